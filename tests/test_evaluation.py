"""Scoring result folders: which frames count, how maps of any kind are read, what is refused, and what is written."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import errno
import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

pytest.importorskip("py_sod_metrics")
pytest.importorskip("cv2")

from datasets.errors import DataError
from datasets.layouts import DAVIS_2016
from datasets.sequences import VideoSequence
from utils.errors import UserError
from utils.evaluation import dataset_scores, evaluate, tables
from utils.evaluation.metrics import boundary_f, jaccard, sequence_statistics
from utils.evaluation.vsod import mean_scores, saliency_scores
from utils.inference.maps import fingerprint

SIZE = (40, 56)


def blob(t: int, size: tuple[int, int] = SIZE, shift: int = 0) -> np.ndarray:
    mask = np.zeros(size, dtype=bool)
    mask[6 : 20 + t % 7, 5 + t % 9 + shift : 25 + t % 9 + shift] = True
    return mask


def save(path: Path, values: np.ndarray, mode: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(values)
    (image.convert(mode) if mode else image).save(path)
    return path


def make_sequence(
    root: Path, name: str = "dog", count: int = 6, dataset: str = "DAVIS-2016", every: int = 1, empty: tuple = ()
) -> VideoSequence:
    """Ground truth on disk; frames are names only, since scoring does not open them."""
    stems = [f"{t:05d}" for t in range(count)]
    masks = {}
    for t in range(0, count, every):
        mask = np.zeros(SIZE, dtype=bool) if t in empty else blob(t)
        masks[stems[t]] = save(root / "gt" / name / f"{stems[t]}.png", mask * np.uint8(255))
    frames = tuple(root / "frames" / name / f"{stem}.jpg" for stem in stems)
    return VideoSequence(name, dataset, frames, {}, masks, "nonzero", root / "flow" / name)


def prediction(t: int) -> np.ndarray:
    return blob(t, shift=1 + t % 3)


def write_maps(folder: Path, sequence: VideoSequence, scale: int = 255) -> Path:
    for t, stem in enumerate(sequence.stems):
        save(folder / sequence.name / f"{stem}.png", prediction(t) * np.uint8(scale))
    return folder


def grey(t: int) -> np.ndarray:
    """A map that is `prediction(t)` above 127, and anything around it."""
    noise = np.random.default_rng(t).integers(0, 100, SIZE)
    return np.where(prediction(t), 255 - noise, noise).astype(np.uint8)


def arguments(*line: str | Path) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    evaluate.add_arguments(parser)
    parser.add_argument("--save_dir", type=Path)
    parser.add_argument("--workers", type=int, default=1)
    return parser.parse_args([str(word) for word in line])


def score(results: Path, sequences: list[VideoSequence], *line: str | Path, table_dir: Path) -> dict:
    args = arguments("--results", results, "--table_dir", table_dir, *line)
    documents = evaluate.run(args, {sequences[0].dataset: sequences}, args.results)
    return next(iter(documents.values()))


def by_hand(sequence: VideoSequence, stems: list[str]) -> dict[str, float]:
    js = [jaccard(prediction(int(stem)), blob(int(stem))) for stem in stems]
    fs = [boundary_f(prediction(int(stem)), blob(int(stem))) for stem in stems]
    row = {f"J_{key}": value for key, value in sequence_statistics(js).items()}
    return row | {f"F_{key}": value for key, value in sequence_statistics(fs).items()}


def tree(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# Which frames count


def test_davis_drops_first_and_last_and_averages_sequences(tmp_path):
    long, short = make_sequence(tmp_path, "long", 12), make_sequence(tmp_path, "short", 4)
    maps = tmp_path / "maps"
    for sequence in (long, short):
        write_maps(maps / "DAVIS-2016", sequence)
    for sequence in (long, short):  # the ends are not scored, so they may be missing
        for stem in (sequence.stems[0], sequence.stems[-1]):
            (maps / "DAVIS-2016" / sequence.name / f"{stem}.png").unlink()
    result = score(maps, [long, short], table_dir=tmp_path / "out")
    for sequence in (long, short):
        expected = by_hand(sequence, list(sequence.stems[1:-1]))
        row = result["sequences"][sequence.name]
        for key, value in expected.items():
            assert row[key] == pytest.approx(value, abs=1e-12)
        assert row["J&F"] == pytest.approx((expected["J_mean"] + expected["F_mean"]) / 2, abs=1e-12)
    for key in ("J_mean", "J_recall", "J_decay", "F_mean", "F_recall", "F_decay", "J&F"):
        values = [result["sequences"][name][key] for name in ("long", "short")]
        assert result["overall"][key] == pytest.approx(sum(values) / 2)  # not weighted by frames
    assert result["overall"]["uvos_frames"] == 10 + 2
    assert result["protocol"]["uvos"]["skip_first"] is True
    assert "without the first and last" in result["protocol"]["uvos"]["frames"]


def test_fbms_scores_annotated_frames_and_names_the_alternatives(tmp_path, capsys):
    sequence = make_sequence(tmp_path, "cats", 13, dataset="FBMS", every=3, empty=(6,))
    maps = write_maps(tmp_path / "maps", sequence)
    result = score(maps, [sequence], table_dir=tmp_path / "out")
    annotated = [f"{t:05d}" for t in (0, 3, 6, 9, 12)]
    js = [0.0 if t == 6 else jaccard(prediction(t), blob(t)) for t in (0, 3, 6, 9, 12)]
    assert result["overall"]["J_mean"] == pytest.approx(np.mean(js))
    assert result["overall"]["uvos_frames"] == len(annotated)
    assert result["overall"]["vsod_frames"] == 3  # the DAVSOD rule drops the ends on every set
    assert result["warnings"] == []  # a single frame without foreground is nothing odd
    alternatives = {(a["skip_first"], a["skip_empty"]): a for a in result["alternatives"]}
    assert alternatives[(True, False)]["J_mean"] == pytest.approx(np.mean(js[1:-1]))
    assert alternatives[(False, True)]["J_mean"] == pytest.approx(np.mean([js[i] for i in (0, 1, 3, 4)]))
    assert alternatives[(True, True)]["uvos_frames"] == 2
    printed = capsys.readouterr().out
    assert "annotated frames, none left out (--no-skip_first --no-skip_last --no-skip_empty)" in printed
    contours, salient = (tmp_path / "out" / "comparison.md").read_text().split("## FBMS: salient objects")
    figures = ", ".join(f"{key} {100 * alternatives[(True, True)][key]:.1f}" for key in ("J_mean", "F_mean", "J&F"))
    assert f"by another convention, --skip_first --skip_last --skip_empty: {figures}." in contours
    assert "another convention" not in salient and contours in printed

    with (tmp_path / "out" / "maps" / "evaluation_FBMS_frames.csv").open() as file:
        scored = {row["frame"]: (bool(row["J"]), bool(row["S"])) for row in csv.DictReader(file)}
    assert scored == {stem: (True, stem in annotated[1:-1]) for stem in annotated}  # no figure is no 0

    chosen = score(maps, [sequence], "--skip_first", "--skip_last", "--skip_empty", table_dir=tmp_path / "out2")
    assert chosen["overall"]["J_mean"] == alternatives[(True, True)]["J_mean"]
    ends = "annotated frames without the first and last of each sequence"
    assert chosen["protocol"]["uvos"]["frames"] == f"{ends}, only those with foreground in the ground truth"
    assert len(result["alternatives"]) == 3 and chosen["alternatives"] == []  # each told once, and not itself
    with (tmp_path / "out2" / "maps" / "evaluation_FBMS_frames.csv").open() as file:  # the frames of these figures
        rows = list(csv.DictReader(file))
    assert [row["frame"] for row in rows] == ["00003", "00009"]
    for key in ("J", "F", "MAE", "S"):
        figure = chosen["overall"][f"{key}_mean" if key in "JF" else key]
        assert np.mean([float(row[key]) for row in rows]) == pytest.approx(figure, abs=1e-12)
    kept = score(
        maps, [sequence], "--metrics", "vsod", "--no-skip_first", "--no-skip_last", table_dir=tmp_path / "out3"
    )
    assert kept["overall"]["vsod_frames"] == 5 and "J_mean" not in kept["overall"]


def test_sequences_count_alike_for_salient_objects_and_curves_are_averaged_before_their_maximum(tmp_path):
    """As DAVSOD's tool does. The mean of the sequences' maxima would be higher: each has another best threshold."""
    sequences = [make_sequence(tmp_path, "long", 9), make_sequence(tmp_path, "short", 4)]
    levels = {"long": (250, 200), "short": (100, 230)}  # of the object, and of something beside it that is no object
    shown: dict[str, list[np.ndarray]] = {"long": [], "short": []}
    for sequence in sequences:
        for t, stem in enumerate(sequence.stems):
            thing, beside = levels[sequence.name]
            picture = np.where(prediction(t), np.uint8(thing), np.uint8(0))
            picture[30:, 40:], picture[0, 0] = beside, 255
            shown[sequence.name].append(picture)
            save(tmp_path / "m" / sequence.name / f"{stem}.png", picture)
    result = score(tmp_path / "m", sequences, "--metrics", "vsod", table_dir=tmp_path / "out")
    means = [mean_scores(saliency_scores(shown[s.name][t], blob(t)) for t in range(1, len(s) - 1)) for s in sequences]
    overall = result["overall"]
    for key in ("f", "e"):
        curve = (getattr(means[0], f"{key}_curve") + getattr(means[1], f"{key}_curve")) / 2
        assert overall[f"max_{key.upper()}"] == pytest.approx(curve.max(), abs=1e-12)
    assert overall["max_F"] < np.mean([mean.summary()["max_F"] for mean in means]) - 0.01
    assert overall["MAE"] == pytest.approx((means[0].mae + means[1].mae) / 2, abs=1e-12)
    assert overall["vsod_frames"] == 7 + 2


def test_a_sequence_of_which_no_frame_is_left_is_named(tmp_path):
    sequence = make_sequence(tmp_path, count=4, empty=(1, 2))
    maps = write_maps(tmp_path / "m", sequence)
    for measures in ("uvos", "vsod"):
        with pytest.raises(DataError, match="DAVIS-2016/dog: no frame has foreground.*--skip_empty"):
            score(maps, [sequence], "--metrics", measures, "--skip_empty", table_dir=tmp_path / "out")


def test_ground_truth_that_lacks_frames_is_warned_of_where_the_release_has_all(tmp_path, capsys):
    """Otherwise the first mask that is there is taken for the first frame, and left out in its place."""
    whole = make_sequence(tmp_path, "dog", 6)
    maps = write_maps(tmp_path / "maps", whole)
    assert score(maps, [whole], "--metrics", "uvos", table_dir=tmp_path / "out")["warnings"] == []
    part = dataclasses.replace(whole, masks={stem: whole.masks[stem] for stem in whole.stems[1:]})
    result = score(maps, [part], "--metrics", "uvos", table_dir=tmp_path / "out")
    (warning,) = result["warnings"]
    assert "no ground truth of 1 frame of dog, though" in warning and "--tools check" in warning
    assert f"warning: {warning}" in capsys.readouterr().out
    sparse = dataclasses.replace(part, dataset="FBMS")
    assert score(maps, [sparse], "--metrics", "uvos", table_dir=tmp_path / "out")["warnings"] == []


def test_ground_truth_without_any_foreground_is_warned_of(tmp_path):
    """Such as object labels in grey levels, of which the rule of the set, above 128, leaves nothing."""
    good, lost = (make_sequence(tmp_path, name, 5, dataset="FBMS") for name in ("good", "lost"))
    lost = dataclasses.replace(lost, mask_rule="above_128")
    for t, stem in enumerate(lost.stems):
        save(lost.masks[stem], blob(t) * np.uint8(2))
    for sequence in (good, lost):
        write_maps(tmp_path / "maps", sequence)
    for metrics in ("uvos", "vsod"):
        result = score(tmp_path / "maps", [good, lost], "--metrics", metrics, table_dir=tmp_path / "out")
        (warning,) = result["warnings"]
        assert "no scored mask of lost has any foreground" in warning and "--tools check" in warning


def test_measures_that_papers_report_are_the_default(tmp_path):
    salient = dict.fromkeys(("DAVSOD", "DAVSOD-Normal", "DAVSOD-Difficult", "MCL"), {"vsod"})
    for dataset, expected in {**salient, "FBMS": {"uvos", "vsod"}}.items():
        sequence = make_sequence(tmp_path / dataset, "v", 4, dataset=dataset)
        result = score(write_maps(tmp_path / dataset / "m", sequence), [sequence], table_dir=tmp_path / "out")
        assert set(result["protocol"]) & {"uvos", "vsod"} == expected


def test_too_short_a_sequence_is_an_error(tmp_path):
    sequence = make_sequence(tmp_path, "blink", 2)
    with pytest.raises(DataError, match=r"DAVIS-2016/blink.*2 annotated.*--no-skip_first"):
        score(write_maps(tmp_path / "m", sequence), [sequence], table_dir=tmp_path / "out")


def test_too_short_a_sequence_for_one_of_two_rules(tmp_path):
    sequence = make_sequence(tmp_path, "blink", 2, dataset="FBMS")
    maps = write_maps(tmp_path / "m", sequence)
    with pytest.raises(DataError, match=r"FBMS/blink.*2 annotated.*--metrics uvos"):
        score(maps, [sequence], table_dir=tmp_path / "out")
    assert score(maps, [sequence], "--metrics", "uvos", table_dir=tmp_path / "out")["overall"]["uvos_frames"] == 2


def test_a_sequence_without_ground_truth_is_said_to_have_none(tmp_path):
    sequence = make_sequence(tmp_path)
    maps = write_maps(tmp_path / "m", sequence)
    with pytest.raises(DataError, match=r"DAVIS-2016/dog: no mask of its 6 frames.*--tools check"):
        score(maps, [dataclasses.replace(sequence, masks={})], table_dir=tmp_path / "out")


def test_three_hundred_frames(tmp_path):
    """Where quarters kept in 8 bits go wrong: good at first, bad in the last quarter."""
    size, stems = (12, 16), [f"{t:05d}" for t in range(302)]
    mask = np.zeros(size, dtype=np.uint8)
    mask[2:10, 2:10] = 255
    gt = save(tmp_path / "gt.png", mask)
    for t, stem in enumerate(stems):
        save(tmp_path / "m" / "v" / f"{stem}.png", mask if t <= 225 else np.roll(mask, 4, axis=1))
    frames = tuple(tmp_path / f"{stem}.jpg" for stem in stems)
    sequence = VideoSequence("v", "DAVIS-2016", frames, {}, dict.fromkeys(stems, gt), "nonzero", tmp_path)
    result = score(tmp_path / "m", [sequence], "--metrics", "uvos", table_dir=tmp_path / "out")
    bad = 32 / 96
    assert result["overall"]["J_decay"] == pytest.approx(1 - (1 + 75 * bad) / 76)
    assert result["overall"]["uvos_frames"] == 300


# Reading maps


def palette_png(path: Path, indices: np.ndarray, colours: list[int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("P", indices.shape[::-1])
    image.frombytes(indices.astype(np.uint8).tobytes())
    image.putpalette(colours + [0] * (768 - len(colours)))
    image.save(path)


WRITERS = {
    "1-bit": lambda path, mask: save(path, mask * np.uint8(255), "1"),
    "grey-255": lambda path, mask: save(path, mask * np.uint8(255)),
    "grey-1": lambda path, mask: save(path, mask * np.uint8(1)),
    "davis-palette": lambda path, mask: palette_png(path, mask, [0, 0, 0, 128, 0, 0]),
    "two-objects": lambda path, mask: palette_png(
        path, mask * np.where(np.arange(mask.shape[1]) < 20, 1, 2), [0, 0, 0, 128, 0, 0, 0, 128, 0]
    ),
    "grey-palette": lambda path, mask: palette_png(path, ~mask, [255, 255, 255, 0, 0, 0]),
    "palette-0-1": lambda path, mask: palette_png(path, mask, [0, 0, 0, 1, 1, 1]),
    "rgb": lambda path, mask: save(path, np.repeat((mask * np.uint8(255))[..., None], 3, axis=2)),
    "rgba": lambda path, mask: save(path, np.repeat((mask * np.uint8(255))[..., None], 3, axis=2), "RGBA"),
    "bmp": lambda path, mask: save(path.with_suffix(".bmp"), mask * np.uint8(255)),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_masks_of_any_kind_of_png_score_the_same(tmp_path, kind):
    sequence = make_sequence(tmp_path)
    for t, stem in enumerate(sequence.stems):
        WRITERS[kind](tmp_path / "m" / sequence.name / f"{stem}.png", prediction(t))
    result = score(tmp_path / "m", [sequence], table_dir=tmp_path / "out")
    for key, value in by_hand(sequence, list(sequence.stems[1:-1])).items():
        assert result["overall"][key] == pytest.approx(value, abs=1e-12)
    expected = [saliency_scores(prediction(t) * np.uint8(255), blob(t)) for t in range(1, 5)]
    for key, value in mean_scores(expected).summary().items():
        assert result["overall"][key] == pytest.approx(value, abs=1e-12)
    assert result["warnings"] == []


def test_grey_maps_are_thresholded_and_said_to_be_grey(tmp_path, capsys):
    sequence = make_sequence(tmp_path)
    for t, stem in enumerate(sequence.stems):
        save(tmp_path / "m" / "dog" / f"{stem}.png", grey(t))
    result = score(tmp_path / "m", [sequence], table_dir=tmp_path / "out")
    assert result["overall"]["J_mean"] == pytest.approx(by_hand(sequence, list(sequence.stems[1:-1]))["J_mean"])
    assert "4 of 4 maps look unbinarised" in result["warnings"][0]
    assert "unbinarised" in capsys.readouterr().out
    # 127 is background, 128 is foreground.
    for t, stem in enumerate(sequence.stems):
        save(tmp_path / "edge" / "dog" / f"{stem}.png", np.where(prediction(t), 128, 127).astype(np.uint8))
    edge = score(tmp_path / "edge", [sequence], "--metrics", "uvos", table_dir=tmp_path / "out")
    assert edge["overall"]["J_mean"] == result["overall"]["J_mean"]


def test_a_map_of_0_and_1_among_grey_maps_is_nearly_black(tmp_path):
    sequence = make_sequence(tmp_path)
    for t, stem in enumerate(sequence.stems):
        save(tmp_path / "m" / "dog" / f"{stem}.png", prediction(t) * np.uint8(1) if t == 2 else grey(t))
    score(tmp_path / "m", [sequence], table_dir=tmp_path / "out")
    with (tmp_path / "out" / "m" / "evaluation_DAVIS-2016_frames.csv").open() as file:
        rows = {row["frame"]: row for row in csv.DictReader(file)}
    assert float(rows["00002"]["J"]) == 0 and float(rows["00003"]["J"]) > 0.5


def test_probability_maps_of_0_and_1_alone_are_nearly_black(tmp_path):
    """Of our own it is known what they are: 1 of 255, as a network that sees nothing writes it."""
    sequence = make_sequence(tmp_path)
    for root in ("run/probability/DAVIS-2016", "others"):
        write_maps(tmp_path / root, sequence, scale=1)
    assert score(tmp_path / "run", [sequence], table_dir=tmp_path / "out")["overall"]["J_mean"] == 0
    assert score(tmp_path / "others", [sequence], table_dir=tmp_path / "out")["overall"]["J_mean"] > 0.5


def test_object_labels_as_grey_levels_are_refused(tmp_path):
    sequence = make_sequence(tmp_path)
    for t, stem in enumerate(sequence.stems):
        save(tmp_path / "m" / "dog" / f"{stem}.png", prediction(t) * np.uint8(2))
    with pytest.raises(DataError, match=r"highest value 2.*palette"):
        score(tmp_path / "m", [sequence], table_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: save(path, np.random.default_rng(0).integers(0, 255, (*SIZE, 3), np.uint8)), "coloured"),
        (lambda path: save(path, np.zeros(SIZE, np.uint16)), "8 bits"),
        (lambda path: pytest.importorskip("cv2").imwrite(str(path), np.full((*SIZE, 3), 255, np.uint16)), "16 bits"),
        (lambda path: path.write_bytes(path.read_bytes()[:60]), "cannot read"),
        (lambda path: save(path, np.zeros((40, 55), np.uint8)), r"55×40.*56×40.*--resize"),
    ],
)
def test_maps_that_cannot_be_scored_are_named(tmp_path, spoil, message):
    sequence = make_sequence(tmp_path)
    maps = write_maps(tmp_path / "m", sequence)
    spoil(maps / "dog" / "00002.png")
    with pytest.raises(DataError, match=f"00002.png.*{message}"):
        score(maps, [sequence], table_dir=tmp_path / "out")


def test_resize_is_opt_in_and_leaves_the_files_alone(tmp_path):
    sequence = make_sequence(tmp_path)
    for t, stem in enumerate(sequence.stems):
        double = prediction(t).repeat(2, axis=0).repeat(2, axis=1) if t < 4 else prediction(t)
        save(tmp_path / "m" / "dog" / f"{stem}.png", double * np.uint8(255))
    before = tree(tmp_path / "m")
    result = score(tmp_path / "m", [sequence], "--resize", table_dir=tmp_path / "out")
    expected = by_hand(sequence, list(sequence.stems[1:-1]))
    assert result["overall"]["J_mean"] == pytest.approx(expected["J_mean"])
    assert result["protocol"]["resized_maps"] == 3 and result["protocol"]["uvos"]["resize"] is True
    assert tree(tmp_path / "m") == before


def test_maps_of_another_size_are_resized_by_what_they_hold(tmp_path):
    """Grey maps between their pixels and thresholded then, masks by the nearest pixel: by another library."""
    import cv2

    sequence, shapes = make_sequence(tmp_path), {"grey": (23, 31), "mask": (23, 31)}
    js = {kind: [] for kind in shapes}
    for t, stem in enumerate(sequence.stems):
        smooth = cv2.GaussianBlur(prediction(t) * np.float32(255), (0, 0), 3)
        small = {"grey": cv2.resize(smooth, shapes["grey"][::-1]).astype(np.uint8)}
        small["mask"] = (small["grey"] > 100) * np.uint8(255)
        large = {
            "grey": cv2.resize(small["grey"].astype(np.float32), SIZE[::-1], interpolation=cv2.INTER_LINEAR) > 127.5,
            "mask": cv2.resize(small["mask"], SIZE[::-1], interpolation=cv2.INTER_NEAREST_EXACT) > 127,
        }
        for kind, values in small.items():
            save(tmp_path / kind / "dog" / f"{stem}.png", values)
            js[kind].append(jaccard(large[kind], blob(t)))
    for kind, tolerance in (("grey", 2e-3), ("mask", 1e-12)):
        result = score(tmp_path / kind, [sequence], "--resize", "--metrics", "uvos", table_dir=tmp_path / "out")
        assert result["overall"]["J_mean"] == pytest.approx(np.mean(js[kind][1:-1]), abs=tolerance), kind


# Pairing


def test_pairing_is_by_name(tmp_path):
    sequence = make_sequence(tmp_path)
    maps = write_maps(tmp_path / "m", sequence)
    reference = score(maps, [sequence], table_dir=tmp_path / "out")
    save(maps / "dog" / "99999.png", np.zeros(SIZE, np.uint8))  # more maps than frames: ignored
    save(maps / "cat" / "00000.png", np.zeros(SIZE, np.uint8))
    (maps / "dog" / ".hidden.png").write_bytes(b"")
    assert score(maps, [sequence], table_dir=tmp_path / "out")["overall"] == reference["overall"]


def test_results_of_a_data_set_under_another_of_its_names(tmp_path):
    sequence = make_sequence(tmp_path)
    reference = score(
        write_maps(tmp_path / "m" / "DAVIS-2016", sequence).parent, [sequence], table_dir=tmp_path / "out"
    )
    for name in ("DAVIS", "davis16"):
        write_maps(tmp_path / name / "all" / name, sequence)
        result = score(tmp_path / name / "all", [sequence], table_dir=tmp_path / "out")
        assert result["overall"] == reference["overall"] and result["protocol"]["uvos"]["maps"] == name
    write_maps(tmp_path / "DAVIS" / "all" / "davis2016", sequence)
    with pytest.raises(UserError, match=r"DAVIS and davis2016 are both called as DAVIS-2016 is.*--results .*DAVIS"):
        score(tmp_path / "DAVIS" / "all", [sequence], table_dir=tmp_path / "out")


def test_everything_missing_is_named_before_any_work(tmp_path):
    sequences = [make_sequence(tmp_path, name) for name in ("dog", "cow", "bear")]
    maps = tmp_path / "m"
    for sequence in sequences[:2]:
        write_maps(maps, sequence)
    (maps / "dog" / "00003.png").unlink()
    for path in sorted((maps / "cow").iterdir()):  # wrong names
        path.rename(path.with_name(f"cow_{path.name}"))
    with pytest.raises(DataError) as error:
        score(maps, sequences, table_dir=tmp_path / "out")
    message = str(error.value)
    assert "DAVIS-2016/dog: no map for 1 of 4 scored frames, 00003.png" in message
    assert "DAVIS-2016/cow: no map for 4 of 4" in message and "cow_00000.png" in message
    assert "DAVIS-2016/bear: no folder" in message and "it has cow, dog" in message
    assert not (tmp_path / "out").exists()


def test_missing_maps_are_counted_by_sequences(tmp_path):
    """Not by folders: maps of one's own are missing in two."""
    sequences = [make_sequence(tmp_path, name, 3) for name in "abcdefg"]
    own = write_own(tmp_path / "run", make_sequence(tmp_path, "other", 3), crf=False)
    with pytest.raises(DataError) as error:
        score(own, sequences, table_dir=tmp_path / "out")
    lines = str(error.value).splitlines()
    assert len(lines) == 1 + 2 * 5 + 1 and lines[-1] == "… and of 2 more sequences"
    with pytest.raises(DataError, match="and of 1 more sequence$"):
        score(own, sequences[1:], table_dir=tmp_path / "out")


