"""Overlapping windows of a video: clips of fixed length, and what the refinement's attention sees at once."""

from __future__ import annotations

from collections.abc import Iterator

Window = tuple[int, int, int, int]  # start, stop, first and last kept


def temporal_windows(length: int, window: int, margin: int | None = None) -> Iterator[Window]:
    """Cut a video into overlapping windows: yields (start, stop, keep_start, keep_stop).

    Frames start..stop-1 belong to the window and keep_start..keep_stop-1 of its result are kept: those with at least
    `margin` frames of the window (a quarter of it by default) on each side, except at the ends of the video. A video of
    at most `window` frames is one window.
    """
    if length <= window:
        yield 0, length, 0, length
        return
    margin = window // 4 if margin is None else margin
    step = window - 2 * margin
    keep = 0
    while keep < length:
        start = max(0, min(keep - margin, length - window))
        stop = start + window
        until = length if stop >= length else min(max(keep + step, stop - margin), length)
        yield start, stop, keep, until
        keep = until


def refinement_windows(length: int, window: int) -> Iterator[Window]:
    """The windows that attention sees: an eighth on each side is only looked at, so a third is done twice."""
    return temporal_windows(length, window, window // 8)


def batches_of_windows(windows: Iterator[Window], frames: int) -> Iterator[list[Window]]:
    """Windows of one video in lists that keep at most so many frames together, or of one window that keeps more."""
    batch: list[Window] = []
    for window in windows:
        if batch and window[3] - batch[0][2] > frames:
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch
