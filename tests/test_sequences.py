"""Every reader, each on a small tree in the native layout of its data set; DAVIS on the real one as well."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datasets import sequences
from datasets.errors import DataError
from datasets.images import load_frame, load_mask
from datasets.layouts import DAVIS_2016
from datasets.sequences import DATASETS, canonical_name, find_datasets, find_root, read_dataset
from datasets.video_sequence import natural_key
from datasets.vsod_layouts import FBMS_59

SIZE = (6, 10)


def picture(path: Path, value: int = 0, mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, SIZE[::-1], (value,) * 3 if mode == "RGB" else value).save(path)
    return path


def pictures(folder: Path, stems: list[str], suffix: str = ".jpg", mode: str = "RGB") -> None:
    for index, stem in enumerate(stems):
        picture(folder / f"{stem}{suffix}", index, mode)


def stems(count: int, width: int = 5, start: int = 0, step: int = 1) -> list[str]:
    return [f"{number:0{width}d}" for number in range(start, start + count * step, step)]


def write(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def davis(root: Path, names: list[str], frames: int = 3, flows: bool = True) -> Path:
    for name in names:
        pictures(root / "JPEGImages" / "480p" / name, stems(frames))
        pictures(root / "Annotations" / "480p" / name, stems(frames), ".png", "L")
        if flows:
            pictures(root / "Flows" / "480p" / name, stems(frames))
    return root


def named(sequences: list) -> list[str]:
    return [sequence.name for sequence in sequences]


# --- DAVIS ------------------------------------------------------------------------------------------------------------


def test_davis_2016_by_names(tmp_path):
    root = davis(tmp_path / "DAVIS", ["bear", "zebra", "ant", "unlisted"])
    write(root / "ImageSets" / "2016" / "train.txt", ["zebra", "", "  bear  "])
    write(root / "ImageSets" / "2016" / "val.txt", ["ant"])
    (root / "Flows" / "480p" / "bear" / "radius.json").write_text("{}")
    (root / "JPEGImages" / "480p" / "bear" / "._00000.jpg").write_bytes(b"")
    (root / "JPEGImages" / "480p" / "bear" / "Thumbs.db").write_bytes(b"")

    train = read_dataset("DAVIS-2016", tmp_path, "train")
    assert named(train) == ["zebra", "bear"], "in the order of the list"
    bear = train[1]
    assert bear.dataset == "DAVIS-2016" and bear.mask_rule == "nonzero"
    assert bear.stems == ("00000", "00001", "00002") == bear.annotated and len(bear) == 3
    assert bear.frames[1] == root / "JPEGImages" / "480p" / "bear" / "00001.jpg"
    assert bear.flow_path("00001") == root / "Flows" / "480p" / "bear" / "00001.jpg"
    assert bear.mask_path("00002") == root / "Annotations" / "480p" / "bear" / "00002.png"
    assert bear.flow_dir == root / "Flows" / "480p" / "bear"
    assert pickle.loads(pickle.dumps(bear)) == bear
    assert named(read_dataset("DAVIS-2016", tmp_path, "val")) == ["ant"] == named(read_dataset("DAVIS", root, "test"))
    assert named(read_dataset("DAVIS-2016", root, "trainval")) == ["zebra", "bear", "ant"]


def test_davis_is_read_at_480p_where_there_are_several_resolutions(tmp_path):
    """Which its figures are of; its own flow comes before flow under the other spelling, and is written there."""
    root = davis(tmp_path / "DAVIS", ["bear"], flows=False)
    write(root / "ImageSets" / "2016" / "val.txt", ["bear"])
    for kind in ("JPEGImages", "Annotations"):
        pictures(root / kind / "1080p" / "bear", stems(3), ".jpg" if kind == "JPEGImages" else ".png")
    (bear,) = read_dataset("DAVIS-2016", tmp_path)
    assert {path.parent.parent.name for path in (*bear.frames, *bear.masks.values())} == {"480p"}
    assert bear.flow_dir == root / "Flows" / "480p" / "bear" and not bear.flows
    for folder in ("flows", "Flows"):
        pictures(root / folder / "480p" / "bear", stems(3))
        (bear,) = read_dataset("DAVIS-2016", tmp_path)
        assert {path.parents[2].name for path in bear.flows.values()} == {folder}


def test_flow_elsewhere_has_the_same_sub_tree(tmp_path):
    data, flow = tmp_path / "data", tmp_path / "flow"
    root = davis(data / "DAVIS", ["bear"])
    write(root / "ImageSets" / "2016" / "val.txt", ["bear"])
    (bear,) = read_dataset("DAVIS", data, flow_root=flow)
    assert bear.flow_dir == flow / "DAVIS-2016" / "Flows" / "480p" / "bear"
    assert bear.flows == {}, "flow beside the data is not mixed in"
    with pytest.raises(DataError, match=f"expected {bear.flow_dir / '00000'}"):
        bear.flow_path("00000")
    pictures(bear.flow_dir, ["00000", "00002"], ".png")
    (again,) = read_dataset("DAVIS-2016", data, flow_root=str(flow))
    assert again.flows == {stem: bear.flow_dir / f"{stem}.png" for stem in ("00000", "00002")}
    assert again.frames == bear.frames and again.masks == bear.masks

    youtube(data / "YouTube-VOS")
    (video, _) = read_dataset("YouTube-VOS", data, "train", flow_root=flow)
    assert video.flow_dir == flow / "YouTube-VOS-2018" / "train" / "Flows" / video.name and not video.flows


def test_davis_2016_by_pairs_of_files(tmp_path):
    root = davis(tmp_path / "DAVIS-2016", ["bear", "boat"], frames=2)
    line = "/JPEGImages/480p/{0}/{1}.jpg /Annotations/480p/{0}/{1}.png "
    lines = [line.format(name, stem) for name in ("boat", "bear") for stem in stems(2)]
    for split in ("train", "trainval"):
        write(root / "ImageSets" / "480p" / f"{split}.txt", lines)
    write(root / "ImageSets" / "480p" / "val.txt", lines[:2])
    assert named(read_dataset("DAVIS-2016", tmp_path, "train")) == ["boat", "bear"]
    assert named(read_dataset("DAVIS-2016", tmp_path, "val")) == ["boat"]
    write(root / "ImageSets" / "480p" / "val.txt", [*lines[:2], line.format("boat", "00002")])
    with pytest.raises(DataError, match=r"lists 1 frame.*00002"):
        read_dataset("DAVIS-2016", tmp_path, "val")


def test_davis_2017_tree_gives_the_subset_of_2016_and_merged_masks(tmp_path):
    root = davis(tmp_path / "DAVIS-2017" / "DAVIS", [*DAVIS_2016["val"], "bike-packing"], frames=2)
    write(root / "ImageSets" / "2017" / "val.txt", ["bike-packing", "blackswan"])
    objects = Image.fromarray(np.array([[0, 1, 2, 0]], dtype=np.uint8), mode="P")
    objects.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
    objects.save(root / "Annotations" / "480p" / "blackswan" / "00000.png")

    val = read_dataset("DAVIS-2016", tmp_path, "val")
    assert named(val) == DAVIS_2016["val"] and len(val) == 20
    np.testing.assert_array_equal(load_mask(val[0].masks["00000"], val[0].mask_rule), [[0, 1, 1, 0]])
    assert named(read_dataset("DAVIS-2017", tmp_path, "val")) == ["bike-packing", "blackswan"]
    with pytest.raises(DataError, match="JPEGImages/480p/bear"):
        read_dataset("DAVIS-2016", tmp_path, "train")  # the training half is not in this tree


def test_the_fifty_names_of_davis_2016():
    assert [len(DAVIS_2016[part]) for part in ("train", "val")] == [30, 20]
    assert len({*DAVIS_2016["train"], *DAVIS_2016["val"]}) == 50
    assert [len(FBMS_59[part]) for part in ("train", "val")] == [29, 30]
    assert len({*FBMS_59["train"], *FBMS_59["val"]}) == 59


def test_davis_without_lists_of_the_split_says_what_there_is(tmp_path):
    root = davis(tmp_path / "DAVIS", ["bear"])
    write(root / "ImageSets" / "2016" / "train.txt", ["bear"])
    with pytest.raises(DataError, match=r"val\.txt.*has train\.txt"):
        read_dataset("DAVIS-2016", tmp_path, "val")
    with pytest.raises(DataError, match="expected one of train, val"):
        read_dataset("DAVIS-2016", tmp_path, "valid")
    with pytest.raises(DataError, match="2017"):
        read_dataset("DAVIS-2017", tmp_path, "val")


@pytest.mark.parametrize("lines", [["bear", "a/b"], ["/JPEGImages/00000.jpg"], [".."], ["", " "]])
def test_davis_lists_with_something_else_in_them(tmp_path, lines):
    root = davis(tmp_path / "DAVIS", ["bear"])
    write(root / "ImageSets" / "2016" / "val.txt", lines)
    with pytest.raises(DataError, match=r"val\.txt"):
        read_dataset("DAVIS-2016", tmp_path, "val")


def test_a_list_that_is_no_text(tmp_path):
    root = listed(tmp_path, ["bear"])
    (root / "ImageSets" / "2016" / "val.txt").write_bytes(b"\xff\xfe bear")
    with pytest.raises(DataError, match=r"val\.txt: cannot read this list of sequences"):
        read_dataset("DAVIS-2016", tmp_path)


def test_davis_lists_written_on_windows_and_trees_without_a_resolution_folder(tmp_path):
    for kind, suffix, mode in (("JPEGImages", ".jpg", "RGB"), ("Annotations", ".png", "L"), ("flows", ".png", "RGB")):
        pictures(tmp_path / "DAVIS" / kind / "bear", stems(2), suffix, mode)
    lists = tmp_path / "DAVIS" / "ImageSets" / "2016"
    lists.mkdir(parents=True)
    (lists / "val.txt").write_bytes(b"\xef\xbb\xbfbear\r\n\r\n")
    (bear,) = read_dataset("DAVIS-2016", tmp_path)
    assert bear.stems == bear.annotated == tuple(bear.flows) and bear.flow_dir == tmp_path / "DAVIS" / "flows" / "bear"


@pytest.mark.parametrize("form", ["{0}", "/JPEGImages/480p/{0}/00000.jpg /Annotations/480p/{0}/00000.png "])
def test_davis_lists_of_names_with_spaces(tmp_path, form):
    root = davis(tmp_path / "DAVIS", ["my cat", "dog"], frames=1)
    write(root / "ImageSets" / "2016" / "val.txt", [form.format(name) for name in ("my cat", "dog")])
    cat, dog = read_dataset("DAVIS-2016", tmp_path)
    assert (cat.name, dog.name) == ("my cat", "dog") and cat.annotated == ("00000",)


@pytest.mark.data
def test_real_davis(real_data):
    counts = {}
    for split in ("train", "val"):
        sequences = read_dataset("DAVIS-2016", real_data, split)
        counts[split] = (len(sequences), sum(map(len, sequences)))
        for sequence in sequences:
            assert tuple(sequence.flows) == tuple(sequence.masks) == sequence.stems == sequence.annotated
            assert sequence.flow_dir.is_dir() and sequence.name in DAVIS_2016[split]
    assert counts == {"train": (30, 2079), "val": (8, 452)}
    assert named(read_dataset("DAVIS-2016", real_data, "train")) == DAVIS_2016["train"]
    first = sequences[0]
    mask = load_mask(first.masks["00000"], first.mask_rule)
    assert mask.shape == load_frame(first.frames[0]).shape[:2] == (480, 854) and 0.05 < mask.mean() < 0.2


# --- what every reader refuses ----------------------------------------------------------------------------------------


def listed(tmp_path: Path, names: list[str]) -> Path:
    root = davis(tmp_path / "DAVIS", names)
    write(root / "ImageSets" / "2016" / "val.txt", names)
    return root


def test_a_listed_sequence_without_a_folder(tmp_path):
    root = listed(tmp_path, ["bear"])
    write(root / "ImageSets" / "2016" / "val.txt", ["bear", "absent"])
    with pytest.raises(DataError, match=r"absent.*val\.txt.*JPEGImages/480p/absent"):
        read_dataset("DAVIS-2016", tmp_path)


def test_an_empty_folder(tmp_path):
    root = listed(tmp_path, ["bear"])
    for file in (root / "JPEGImages" / "480p" / "bear").iterdir():
        file.unlink()
    with pytest.raises(DataError, match="bear.*holds no frame"):
        read_dataset("DAVIS-2016", tmp_path)


@pytest.mark.parametrize("folder", ["JPEGImages", "Annotations", "Flows"])
def test_two_files_of_one_stem(tmp_path, folder):
    root = listed(tmp_path, ["bear"])
    existing = next((root / folder / "480p" / "bear").glob("00001.*"))
    twin = existing.with_suffix(".bmp" if folder == "Annotations" else ".png")
    picture(twin)
    with pytest.raises(DataError, match="00001") as caught:
        read_dataset("DAVIS-2016", tmp_path)
    assert existing.name in str(caught.value) and twin.name in str(caught.value)


def test_a_mask_without_a_frame(tmp_path):
    root = listed(tmp_path, ["bear"])
    picture(root / "Annotations" / "480p" / "bear" / "00007.png", 0, "L")
    with pytest.raises(DataError, match=r"00007\.png: a mask without its frame"):
        read_dataset("DAVIS-2016", tmp_path)


def test_a_link_to_nothing_is_not_passed_over(tmp_path):
    """Without the frame and its mask the video would be shorter, and its scores of other frames."""
    root = listed(tmp_path, ["bear"])
    for folder in ("JPEGImages", "Annotations"):
        file = next((root / folder / "480p" / "bear").glob("00001.*"))
        file.unlink()
        file.symlink_to(tmp_path / "unmounted" / file.name)
    (bear,) = read_dataset("DAVIS-2016", tmp_path)
    assert bear.stems == ("00000", "00001", "00002") == bear.annotated
    with pytest.raises(DataError, match="00001.jpg: no such frame, but a link to"):
        load_frame(bear.frames[1])


def test_missing_flow_is_an_error_only_when_asked_for(tmp_path):
    root = listed(tmp_path, ["bear"])
    (root / "Flows" / "480p" / "bear" / "00001.jpg").unlink()
    (bear,) = read_dataset("DAVIS-2016", tmp_path)
    assert tuple(bear.flows) == ("00000", "00002")
    with pytest.raises(DataError, match=r"Flows/480p/bear/00001\.png.*tool\.py --tools flow"):
        bear.flow_path("00001")
    with pytest.raises(DataError, match="no mask"):
        bear.mask_path("00009")


def test_missing_flow_names_the_command_that_makes_it(tmp_path):
    """Of the split and the folders it was read with: without them the command would make that of val, elsewhere."""
    data, flow = tmp_path / "my data", tmp_path / "flow"
    root = listed(data, ["bear"])
    (root / "ImageSets" / "2016" / "train.txt").write_text("bear\n")
    for file in list((root / "Flows").rglob("*.jpg")):
        file.unlink()
    command = f"python tool.py --tools flow --datasets DAVIS-2016 --data_dir '{data}'"
    for split, flow_root, options in (
        ("val", None, ""),
        ("train", None, " --split train"),
        ("train", flow, f" --split train --flow_dir {flow}"),
    ):
        (bear,) = read_dataset("DAVIS", data, split, flow_root=flow_root)
        with pytest.raises(DataError) as caught:
            bear.flow_path("00001")
        assert str(caught.value).endswith(f"Make the flow first: {command}{options}")


def test_missing_data_and_unknown_names(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        read_dataset("DAVIS-2016", tmp_path / "nowhere")
    with pytest.raises(DataError, match="DAVIS-2016 is not under.*JPEGImages"):
        read_dataset("DAVIS-2016", tmp_path)
    with pytest.raises(DataError, match="known: DAVIS-2016"):
        read_dataset("Davos", tmp_path)
    (tmp_path / "FBMS").mkdir()
    with pytest.raises(DataError, match="Looked in .*FBMS, which has another form"):
        read_dataset("FBMS", tmp_path)


def test_problems_can_be_gathered_instead(tmp_path):
    root = listed(tmp_path, ["bear", "bus", "cat", "dog"])
    write(root / "ImageSets" / "2016" / "val.txt", ["bear", "bus", "absent", "cat", "dog"])
    picture(root / "Annotations" / "480p" / "bear" / "00007.png", 0, "L")
    picture(root / "JPEGImages" / "480p" / "bus" / "00001.png")
    for file in (root / "JPEGImages" / "480p" / "cat").iterdir():
        file.unlink()
    problems = []
    sequences = read_dataset("DAVIS-2016", tmp_path, on_problem=lambda name, error: problems.append((name, str(error))))
    assert [name for name, _ in problems] == ["bear", "bus", "absent", "cat"]
    assert named(sequences) == ["bear", "bus", "dog"], "what is left can still be looked at"
    assert sequences[0].annotated == sequences[0].stems == sequences[1].stems == tuple(stems(3))

    problems.clear()
    assert read_dataset("DAVIS-2016", tmp_path, "train", on_problem=lambda *problem: problems.append(problem)) == []
    assert problems and all(isinstance(error, DataError) for _, error in problems)


def test_pairing_is_by_stem_whatever_the_order_and_suffix(tmp_path):
    """Unpadded names sort as numbers, and a gap in the masks shifts nothing."""
    root = tmp_path / "DAVIS"
    names = [str(number) for number in range(1, 12)]
    pictures(root / "JPEGImages" / "480p" / "bear", names, ".JPG")
    pictures(root / "Annotations" / "480p" / "bear", ["2", "10"], ".png", "L")
    pictures(root / "Flows" / "480p" / "bear", ["11", "3"], ".png")
    write(root / "ImageSets" / "2016" / "val.txt", ["bear"])
    (bear,) = read_dataset("DAVIS-2016", tmp_path)
    assert bear.stems == tuple(names)
    assert tuple(bear.masks) == ("2", "10") and tuple(bear.flows) == ("3", "11")
    assert all(path.stem == stem for paths in (bear.masks, bear.flows) for stem, path in paths.items())


def test_natural_order():
    assert sorted(["a10", "a9", "a010", "b1", "10", "9", "a"], key=natural_key) == [
        "9",
        "10",
        "a",
        "a9",
        "a010",
        "a10",
        "b1",
    ]


@pytest.mark.parametrize("folder", ["DAVIS", "davis-2016", "DAVIS2016", "DAVIS-2017/DAVIS", "."])
def test_roots_are_found_by_the_usual_names_or_given_themselves(tmp_path, folder):
    root = davis(tmp_path / folder, ["bear"])
    write(root / "ImageSets" / "2016" / "val.txt", ["bear"])
    assert find_root("DAVIS-2016", tmp_path) == root
    assert named(read_dataset("DAVIS-2016", root)) == ["bear"]


def test_davis_2016_is_preferred_to_davis_2017(tmp_path):
    for folder, name in (("DAVIS-2017", "other"), ("DAVIS", "another"), ("DAVIS-2016", "bear")):
        root = davis(tmp_path / folder, [name])
        write(root / "ImageSets" / "2016" / "val.txt", [name])
    assert named(read_dataset("DAVIS-2016", tmp_path)) == ["bear"]


# --- YouTube-VOS ------------------------------------------------------------------------------------------------------


def youtube(root: Path) -> Path:
    """Two listed videos and one that is not; every frame of the download is a fifth of the source's."""
    for name, count in (("003234408d", 12), ("0043f083b5", 4), ("zz-unlisted", 2)):
        pictures(root / "train" / "JPEGImages" / name, stems(count, step=5))
        pictures(root / "train" / "Annotations" / name, stems(count, step=5)[1::2], ".png", "L")
    pictures(root / "train" / "Flows" / "003234408d", stems(12, step=5))
    write(root / "train" / "meta.json", [json.dumps({"videos": {"0043f083b5": {"objects": {}}, "003234408d": {}}})])
    return root