def test_one_of_a_thing_is_one(tmp_path, capsys):
    sequence = make_sequence(tmp_path, "dog", 3)
    maps = tmp_path / "m"
    save(maps / "dog" / "00002.png", grey(2))
    with pytest.raises(DataError, match=r"1 of 1 scored frame, 00001.png; .* has 1 map, 00002.png$"):
        score(maps, [sequence], table_dir=tmp_path / "out")
    save(maps / "dog" / "00001.png", grey(1))
    (warning,) = score(maps, [sequence], table_dir=tmp_path / "out")["warnings"]
    assert "1 of 1 map looks unbinarised" in warning and "- 1 sequence; " in capsys.readouterr().out
    one = dataclasses.replace(sequence, frames=sequence.frames[:1], masks={})
    with pytest.raises(DataError, match="no mask of its 1 frame,"):
        score(maps, [one], table_dir=tmp_path / "out")


def test_two_maps_of_one_frame_are_refused(tmp_path):
    sequence = make_sequence(tmp_path)
    maps = write_maps(tmp_path / "m", sequence)
    save(maps / "dog" / "00002.bmp", np.zeros(SIZE, np.uint8))
    with pytest.raises(DataError, match=r"two maps of frame 00002"):
        score(maps, [sequence], table_dir=tmp_path / "out")


