"""The check of a data root: every problem at once, and none where there is none."""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tqdm import tqdm

from datasets import check
from datasets.check import check_sequences, check_stills, run
from datasets.errors import DataError
from datasets.sequences import read_dataset
from datasets.stills import read_stills
from tests.test_sequences import fbms

HEIGHT, WIDTH = 24, 40
RNG = np.random.default_rng(3)
SHAPE = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
SHAPE[6:18, 8:30] = 255


def save(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


def noise(height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    return RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)


def davis(root: Path, names: list[str], frames: int = 4) -> Path:
    for name in names:
        for number in range(frames):
            save(root / "JPEGImages" / "480p" / name / f"{number:05d}.jpg", noise())
            save(root / "Flows" / "480p" / name / f"{number:05d}.jpg", noise(HEIGHT // 2, WIDTH // 2))
            save(root / "Annotations" / "480p" / name / f"{number:05d}.png", SHAPE)
    lists = root / "ImageSets" / "2016"
    lists.mkdir(parents=True, exist_ok=True)
    (lists / "val.txt").write_text("\n".join(names))
    return root


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def fatal(problems: list) -> list[tuple[str, str]]:
    return [(problem.kind, problem.sequence) for problem in problems if problem.fatal]


def report(*arguments, **options) -> tuple[int, str]:
    with redirect_stdout(io.StringIO()) as out:
        count = run(*arguments, **options)
    return count, out.getvalue()


def check_split(name: str, root: Path, split: str, require_flow: bool = True) -> tuple[list, list]:
    """What `run` finds of one split: the sequences or stills, and their problems."""
    items, problems = check._read(name, root, split, 5, None)
    return items, problems + check._look_at_all(items, name, split, require_flow, 1, None)


def test_a_sound_root_has_no_problem(tmp_path):
    davis(tmp_path / "DAVIS", ["bear", "bus"])
    sequences = read_dataset("DAVIS-2016", tmp_path)
    for workers in (1, 3):
        assert check_sequences(sequences, workers=workers) == []
    count, text = report(tmp_path, ["DAVIS-2016"])
    assert count == 0 and text.endswith("check: no problem\n")
    assert "DAVIS-2016 val in" in text and "2 sequences, 8 frames, 8 with flow, 8 with a mask" in text
    assert "20 of the 20 sequences of val" in text, "bear and bus are training sequences, and val is incomplete"
    assert "no such list" in text and "incomplete: 1 (a note)" in text


def test_progress_counts_every_frame(tmp_path):
    davis(tmp_path / "DAVIS", ["bear", "bus"])
    steps = []
    check_sequences(read_dataset("DAVIS-2016", tmp_path), progress=steps.append)
    assert sum(steps) == 8


def test_everything_wrong_is_reported_at_once(tmp_path):
    names = ["absent", "empty", "flow", "frame", "list", "mask", "noflow", "sizes", "sound", "stray", "twin", "values"]
    root = davis(tmp_path / "DAVIS", names)
    jpeg, flows, masks = (root / folder / "480p" for folder in ("JPEGImages", "Flows", "Annotations"))

    for file in (jpeg / "absent").iterdir():
        file.unlink()
    (jpeg / "absent").rmdir()
    for file in (jpeg / "empty").iterdir():
        file.unlink()
    (flows / "flow" / "00000.jpg").unlink()
    truncate(flows / "flow" / "00001.jpg")
    save(flows / "flow" / "00002.jpg", noise(HEIGHT, HEIGHT))
    truncate(jpeg / "frame" / "00002.jpg")
    (masks / "list" / "00003.png").unlink()
    save(masks / "mask" / "00001.png", SHAPE[:-2])
    (masks / "mask" / "00002.png").write_bytes(b"no image")
    for file in (flows / "noflow").iterdir():
        file.unlink()
    for number in (2, 3):
        save(jpeg / "sizes" / f"{number:05d}.jpg", noise(48, 80))
        save(masks / "sizes" / f"{number:05d}.png", np.zeros((48, 80), dtype=np.uint8))
    save(masks / "stray" / "00009.png", SHAPE)
    save(jpeg / "twin" / "00001.png", noise())
    save(masks / "values" / "00000.png", noise()[..., 0])

    sequences, problems = check_split("DAVIS-2016", tmp_path, "val")
    assert sorted(fatal(problems)) == sorted(
        [
            ("layout", "absent"),
            ("layout", "empty"),
            ("layout", "stray"),
            ("layout", "twin"),
            ("no flow", "flow"),
            ("flow", "flow"),  # truncated
            ("flow", "flow"),  # aspect
            ("frame", "frame"),
            ("no mask", "list"),
            ("mask", "mask"),  # size
            ("mask", "mask"),  # no image
            ("no flow", "noflow"),
            ("frame", "sizes"),
            ("mask values", "values"),
        ]
    )
    assert len(sequences) == len(names) - 2
    for file in ("flow/00000", "flow/00001.jpg", "flow/00002.jpg", "frame/00002.jpg", "list/00003.png"):
        assert any(file in problem.message for problem in problems), file

    count, text = report(tmp_path, ["DAVIS-2016"], splits=["val"])
    assert count == 14 and "check: 14 problems" in text
    assert "  layout: 4 in 4 sequences; " in text and "  flow: 2 in 1 sequence; " in text
    command = f"python tool.py --tools flow --datasets DAVIS-2016 --data_dir {tmp_path}"
    assert f"; {command} makes what is missing\n" in text and f"; remove these files, then {command}\n" in text


def test_flow_of_two_sizes_in_one_video(tmp_path):
    """Of one aspect, so that each goes with its frame; `test` reads the flow of a video as of one size."""
    root = davis(tmp_path / "DAVIS", ["bear", "bus"])
    save(root / "Flows" / "480p" / "bear" / "00002.jpg", noise(HEIGHT, WIDTH))
    for file in (root / "Flows" / "480p" / "bus").iterdir():
        save(file, noise(HEIGHT, WIDTH))  # another size than bear's is nothing wrong
    (problem,) = check_sequences(read_dataset("DAVIS-2016", tmp_path))
    assert (problem.kind, problem.sequence, problem.fatal) == ("flow", "bear", True)
    assert "20×12 at 00000, 40×24 at 00002" in problem.message and "Flows/480p/bear" in problem.message


def test_masks_under_the_name_of_the_unsupervised_release(tmp_path):
    root = davis(tmp_path / "DAVIS", ["bear", "bus"])
    unread = (root / "Annotations").rename(root / "Annotations_unsupervised")
    count, text = report(tmp_path, ["DAVIS-2016"], splits=["val"])
    assert count == 2 and text.count(f"; masks lie in {unread}, which is not read") == 1
    assert "rename it, or link it, to Annotations\n" in text
    (root / "Annotations").symlink_to(unread.name)
    count, text = report(tmp_path, ["DAVIS-2016"], splits=["val"])
    assert count == 0 and "masks lie in" not in text


def test_what_is_not_required_is_no_problem(tmp_path):
    root = davis(tmp_path / "DAVIS", ["bear"])
    for folder in ("Flows", "Annotations"):
        for file in (root / folder / "480p" / "bear").iterdir():
            file.unlink()
    sequences = read_dataset("DAVIS-2016", tmp_path)
    assert fatal(check_sequences(sequences)) == [("no flow", "bear"), ("no mask", "bear")]
    assert check_sequences(sequences, require_flow=False, require_masks=False) == []


def test_sparse_sets_need_some_masks_and_not_all(tmp_path):
    root = tmp_path / "MCL"
    for video in ("crowd", "road"):
        for number in range(4):
            save(root / video / "Imgs" / f"{number:03d}.jpg", noise())
    save(root / "crowd" / "GT" / "001.png", SHAPE)
    _, problems = check_split("MCL", tmp_path, "val", require_flow=False)
    assert fatal(problems) == [("no mask", "road")]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (SHAPE, None),
        (SHAPE // 255, None),
        (np.zeros_like(SHAPE), None),
        (np.where(np.eye(HEIGHT, WIDTH) > 0, 90, SHAPE).astype(np.uint8), False),  # 24 of 960 pixels in between
        (SHAPE // 2, True),  # 127: the object is lost
        (np.where(np.eye(HEIGHT, WIDTH) > 0, 100, 0).astype(np.uint8), True),  # and so is a small one
        (noise()[..., 0], True),
    ],
)
def test_mask_values_of_the_binary_rule(tmp_path, values, expected):
    """None: no problem of its values; otherwise whether it is fatal."""
    root = tmp_path / "MCL" / "crowd"
    for number in range(2):
        save(root / "Imgs" / f"{number:03d}.jpg", noise())
        save(root / "GT" / f"{number:03d}.png", SHAPE if number else values)
    _, problems = check_split("MCL", tmp_path, "val", require_flow=False)
    assert [(problem.kind, problem.fatal) for problem in problems] == (
        [] if expected is None else [("mask values", expected)]
    )


@pytest.mark.parametrize(("colour", "expected"), [((255, 255, 255), None), ((255, 255, 0), None), ((255, 0, 0), True)])
def test_objects_in_dark_colours_are_told(tmp_path, colour, expected):
    """Whose grey value, by which the binary rule reads them, is that of the background."""
    root = tmp_path / "MCL" / "crowd"
    mask = np.where(SHAPE[..., None] > 0, np.uint8(colour), np.uint8(0))
    mask[:4] = 255  # another object, which is kept
    for number in range(2):
        save(root / "Imgs" / f"{number:03d}.jpg", noise())
        save(root / "GT" / f"{number:03d}.png", mask)
    _, problems = check_split("MCL", tmp_path, "val", require_flow=False)
    assert [(problem.kind, problem.fatal) for problem in problems] == (
        [] if expected is None else [("mask values", True)] * 2
    )


def test_void_pixels_are_told(tmp_path):
    root = davis(tmp_path / "DAVIS", ["bear"])
    mask = next((root / "Annotations" / "480p" / "bear").iterdir())
    image = Image.fromarray(np.where(np.eye(HEIGHT, WIDTH) > 0, 255, SHAPE // 255).astype(np.uint8), mode="P")
    image.putpalette([0, 0, 0, 128, 0, 0] + [9, 9, 9] * 253 + [224, 224, 192])
    image.save(mask)
    _, problems = check_split("DAVIS-2016", tmp_path, "val")
    (problem,) = [problem for problem in problems if problem.kind == "void"]
    assert (
        not problem.fatal and "2.50% of the pixels have index 255" in problem.message and str(mask) in problem.message
    )
    count, text = report(tmp_path, ["DAVIS-2016"], splits=["val"])
    assert count == 0 and "void: 1 in 1 sequence (a note); nothing to do" in text


def test_native_fbms_is_sound(tmp_path):
    """Its masks have colours and greys of their own, of which its rule knows."""
    fbms(tmp_path / "FBMS")
    for split, count in (("val", 3), ("train", 1)):
        sequences, problems = check_split("FBMS", tmp_path, split, require_flow=False)
        assert len(sequences) == count and not fatal(problems), problems
        assert {problem.kind for problem in problems} <= {"incomplete"}  # of 59 videos four are there


def test_masks_that_are_kept_back_are_no_problem(tmp_path):
    """DAVIS-2017's test-dev has those of first frames, that of the unsupervised task none: both are sound downloads."""
    root = davis(tmp_path / "DAVIS", ["bear", "bus"])
    lists = (root / "ImageSets" / "2016").rename(root / "ImageSets" / "2017")
    (lists / "val.txt").rename(lists / "test-dev.txt")
    for name, kept in (("bear", 1), ("bus", 0)):
        for file in sorted((root / "Annotations" / "480p" / name).iterdir())[kept:]:
            file.unlink()
    count, text = report(tmp_path, ["DAVIS-2017"], splits=["test-dev"])
    assert count == 0 and "8 frames, 8 with flow, 1 with a mask" in text
    problems = check_sequences(read_dataset("DAVIS-2017", tmp_path, "test-dev"))
    assert fatal(problems) == [("no mask", "bear")] * 3 + [("no mask", "bus")]


def test_a_sequence_whose_masks_are_all_empty_is_a_note(tmp_path):
    root = davis(tmp_path / "DAVIS", ["bear"])
    for file in (root / "Annotations" / "480p" / "bear").iterdir():
        save(file, np.zeros_like(SHAPE))
    (problem,) = check_sequences(read_dataset("DAVIS-2016", tmp_path))
    assert not problem.fatal and "foreground" in problem.message


def test_sets_and_splits_that_are_not_there(tmp_path):
    davis(tmp_path / "DAVIS", ["bear"])
    count, text = report(tmp_path, ["DAVIS-2016", "FBMS"], splits=["train", "val"])
    assert count == 3, "no train list of DAVIS, and FBMS twice"
    assert "train.txt: no such list" in text and "FBMS is not under" in text
    count, text = report(tmp_path, ["FBMS"])
    assert count == 2, "a set of which nothing is here is a problem even by default"
    count, _ = report(tmp_path / "none", ["DAVIS-2016"], splits=["val"])
    assert count == 1
    # A split that may be absent is another thing than one of which no sequence can be read.
    assert report(tmp_path, ["DAVIS-2016"])[0] == 0
    (tmp_path / "DAVIS" / "ImageSets" / "2016" / "train.txt").write_text("gone")
    count, text = report(tmp_path, ["DAVIS-2016"])
    assert count == 1 and "DAVIS-2016/gone" in text


def test_the_report_shortens_long_groups(tmp_path):
    root = davis(tmp_path / "DAVIS", ["bear"], frames=9)
    for number in range(1, 9):
        (root / "Flows" / "480p" / "bear" / f"{number:05d}.jpg").unlink()
    count, text = report(tmp_path, ["DAVIS-2016"], splits=["val"])
    assert count == 8 and "  no flow: 8 in 1 sequence; " in text and "… and 3 more" in text
    assert text.count("no flow image") == 5


def test_only_the_sequences_asked_for_are_checked(tmp_path):
    root = davis(tmp_path / "DAVIS", ["bear", "bus", "cows"])
    for name in ("bus", "cows"):
        truncate(root / "JPEGImages" / "480p" / name / "00001.jpg")
    (root / "ImageSets" / "2016" / "val.txt").write_text("bear\nbus\ncows\nabsent")
    (root / "ImageSets" / "2016" / "train.txt").write_text("cows")
    assert report(tmp_path, ["DAVIS-2016"])[0] == 4
    count, text = report(tmp_path, ["DAVIS-2016"], only=["bear"])
    assert count == 0 and "DAVIS-2016 val in" in text and "1 sequence, 4 frames" in text
    assert "train" not in text and "incomplete" not in text
    count, text = report(tmp_path, ["DAVIS-2016"], only=["bus", "absent"])
    assert count == 2 and "bus/00001.jpg" in text and "absent" in text and "cows" not in text
    with pytest.raises(DataError, match="--sequences buss: not in DAVIS-2016; .* bus"):
        report(tmp_path, ["DAVIS-2016"], only=["bear", "buss"])
    # Of a set that is not there no name is known: that is the problem.
    count, text = report(tmp_path, ["FBMS"], only=["bear"])
    assert count == 2 and "FBMS is not under" in text
    count, text = report(tmp_path, ["DAVIS-2016", "FBMS"], only=["bear"])
    assert count == 2 and "FBMS is not under" in text


def stills(root: Path, names: list[str]) -> Path:
    for name in names:
        save(root / "DUTS-TR" / "DUTS-TR-Image" / f"{name}.jpg", noise())
        save(root / "DUTS-TR" / "DUTS-TR-Mask" / f"{name}.png", SHAPE)
    return root / "DUTS-TR"


def test_a_sound_set_of_stills(tmp_path):
    root = stills(tmp_path, ["s0", "s1"])
    save(root / "DUTS-TR-Image" / "s2.jpg", noise(30, 30))  # stills are of many sizes
    save(root / "DUTS-TR-Mask" / "s2.png", np.full((30, 30), 128, dtype=np.uint8))  # which is an object just so
    screen = io.StringIO()
    assert report(tmp_path, ["duts-tr"]) == report(tmp_path, ["DUTS-TR"])
    count, text = report(tmp_path, ["DUTS-TR"], bar=partial(tqdm, file=screen))
    assert count == 0 and text == f"DUTS-TR train in {root}: 3 stills with a mask\ncheck: no problem\n"
    assert "3/3" in screen.getvalue()
    count, text = report(tmp_path, ["DUTS-TR"], splits=["val"])
    assert count == 1 and "no split 'val'" in text and "expected the split train" in text


def test_everything_wrong_with_stills_is_reported_at_once(tmp_path):
    root = stills(tmp_path, ["alone", "bad", "empty", "image", "lost", "sizes", "sound"])
    (root / "DUTS-TR-Image" / "alone.jpg").unlink()
    (root / "DUTS-TR-Mask" / "bad.png").write_bytes(b"no image")
    save(root / "DUTS-TR-Mask" / "empty.png", SHAPE // 255)  # 0 and 1, of which training would see no object
    truncate(root / "DUTS-TR-Image" / "image.jpg")
    (root / "DUTS-TR-Mask" / "lost.png").unlink()
    save(root / "DUTS-TR-Mask" / "sizes.png", SHAPE[:-2])
    found, problems = check_split("DUTS-TR", tmp_path, "train")
    assert [still.name for still in found] == ["bad", "empty", "image", "sizes", "sound"]
    wrong = [("frame", "image"), ("layout", ""), ("mask", "bad"), ("mask", "sizes"), ("mask values", "empty")]
    assert sorted(fatal(problems)) == wrong
    (note,) = [problem.message for problem in problems if not problem.fatal]
    assert "alone.png" in note
    count, text = report(tmp_path, ["DUTS-TR"])
    assert count == 5 and "check: 5 problems" in text and "  mask: 2 in 2 stills; " in text
    assert "1 of 6 images have no mask" in text and "lost.jpg" in text
    count, text = report(tmp_path, ["DUTS-TR"], only=["bad", "sound"])
    assert count == 1 and "2 stills with a mask" in text
    with pytest.raises(DataError, match="--sequences sond: not in DUTS-TR; .* sound"):
        report(tmp_path, ["DUTS-TR"], only=["sond"])
    count, text = report(tmp_path / "DUTS-TR" / "DUTS-TR-Mask", ["DUTS-TR"])
    assert count == 1 and "no image folder" in text


def test_two_stills_or_masks_of_one_stem(tmp_path):
    """Which of them training would take, the order of the folder would say."""
    root = stills(tmp_path, ["s0", "s1", "s2"])
    save(root / "DUTS-TR-Mask" / "s0.bmp", SHAPE)
    save(root / "DUTS-TR-Image" / "s1.png", noise())
    count, text = report(tmp_path, ["DUTS-TR"])
    assert count == 2 and "s0.bmp and s0.png share the stem s0" in text and "s1.jpg and s1.png share" in text
    with pytest.raises(DataError, match=r"s0\.bmp and s0\.png share the stem"):
        read_stills(tmp_path)


def test_other_tools_say_that_stills_are_no_videos(tmp_path):
    stills(tmp_path, ["s0"])
    with pytest.raises(DataError, match="DUTS-TR holds still images and no videos.*--tools check.*DAVIS-2016"):
        read_dataset("DUTS-TR", tmp_path)


def test_a_bar_counts_the_frames_of_a_set(tmp_path):
    davis(tmp_path / "DAVIS", ["bear", "bus"])
    screen = io.StringIO()
    count, text = report(tmp_path, ["DAVIS-2016"], bar=partial(tqdm, file=screen))
    assert "check DAVIS-2016: 100%" in screen.getvalue() and "8/8" in screen.getvalue()
    assert count == 0 and "%" not in text


@pytest.mark.data
def test_real_stills_are_sound(real_data):
    found = read_stills(real_data)
    assert len(found) > 1000 and check_stills(found[::16]) == []


@pytest.mark.data
def test_real_davis_val_is_sound(real_data):
    sequences = read_dataset("DAVIS-2016", real_data, "val")
    assert check_sequences([sequence for sequence in sequences if sequence.name == "libby"]) == []
    sequences = read_dataset("DAVIS-2016", real_data, "train")
    assert check_sequences([sequence for sequence in sequences if sequence.name == "bear"]) == []