@pytest.mark.parametrize("folder", ["YouTube-VOS", "YouTubeVOS-2018", "YouTube-VOS-2018"])
def test_youtube_vos_keeps_every_fifth_frame(tmp_path, folder):
    root = youtube(tmp_path / folder)
    first, second = read_dataset("YouTube-VOS-2018", tmp_path, "train")
    assert (first.name, second.name) == ("003234408d", "0043f083b5")
    assert first.stems == ("00000", "00025", "00050") and second.stems == ("00005",)
    assert first.annotated == ("00025",), "sparse: the masks of this tree are at odd positions"
    assert second.annotated == ("00005",), "its first frame has no mask, and thinned out from there it would have none"
    assert tuple(first.flows) == first.stems and first.flow_dir == root / "train" / "Flows" / "003234408d"
    assert first.dataset == "YouTube-VOS-2018" and first.mask_rule == "nonzero"

    every = read_dataset("YouTube-VOS", tmp_path, "train", num_frames=1)
    assert [len(sequence) for sequence in every] == [12, 4]
    assert every[0].annotated == tuple(stems(12, step=5)[1::2])
    assert [len(sequence) for sequence in read_dataset("YouTube-VOS", tmp_path, "train", num_frames=7)] == [2, 1]
    # Of every second frame the even ones are kept, where no mask is: the odd ones are taken instead.
    (odd, _) = read_dataset("YouTube-VOS", tmp_path, "train", num_frames=2)
    assert odd.stems == tuple(stems(12, step=5)[1::2]) == odd.annotated
    # One mask alone, beyond the first five: two frames are kept, in step with it.
    for mask in (root / "train" / "Annotations" / "003234408d").iterdir():
        if mask.stem != "00035":
            mask.unlink()
    assert read_dataset("YouTube-VOS", tmp_path, "train")[0].stems == ("00010", "00035")
    with pytest.raises(DataError, match="num_frames is 0"):
        read_dataset("YouTube-VOS", tmp_path, "train", num_frames=0)