def test_wrong_folders_are_user_errors(tmp_path):
    sequence = make_sequence(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        score(tmp_path / "nowhere", [sequence], table_dir=tmp_path / "out")
    with pytest.raises(UserError, match="--eval_folder crf"):
        score(write_maps(tmp_path / "m", sequence), [sequence], "--eval_folder", "crf", table_dir=tmp_path / "out")
    own = tmp_path / "own"
    write_maps(own / "binary" / "FBMS", sequence)
    with pytest.raises(UserError, match=r"no maps of DAVIS-2016.*--tools test"):
        score(own, [sequence], table_dir=tmp_path / "out")


# What is written


def write_own(folder: Path, sequence: VideoSequence, crf: bool) -> Path:
    for t, stem in enumerate(sequence.stems):
        name = f"{sequence.dataset}/{sequence.name}/{stem}.png"
        save(folder / "probability" / name, grey(t))
        save(folder / "binary" / name, (grey(t) > 127) * np.uint8(255))
        if crf:
            save(folder / "crf" / name, np.where(blob(t), 250, 3).astype(np.uint8))
    return folder


def test_folders_that_the_tools_before_will_make_need_not_be_there_yet(tmp_path):
    """`--tools test eval --results run`: checked before `test` has begun."""
    for folder in (tmp_path / "run", tmp_path / "run" / "part", tmp_path / "demo" / "results"):
        args = arguments("--results", folder, "--save_dir", tmp_path / "run")
        args.demo_dir = tmp_path / "demo"
        evaluate.check(args, ["DAVIS-2016"])
    args.results = [tmp_path / "elsewhere"]
    with pytest.raises(UserError, match="elsewhere: no such folder"):
        evaluate.check(args, ["DAVIS-2016"])


def test_our_own_results_with_crf(tmp_path):
    sequence = make_sequence(tmp_path)
    own = write_own(tmp_path / "run", sequence, crf=True)
    before = tree(own)
    args = arguments("--save_dir", own)
    documents = evaluate.run(args, {"DAVIS-2016": [sequence]}, [own])
    document = json.loads((own / "evaluation.json").read_text())
    assert document == documents["run"]
    assert {"protocol", "overall", "sequences", "crf"} <= set(document)
    for keys in (document["overall"], document["sequences"]["dog"], document["crf"]["overall"]):
        assert {"J_mean", "J_recall", "J_decay", "F_mean", "F_recall", "F_decay"} <= set(keys)
        assert {"MAE", "S", "max_F", "mean_F", "adp_F", "max_E", "mean_E", "adp_E", "wF"} <= set(keys)
    assert document["protocol"]["uvos"]["maps"] == "binary/DAVIS-2016"
    assert document["protocol"]["vsod"]["maps"] == "probability/DAVIS-2016"
    expected = mean_scores(saliency_scores(grey(t), blob(t)) for t in range(1, 5)).summary()
    assert {key: document["overall"][key] for key in expected} == pytest.approx(expected, abs=1e-12)
    assert document["crf"]["overall"]["J_mean"] == 1  # the CRF's maps are grey by nature: thresholded, no warning
    assert document["warnings"] == []
    after = tree(own)
    assert {name: after[name] for name in before} == before
    assert {name for name in after if name not in before} == {
        "evaluation.json",
        "evaluation_DAVIS-2016.csv",
        "evaluation_DAVIS-2016_frames.csv",
        "evaluation_DAVIS-2016_crf.csv",
        "evaluation_DAVIS-2016_crf_frames.csv",
        "comparison.md",
        "comparison.tex",
        "comparison.csv",
    }
    with (own / "evaluation_DAVIS-2016.csv").open() as file:
        rows = {row["sequence"]: row for row in csv.DictReader(file)}
    assert float(rows["mean"]["J_mean"]) == document["overall"]["J_mean"]
    only = score(own, [sequence], "--eval_folder", "crf", table_dir=tmp_path / "out")
    assert only["overall"] == document["crf"]["overall"]
    theirs = write_maps(tmp_path / "theirs", sequence)  # which has no such folders
    args = arguments("--results", own, theirs, "--table_dir", tmp_path / "out", "--eval_folder", "crf")
    both = evaluate.run(args, {"DAVIS-2016": [sequence]}, args.results)
    assert [document["overall"] for document in both.values()][0] == only["overall"] and "theirs" in both
    with pytest.raises(UserError, match="theirs: --eval_folder crf needs one of"):
        score(theirs, [sequence], "--eval_folder", "crf", table_dir=tmp_path / "out")
    next((own / "crf").rglob("*2.png")).unlink()
    with pytest.raises(DataError, match="--tools crf makes them; --eval_folder binary scores without the CRF"):
        score(own, [sequence], table_dir=tmp_path / "out")
    score(own, [sequence], "--eval_folder", "binary", table_dir=tmp_path / "out")
    shutil.rmtree(own / "crf" / "DAVIS-2016")  # of this data set alone
    with pytest.raises(UserError, match="crf/DAVIS-2016: no such folder; --eval_folder crf expects maps there"):
        score(own, [sequence], "--eval_folder", "crf", table_dir=tmp_path / "out")


def test_scores_that_a_full_disk_cut_short_are_not_taken_for_whole(tmp_path, monkeypatch):
    sequence = make_sequence(tmp_path / "data", "s", 5)
    own = write_own(tmp_path / "run", sequence, crf=False)
    score(own, [sequence], table_dir=tmp_path / "run")
    assert (own / "evaluation.json").is_file()

    def full(path, text):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    for name in ("write_text", "write_json"):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
            patch.setattr(evaluate, name, full)
            score(own, [sequence], table_dir=tmp_path / "run")
        assert not (own / "evaluation.json").exists()
    score(own, [sequence], table_dir=tmp_path / "run")
    assert (own / "evaluation.json").is_file()


def test_masks_of_others_inside_the_table_folder_stay_as_they_are(tmp_path):
    sequence = make_sequence(tmp_path)
    theirs = write_maps(tmp_path / "out" / "theirs", sequence)
    before = tree(theirs)
    score(theirs, [sequence], table_dir=tmp_path / "out")
    assert tree(theirs) == before
    assert (tmp_path / "out" / "theirs_scores" / "evaluation.json").is_file()


def test_figures_of_each_folder_have_a_place_of_their_own(tmp_path):
    """Also where the names that tell folders apart are alike without the slash, or one is called as the place is."""
    sequence = make_sequence(tmp_path)
    folders = [write_maps(tmp_path / name, sequence) for name in ("p/maps", "q/maps", "p_maps", "out/q_maps")]
    before = [tree(folder) for folder in folders]
    args = arguments("--results", *folders, "--table_dir", tmp_path / "out", "--metrics", "uvos")
    evaluate.run(args, {"DAVIS-2016": [sequence]}, args.results)
    assert [tree(folder) for folder in folders] == before
    names = [json.loads(path.read_text())["results"] for path in (tmp_path / "out").glob("*/evaluation.json")]
    assert sorted(names) == ["p/maps", "p_maps", "q/maps", "q_maps"]


def test_probability_alone_scores_as_its_binary_maps(tmp_path):
    sequence = make_sequence(tmp_path)
    both = write_own(tmp_path / "both", sequence, crf=False)
    for t, stem in enumerate(sequence.stems):
        save(tmp_path / "one" / "probability" / "DAVIS-2016" / "dog" / f"{stem}.png", grey(t))
    results = [score(folder, [sequence], table_dir=tmp_path / "out") for folder in (both, tmp_path / "one")]
    assert results[0]["overall"] == results[1]["overall"] and results[1]["warnings"] == []


def test_several_data_sets_are_keyed_by_name(tmp_path):
    davis, fbms = make_sequence(tmp_path, "dog"), make_sequence(tmp_path / "f", "cat", dataset="FBMS")
    own = tmp_path / "run"
    for sequence in (davis, fbms):
        write_own(own, sequence, crf=False)
    evaluate.run(arguments("--save_dir", own), {"DAVIS-2016": [davis], "FBMS": [fbms]}, [own])
    document = json.loads((own / "evaluation.json").read_text())
    assert document["datasets"] == ["DAVIS-2016", "FBMS"]
    assert document["overall"]["FBMS"]["uvos_frames"] == 6 and document["overall"]["DAVIS-2016"]["uvos_frames"] == 4
    assert "cat" in document["sequences"]["FBMS"]


def test_maps_of_two_crfs_are_not_one_row(tmp_path):
    sequence, own = make_sequence(tmp_path, "cat"), tmp_path / "own"
    for kind, field, makings in (("probability", "dbsnet-test", (3, 3)), ("crf", "dbsnet-crf", (5, 10))):
        for t, stem in enumerate(sequence.stems):
            # The first frame is not scored: what made it does not matter. Upright videos have a size of their own.
            making = {"iters": makings[t > 1] if t else 99}
            if kind == "probability":
                making["resized"] = [2, 4] if t % 2 else [4, 2]
            text = PngImagePlugin.PngInfo()
            text.add_text(field, json.dumps(making))
            path = own / kind / "DAVIS-2016" / "cat" / f"{stem}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(grey(t)).save(path, pnginfo=text)
    words = r"own \+ CRF, DAVIS-2016: .* cat/00001 and cat/00002 differ in crf iters 5 and 10\..* --tools crf again"
    with pytest.raises(DataError, match=words):
        score(own, [sequence], table_dir=tmp_path / "out")
    assert score(own, [sequence], "--eval_folder", "probability", table_dir=tmp_path / "out")


def test_maps_of_videos_stretched_and_in_their_own_shape_are_not_one_row(tmp_path):
    """A run with --size, or of an older version, stretched to the same size what another saw in its own shape."""
    own, making = tmp_path / "own", {"weights": "0123", "size": [384, 640]}
    sizes = {"wide": (54, 96), "square": (64, 64), "upright": (96, 54)}
    sequences = []
    for name, size in sizes.items():
        frames = tuple(tmp_path / name / f"{t}.png" for t in range(3))
        masks = {frame.stem: save(frame, blob(1, size) * np.uint8(255)) for frame in frames}
        sequences.append(VideoSequence(name, "D", frames, {}, masks, "nonzero", tmp_path / "flow"))

    def write(**resized: list[int]) -> None:
        text = {name: PngImagePlugin.PngInfo() for name in sizes}
        for sequence in sequences:
            note = making | ({"resized": resized[sequence.name]} if sequence.name in resized else {})
            text[sequence.name].add_text("dbsnet-test", json.dumps(note))
            for stem, mask in sequence.masks.items():
                path = own / "probability" / "D" / sequence.name / f"{stem}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.open(mask).save(path, pnginfo=text[sequence.name])

    for shapes in ({}, {"square": [480, 480], "upright": [640, 384]}):
        write(**shapes)
        assert score(own, sequences, table_dir=tmp_path / "out")["overall"]["J_mean"] == 1
    for one, other in (("wide", "upright"), ("square", "upright")):
        write(square=[480, 480])
        part = [sequence for sequence in sequences if sequence.name in (one, other, "square")]
        words = rf"own, D: .* {one}/. and upright/. differ in videos of another shape: in their own and stretched, by "
        with pytest.raises(DataError, match=words):
            score(own, part, table_dir=tmp_path / "out")


def test_comparison_of_several_folders(tmp_path):
    sequence = make_sequence(tmp_path, "cat")  # not one of DAVIS-2016 val
    for t, stem in enumerate(sequence.stems):
        save(tmp_path / "best_of_all" / "cat" / f"{stem}.png", blob(t) * np.uint8(255))
    write_maps(tmp_path / "a" / "maps", sequence)
    worse = tmp_path / "b" / "maps"
    for t, stem in enumerate(sequence.stems):
        save(worse / "cat" / f"{stem}.png", blob(t, shift=8) * np.uint8(255))
    folders = [worse, tmp_path / "a" / "maps", tmp_path / "best_of_all"]
    before = [tree(folder) for folder in folders]
    args = arguments("--results", *folders, "--table_dir", tmp_path / "out", "--published")
    evaluate.run(args, {"DAVIS-2016": [sequence]}, args.results)
    assert [tree(folder) for folder in folders] == before  # nothing is written among somebody's masks

    with (tmp_path / "out" / "comparison.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["measures"] == "uvos"]
    assert [row["method"] for row in rows if row["published"] == "no"] == ["best_of_all", "a/maps", "b/maps"]
    assert rows[0]["method"] == "best_of_all" and rows[0]["rank"] == "1" and float(rows[0]["J_mean"]) == 1
    ordered = [float(row["J_mean"]) for row in rows]
    assert ordered == sorted(ordered, reverse=True)
    matnet = next(row for row in rows if row["method"] == "MATNet")
    assert matnet["published"] == "yes" and float(matnet["J_mean"]) == 0.824 and "davischallenge" in matnet["source"]
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert "MATNet (published, all 20 sequences)" in text and "**100.0**" in text
    assert re.search(r"^- Published: MATNet, .*: DAVIS-2016 results of davischallenge\.org", text, re.MULTILINE)
    latex = (tmp_path / "out" / "comparison.tex").read_text()
    assert r"best\_of\_all" in latex and r"MATNet$^\dagger$ & 82.4" in latex and r"\bottomrule" in latex


def test_published_rows_come_unasked_only_where_they_compare(tmp_path):
    names = {"val": DAVIS_2016["val"], "others": DAVIS_2016["train"][:20]}
    sequences = {part: [make_sequence(tmp_path, name, 3) for name in names[part]] for part in names}
    for sequence in (*sequences["val"], *sequences["others"]):
        write_maps(tmp_path / "m", sequence)
    cases = (("val", 20, ("--resize",), True), ("val", 19, (), False), ("val", 20, ("--no-skip_last",), False))
    for part, count, line, expected in (*cases, ("others", 20, (), False)):
        score(tmp_path / "m", sequences[part][:count], "--metrics", "uvos", *line, table_dir=tmp_path / "out")
        text = (tmp_path / "out" / "comparison.md").read_text()
        assert ("MATNet (published)" in text) is expected
        assert (r"$^\dagger$ as published.}" in (tmp_path / "out" / "comparison.tex").read_text()) is expected
        assert ("left out" in text.replace("none left out", "")) is not expected


def test_published_rows_of_the_same_sequences(tmp_path):
    sequences = [make_sequence(tmp_path, name, 3) for name in ("blackswan", "dog")]
    for sequence in sequences:
        write_maps(tmp_path / "m", sequence)

    def methods(count: int, *line: str) -> dict[str, float]:
        score(tmp_path / "m", sequences[:count], "--metrics", "uvos", *line, table_dir=tmp_path / "out")
        found = re.findall(
            r"([\w+-]+) \((published[^)]*)\) +\| +\**([\d.]+)", (tmp_path / "out" / "comparison.md").read_text()
        )
        return {f"{method}: {of}": float(value) for method, of, value in found}

    both = methods(2)
    # Means over all frames that davischallenge.org has figures of: blackswan 94.26, dog 92.94.
    assert both["MATNet: published, these 2 sequences"] == 93.6 and len(both) == 22
    assert methods(1)["MATNet: published, this sequence"] == 94.3
    more = methods(2, "--published")
    assert (
        more["MATNet: published, these 2 sequences"] == 93.6
        and more["HFAN-Medium: published, all 20 sequences"] == 86.8
    )
    latex = (tmp_path / "out" / "comparison.tex").read_text()
    assert r"MATNet$^\dagger$ & 93.6" in latex and r"HFAN-Medium$^\ddagger$ & 86.8" in latex
    caption = r"$^\dagger$ as published, these 2 sequences. $^\ddagger$ as published, all 20 sequences."
    assert rf"\caption{{DAVIS-2016, J and F (percent). {caption}}}" in latex
    assert "MATNet: published, all 20 sequences" not in more and both.items() <= more.items()
    assert methods(2, "--no-published") == {}
    assert methods(2, "--no-skip_last") == {}  # another rule: nothing to compare with


def test_ties_gaps_and_signs_in_tables():
    rows = (
        tables.Row("b_2", {"J_mean": 0.5, "J_decay": -0.0001}),
        tables.Row("a", {"J_mean": 0.5, "J_decay": 0.02}),
        tables.Row("c", {"J_mean": 0.7}),
        tables.Row("d", {"F_mean": 0.9}),
    )
    table = tables.Table("DAVIS-2016", "uvos", rows)
    assert [(rank, row.method) for rank, row in table.ranked()] == [(1, "c"), (2, "b_2"), (2, "a"), (None, "d")]
    assert table.columns[0].format(0.12345) == "12.3" and table.columns[1].format(-0.0001) == "0.0"
    assert table.columns[0].format((0.824 + 0.807) / 2) == "81.6"  # MATNet's J&F, as papers print it
    text = tables.markdown([table])
    assert "–" in text and "**0.0**" in text and "**70.0**" in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({len(line) for line in lines}) == 1


def test_what_is_best_and_how_it_is_rounded_and_marked():
    decay = {column.key: column for column in tables.COLUMNS["uvos"]}["J_decay"]
    assert decay.format(0.8145) == "81.5" and decay.format(0.8155) == "81.6"  # halves up, as papers round
    overall = {"J_mean": 0.5, "S": 0.9, "MAE": 0.01}  # one run's figures of both kinds
    rows = (tables.Row("a|b", overall | {"J_decay": -0.002}), tables.Row("c", overall | {"J_decay": 0.05, "MAE": 0.02}))
    both = [tables.Table("D", measures, rows) for measures in ("uvos", "vsod")]
    text, latex = tables.markdown(both), tables.latex(both)
    assert "**-0.2**" in text and "**0.010**" in text and "**5.0**" not in text and "**0.020**" not in text
    assert r"a\|b" in text  # a bar would begin another column
    assert r"\textbf{$-0.2$}" in latex and r"\textbf{0.010}" in latex  # a minus, not a hyphen
    for key, arrow, command in (("J mean", "↑", "uparrow"), ("J decay", "↓", "downarrow"), ("MAE", "↓", "downarrow")):
        assert f"{key} {arrow}" in text
        title = next(c.latex for columns in tables.COLUMNS.values() for c in columns if c.title == key)
        assert rf"{title} $\{command}$" in latex
    alone = [tables.Table("D", "uvos", rows[:1])]  # nothing to be better than
    assert "**" not in tables.markdown(alone) and "textbf" not in tables.latex(alone)
    _, salient = (row for row in csv.DictReader(tables.comma_separated(both).splitlines()) if row["method"] == "c")
    assert (salient["measures"], salient["S"], salient["J_mean"]) == ("vsod", "0.9", "")


# Several processes


def test_any_number_of_processes_gives_the_same(tmp_path, monkeypatch):
    sequences = [make_sequence(tmp_path, name, count) for name, count in (("dog", 27), ("cow", 5))]
    own = tmp_path / "run"
    for sequence in sequences:
        write_own(own, sequence, crf=False)
    documents = []
    for workers in (0, 1, 2):
        evaluate.run(arguments("--save_dir", own, "--workers", workers), {"DAVIS-2016": sequences}, [own])
        documents.append((own / "evaluation.json").read_text() + (own / "evaluation_DAVIS-2016_frames.csv").read_text())
    assert len(set(documents)) == 1

    # An error in a process is the same error.
    monkeypatch.setitem(dataset_scores.WORTH_PROCESSES, "uvos", 1)
    (own / "binary" / "DAVIS-2016" / "dog" / "00011.png").write_bytes(b"no image")
    for workers in (1, 2):
        args = arguments("--save_dir", own, "--workers", workers, "--metrics", "uvos")
        with pytest.raises(DataError, match="00011.png: cannot read"):
            evaluate.run(args, {"DAVIS-2016": sequences}, [own])


# Published figures, from the masks to the table


@pytest.mark.data
def test_official_results_end_to_end(real_data, tmp_path):
    known = real_data / "known_answers" / "davis16"
    if not known.is_dir():
        pytest.skip(f"needs the published figures of DAVIS-16 in {known}")
    gt = sorted((known / "Annotations" / "480p" / "car-shadow").glob("*.png"))
    masks = {path.stem: path for path in gt}
    sequence = VideoSequence("car-shadow", "DAVIS-2016", tuple(gt), {}, masks, "nonzero", tmp_path)
    methods = ("osvos", "cut", "matnet", "pdb", "ags")
    args = arguments(
        "--results", *(known / "Results" / m for m in methods), "--table_dir", tmp_path, "--metrics", "uvos"
    )
    documents = evaluate.run(args, {"DAVIS-2016": [sequence]}, args.results)
    expected = json.loads((known / "expected_car-shadow.json").read_text())
    for method in methods:
        with (tmp_path / method / "evaluation_DAVIS-2016_frames.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert [row["frame"] for row in rows] == [f"{t:05d}" for t in range(1, 39)]
        for name in "JF":
            ours = [float(row[name]) for row in rows]
            if "per_frame" in expected[method][name]:
                np.testing.assert_allclose(ours, expected[method][name]["per_frame"], rtol=0, atol=1e-9)
                for statistic in ("mean", "recall", "decay"):
                    figure = documents[method]["overall"][f"{name}_{statistic}"]
                    assert figure == pytest.approx(expected[method][name][statistic], abs=1e-9)
            else:
                np.testing.assert_allclose(ours, expected[method][name]["per_frame_rounded3"], rtol=0, atol=0.00051)


def test_the_benchmark_compares_ways_that_agree():
    from utils.evaluation.benchmark import moving_ellipses, plain_scikit_image, plain_scipy, time_frames, time_processes

    masks = moving_ellipses(6, (60, 107))
    for pred, gt in ((masks[0], masks[3]), (masks[0] & False, masks[0]), (masks[0] & False, masks[0] & False)):
        expected = (jaccard(pred, gt), boundary_f(pred, gt))
        assert plain_scipy(pred, gt) == plain_scikit_image(pred, gt) == pytest.approx(expected, abs=1e-12)
    assert set(time_frames(masks, repeat=1)) == {"ours", "scipy", "scikit_image"}
    result = time_processes(masks, frames=12)
    assert result["frames"] == 12 and result["wall_ratio"] > 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gt", "nowhere"], "--gt nowhere: 0 .png there; expected 3 masks"),
        (["--gt", "masks"], r"00003.png: 6×5 pixels"),
        (["--frames", "0"], "--frames 0: expected 1"),
        (["--frames", "399"], "--frames 399: fewer than 400 are scored in one process"),
        (["--repeat", "0"], "--repeat 0: expected 1"),
    ],
)
def test_the_benchmark_says_what_is_wrong(words, said, tmp_path, monkeypatch, capsys):
    from utils.evaluation import benchmark

    for t in range(4):
        save(tmp_path / "masks" / f"{t:05d}.png", np.zeros((5, 6 if t == 3 else 7), np.uint8))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["benchmark", *words])
    with pytest.raises(SystemExit) as caught:
        benchmark.main()
    assert caught.value.code == 2 and said in capsys.readouterr().err


