"""The layouts that data sets come in, one reader per data set. Each returns what it found, paired by stem, undecoded.

A reader takes the root of the data set, the split, a `Report`, which is told about each problem, the name that the
sequences shall carry, and `num_frames`, which only YouTube-VOS heeds. `vsod_layouts` has FBMS-59, DAVSOD and MCL.
"""

from __future__ import annotations

import json
import re
from pathlib import Path, PurePosixPath

from datasets.errors import DataError
from datasets.video_sequence import SPLITS, Report, VideoSequence, build_sequence, list_folders, parts_of

DAVIS_2016 = {
    "train": (
        "bear bmx-bumps boat breakdance-flare bus car-turn dance-jump dog-agility drift-turn elephant flamingo hike "
        "hockey horsejump-low kite-walk lucia mallard-fly mallard-water motocross-bumps motorbike paragliding rhino "
        "rollerblade scooter-gray soccerball stroller surf swing tennis train"
    ).split(),
    "val": (
        "blackswan bmx-trees breakdance camel car-roundabout car-shadow cows dance-twirl dog drift-chicane "
        "drift-straight goat horsejump-high kite-surf libby motocross-jump paragliding-launch parkour "
        "scooter-black soapbox"
    ).split(),
}
_LIST_FOLDERS = ("2016", "480p")  # of ImageSets, for DAVIS-2016
_OWN_LIST_FOLDERS = (*_LIST_FOLDERS, "2017", ".")  # for a set of another name