def test_youtube_vos_other_parts_and_broken_ones(tmp_path):
    root = youtube(tmp_path / "YouTube-VOS")
    with pytest.raises(DataError, match="valid/JPEGImages"):
        read_dataset("YouTube-VOS", tmp_path, "val")
    pictures(root / "valid" / "JPEGImages" / "aa", stems(6, step=5))
    pictures(root / "valid" / "Annotations" / "aa", ["00000"], ".png", "L")
    (aa,) = read_dataset("YouTube-VOS", tmp_path, "val", num_frames=1)
    assert len(aa) == 6 and aa.annotated == ("00000",)
    assert len(read_dataset("YouTube-VOS", tmp_path, "val")[0]) == 6, "only training videos are thinned out"

    write(root / "train" / "meta.json", [json.dumps({"videos": {"gone": {}}})])
    with pytest.raises(DataError, match=r"gone.*meta\.json"):
        read_dataset("YouTube-VOS", tmp_path, "train")
    for text in ("{", "[]", '{"objects": 1}'):
        (root / "train" / "meta.json").write_text(text)
        with pytest.raises(DataError, match=r"meta\.json"):
            read_dataset("YouTube-VOS", tmp_path, "train")
    write(root / "train" / "meta.json", [json.dumps({"videos": {}})])
    with pytest.raises(DataError, match="YouTube-VOS-2018: no sequence in the train split"):
        read_dataset("YouTube-VOS", tmp_path, "train")
    (root / "train" / "meta.json").unlink()
    assert len(read_dataset("YouTube-VOS", tmp_path, "train")) == 3


