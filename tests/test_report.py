"""The parts of the page of `--tools report`, and what it refuses; the row of tools that leads to it: test_tool.py."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("cv2")

from datasets.sequences import VideoSequence
from utils import report
from utils.errors import UserError
from utils.evaluation import evaluate
from utils.evaluation.reading import Scores


def scores_of(frames: dict[str, dict[str, float]], dataset: str = "D") -> Scores:
    """J of some frames, by video."""
    means = {name: {"J_mean": sum(values.values()) / len(values)} for name, values in frames.items()}
    overall = {"J_mean": sum(row["J_mean"] for row in means.values()) / len(means)}
    parts = {"overall": {"": overall}, "sequences": {"": means}, "frames": {"": frames}, "protocols": {}}
    return Scores(dataset=dataset, key="J_mean", frame_key="J", **parts)


def test_one_of_a_thing_is_one() -> None:
    one, two = scores_of({"a": {"0": 0.5}}), scores_of({"a": {"0": 0.5, "1": 0.5}, "b": {"0": 0.5}})
    assert "<b>1</b>sequence of D<" in report._tiles(one) and "<b>2</b>sequences of D<" in report._tiles(two)
    assert "a, 1 frame<" in report._curves(one) and "a, 2 frames<" in report._curves(two)


SIZE, MASK_SIZE = (40, 56), (20, 28)


def scored(root: Path, name: str = "dog") -> tuple[Path, VideoSequence]:
    """Results of five frames whose ground truth is half as large, with their scores."""
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    stems, results = [f"{t:05d}" for t in range(5)], root / "results"
    frames = tuple(root / "frames" / name / f"{stem}.png" for stem in stems)
    masks = {stem: root / "gt" / name / f"{stem}.png" for stem in stems}
    for t, (frame, stem) in enumerate(zip(frames, stems)):
        mask = ((y > 10) & (y < 30) & (x > 10 + 2 * t) & (x < 30 + 2 * t)) * np.uint8(255)
        maps = [results / kind / "DAVIS-2016" / name / f"{stem}.png" for kind in ("probability", "binary")]
        for path, picture in ((frame, np.zeros((*SIZE, 3), np.uint8)), *((path, mask) for path in maps)):
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(path)
        masks[stem].parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask[::2, ::2]).save(masks[stem])
    sequence = VideoSequence(name, "DAVIS-2016", frames, {}, masks, "nonzero", root / "flow")
    given = dict.fromkeys(("skip_first", "skip_last", "skip_empty", "published", "table_dir")) | {"resize": True}
    args = SimpleNamespace(metrics=["uvos"], eval_folder="auto", workers=0, save_dir=results, **given)
    evaluate.run(args, {"DAVIS-2016": [sequence]}, [results])
    return results, sequence


def test_pictures_of_masks_of_another_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results, sequence = scored(tmp_path)
    pictures = []
    monkeypatch.setattr(report, "_figure", lambda image, caption: pictures.append(image) or "")
    report.write_report(tmp_path / "page.html", results, {"DAVIS-2016": [sequence]})
    assert len(pictures) == 3 and all(picture.shape == (*SIZE, 3) for picture in pictures)
    for picture in pictures:  # the outline of the ground truth lies around the tinted mask
        rows, columns = np.nonzero((picture == report.TRUTH).all(axis=2))
        inner = np.argwhere((picture == picture[20, columns.min() + 3]).all(axis=2))
        assert abs(rows.min() - inner[:, 0].min()) <= 2 and abs(columns.max() - inner[:, 1].max()) <= 2


def test_data_that_lack_a_scored_frame(tmp_path: Path) -> None:
    results, sequence = scored(tmp_path)
    other = dataclasses.replace(sequence, frames=sequence.frames[:1])
    with pytest.raises(UserError, match="DAVIS-2016/dog: has no frame 0000.*--data_dir"):
        report.write_report(tmp_path / "page.html", results, {"DAVIS-2016": [other]})


@pytest.mark.parametrize(("name", "tool"), [("evaluation.json", "eval"), ("test.json", "test")])
@pytest.mark.parametrize(("content", "said"), [("{", "cannot be read as JSON"), ("[]", "not what")])
def test_damaged_files_say_which_tool_makes_them(name: str, tool: str, content: str, said: str, tmp_path: Path) -> None:
    results, sequence = scored(tmp_path)
    (results / name).write_text(content)
    with pytest.raises(UserError, match=f"{name}: {said}.*--tools {tool}.* again"):
        report.write_report(tmp_path / "page.html", results, {"DAVIS-2016": [sequence]})


def test_names_are_no_html(tmp_path: Path) -> None:
    results, sequence = scored(tmp_path, name="<b>a&b")
    report.write_report(tmp_path / "page.html", results, {"DAVIS-2016": [sequence]}, title="<i>", introduction=["<u>"])
    page = (tmp_path / "page.html").read_text()
    assert "&lt;b&gt;a&amp;b" in page and not any(tag in page for tag in ("<b>a", "<i>", "<u>"))
