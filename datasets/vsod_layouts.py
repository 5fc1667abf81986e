"""Layouts of the video saliency sets and of FBMS-59: folders of videos, told apart by what their folders are called."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from datasets.errors import DataError
from datasets.video_sequence import (
    FRAME_SUFFIXES,
    MASK_SUFFIXES,
    SPLITS,
    Report,
    VideoSequence,
    build_sequence,
    by_stem,
    folder_names,
    list_files,
    list_folders,
    natural_key,
    object_folders,
    parts_of,
)

FBMS_59 = {
    "train": (
        "bear01 bear02 cars2 cars3 cars6 cars7 cars8 cars9 cats02 cats04 cats05 cats07 ducks01 horses01 horses03 "
        "horses06 lion02 marple1 marple10 marple11 marple13 marple3 marple5 marple8 meerkats01 people04 people05 "
        "rabbits01 rabbits05"
    ).split(),
    "val": (
        "camel01 cars1 cars10 cars4 cars5 cats01 cats03 cats06 dogs01 dogs02 farm01 giraffes01 goats01 horses02 "
        "horses04 horses05 lion01 marple12 marple2 marple4 marple6 marple7 marple9 people03 people1 people2 rabbits02 "
        "rabbits03 rabbits04 tennis"
    ).split(),
}

_FRAME_FOLDERS = ("imgs", "images", "jpegimages", "frames", "frame", "img", "image")
_MASK_FOLDERS = (
    "gt_object_level",
    "ground-truth",
    "groundtruth",
    "ground_truth",
    "gt",
    "annotations",
    "labels",
    "masks",
)
_OTHER_FOLDERS = ("flows", "flow", "imagesets", "gt_instance_level", "fixation_maps", "imgs_fused")

_FBMS_PARTS = {
    "train": ("Trainingset", "FBMS_Trainingset", "FBMS-59_Trainingset", "TrainingSet", "Train"),
    "val": ("Testset", "FBMS_Testset", "FBMS-59_Testset", "TestSet", "Test"),
}
_DAVSOD_PARTS = {
    "train": ("DAVSOD-TrainingSet", "Training Set", "TrainingSet", "Training"),  # the archive, and what is in it
    "validation": ("DAVSOD-ValidationSet", "Validation Set", "ValidationSet", "Validation"),
    "easy": ("Easy-35", "DAVSOD-Easy-35", "DAVSOD-Easy", "Easy"),
    "normal": ("Normal-25", "DAVSOD-Normal-25", "DAVSOD-Normal", "Normal"),
    "difficult": ("Difficult-20", "DAVSOD-Difficult-20", "DAVSOD-Difficult", "Difficult"),
}

_DAVSOD_ASKED_BY = {
    "train": "the train split of DAVSOD",
    "validation": "the validation split of DAVSOD",
    "easy": "the val split of DAVSOD",
    "normal": "the val split of DAVSOD-Normal",
    "difficult": "the val split of DAVSOD-Difficult",
}


@dataclass(frozen=True)
class VideoFolder:
    """Where the files of one video lie."""

    name: str
    frames: Path
    masks: Path | None
    flows: tuple[Path, ...]


def _kind(folder: Path, names: tuple[str, ...]) -> Path | None:
    """The sub-folder that is called one of `names` in any case, by their order."""
    present = {child.name.lower(): child for child in list_folders(folder)}
    return next((present[name] for name in names if name in present), None)


def _is_empty(folder: Path) -> bool:
    """Whether there is nothing in it but what file managers leave behind."""
    return all(child.name[0] == "." or child.name.lower() in ("thumbs.db", "desktop.ini") for child in folder.iterdir())


def find_videos(root: Path) -> list[VideoFolder]:
    """Videos of a folder, in any of three forms; the first form that fits any video is the one.

    `<root>/Imgs/<video>/*` with `<root>/GT/<video>/*`; `<root>/<video>/Imgs/*` with `<root>/<video>/GT_object_level/*`;
    `<root>/<video>/*` with `<root>/<video>/GroundTruth/*`. The folders go by any of the usual names (JPEGImages,
    images, frames …; ground-truth, Annotations, labels …). Flow: `<root>/Flows/<video>/<stem>.png|.jpg` in all of
    them, where `tool.py --tools flow` writes it; `<root>/flows/<video>`, `<video>/Flows` and `<video>/flows` are read
    too.

    A video that has masks and no frames, or nothing at all, is in the list like the others, so that reading it says so.
    """
    frames_root, masks_root = _kind(root, _FRAME_FOLDERS), _kind(root, _MASK_FOLDERS)
    if frames_root is not None and (videos := list_folders(frames_root)):
        annotated = list_folders(masks_root) if masks_root else []
        return [
            VideoFolder(
                name,
                frames=frames_root / name,
                masks=masks_root / name if masks_root else None,
                flows=(root / "Flows" / name, root / "flows" / name),
            )
            for name in dict.fromkeys(video.name for video in (*videos, *annotated))
        ]
    reserved = (*_FRAME_FOLDERS, *_MASK_FOLDERS, *_OTHER_FOLDERS)
    videos = [folder for folder in list_folders(root) if folder.name.lower() not in reserved]
    # An Imgs folder with folders in it is a whole data set, not a video.
    frames_of = {
        video: frames
        for video in videos
        if (frames := _kind(video, _FRAME_FOLDERS)) is not None and not list_folders(frames)
    }
    usual = next((frames.name for frames in frames_of.values()), "")
    if not frames_of:
        frames_of = {video: video for video in videos if list_files(video, FRAME_SUFFIXES)}
    if frames_of:
        for video in videos:
            if video not in frames_of and (_kind(video, _MASK_FOLDERS) is not None or _is_empty(video)):
                frames_of[video] = video / usual
    return [
        VideoFolder(
            video.name,
            frames=frames,
            masks=_kind(video, _MASK_FOLDERS),
            flows=(root / "Flows" / video.name, root / "flows" / video.name, video / "Flows", video / "flows"),
        )
        for video, frames in sorted(frames_of.items(), key=lambda item: natural_key(item[0].name))
    ]


def _sequences(videos: list[VideoFolder], dataset: str, report: Report) -> list[VideoSequence]:
    found = [
        build_sequence(video.name, dataset, video.frames, video.flows, *_masks(video, report), report)
        for video in videos
    ]
    return [sequence for sequence in found if sequence is not None]


def _masks(video: VideoFolder, report: Report) -> tuple[Path | dict[str, Path] | None, str]:
    """The masks of one video as `build_sequence` takes them, and the rule that reads them."""
    objects = object_folders(video.masks) if video.masks and not list_files(video.masks, MASK_SUFFIXES) else []
    if not objects:
        return video.masks, "above_128"
    masks: dict[str, Path] = {}
    for folder in objects:  # the first that has a frame stands for all
        masks = {**by_stem(list_files(folder, MASK_SUFFIXES), video.name, report), **masks}
    return masks, "objects"


def _part(root: Path, names: tuple[str, ...]) -> Path | None:
    """The folder of a part of a data set, entered once more where an archive was unpacked into a folder of its own."""
    wanted = [name.lower() for name in names]
    outer = [folder for folder in list_folders(root) if folder.name.lower() in wanted]
    inner = [folder for parent in outer for folder in list_folders(parent) if folder.name.lower() in wanted]
    return next((folder for folder in (*outer, *inner) if find_videos(folder)), None)


def has_videos_with_masks(root: Path) -> bool:
    """Whether a folder holds videos of which at least one has a folder of masks."""
    return any(video.masks is not None for video in find_videos(root))


def read_videos(root: Path, split: str, report: Report, dataset: str, num_frames: int) -> list[VideoSequence]:
    """A set that has a test part only (MCL, ViSal, SegTrack v2 …): every video of the folder, see `find_videos`.

    Where each object of a video has masks of its own, in `<masks>/1/*`, `<masks>/2/*` and so on, they are merged.
    """
    if split not in ("val", "test"):
        raise DataError(
            f"{dataset}: no split {split!r}; {root} holds one set of videos, which is for evaluation (split val). To "
            "train on some of them, lay those out as train/images/<video> and train/labels/<video>, and the others as "
            "val/images/<video> and val/labels/<video>"
        )
    return _sequences(find_videos(root), dataset, report)


# --- DAVSOD -----------------------------------------------------------------------------------------------------------


def has_davsod(root: Path) -> bool:
    """Whether a folder holds one of the DAVSOD packages, or the videos of one."""
    return any(_part(root, names) is not None for names in _DAVSOD_PARTS.values()) or has_videos_with_masks(root)


def read_davsod(root: Path, split: str, report: Report, dataset: str, num_frames: int) -> list[VideoSequence]:
    """DAVSOD: `<package>/<video>/Imgs/*` with `<package>/<video>/GT_object_level/*.png`.

    Packages: Training Set (split train), Validation Set (split validation), and the test sets, each the
    split val or test of a name of its own: Easy-35 is DAVSOD, as in papers; Normal-25 is DAVSOD-Normal; Difficult-20 is
    DAVSOD-Difficult. Flow: `<package>/Flows/<video>/<stem>.png|.jpg`.
    """
    test_part = {"DAVSOD-Normal": "normal", "DAVSOD-Difficult": "difficult"}.get(dataset, "easy")
    splits = {"val": test_part, "test": test_part}
    if dataset == "DAVSOD":
        splits.update(train="train", validation="validation")
    part = parts_of(split, splits, dataset)
    names = _DAVSOD_PARTS[part]
    called = folder_names(root)
    itself = next((part for part, usual in _DAVSOD_PARTS.items() if called & {name.lower() for name in usual}), None)
    folder = _part(root, names)
    # Videos that lie in DAVSOD itself are those of Easy-35, but not the videos of another package.
    if folder is None and part == (itself or "easy") and find_videos(root):
        folder = root
    if folder is None:
        advice = "unpack it there"
        if itself:
            advice = f"this is {_DAVSOD_ASKED_BY[itself]}. Put the packages side by side into one folder, DAVSOD"
        raise DataError(f"{root}: no folder {' or '.join(names)}, the {split} part of {dataset}; {advice}")
    return _sequences(find_videos(folder), dataset, report)


# --- FBMS-59 ----------------------------------------------------------------------------------------------------------


def has_fbms(root: Path) -> bool:
    """Whether a folder is FBMS-59: videos in it, or in its Trainingset or Testset, of which at least one is called as
    there. DAVSOD has a TrainingSet as well.
    """
    parts = [root, *(_part(root, names) for names in _FBMS_PARTS.values())]
    videos = [video.name for part in parts if part is not None for video in find_videos(part)]
    return not {*FBMS_59["train"], *FBMS_59["val"]}.isdisjoint(videos)


def read_fbms(root: Path, split: str, report: Report, dataset: str, num_frames: int) -> list[VideoSequence]:
    """FBMS-59, native or as binary PNG; only some frames have a mask.

    Native: `Trainingset|Testset/<video>/<video>_0001.jpg` with `<video>/GroundTruth/` of `<video>_0001_gt.ppm` or
    `<video>_01.pgm` and `<video>Def.dat`. A mask is paired with the frame of its stem, `_gt` aside, or else of the
    number that ends its stem. Where a frame has a .ppm and a .pgm the .ppm counts, since the .pgm beside it drops
    objects; files with PROB in their name are soft versions and are ignored. Binary PNG: the same folders, or any form
    of `find_videos`. Without Trainingset and Testset the split is by the names of the 29 training and 30 test videos.
    Flow: `Testset/Flows/<video>/<stem>.png|.jpg`, or `Flows/<video>/…` where there is no Testset.
    """
    found = []
    for part in parts_of(split, SPLITS, dataset):
        folder = _part(root, _FBMS_PARTS[part])
        if folder is not None:
            videos = find_videos(folder)
        else:
            videos = [video for video in find_videos(root) if video.name in FBMS_59[part]]
        if not videos:
            raise DataError(
                f"{root}: no video of the {part} part of {dataset}; expected {_FBMS_PARTS[part][0]}/<video>/*.jpg, or "
                f"folders called {', '.join(FBMS_59[part][:3])} …"
            )
        for video in videos:
            masks, rule = _fbms_masks(video, dataset, report)
            sequence = build_sequence(video.name, dataset, video.frames, video.flows, masks, rule, report)
            if sequence is not None:
                found.append(sequence)
    return found


def _last_number(stem: str) -> int | None:
    digits = re.findall(r"\d+", stem)
    return int(digits[-1]) if digits else None


def _fbms_masks(video: VideoFolder, dataset: str, report: Report) -> tuple[dict[str, Path], str]:
    """Masks of one FBMS video by frame stem, and the rule that reads them."""
    if video.masks is None:
        return {}, "fbms"
    native = [file for file in list_files(video.masks, (".ppm", ".pgm")) if "PROB" not in file.name.upper()]
    rule = "fbms" if native else "above_128"
    files = sorted(native, key=lambda file: file.suffix.lower() != ".ppm") or list_files(video.masks, MASK_SUFFIXES)

    stems = [file.stem for file in list_files(video.frames, FRAME_SUFFIXES)]
    numbered: dict[int, list[str]] = {}
    for stem in stems:
        if (number := _last_number(stem)) is not None:
            numbered.setdefault(number, []).append(stem)

    masks: dict[str, Path] = {}
    for file in files:
        name = file.stem.removesuffix("_gt")
        number = _last_number(name)
        candidates = [name] if name in stems else [] if number is None else numbered.get(number, [])
        if len(candidates) != 1:
            message = (
                f"{dataset}/{video.name}: {file} is a mask without its frame; expected a frame {name} in {video.frames}"
            )
            if number is not None:
                message += f", or one frame numbered {number}, of which there are {len(candidates)}"
            report(video.name, DataError(message))
            continue
        first = masks.setdefault(candidates[0], file)
        if first is not file and first.suffix.lower() == file.suffix.lower():
            message = (
                f"{dataset}/{video.name}: {first} and {file.name} are both masks of the frame {candidates[0]}; "
                "expected one. Remove one of the two"
            )
            report(video.name, DataError(message))
    return {stem: masks[stem] for stem in stems if stem in masks}, rule