def test_youtube_vos_all_frames_takes_its_masks_from_train(tmp_path):
    root = tmp_path / "YouTube-VOS"
    pictures(root / "train_all_frames" / "JPEGImages" / "aa", stems(11))
    pictures(root / "train" / "Annotations" / "aa", ["00000", "00005", "00010"], ".png", "L")
    (aa,) = read_dataset("YouTube-VOS", tmp_path, "train")
    assert aa.stems == ("00000", "00005", "00010") == aa.annotated


# --- FBMS-59 ----------------------------------------------------------------------------------------------------------


def netpbm(path: Path, colours: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = "P6" if colours.ndim == 3 else "P5"
    path.write_bytes(
        f"{kind}\n{colours.shape[1]} {colours.shape[0]}\n255\n".encode() + colours.astype(np.uint8).tobytes()
    )


def fbms(root: Path, train: str = "Trainingset", test: str = "Testset") -> Path:
    """cats01: colour ground truth with its .pgm twin, PROB files and frames from number 1; cars1 and tennis: grey."""
    grey = np.zeros(SIZE)
    grey[2:4, 3:6] = 200
    colour = np.full((*SIZE, 3), 255)
    colour[1:3, 1:4] = (0, 120, 0)
    cats, cars, tennis = root / test / "cats01", root / test / "cars1", root / test / "tennis"
    pictures(cats, [f"cats01_{number:04d}" for number in range(1, 25)])
    for number in (1, 20):
        netpbm(cats / "GroundTruth" / f"cats01_{number:04d}_gt.ppm", colour)
        netpbm(cats / "GroundTruth" / f"cats01_{number:04d}_gt.pgm", grey)
        netpbm(cats / "GroundTruth" / f"PROB_cats01_{number:04d}_gt.ppm", colour)
        netpbm(cats / "GroundTruth" / f"cats01_{number:04d}_PROB_gt.ppm", colour)
    pictures(cars, [f"cars1_{number:02d}" for number in range(1, 20)])
    netpbm(cars / "GroundTruth" / "cars1_001.pgm", grey)  # the number is padded otherwise
    netpbm(cars / "GroundTruth" / "cars1_10.pgm", grey)
    (cars / "GroundTruth" / "cars1Def.dat").write_text(
        "Total number of regions:\n2\nScale of region 0:\n0\nScale of region 1:\n200\n"
    )
    (cars / "cars1.bmf").write_text("19 1\n")
    pictures(tennis, [f"tennis{number}" for number in range(454, 460)])
    netpbm(tennis / "GroundTruth" / "tennis457.pgm", grey)
    pictures(root / train / "marple13", ["marple13_01", "marple13_02"])
    netpbm(root / train / "marple13" / "GroundTruth" / "marple13_01.pgm", grey)
    return root


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("Trainingset", "Testset"),
        ("FBMS_Trainingset/Trainingset", "FBMS_Testset/Testset"),
        (".", "."),
    ],
)
def test_fbms_native(tmp_path, train, test):
    root = fbms(tmp_path / "FBMS-59", train, test)
    cars, cats, tennis = read_dataset("FBMS", tmp_path, "val")
    assert (cars.name, cats.name, tennis.name) == ("cars1", "cats01", "tennis")
    assert cars.dataset == "FBMS" and {sequence.mask_rule for sequence in (cars, cats, tennis)} == {"fbms"}
    assert len(cars) == 19 and cars.annotated == ("cars1_01", "cars1_10")
    assert cars.masks["cars1_01"].name == "cars1_001.pgm"
    assert len(cats) == 24 and cats.annotated == ("cats01_0001", "cats01_0020")
    assert {path.name for path in cats.masks.values()} == {"cats01_0001_gt.ppm", "cats01_0020_gt.ppm"}
    assert tennis.annotated == ("tennis457",)
    assert load_mask(cats.masks["cats01_0001"], cats.mask_rule).sum() == 6
    assert load_mask(cars.masks["cars1_10"], cars.mask_rule).sum() == 6
    assert cats.flow_dir == root / test / "Flows" / "cats01" and not cats.flows
    pictures(cats.flow_dir, list(cats.stems), ".png")
    assert len(read_dataset("FBMS-59", root, "val")[1].flows) == 24
    assert named(read_dataset("FBMS", tmp_path, "train")) == ["marple13"]
    assert len(read_dataset("FBMS", tmp_path, "trainval")) == 4
    with pytest.raises(DataError, match="no split 'easy'; expected one of train, val"):
        read_dataset("FBMS", tmp_path, "easy")