def read_list(path: Path, report: Report) -> dict[str, list[str]]:
    """Sequence names of a list file in its order, each with the frame stems that the list names, if any.

    Two forms: a sequence name per line, or `/JPEGImages/480p/bear/00000.jpg /Annotations/480p/bear/00000.png` per line.
    Names may have spaces.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot read this list of sequences: {error}") from error
    sequences: dict[str, list[str]] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        entry = PurePosixPath(re.split(r"\s+/?Annotations/", line.strip())[0])
        if len(entry.parts) == 1 and entry.name not in ("", ".", ".."):
            sequences.setdefault(entry.name, [])
        elif "JPEGImages" in entry.parts[:-2]:
            sequences.setdefault(entry.parent.name, []).append(entry.stem)
        else:
            expected = "expected a sequence name, or /JPEGImages/480p/NAME/00000.jpg and its mask"
            report("", DataError(f"{path}, line {number}: {line.strip()!r}; {expected}"))
    if not sequences:
        report("", DataError(f"{path}: names no sequence; expected one per line"))
    return sequences


SequenceList = tuple[Path | None, dict[str, list[str]]]  # the list file, and what `read_list` makes of it


def _lists(root: Path, folders: tuple[str, ...], parts: tuple[str, ...], report: Report) -> list[SequenceList] | None:
    """The list files of a split from the first of the ImageSets folders that exists; None where none of them does."""
    folder = next((root / "ImageSets" / name for name in folders if (root / "ImageSets" / name).is_dir()), None)
    if folder is None:
        return None
    found: list[SequenceList] = []
    for part in parts:
        path = folder / f"{part}.txt"
        if path.is_file():
            found.append((path, read_list(path, report)))
        else:
            present = ", ".join(sorted(file.name for file in folder.glob("*.txt"))) or "nothing"
            report("", DataError(f"{path}: no such list; {folder} has {present}. Choose a split that it has"))
    return found


def _resolution(folder: Path) -> str:
    """Resolution folder within JPEGImages: 480p where there is one, "" where the sequences lie directly in it."""
    for name in ("480p", "1080p", "Full-Resolution"):
        if (folder / name).is_dir():
            return name
    return ""


def _davis_sequences(root: Path, dataset: str, lists: list[SequenceList], report: Report) -> list[VideoSequence]:
    resolution = _resolution(root / "JPEGImages")
    found = []
    for path, names in lists:
        for name, stems in names.items():
            sequence = build_sequence(
                name,
                dataset,
                frame_dir=root / "JPEGImages" / resolution / name,
                flow_dirs=[root / folder / resolution / name for folder in ("Flows", "flows")],
                masks=root / "Annotations" / resolution / name,
                mask_rule="nonzero",
                report=report,
                listed_in=path,
            )
            if sequence is None:
                continue
            absent = sorted(set(stems) - set(sequence.stems))
            if absent:
                message = (
                    f"{dataset}/{name}: {path} lists {len(absent)} frame(s) that {sequence.frames[0].parent} lacks, "
                    f"the first is {absent[0]}; unpack the data again"
                )
                report(name, DataError(message))
            found.append(sequence)
    return found


def read_davis_2016(root: Path, split: str, report: Report, dataset: str, num_frames: int) -> list[VideoSequence]:
    """DAVIS-2016, from its own release or from a DAVIS-2017 tree.

    The list is `ImageSets/2016/<split>.txt` (names) or else `ImageSets/480p/<split>.txt` (pairs of files). In a tree of
    neither, which is DAVIS-2017's, it is the 50 sequences of 2016; the indexed masks are merged by the rule "nonzero".
    Flow: `Flows/480p/<sequence>/<stem>.png|.jpg` (or `flows/…`) beside `JPEGImages`.
    """
    parts = parts_of(split, SPLITS, dataset)
    lists = _lists(root, _LIST_FOLDERS, parts, report)
    if lists is None:
        lists = [(None, {name: [] for name in DAVIS_2016[part]}) for part in parts]
    return _davis_sequences(root, dataset, lists, report)


def read_davis_2017(root: Path, split: str, report: Report, dataset: str, num_frames: int) -> list[VideoSequence]:
    """DAVIS-2017 by `ImageSets/2017/<split>.txt`: train, val, trainval, test-dev, test-challenge. Objects are merged.

    Flow: as in DAVIS-2016.
    """
    splits = {**SPLITS, "test-dev": ("test-dev",), "test-challenge": ("test-challenge",)}
    parts = parts_of(split, splits, dataset)
    lists = _lists(root, ("2017",), parts, report) or []
    return _davis_sequences(root, dataset, lists, report)


def has_davis_2016(root: Path) -> bool:
    """Whether a folder is a DAVIS tree that DAVIS-2016 can be read from."""
    return bool(list_folders(root / "JPEGImages"))


def read_davis_lists(root: Path, split: str, report: Report, dataset: str, num_frames: int) -> list[VideoSequence]:
    """A set of any name in DAVIS's form, by `<split>.txt` in `ImageSets/2016`, `480p`, `2017` or `ImageSets` itself.

    The first of these folders that has lists is taken. Objects are merged. Flow: as in DAVIS-2016.
    """
    folders = tuple(name for name in _OWN_LIST_FOLDERS if _has_lists(root, name))
    lists = _lists(root, folders, parts_of(split, SPLITS, dataset), report) or []
    return _davis_sequences(root, dataset, lists, report)


def has_davis_lists(root: Path) -> bool:
    """Whether a folder is a tree of DAVIS's form with lists of its own, and not with those of another form: SegTrack v2
    has ImageSets too.
    """
    return has_davis_2016(root) and any(_has_lists(root, name) for name in _OWN_LIST_FOLDERS)


def _has_lists(root: Path, name: str) -> bool:
    """Whether this folder of ImageSets is for the lists of splits: by its name, whatever it holds, or by a list."""
    folder = root / "ImageSets" / name
    if name in _LIST_FOLDERS:
        return folder.is_dir()
    return any((folder / f"{part}.txt").is_file() for part in ("train", "val"))


def has_davis_2017(root: Path) -> bool:
    """Whether a folder is a DAVIS-2017 tree."""
    return (root / "JPEGImages").is_dir() and (root / "ImageSets" / "2017").is_dir()


# --- YouTube-VOS ------------------------------------------------------------------------------------------------------

_YOUTUBE_PARTS = {
    "train": ("train", "train_all_frames"),
    "val": ("valid", "valid_all_frames", "val"),
    "test": ("test",),
}


def has_youtube_vos(root: Path) -> bool:
    """Whether a folder is a YouTube-VOS tree."""
    return any((root / part / "JPEGImages").is_dir() for parts in _YOUTUBE_PARTS.values() for part in parts)


def read_youtube_vos(root: Path, split: str, report: Report, dataset: str, num_frames: int) -> list[VideoSequence]:
    """YouTube-VOS-2018: `train/JPEGImages/<video>/*.jpg` with `train/Annotations/<video>/*.png` (indexed, merged).

    The videos are those of `train/meta.json`, or all folders where that is missing. Of each training video
    every `num_frames`-th frame is kept, beginning with the first, or, where that would lose all masks, so that the
    first mask is kept; frames may lack one. The split val is `valid/`, which publishes the masks of first appearances
    only. Flow: `train/Flows/<video>/<stem>.png|.jpg` (or `train/flows/…`). It is to be made with `num_frames=1`,
    between neighbouring frames of the download, whatever is kept of it later.
    """
    parts = [root / part for part in parts_of(split, _YOUTUBE_PARTS, dataset)]
    if num_frames < 1:
        raise DataError(f"num_frames is {num_frames}; expected 1 (every frame) or more")
    part = next((part for part in parts if (part / "JPEGImages").is_dir()), None)
    if part is None:
        raise DataError(f"{root}: no {parts[0].name}/JPEGImages, the {split} part of {dataset}; unpack it there")
    annotations = part / "Annotations"
    if not annotations.is_dir():
        annotations = parts[0] / "Annotations"  # train_all_frames has frames only
    meta = next((file for file in (part / "meta.json", parts[0] / "meta.json") if file.is_file()), None)
    names = _youtube_videos(meta) if meta else [folder.name for folder in list_folders(part / "JPEGImages")]
    found = [
        build_sequence(
            name,
            dataset,
            frame_dir=part / "JPEGImages" / name,
            flow_dirs=[part / "Flows" / name, part / "flows" / name],
            masks=annotations / name,
            mask_rule="nonzero",
            report=report,
            listed_in=meta,
            keep_every=num_frames if split == "train" else 1,
        )
        for name in names
    ]
    return [sequence for sequence in found if sequence is not None]


def _youtube_videos(meta: Path) -> list[str]:
    """Video names of a `meta.json`: `{"videos": {name: {"objects": …}}}`."""
    try:
        videos = json.loads(meta.read_text(encoding="utf-8"))["videos"]
        return sorted(videos)
    except (OSError, ValueError, KeyError, TypeError) as error:
        message = f"{meta}: not the list of videos of YouTube-VOS ({type(error).__name__}: {error})"
        raise DataError(f'{message}; expected {{"videos": {{name: …}}}}. Unpack it again') from error


# --- The authors' own layout, and a folder of frames ------------------------------------------------------------------


def has_authors_layout(root: Path) -> bool:
    """Whether a folder has `train/images` or `val/images` (or `test/images`) with videos in it."""
    return any(list_folders(root / part / "images") for part in ("train", "val", "test"))


def read_authors_layout(
    root: Path, split: str, report: Report, dataset: str, num_frames: int, mask_rule: str
) -> list[VideoSequence]:
    """The layout that DBSNet's authors use for every set: `<train|val>/<images|flows|labels>/<video>/<stem>`.

    Flow: `<train|val>/flows/<video>/<stem>.jpg|.png`, where `tool.py --tools flow` writes it too (`Flows/` is read as
    well). Of YouTube-VOS, every `num_frames`-th frame of a training video is kept, as in the native layout.
    """
    found = []
    for part in parts_of(split, SPLITS, dataset):
        folder = root / part
        if part == "val" and not (folder / "images").is_dir():
            folder = root / "test"
        names = {video.name: None for kind in ("images", "labels") for video in list_folders(folder / kind)}
        if not names:
            raise DataError(f"{dataset}: no video in {root / part / 'images'}; expected a folder of frames per video")
        for name in names:
            sequence = build_sequence(
                name,
                dataset,
                frame_dir=folder / "images" / name,
                flow_dirs=[folder / "flows" / name, folder / "Flows" / name],
                masks=folder / "labels" / name,
                mask_rule=mask_rule,
                report=report,
                keep_every=num_frames if part == "train" and dataset.startswith("YouTube-VOS") else 1,
            )
            if sequence is not None:
                found.append(sequence)
    return found