def test_a_row_of_refined_maps_says_so(tmp_path):
    own = write_own(tmp_path / "run", sequence := make_sequence(tmp_path), crf=True)
    for folder, name in (("crf", "run + CRF"), ("probability", "run")):
        line = ("--metrics", "uvos", "--no-published", "--eval_folder", folder)
        score(own, [sequence], *line, table_dir=tmp_path / "out")
        with (tmp_path / "out" / "comparison.csv").open() as file:
            assert [row["method"] for row in csv.DictReader(file)] == [name]


def test_maps_of_other_frames_among_those_of_a_run_that_was_stopped(tmp_path):
    sequence, own = make_sequence(tmp_path), tmp_path / "own"
    makings = []
    for size in (100, 200):
        for frame in sequence.frames:
            frame.parent.mkdir(parents=True, exist_ok=True)
            frame.write_bytes(b"." * size)
        makings.append({"frames": fingerprint(sequence.frames, times=False)})
    for done, count in ((6, 0), (3, 1), (0, 1)):
        for t, stem in enumerate(sequence.stems):
            text = PngImagePlugin.PngInfo()
            text.add_text("dbsnet-test", json.dumps(makings[t < done]))
            path = own / "probability" / "DAVIS-2016" / "dog" / f"{stem}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(grey(t)).save(path, pnginfo=text)
        warnings = score(own, [sequence], "--metrics", "uvos", table_dir=tmp_path / "out")["warnings"]
        assert ["DAVIS-2016/dog were made of other frames" in warning for warning in warnings] == [True] * count