@pytest.mark.parametrize("masks", ["GroundTruth", "GT", "ground-truth"])
def test_fbms_binary_png_in_the_native_folders(tmp_path, masks):
    root = tmp_path / "FBMS" / "Testset" / "lion01"
    pictures(root, ["lion01_0001", "lion01_0002"])
    pictures(root / masks, ["lion01_0002"], ".png", "L")
    (lion,) = read_dataset("FBMS", tmp_path)
    assert lion.mask_rule == "above_128" and lion.annotated == ("lion01_0002",)


@pytest.mark.parametrize(("frames", "masks"), [("JPEGImages", "Annotations"), ("Imgs", "ground-truth")])
def test_fbms_binary_png_in_flat_folders_is_split_by_name(tmp_path, frames, masks):
    root = tmp_path / "FBMS"
    for name in ("lion01", "lion02"):
        pictures(root / frames / name, stems(3))
        pictures(root / masks / name, stems(2), ".png", "L")
    (lion,) = read_dataset("FBMS", tmp_path)
    assert lion.name == "lion01" and lion.annotated == ("00000", "00001")
    assert lion.flow_dir == root / "Flows" / "lion01"
    assert named(read_dataset("FBMS", tmp_path, "train")) == ["lion02"]


def test_fbms_masks_that_fit_no_frame_or_the_same_frame(tmp_path):
    root = fbms(tmp_path / "FBMS")
    truth = root / "Testset" / "cars1" / "GroundTruth"
    netpbm(truth / "cars1_55.pgm", np.zeros(SIZE))
    with pytest.raises(DataError, match=r"cars1_55\.pgm is a mask without its frame.*numbered 55"):
        read_dataset("FBMS", tmp_path)
    (truth / "cars1_55.pgm").rename(truth / "cars1_0001.pgm")
    with pytest.raises(DataError, match=r"both masks of the frame cars1_01"):
        read_dataset("FBMS", tmp_path)
    (truth / "cars1_0001.pgm").rename(truth / "whole.pgm")  # no number to find a frame by
    expected = rf"whole\.pgm is a mask without its frame; expected a frame whole in {re.escape(str(truth.parent))}$"
    with pytest.raises(DataError, match=expected):
        read_dataset("FBMS", tmp_path)


def test_fbms_with_parts_that_are_missing(tmp_path):
    root = fbms(tmp_path / "FBMS")
    shutil.rmtree(root / "Trainingset")
    with pytest.raises(DataError, match=r"no video of the train part of FBMS; expected Trainingset/<video>/\*\.jpg"):
        read_dataset("FBMS", tmp_path, "train")
    shutil.rmtree(root / "Testset" / "tennis" / "GroundTruth")
    pictures(root / "Testset" / "cars1", ["cover"])  # a frame without a number
    netpbm(root / "Testset" / "cars1" / "GroundTruth" / "cars1_55.pgm", np.zeros(SIZE))
    netpbm(root / "Testset" / "dogs01" / "GroundTruth" / "dogs01_01.pgm", np.zeros(SIZE))  # of a video without frames
    problems = []
    cars, cats, tennis = read_dataset("FBMS", tmp_path, on_problem=lambda name, _: problems.append(name))
    assert cars.annotated == ("cars1_01", "cars1_10") and len(cars) == 20 and not tennis.masks
    assert {"cars1", "dogs01"} == set(problems)


# --- DAVSOD, MCL and other saliency sets ------------------------------------------------------------------------------


def davsod(package: Path, names: list[str]) -> None:
    for name in names:
        pictures(package / name / "Imgs", stems(3, 4, 120), ".png")
        pictures(package / name / "GT_object_level", stems(3, 4, 120), ".png", "L")
        pictures(package / name / "GT_instance_level", stems(3, 4, 120), ".png", "P")
        pictures(package / name / "Fixation_maps", stems(3, 4, 120), ".png", "L")


@pytest.mark.parametrize("nested", ["", "Easy-35"])
def test_davsod_packages(tmp_path, nested):
    root = tmp_path / "DAVSOD"
    davsod(root / "Easy-35" / nested, ["select_0043", "select_0139"])
    davsod(root / "Normal-25", ["select_0001"])
    davsod(root / "DAVSOD-Difficult-20", ["select_0002"])
    davsod(root / "DAVSOD-TrainingSet", ["select_0100"])
    davsod(root / "DAVSOD-ValidationSet", ["select_0200"])
    first, second = read_dataset("DAVSOD", tmp_path)
    assert (first.name, second.name) == ("select_0043", "select_0139")
    assert first.stems == ("0120", "0121", "0122") == first.annotated and first.mask_rule == "above_128"
    assert all("GT_object_level" in path.parts for path in first.masks.values())
    assert first.flow_dir == root / "Easy-35" / nested / "Flows" / "select_0043"
    pictures(first.flow_dir, list(first.stems))
    assert len(read_dataset("DAVSOD", root)) == 2 and len(read_dataset("DAVSOD", root)[0].flows) == 3
    assert named(read_dataset("DAVSOD", tmp_path, "train")) == ["select_0100"]
    assert named(read_dataset("DAVSOD", tmp_path, "validation")) == ["select_0200"]
    assert named(read_dataset("DAVSOD-Normal", tmp_path)) == ["select_0001"]
    (difficult,) = read_dataset("DAVSOD-Difficult-20", tmp_path)
    assert (difficult.name, difficult.dataset) == ("select_0002", "DAVSOD-Difficult")


