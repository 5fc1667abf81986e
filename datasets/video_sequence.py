"""One video of a data set, its files paired by stem and not decoded; and the walking of folders that readers share."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from datasets.errors import DataError

FRAME_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".webp", ".tif", ".tiff")
FLOW_SUFFIXES = (".png", ".jpg", ".jpeg")
MASK_SUFFIXES = (".png", ".bmp")

# Of most data sets, each with its parts.
SPLITS = {"train": ("train",), "val": ("val",), "test": ("val",), "trainval": ("train", "val")}

# What a reader calls with (sequence name or "", problem). If it returns, reading goes on without the broken part.
Report = Callable[[str, DataError], None]


def raise_problem(sequence: str, error: DataError) -> None:
    """The default `Report`: the first problem ends the reading."""
    raise error


@dataclass(frozen=True)
class VideoSequence:
    """The files of one video.

    Attributes:
        name: folder name of the video, unique within its data set.
        dataset: name of the data set, as the results folder spells it.
        frames: frame images in time order (natural order of their names).
        flows: flow image by frame stem; only those that exist.
        masks: annotation by frame stem; only those that exist (FBMS, MCL and YouTube-VOS annotate some frames only).
        mask_rule: how `datasets.images.load_mask` reads them: "nonzero", "above_128", "objects" or "fbms".
        flow_dir: folder where the flow images are, or where `tool.py --tools flow` writes them.
        flow_command: the command that makes its flow, for errors; `read_dataset` fills in where the data lie.
    """

    name: str
    dataset: str
    frames: tuple[Path, ...]
    flows: dict[str, Path]
    masks: dict[str, Path]
    mask_rule: str
    flow_dir: Path
    flow_command: str = field(default="python tool.py --tools flow", compare=False)

    def __len__(self) -> int:
        return len(self.frames)

    @cached_property
    def stems(self) -> tuple[str, ...]:
        """Frame names without suffix, in time order; the keys of `flows` and `masks`, and the names of result files."""
        return tuple(frame.stem for frame in self.frames)

    @cached_property
    def annotated(self) -> tuple[str, ...]:
        """Stems of the frames that have a mask, in time order."""
        return tuple(stem for stem in self.stems if stem in self.masks)

    def flow_path(self, stem: str) -> Path:
        """The flow image of a frame. Raises DataError where there is none."""
        if stem in self.flows:
            return self.flows[stem]
        raise DataError(
            f"{self.dataset}/{self.name}: frame {stem} has no flow image; expected {self.flow_dir / stem}.png "
            f"or .jpg. Make the flow first: {self.flow_command}"
        )

    def mask_path(self, stem: str) -> Path:
        """The annotation of a frame. Raises DataError where there is none."""
        if stem in self.masks:
            return self.masks[stem]
        raise DataError(
            f"{self.dataset}/{self.name}: frame {stem} has no mask; {len(self.masks)} of its {len(self.frames)} frames "
            "have one"
        )


def flow_command(dataset: str, data_dir: Path | str, split: str, flow_root: Path | str | None = None) -> str:
    """The command that makes the flow of a split of a data set, of the arguments of `datasets.read_dataset`."""
    words = ["python", "tool.py", "--tools", "flow", "--datasets", dataset, "--data_dir", str(data_dir)]
    if split != "val":  # which the tools take by default
        words += ["--split", split]
    if flow_root is not None:
        words += ["--flow_dir", str(flow_root)]
    return shlex.join(words)


def natural_key(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key that reads runs of digits as numbers: 2 before 10, whether or not the names are zero-padded."""
    parts = re.findall(r"\d+|\D+", name)
    return tuple((0, int(part), part) if part.isdecimal() else (1, 0, part) for part in parts)


# Folders that archives and file servers add, in small letters. Not all that begin with "__", as names of videos may.
_NO_VIDEOS = ("__macosx", "__pycache__", "@eadir", "$recycle.bin", "system volume information", "lost+found")


def list_folders(folder: Path) -> list[Path]:
    """Sub-folders in natural order, without hidden ones and those that come with a system and not with the data; empty
    where `folder` does not exist.
    """
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    return [folder / name for name in sorted(names, key=natural_key) if name.lower() not in _NO_VIDEOS]


def folder_names(folder: Path) -> set[str]:
    """What a folder is called, in small letters: "." has a name, and a link has two."""
    return {folder.absolute().name.lower(), folder.resolve().name.lower()}


