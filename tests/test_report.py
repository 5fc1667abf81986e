"""The parts of the page of `--tools report`, and what it refuses; the row of tools that leads to it: test_tool.py."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

pytest.importorskip("cv2")

from datasets.sequences import VideoSequence
from utils import report
from utils.errors import UserError
from utils.evaluation import evaluate
from utils.evaluation.reading import Scores, read_making


def scores_of(frames: dict[str, dict[str, float]], dataset: str = "D") -> Scores:
    """J of some frames, by video."""
    means = {name: {"J_mean": sum(values.values()) / len(values)} for name, values in frames.items()}
    overall = {"J_mean": sum(row["J_mean"] for row in means.values()) / len(means)}
    parts = {"overall": {"": overall}, "sequences": {"": means}, "frames": {"": frames}, "counted": "all"}
    return Scores(dataset=dataset, key="J_mean", frame_key="J", **parts)


def test_one_of_a_thing_is_one() -> None:
    one, two = scores_of({"a": {"0": 0.5}}), scores_of({"a": {"0": 0.5, "1": 0.5}, "b": {"0": 0.5}})
    assert "<b>1</b>sequence of D<" in report._tiles(one) and "<b>2</b>sequences of D<" in report._tiles(two)
    assert "a, 1 frame<" in report._curves(one) and "a, 2 frames<" in report._curves(two)


def test_sequences_stand_from_best_to_worst(monkeypatch: pytest.MonkeyPatch) -> None:
    score = scores_of({name: {"0": value} for name, value in zip("abcde", (0.3, 0.9, 0.1, 0.7, 0.5))})
    rows = re.findall(r"<tr[^>]*><th>([^<]*)</th><td>([^<]*)</td>", report._table(score))
    expected = [("all 5", "50.0"), ("b", "90.0"), ("d", "70.0"), ("e", "50.0"), ("a", "30.0"), ("c", "10.0")]
    assert rows == expected
    assert re.findall(r"<figcaption>(\w), 1 frame<", report._curves(score)) == list("bdeac")

    monkeypatch.setattr(report, "_pictures", lambda save_dir, score, sequence: [sequence.name])
    sequences = [SimpleNamespace(name=name) for name in "abcde"]
    shown = re.findall(
        r'<h3>(\w) <small>(\w+), J ([\d.]+)</small></h3>\n?<div class="pictures">(\w)<',
        report._examples(Path(), score, sequences),
    )
    assert shown == [
        ("b", "best", "90.0", "b"),
        ("d", "best", "70.0", "d"),
        ("a", "worst", "30.0", "a"),
        ("c", "worst", "10.0", "c"),
    ]
    one = report._examples(Path(), scores_of({"a": {"0": 0.5}}), sequences)
    assert "best" in one and "worst" not in one  # not the same one twice


def test_curves_are_where_their_values_are() -> None:
    """The diagram is 280 wide and 110 high; 0 lies at 102, the top at 8, the first place at 30, the last at 274."""

    def path(values: list[float | None], **options: Any) -> str:
        return re.search(r'class="line plain" d="(.*?)"', report.chart({"plain": values}, name="J", **options))[1]

    assert path([0, 1, 0.5]) == "M30.0 102.0L152.0 8.0 274.0 55.0"
    assert path([0, 4, 2, 9], top=4, positions=[10, 20, 40, 50]) == "M30.0 102.0L91.0 8.0 213.0 55.0 274.0 8.0"
    assert path([1, None, 0, 0, None]) == "M30.0 8.0h.1M152.0 102.0L213.0 102.0"  # a gap, and a point by itself


def test_steps_of_a_log_that_are_no_numbers_are_passed_over(tmp_path: Path) -> None:
    lines = [{"kind": "train", "step": step, "loss": loss} for step, loss in ((1, 2.0), (2, math.nan), (3, 1.0))]
    lines += [{"kind": "val", "step": 3, "J": 0.5}, {"kind": "train", "step": 4, "loss": None}, {"kind": "start"}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert report._curves_of(tmp_path / "log.jsonl") == {"loss": [(1, 2.0), (3, 1.0)]}  # one value makes no curve


def test_training_curves_lie_over_their_steps(tmp_path: Path) -> None:
    lines = [{"kind": "train", "step": step, "loss": loss} for step, loss in ((10, 4.0), (20, 2.0), (50, 0.0))]
    lines += [{"kind": "val", "step": step, "J": 0.5} for step in (10, 50)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    loss, j = re.findall(r'class="line plain" d="(.*?)"', report._training(tmp_path / "log.jsonl"))
    assert loss == "M30.0 8.0L91.0 55.0 274.0 102.0"  # from 0 to the largest
    assert j == "M30.0 55.0L274.0 55.0"  # from 0 to 1


def test_figures_after_the_crf_stand_beside_the_others() -> None:
    plain, refined = scores_of({"a": {"0": 0.5, "1": 0.75}}), scores_of({"a": {"1": 0.25}})
    parts = ("overall", "sequences", "frames")
    both = dataclasses.replace(
        plain, **{part: {**getattr(plain, part), "crf": getattr(refined, part)[""]} for part in parts}
    )
    rows = re.findall(r"<th>(all 1|a)</th><td>([^<]*)</td><td>([^<]*)</td></tr>", report._table(both))
    assert rows == [("all 1", "62.5", "25.0"), ("a", "62.5", "25.0")]
    assert report._table(both).count("J mean + CRF") == 1 and "CRF" not in report._table(plain)
    assert 'class="line crf" d="M274.0 78.5h.1"' in report._curves(both)  # under its frame, the second


MAKING = {"weights": "0123", "size": [40, 56], "clip_len": None, "flip": False, "scales": [1.0], "amp": "none"}


def test_every_option_of_a_run_is_told_and_each_run_of_several() -> None:
    def facts(**makings: dict[str, Any]) -> dict[str, str]:
        page = report._facts({}, [], {name: {"": making} for name, making in makings.items()})
        return dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", page))

    assert facts(A=MAKING)["test"] == "40×56, whole video"
    options = {"clip_len": 8, "flip": True, "scales": [1.0, 1.5], "amp": "bf16", "without": "flow"}
    other = (
        MAKING | options | {"zoom": True, "consensus": True, "smooth": True, "optional_motion": True, "flow_dir": "/f"}
    )
    said = "40×56, clips of 8, flip, scales [1.0, 1.5], bf16, without flow, zoom, consensus of frames, smoothed"
    said += ", optional motion, flow of /f"
    assert facts(A=other)["test"] == said
    told = facts(A=MAKING, B=other)
    assert (told["A, test"], told["B, test"]) == ("40×56, whole video", said) and "test" not in told
    # Turned for an upright video.
    alike = facts(A=MAKING | {"sources": "1"}, B=MAKING | {"sources": "2", "resized": [56, 40]})
    assert alike["test"] == "40×56, videos of another shape in theirs, whole video"
    assert not any("A" in name or "B" in name for name in alike)


def test_a_video_in_its_own_shape_tells_of_the_others(tmp_path: Path) -> None:
    for name, making in (("a", MAKING), ("b", MAKING | {"resized": [56, 40]}), ("c", MAKING)):
        path = tmp_path / "probability" / "D" / name / "0.png"
        path.parent.mkdir(parents=True)
        text = PngImagePlugin.PngInfo()
        text.add_text("dbsnet-test", json.dumps(making))
        Image.new("L", (56, 40)).save(path, pnginfo=text)
    made = read_making(tmp_path, scores_of({name: {"0": 0.5} for name in "abc"}))
    assert made == {"": MAKING | {"resized": [56, 40]}}
    assert read_making(tmp_path, scores_of({"a": {"0": 0.5}})) == {"": MAKING}


def test_wide_pictures_are_made_smaller_in_their_shape() -> None:
    def size(height: int, width: int) -> tuple[int, int]:
        figure = report._figure(np.zeros((height, width, 3), np.uint8), "")
        data = base64.b64decode(re.search(r'base64,([^"]*)"', figure)[1])
        said = re.search(r'width="(\d+)" height="(\d+)"', figure)
        assert Image.open(io.BytesIO(data)).size == (int(said[1]), int(said[2]))
        return int(said[2]), int(said[1])

    assert size(480, 854) == (225, 400) and size(300, 200) == (300, 200)


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


def test_the_frames_that_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results, sequence = scored(tmp_path)
    flows = {stem: tmp_path / "flow" / f"{stem}.png" for stem in sequence.stems}
    for t, path in enumerate(flows.values()):
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.full((*SIZE, 3), 10 * t, np.uint8)).save(path)
    sequence = dataclasses.replace(sequence, flows=flows)
    monkeypatch.setattr(report, "_figure", lambda image, caption: (caption, image))

    def shown(values: tuple[float, ...]) -> list[tuple[str, np.ndarray]]:
        score = scores_of({"dog": dict(zip(sequence.stems, values))}, "DAVIS-2016")
        return report._pictures(results, score, sequence)

    five = shown((0.2, 0.9, 0.1, 0.7, 0.5))
    assert [caption for caption, _ in five] == [
        "flow of frame 00004",
        "best frame 00001: J 90.0",
        "median frame 00004: J 50.0",
        "worst frame 00002: J 10.0",
    ]
    assert (five[0][1] == 40).all()
    assert [caption for caption, _ in shown((0.2, 0.9))] == ["flow of frame 00001", "frame 00001: J 90.0"]


def test_training_curves_are_those_beside_the_checkpoint(tmp_path: Path) -> None:
    """Unless the maps are of another run than the one that test.json tells of."""
    results, sequence = scored(tmp_path)
    for path in (results / "probability" / "DAVIS-2016" / "dog").iterdir():
        text = PngImagePlugin.PngInfo()
        text.add_text("dbsnet-test", json.dumps(MAKING | {"sources": path.stem}))
        Image.open(path).save(path, pnginfo=text)
    (tmp_path / "run").mkdir()
    record = {"checkpoint": str(tmp_path / "run" / "best.pt"), "sha256": "0123", "notes": {}, "parameters": 1}
    record |= {"network": {"variant": "xs"}, "settings": MAKING, "date": "", "device": "", "frames_per_second": None}
    log = [json.dumps({"kind": "train", "step": step, "loss": 1.0}) for step in (1, 2)]

    def page(**changed: Any) -> str:
        (results / "test.json").write_text(json.dumps(record | changed))
        return report.write_report(tmp_path / "page.html", results, {"DAVIS-2016": [sequence]}).read_text()

    assert "<h2>Training</h2>" not in page()
    (tmp_path / "run" / "log.jsonl").write_text("\n".join(log))
    assert "<h2>Training</h2>" in page()
    assert "<h2>Training</h2>" not in page(settings=MAKING | {"weights": "4567"})


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


def test_figures_of_refined_maps_alone_are_not_shown_as_the_plain_ones(tmp_path: Path) -> None:
    results, sequence = scored(tmp_path)
    shutil.copytree(results / "binary", results / "crf")
    given = dict.fromkeys(("skip_first", "skip_last", "skip_empty", "published", "table_dir")) | {"resize": True}
    args = SimpleNamespace(metrics=["uvos"], eval_folder="crf", workers=0, save_dir=results, **given)
    evaluate.run(args, {"DAVIS-2016": [sequence]}, [results])
    with pytest.raises(UserError, match="evaluation.json: has figures of crf/ alone.*without --eval_folder"):
        report.write_report(tmp_path / "page.html", results, {"DAVIS-2016": [sequence]})


@pytest.mark.parametrize("name", ["comparison.csv", "evaluation_DAVIS-2016_frames.csv"])
@pytest.mark.parametrize("change", ["semicolons", "byte order mark", "UTF-16"])
def test_tables_that_another_program_saved(name: str, change: str, tmp_path: Path) -> None:
    results, sequence = scored(tmp_path)
    text = (results / name).read_text()
    changed = {"semicolons": text.replace(",", ";").encode(), "byte order mark": text.encode("utf-8-sig")}
    (results / name).write_bytes(changed.get(change, text.encode("utf-16")))
    with pytest.raises(UserError, match=f"{name}: not as --tools eval writes it .* again"):
        report.write_report(tmp_path / "page.html", results, {"DAVIS-2016": [sequence]})


def test_a_table_of_frames_that_lacks_a_sequence(tmp_path: Path) -> None:
    results, sequence = scored(tmp_path)
    path = results / "evaluation_DAVIS-2016_frames.csv"
    path.write_text(path.read_text().splitlines()[0])
    with pytest.raises(UserError, match="frames.csv: has no frame of dog; run --tools eval again"):
        report.write_report(tmp_path / "page.html", results, {"DAVIS-2016": [sequence]})


def test_scores_without_what_the_page_shows_of_them(tmp_path: Path) -> None:
    results, sequence = scored(tmp_path)
    with pytest.raises(UserError, match="evaluation.json: has DAVIS-2016, not MCL; .* with the same --datasets"):
        report.write_report(tmp_path / "page.html", results, {"MCL": [sequence]})
    for kind in ("binary", "probability"):
        (results / kind / "DAVIS-2016" / "dog" / "00001.png").unlink()
    with pytest.raises(UserError, match="binary/DAVIS-2016/dog/00001.png: no such map, .* run --tools test again"):
        report.write_report(tmp_path / "page.html", results, {"DAVIS-2016": [sequence]})
    # --sequences of others: all that was scored is in the table, and no picture is looked for. A page needs no ranks.
    (results / "comparison.csv").unlink()
    text = report.write_report(tmp_path / "page.html", results, {"DAVIS-2016": []}).read_text()
    assert "<th>dog</th>" in text and "<img" not in text and "published" not in text
    (results / "evaluation_DAVIS-2016_frames.csv").unlink()
    with pytest.raises(UserError, match="frames.csv: no such file, .* run --tools eval again"):
        report.write_report(tmp_path / "page.html", results, {"DAVIS-2016": [sequence]})


def test_the_rule_is_that_of_the_figures_shown(tmp_path: Path) -> None:
    results, sequence = scored(tmp_path)
    given = dict.fromkeys(("skip_first", "skip_last", "skip_empty", "published", "table_dir")) | {"resize": True}
    args = SimpleNamespace(metrics=["uvos", "vsod"], eval_folder="auto", workers=0, save_dir=results, **given)
    evaluate.run(args, {"DAVIS-2016": [sequence]}, [results])
    report.write_report(tmp_path / "page.html", results, {"DAVIS-2016": [sequence]})
    rules = re.findall("<dt>(DAVIS-2016, .*?)</dt><dd>(.*?)</dd>", (tmp_path / "page.html").read_text())
    assert rules == [("DAVIS-2016, J and F", "annotated frames without the first and last of each sequence")]


def test_masks_of_others_have_no_page(tmp_path: Path) -> None:
    results, sequence = scored(tmp_path)
    theirs = results / "binary" / "DAVIS-2016"
    with pytest.raises(UserError, match="DAVIS-2016: no results of --tools test .* masks of others"):
        report.write_report(tmp_path / "page.html", theirs, {"DAVIS-2016": [sequence]})