@pytest.mark.parametrize("outer", ["{}", "DAVSOD-{}"])
def test_davsod_training_and_validation_sets_as_they_unpack(tmp_path, outer):
    """The folder in DAVSOD-TrainingSet.zip is called "Training Set"; some unpack it into another folder."""
    for part, name in (("Training", "select_0100"), ("Validation", "select_0200")):
        package = f"{part} Set" if outer == "{}" else f"{outer.format(part)}Set/{part} Set"
        davsod(tmp_path / "DAVSOD" / package, [name])
    (train,) = read_dataset("DAVSOD", tmp_path, "train")
    assert train.name == "select_0100" and len(train.masks) == 3 and train.flow_dir.parent.parent.name == "Training Set"
    assert named(read_dataset("DAVSOD", tmp_path, "validation")) == ["select_0200"]


def test_davsod_package_given_itself(tmp_path):
    davsod(tmp_path / "Easy-35", ["select_0043"])
    assert named(read_dataset("DAVSOD", tmp_path / "Easy-35")) == ["select_0043"]
    with pytest.raises(DataError, match="DAVSOD-TrainingSet"):
        read_dataset("DAVSOD", tmp_path / "Easy-35", "train")
    with pytest.raises(DataError, match="expected one of val, test"):
        read_dataset("DAVSOD-Normal", tmp_path / "Easy-35", "train")


def test_davsod_given_itself_has_all_its_packages(tmp_path, monkeypatch):
    """Easy-35 is a usual folder of DAVSOD as well, and there is no training set in it."""
    root = tmp_path / "DAVSOD"
    for package, name in (("Easy-35", "select_0043"), ("Training Set", "select_0100"), ("Normal-25", "select_0001")):
        davsod(root / package, [name])
    monkeypatch.chdir(root)
    for itself in (root, Path(".")):
        assert find_root("DAVSOD", itself) == find_root("DAVSOD-Normal", itself) == itself
        assert named(read_dataset("DAVSOD", itself)) == ["select_0043"]
        assert named(read_dataset("DAVSOD", itself, "train")) == ["select_0100"]
        assert named(read_dataset("DAVSOD-Normal", itself)) == ["select_0001"]


def test_davsod_packages_are_not_taken_for_each_other(tmp_path):
    """Figures of Normal-25 would stand in the table as those of DAVSOD, which is Easy-35."""
    for package in ("Easy-35", "Normal-25", "Training Set"):
        davsod(tmp_path / package, ["select_0001"])
    (tmp_path / "link").symlink_to("Normal-25")
    for folder, whose in (
        ("Normal-25", "val split of DAVSOD-Normal"),
        ("link", "val split of DAVSOD-Normal"),
        ("Training Set", "train split of DAVSOD"),
    ):
        with pytest.raises(DataError, match=f"no folder Easy-35 .*this is the {whose}"):
            read_dataset("DAVSOD", tmp_path / folder)
    davsod(tmp_path / "other" / "DAVSOD" / "Training Set", ["select_0001"])
    with pytest.raises(DataError, match="no folder Easy-35 .*, the val part of DAVSOD; unpack it there"):
        read_dataset("DAVSOD", tmp_path / "other")
    assert named(read_dataset("DAVSOD-Normal", tmp_path / "link")) == ["select_0001"]
    assert named(read_dataset("DAVSOD", tmp_path / "Training Set", "train")) == ["select_0001"]


@pytest.mark.parametrize("form", ["{kind}/{video}", "{video}/{kind}"])
@pytest.mark.parametrize("masks", ["GT", "ground-truth"])
def test_mcl(tmp_path, form, masks):
    root = tmp_path / "MCL"
    for video in ("crowd", "road"):
        pictures(root / form.format(kind="Imgs", video=video), stems(9, 3))
        pictures(root / form.format(kind=masks, video=video), ["000", "008"], ".png", "L")
    crowd, road = read_dataset("MCL", tmp_path)
    assert (crowd.name, road.name) == ("crowd", "road") and len(crowd) == 9
    assert crowd.annotated == ("000", "008") and crowd.mask_rule == "above_128"
    assert crowd.flow_dir == root / "Flows" / "crowd"
    with pytest.raises(DataError, match="no split 'train'") as caught:
        read_dataset("MCL", tmp_path, "train")
    for place, kind in re.findall(r"(\w+/(images|labels))/<video>", str(caught.value)):  # what it advises works
        video = "crowd" if place.startswith("train") else "road"
        pictures(root / place / video, stems(3), ".jpg" if kind == "images" else ".png")
    assert named(read_dataset("MCL", tmp_path, "train")) == ["crowd"]
    assert named(read_dataset("MCL", tmp_path)) == ["road"]


@pytest.mark.parametrize("form", ["{kind}/{video}", "{video}/{kind}", "{video}"])
def test_videos_without_frames_are_not_passed_over(tmp_path, form):
    root = tmp_path / "MCL"
    for video in ("crowd", "road"):
        masks = form.replace("{kind}", "GT") if "kind" in form else form + "/GT"
        pictures(root / masks.format(kind="GT", video=video), ["000"], ".png", "L")
    frames = root / form.format(kind="Imgs", video="road")
    pictures(frames, stems(2, 3))
    with pytest.raises(DataError, match="crowd.*(no folder|no frame)"):
        read_dataset("MCL", tmp_path)
    pictures(root / form.format(kind="Imgs", video="crowd"), stems(2, 3))
    assert named(read_dataset("MCL", tmp_path)) == ["crowd", "road"]
    (root / "empty").mkdir()
    for name in (".DS_Store", "Thumbs.db"):
        (root / "empty" / name).write_bytes(b"")
    if not form.startswith("{kind}"):
        with pytest.raises(DataError, match="empty.*(no folder|no frame)"):
            read_dataset("MCL", tmp_path)


def test_folders_of_systems_are_no_videos_and_names_may_begin_with_underscores(tmp_path):
    """As the identifiers of YouTube do, which some sets call their videos by."""
    root = tmp_path / "MCL"
    for name in ("__aB3-x", "_c"):
        pictures(root / "Imgs" / name, stems(2))
        pictures(root / "GT" / name, ["00000"], ".png", "L")
    for name in ("__MACOSX", "@eaDir", ".AppleDouble", "$RECYCLE.BIN"):
        (root / "Imgs" / name / "00000.jpg").mkdir(parents=True)
    assert named(read_dataset("MCL", tmp_path)) == ["__aB3-x", "_c"]


def test_flow_folders_are_no_videos(tmp_path):
    root = tmp_path / "MCL"
    pictures(root / "crowd", stems(2))
    pictures(root / "crowd" / "GT", ["00000"], ".png", "L")
    pictures(root / "Flows" / "crowd", stems(2))
    pictures(root / "flows", stems(2))
    (crowd,) = read_dataset("MCL", tmp_path)
    assert crowd.name == "crowd" and len(crowd.flows) == 2