def list_files(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """Files with one of the suffixes (any case) in natural order, without hidden ones; empty where there is no folder.

    Hidden files are left out because archives made on macOS hold a `._00000.jpg` beside each `00000.jpg`. A link to
    nothing is listed: whoever opens it says so, where a frame left out would shorten the video without a word.
    """
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        names = [
            entry.name
            for entry in entries
            if not entry.name.startswith(".") and entry.name.lower().endswith(tuple(suffixes)) and not entry.is_dir()
        ]
    return [folder / name for name in sorted(names, key=natural_key)]


def object_folders(masks: Path) -> list[Path]:
    """The folders 1, 2 … of a folder of masks, where each object has masks of its own, as in SegTrack v2."""
    return [folder for folder in list_folders(masks) if folder.name.isdecimal()]


def by_stem(files: Iterable[Path], sequence: str, report: Report) -> dict[str, Path]:
    """Files keyed by stem. Two files of one stem are a problem: either could be meant. The first one is kept."""
    found: dict[str, Path] = {}
    for file in files:
        first = found.setdefault(file.stem, file)
        if first is not file:
            report(
                sequence,
                DataError(
                    f"{file.parent}: {first.name} and {file.name} share the stem {file.stem}, and files are paired by "
                    "stem; expected one file per frame. Remove one of the two"
                ),
            )
    return found


def parts_of(split: str, splits: dict[str, Any], dataset: str) -> Any:
    """What a split of a data set is made of. Raises DataError for one that it does not have."""
    if split not in splits:
        raise DataError(f"{dataset}: no split {split!r}; expected one of {', '.join(splits)}")
    return splits[split]


def first_folder(candidates: Sequence[Path]) -> Path:
    """The first candidate that exists, otherwise the first."""
    return next((folder for folder in candidates if folder.is_dir()), candidates[0])


def build_sequence(
    name: str,
    dataset: str,
    frame_dir: Path,
    flow_dirs: Sequence[Path],
    masks: Path | dict[str, Path] | None,
    mask_rule: str,
    report: Report = raise_problem,
    listed_in: Path | None = None,
    keep_every: int = 1,
) -> VideoSequence | None:
    """Pair the frames, flows and masks of one video by stem.

    Args:
        frame_dir: folder of the frames.
        flow_dirs: where its flow may lie; the first that exists is read, and the first of all is where flow is written.
        masks: folder of the masks, or masks by frame stem, or None.
        listed_in: the list file that names this sequence, for the error.
        keep_every: keep every so-maniest frame, beginning with the first; where that would lose all labels, with the
            first that keeps one.

    Returns:
        None where there is no frame at all and `report` returned.

    Raises:
        DataError: through `report`: no folder or no frame; two files of one stem; a mask of no frame.
    """
    origin = f" (listed in {listed_in})" if listed_in else ""
    if not frame_dir.is_dir():
        report(
            name,
            DataError(
                f"{dataset}/{name}{origin}: no folder {frame_dir}; expected its frames there. Unpack them, or take the "
                "sequence off the list"
            ),
        )
        return None
    frames = by_stem(list_files(frame_dir, FRAME_SUFFIXES), name, report)
    if not frames:
        report(
            name,
            DataError(
                f"{dataset}/{name}{origin}: {frame_dir} holds no frame; expected image files "
                f"({', '.join(FRAME_SUFFIXES)}). Unpack the data again"
            ),
        )
        return None

    if masks is None:
        masks = {}
    elif isinstance(masks, Path):
        masks = by_stem(list_files(masks, MASK_SUFFIXES), name, report)
    for stem in [stem for stem in masks if stem not in frames]:
        report(
            name,
            DataError(
                f"{masks[stem]}: a mask without its frame; expected a frame {stem} in {frame_dir} "
                f"(it has {next(iter(frames))} … {next(reversed(frames))}). Masks and frames are paired by stem"
            ),
        )

    flow_dir = first_folder(flow_dirs)
    flows = by_stem(list_files(flow_dir, FLOW_SUFFIXES), name, report)
    first = 0
    if masks and not any(stem in masks for stem in list(frames)[::keep_every]):
        # Labels that lie between the frames to be kept: begin later, with one of them among those kept.
        first = next(index for index, stem in enumerate(frames) if stem in masks) % keep_every
    kept = list(frames)[first::keep_every]
    return VideoSequence(
        name=name,
        dataset=dataset,
        frames=tuple(frames[stem] for stem in kept),
        flows={stem: flows[stem] for stem in kept if stem in flows},
        masks={stem: masks[stem] for stem in kept if stem in masks},
        mask_rule=mask_rule,
        flow_dir=flow_dir,
    )