def test_nothing_is_written_among_masks_of_others(tmp_path):
    sequence = make_sequence(tmp_path)
    theirs = write_maps(tmp_path / "theirs", sequence)
    before = tree(theirs)
    with pytest.raises(UserError, match="theirs: the folder of masks .* --table_dir DIR"):
        score(theirs, [sequence], table_dir=theirs)
    assert tree(theirs) == before


@pytest.mark.parametrize("metrics", [("vsod",), ("uvos", "vsod")])
def test_a_mask_of_the_whole_image_is_one_with_1_as_with_255(tmp_path, metrics):
    sequence = make_sequence(tmp_path)
    results = []
    for scale in (1, 255):
        maps = write_maps(tmp_path / str(scale), sequence, scale)
        save(maps / "dog" / "00002.png", np.full(SIZE, scale, np.uint8))
        results.append(score(maps, [sequence], "--metrics", *metrics, table_dir=tmp_path / "out")["overall"])
    assert results[0] == results[1]


def test_a_file_in_the_place_of_the_figures_is_told_before_any_work(tmp_path):
    place = tmp_path / "file"
    place.touch()
    args = arguments("--results", tmp_path, "--save_dir", place)
    args.demo_dir = "demo"
    with pytest.raises(UserError, match="--save_dir .*: a file; expected the name of a folder"):
        evaluate.check(args, ["DAVIS-2016"])