def test_a_folder_of_other_data_sets_is_not_taken_for_one(tmp_path):
    davis(tmp_path / "DAVIS", ["bear"])
    youtube(tmp_path / "YouTube-VOS")
    for name in ("MCL", "DAVSOD", "FBMS"):
        with pytest.raises(DataError, match=f"{name} is not under"):
            read_dataset(name, tmp_path)


# --- the authors' layout, unknown sets, a folder of frames ------------------------------------------------------------


def authors(root: Path, split: str, names: list[str], flows: str = "flows") -> None:
    for name in names:
        pictures(root / split / "images" / name, stems(6))
        pictures(root / split / flows / name, stems(6))
        pictures(root / split / "labels" / name, stems(6), ".png", "L")


@pytest.mark.parametrize("name", DATASETS)
def test_every_set_is_read_in_the_authors_layout(tmp_path, name):
    root = tmp_path / name
    authors(root, "val", ["goat", "camel"])
    authors(root, "train", ["bear"], "Flows")
    camel, goat = read_dataset(name, tmp_path, "val")
    assert (camel.name, goat.name) == ("camel", "goat")
    assert camel.frames[3] == root / "val" / "images" / "camel" / "00003.jpg"
    assert camel.flow_path("00003") == root / "val" / "flows" / "camel" / "00003.jpg"
    assert camel.mask_path("00003") == root / "val" / "labels" / "camel" / "00003.png"
    (bear,) = read_dataset(name, root, "train")
    kept = 2 if name.startswith("YouTube") else 6
    assert len(bear) == len(bear.flows) == len(bear.masks) == kept
    assert bear.flow_dir == root / "train" / "Flows" / "bear"


def test_a_folder_that_several_sets_may_have_is_a_name_of_one():
    """As an unknown set, DAVIS would be scored on its first and last frames, and its list be another year's."""
    for source in sequences._SOURCES.values():
        for folder in source.folders:
            assert canonical_name(folder) == canonical_name(folder.lower()) and canonical_name(folder) in DATASETS
    assert canonical_name("davis_2017") == "DAVIS-2017" and canonical_name("DAVSOD-master") == "DAVSOD"
    assert canonical_name("DAVIS-trainval") == canonical_name("DAVIS-2017-trainval-480p") == "DAVIS-2016"


def test_the_data_sets_that_are_there(tmp_path):
    assert find_datasets(tmp_path / "nowhere") == find_datasets(tmp_path) == []
    youtube(tmp_path / "YouTube-VOS")
    (tmp_path / "fbms" / "unpacked").mkdir(parents=True)  # nothing that is known: to be told, not passed over
    authors(tmp_path / "DAVIS", "train", ["bear"])  # of 2016 or 2017
    authors(tmp_path / "Mine", "train", ["a"])
    assert find_datasets(tmp_path) == ["DAVIS-2016", "YouTube-VOS-2018", "FBMS"]
    (tmp_path / "DUTS" / "DUTS-TR").mkdir(parents=True)
    assert find_datasets(tmp_path)[-1] == "DUTS-TR" and find_datasets(tmp_path / "DUTS") == ["DUTS-TR"]
    assert find_datasets(tmp_path / "YouTube-VOS") == ["YouTube-VOS-2018"]
    assert find_datasets(tmp_path / "DAVIS") == ["DAVIS-2016"]


def test_authors_layout_with_a_folder_test_in_place_of_val(tmp_path):
    authors(tmp_path / "FBMS", "test", ["goat"])
    for split in ("val", "test"):
        (goat,) = read_dataset("FBMS", tmp_path, split)
        assert goat.frames[0].parent == tmp_path / "FBMS" / "test" / "images" / "goat" and len(goat.masks) == 6
    authors(tmp_path / "FBMS", "val", ["camel"])
    assert named(read_dataset("FBMS", tmp_path)) == ["camel"]


def test_two_videos_of_one_name_in_one_call_are_refused(tmp_path):
    """The results of one would be written over those of the other."""
    authors(tmp_path / "Mine", "train", ["a", "b"])
    authors(tmp_path / "Mine", "val", ["b", "c"])
    assert named(read_dataset("Mine", tmp_path, "train")) == ["a", "b"]
    with pytest.raises(DataError, match="Mine/b: two videos are called so in the trainval split"):
        read_dataset("Mine", tmp_path, "trainval")


def test_authors_layout_names_what_is_missing(tmp_path):
    authors(tmp_path / "FBMS", "val", ["goat"])
    with pytest.raises(DataError, match="train/images"):
        read_dataset("FBMS", tmp_path, "train")
    pictures(tmp_path / "FBMS" / "val" / "labels" / "extra", stems(2), ".png", "L")
    with pytest.raises(DataError, match="extra: no folder .*val/images/extra"):
        read_dataset("FBMS", tmp_path)
    problems = []
    assert named(read_dataset("FBMS", tmp_path, on_problem=lambda name, _: problems.append(name))) == ["goat"]
    assert problems == ["extra"]


def test_sets_that_are_not_known_by_name(tmp_path):
    authors(tmp_path / "Mine", "val", ["a"])
    assert named(read_dataset("Mine", tmp_path)) == ["a"] == named(read_dataset("mine", tmp_path / "Mine"))
    root = davis(tmp_path / "synthetic", ["clip0", "clip1"])
    write(root / "ImageSets" / "2016" / "train.txt", ["clip0"])
    write(root / "ImageSets" / "2016" / "val.txt", ["clip1"])
    (clip,) = read_dataset("synthetic", tmp_path, "train")
    assert (clip.name, clip.dataset, len(clip.flows)) == ("clip0", "synthetic", 3)
    pictures(tmp_path / "ViSal" / "Imgs" / "horse", stems(3))
    pictures(tmp_path / "ViSal" / "GT" / "horse", stems(1), ".png", "L")
    assert named(read_dataset("ViSal", tmp_path)) == ["horse"]


