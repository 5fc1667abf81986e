"""Progress bars: lively on a terminal, few lines in a log file."""

from __future__ import annotations

import io
import sys

import pytest
import tqdm.std

from utils.progress import progress_bar


class Screen(io.StringIO):
    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


@pytest.mark.parametrize(("terminal", "least", "most"), [(True, 540, 610), (False, 3, 5)])
def test_a_minute_of_work(terminal: bool, least: int, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """60 s in steps of 10 ms by a clock of our own: how often the bar is drawn."""
    now = 0.0
    screen = Screen(terminal)
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(tqdm.std, "time", lambda: now)
    with progress_bar(total=6000, desc="work", miniters=0) as bar:
        bar._time = lambda: now
        for _ in range(6000):
            now += 0.01
            bar.update()
    drawn = screen.getvalue().count("\r")
    assert least <= drawn <= most
    assert "6000/6000" in screen.getvalue()


def test_it_hands_on_what_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen(False)
    monkeypatch.setattr(sys, "stderr", screen)
    assert list(progress_bar("abc", desc="letters", disable=True)) == ["a", "b", "c"] and not screen.getvalue()
    assert list(progress_bar("abc", desc="letters", unit="letter")) == ["a", "b", "c"] and "3/3" in screen.getvalue()