def test_segtrack_v2_as_it_unpacks(tmp_path):
    """Its ImageSets are no lists of DAVIS, and where a video has several objects each has a folder of masks."""
    root = tmp_path / "SegTrackv2"
    girl, drift = root / "JPEGImages" / "girl", root / "JPEGImages" / "drift"
    pictures(girl, ["girl_0001", "girl_0002"], ".bmp")
    pictures(root / "GroundTruth" / "girl", ["girl_0001", "girl_0002"], ".png", "L")
    pictures(drift, ["drift_0", "drift_1", "drift_2"])
    parts = {}
    for number, (name, rows) in enumerate({"1/drift_0.png": 2, "1/drift_1.png": 1, "2/drift_0.bmp": 4}.items()):
        mask = np.zeros(SIZE, dtype=np.uint8)
        mask[number : number + rows, number] = 255
        parts[name] = mask > 0
        file = root / "GroundTruth" / "drift" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask).save(file)
    write(root / "ImageSets" / "all.txt", ["*drift", "*girl"])
    write(root / "ImageSets" / "drift.txt", ["drift/", "drift_0", "drift_1", "drift_2"])

    first, second = read_dataset("SegTrackv2", tmp_path)
    assert (first.name, second.name) == ("drift", "girl") and second.mask_rule == "above_128"
    assert first.stems == ("drift_0", "drift_1", "drift_2") and first.annotated == ("drift_0", "drift_1")
    assert second.stems == second.annotated == ("girl_0001", "girl_0002")
    both = load_mask(first.masks["drift_0"], first.mask_rule)
    np.testing.assert_array_equal(both, parts["1/drift_0.png"] | parts["2/drift_0.bmp"])
    one = load_mask(first.masks["drift_1"], first.mask_rule)
    np.testing.assert_array_equal(one, parts["1/drift_1.png"])

    Image.new("L", (3, 3)).save(root / "GroundTruth" / "drift" / "2" / "drift_1.png")
    with pytest.raises(DataError, match=r"2/drift_1\.png: 3×3 pixels"):
        load_mask(first.masks["drift_1"], first.mask_rule)


def test_known_sets_are_known_in_any_case_and_by_their_folder_names(tmp_path):
    """Their folder is found in any case: as that of an unknown set, training and test videos would be read together,
    and DAVIS scored on its first and last frames.
    """
    for name in ("lion01", "lion02"):
        pictures(tmp_path / "FBMS" / "JPEGImages" / name, stems(3))
        pictures(tmp_path / "FBMS" / "Annotations" / name, stems(2), ".png", "L")
    root = davis(tmp_path / "DAVIS_2016", ["bear"])
    write(root / "ImageSets" / "2016" / "val.txt", ["bear"])
    youtube(tmp_path / "YoutubeVOS-2018")
    youtube(tmp_path / "YouTubeVOS_2019")
    for name in ("fbms", "Fbms-59", "FBMS_59"):
        (lion,) = read_dataset(name, tmp_path)
        assert (lion.name, lion.dataset, lion.mask_rule) == ("lion01", "FBMS", "above_128")
    for name in ("davis-2016", "Davis", "DAVIS_2016", "DAVIS-16", "davis16", "DAVIS-trainval"):
        assert [sequence.dataset for sequence in read_dataset(name, tmp_path)] == ["DAVIS-2016"]
    for name, year in (("YoutubeVOS-2018", 2018), ("ytvos", 2018), ("youtube-vos-2019", 2019)):
        assert {video.dataset for video in read_dataset(name, tmp_path, "train")} == {f"YouTube-VOS-{year}"}
    assert [canonical_name(name) for name in ("Easy-35", "duts-tr", "Mine")] == ["DAVSOD", "DUTS-TR", "Mine"]


def test_a_set_that_is_given_itself_is_no_other_set(tmp_path):
    """Several have one form; by its name a folder is one of them."""
    for video in ("crowd", "road"):
        pictures(tmp_path / "MCL" / video / "Imgs", stems(2))
        pictures(tmp_path / "MCL" / video / "GT", stems(2), ".png", "L")
    davsod(tmp_path / "DAVSOD" / "Easy-35", ["select_0043"])
    davsod(tmp_path / "DAVSOD" / "TrainingSet", ["select_0100"])
    pictures(tmp_path / "FBMS" / "JPEGImages" / "lion01", stems(2))
    pictures(tmp_path / "FBMS" / "Annotations" / "lion01", stems(2), ".png", "L")
    (tmp_path / "link").symlink_to("MCL")
    for folder, itself in (("MCL", "MCL"), ("DAVSOD", "DAVSOD"), ("DAVSOD/Easy-35", "DAVSOD"), ("FBMS", "FBMS")):
        for name in ("DAVIS-2016", "FBMS", "DAVSOD", "MCL"):
            if name == itself:
                assert read_dataset(name, tmp_path / folder)
            else:
                with pytest.raises(DataError, match=f"{name} is not under"):
                    read_dataset(name, tmp_path / folder)
    assert named(read_dataset("MCL", tmp_path / "link")) == ["crowd", "road"]
    with pytest.raises(DataError, match="DAVSOD is not under"):
        read_dataset("DAVSOD", tmp_path / "link")


def test_messages_say_what_to_do(tmp_path):
    """Each error names a path and carries an instruction or an expectation."""
    for name in ("DAVIS-2016", "DAVIS-2017", "YouTube-VOS-2018", "FBMS", "DAVSOD", "MCL", "other"):
        with pytest.raises(DataError) as caught:
            read_dataset(name, tmp_path)
        assert str(tmp_path) in str(caught.value) and re.search("expected|no folder", str(caught.value))


LIST_FOLDERS = ["2016", "480p", "2017", "."]


@pytest.mark.parametrize("folder", LIST_FOLDERS)
def test_lists_of_an_own_set_in_the_form_of_davis(tmp_path, folder):
    """Passed over, they would have all videos scored as those of val, the trained ones too."""
    root = davis(tmp_path / "Mine", ["cat", "dog", "elk"])
    for later in LIST_FOLDERS[LIST_FOLDERS.index(folder) + 1 :]:
        write(root / "ImageSets" / later / "val.txt", ["elk"])
    write(root / "ImageSets" / folder / "train.txt", ["cat", "elk"])
    write(root / "ImageSets" / folder / "val.txt", ["dog"])
    assert named(read_dataset("Mine", tmp_path)) == ["dog"]
    assert named(read_dataset("Mine", tmp_path, "train")) == ["cat", "elk"]
    assert named(read_dataset("Mine", tmp_path, "trainval")) == ["cat", "elk", "dog"]
    (root / "ImageSets" / folder / "val.txt").unlink()
    with pytest.raises(DataError, match=r"val\.txt: no such list; .* has train\.txt"):
        read_dataset("Mine", tmp_path)


@pytest.mark.parametrize("folder", ["2016", "480p"])
def test_lists_of_other_splits_are_not_passed_over(tmp_path, folder):
    root = davis(tmp_path / "Mine", ["cat", "dog"])
    for kind in ("JPEGImages", "Annotations"):  # videos lie directly in them, as in a set that is read without lists
        for name in ("cat", "dog"):
            (root / kind / "480p" / name).rename(root / kind / name)
        (root / kind / "480p").rmdir()
    assert named(read_dataset("Mine", tmp_path)) == ["cat", "dog"]
    write(root / "ImageSets" / folder / "test.txt", ["cat"])
    with pytest.raises(DataError, match=r"val\.txt: no such list; .* has test\.txt"):
        read_dataset("Mine", tmp_path)
