"""Finding a data set under a folder and reading its videos: `read_dataset`."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from datasets import layouts, vsod_layouts
from datasets.errors import DataError
from datasets.stills import STILL_SETS, has_stills
from datasets.video_sequence import (
    FLOW_SUFFIXES,
    Report,
    VideoSequence,
    by_stem,
    flow_command,
    folder_names,
    list_files,
    list_folders,
    raise_problem,
)

__all__ = ["DATASETS", "VideoSequence", "find_root", "read_dataset"]


@dataclass(frozen=True)
class _Layout:
    """One form that a data set comes in."""

    matches: Callable[[Path], bool]  # whether a folder is the root of a set of this form
    read: Callable[..., list[VideoSequence]]  # (root, split, report, dataset, num_frames)
    expected: str  # what the root holds, for the error


@dataclass(frozen=True)
class _Source:
    """How a data set is found and read."""

    folders: tuple[str, ...]  # its usual folder names, the likeliest first
    layouts: tuple[_Layout, ...]


def _authors(mask_rule: str) -> _Layout:
    return _Layout(
        layouts.has_authors_layout,
        functools.partial(layouts.read_authors_layout, mask_rule=mask_rule),
        "<train|val>/<images|flows|labels>/<video>/*",
    )


_VIDEOS = _Layout(
    vsod_layouts.has_videos_with_masks, vsod_layouts.read_videos, "<video>/Imgs/* with <video>/ground-truth/*"
)
_DAVSOD = _Layout(
    vsod_layouts.has_davsod, vsod_layouts.read_davsod, "<package>/<video>/Imgs/* with <video>/GT_object_level/*"
)
_DAVIS_2016 = _Layout(layouts.has_davis_2016, layouts.read_davis_2016, "JPEGImages/480p/<sequence>/*.jpg")
_DAVIS_2017 = _Layout(
    layouts.has_davis_2017,
    layouts.read_davis_2017,
    "JPEGImages/480p/<sequence>/*.jpg and ImageSets/2017/<split>.txt",
)
_YOUTUBE_VOS = _Layout(layouts.has_youtube_vos, layouts.read_youtube_vos, "train/JPEGImages/<video>/*.jpg")
_FBMS = _Layout(vsod_layouts.has_fbms, vsod_layouts.read_fbms, "Testset/<video>/*.jpg with <video>/GroundTruth/*")

_DAVIS_FOLDERS = (
    "DAVIS",
    "DAVIS-data",
    "DAVIS-trainval",
    "DAVIS-2017-trainval",
    "DAVIS-2017-trainval-480p",
    "DAVIS-2017-trainval-Full-Resolution",
)
_YOUTUBE_VOS_FOLDERS = ("YouTube-VOS-{}", "YouTubeVOS-{}", "YouTubeVOS_{}", "YouTubeVOS{}")  # of a year
_DAVSOD_FOLDERS = ("DAVSOD", "DAVSOD-master", "DAVSOD-dataset")

_SOURCES = {
    "DAVIS-2016": _Source(
        (
            *("DAVIS-2016", "DAVIS2016", "DAVIS_2016", "DAVIS-16", "DAVIS16"),
            *_DAVIS_FOLDERS,
            *("DAVIS-2017", "DAVIS2017", "DAVIS_2017"),
        ),
        (_DAVIS_2016, _authors("nonzero")),
    ),
    "DAVIS-2017": _Source(
        ("DAVIS-2017", "DAVIS2017", "DAVIS_2017", *_DAVIS_FOLDERS), (_DAVIS_2017, _authors("nonzero"))
    ),
    "YouTube-VOS-2018": _Source(
        (*(name.format(2018) for name in _YOUTUBE_VOS_FOLDERS), "YouTube-VOS", "YouTubeVOS", "YouTube_VOS", "YTVOS"),
        (_YOUTUBE_VOS, _authors("nonzero")),
    ),
    "YouTube-VOS-2019": _Source(
        tuple(name.format(2019) for name in _YOUTUBE_VOS_FOLDERS), (_YOUTUBE_VOS, _authors("nonzero"))
    ),
    "FBMS": _Source(("FBMS", "FBMS-59", "FBMS59", "FBMS_59"), (_authors("above_128"), _FBMS)),
    "DAVSOD": _Source((*_DAVSOD_FOLDERS, "DAVSOD-Easy-35", "Easy-35"), (_authors("above_128"), _DAVSOD)),
    "DAVSOD-Normal": _Source(
        ("DAVSOD-Normal", "DAVSOD-Normal-25", "Normal-25", *_DAVSOD_FOLDERS), (_authors("above_128"), _DAVSOD)
    ),
    "DAVSOD-Difficult": _Source(
        ("DAVSOD-Difficult", "DAVSOD-Difficult-20", "Difficult-20", *_DAVSOD_FOLDERS), (_authors("above_128"), _DAVSOD)
    ),
    "MCL": _Source(("MCL",), (_authors("above_128"), _VIDEOS)),
}
_ALIASES = {
    "DAVIS": "DAVIS-2016",
    "DAVIS2016": "DAVIS-2016",
    "DAVIS2017": "DAVIS-2017",
    "DAVIS_2017": "DAVIS-2017",
    "YouTube-VOS": "YouTube-VOS-2018",
    "YouTubeVOS-2018": "YouTube-VOS-2018",
    "YouTubeVOS": "YouTube-VOS-2018",
    "FBMS-59": "FBMS",
    "FBMS59": "FBMS",
    "DAVSOD-Normal-25": "DAVSOD-Normal",
    "DAVSOD-Difficult-20": "DAVSOD-Difficult",
    "DAVSOD-Easy-35": "DAVSOD",
}
# A set that is not known by name is read where its folder has one of these forms.
_ANY_LAYOUTS = (
    _authors("nonzero"),
    _Layout(
        layouts.has_davis_lists,
        layouts.read_davis_lists,
        "JPEGImages/480p/<sequence>/* with ImageSets/2016/<split>.txt or ImageSets/<split>.txt",
    ),
    _VIDEOS,
)

DATASETS: tuple[str, ...] = (*_SOURCES, *_ALIASES)


SEQUENCE_NAMES = {"DAVIS-2016": layouts.DAVIS_2016, "FBMS": vsod_layouts.FBMS_59}
"""The sequences of the data sets whose lists are known here, by split: what is complete, and what is another split."""

TRAINING_SETS = ("YouTube-VOS-2018", "YouTube-VOS-2019", *STILL_SETS)
"""Sets that are trained on and not tested on: YouTube-VOS keeps back the masks of its val split; stills have none."""

DENSE = ("DAVIS-2016", "DAVIS-2017")
"""Sets whose release annotates every frame; in the others some frames have no mask."""


def canonical_name(name: str) -> str:
    """The name of a data set that results are filed under: `FBMS-59` and `fbms` are `FBMS`; an unknown name stays as
    it is.

    Its usual folder names are names of a data set as well, and case does not matter. Otherwise its folder, which is
    found in any case, would be read as that of a set that nothing is known of: FBMS not parted into train and test,
    DAVIS scored on its first and last frames.
    """
    return _known_names().get(name.lower(), name)


@functools.cache
def _known_names() -> dict[str, str]:
    """Names of data sets in small letters -> as results are filed under them."""
    names = {name.lower(): name for name in (*_SOURCES, *STILL_SETS)}
    names.update((alias.lower(), name) for alias, name in _ALIASES.items())
    for name, source in _SOURCES.items():
        for folder in source.folders:  # of one that two sets may have, the first
            names.setdefault(folder.lower(), name)
    return names


def _may_be(source: _Source, folder: Path) -> bool:
    """Whether a folder can be this data set by its name: one that is called as another set is that set, since several
    have one form (videos in an MCL folder would be scored as DAVSOD's).
    """
    called = folder_names(folder)
    owners = [other for other in _SOURCES.values() if called & {name.lower() for name in other.folders}]
    # The parts of DAVSOD, or the years of DAVIS, are called alike.
    return not owners or any(set(owner.folders) & set(source.folders) for owner in owners)


def _usual_folders(source: _Source, parent: Path) -> list[Path]:
    """Folders that are called as this data set usually is, the likeliest first."""
    wanted = [folder.lower() for folder in source.folders]
    folders = [folder for folder in list_folders(parent) if folder.name.lower() in wanted]
    return sorted(folders, key=lambda folder: wanted.index(folder.name.lower()))


def _find(name: str, data_dir: Path) -> tuple[Path, _Layout]:
    if canonical_name(name) in STILL_SETS:
        raise DataError(
            f"{name} holds still images and no videos: main.py trains on clips made of them and --tools check looks at "
            f"them, but nothing else takes them; expected a data set of videos, such as {', '.join(_SOURCES)}"
        )
    known = _SOURCES.get(canonical_name(name))
    source = known or _Source((name,), _ANY_LAYOUTS)
    if not data_dir.is_dir():
        raise DataError(f"{data_dir}: no such folder; expected the data sets (or {name} itself) there. Set --data_dir")
    outer = _usual_folders(source, data_dir)
    # DAVIS-2017/DAVIS: unpacked into its own folder.
    inner = [folder for parent in outer for folder in _usual_folders(source, parent)]
    is_called_so = bool(folder_names(data_dir) & {folder.lower() for folder in source.folders})
    itself = [data_dir] if (_may_be(known, data_dir) if known else is_called_so) else []
    # One that is called so comes first: Easy-35, in DAVSOD, is a part of it and has no training set.
    for candidate in (*itself, *outer, *inner) if is_called_so else (*outer, *inner, *itself):
        for layout in source.layouts:
            if layout.matches(candidate):
                return candidate, layout
    forms = " or ".join(layout.expected for layout in source.layouts)
    if known:
        problem = f"{name} is not under {data_dir}: expected a folder {' or '.join(source.folders)}"
    else:
        problem = f"no data set is called {name!r} (known: {', '.join(DATASETS)}), and {data_dir} has no folder {name}"
    looked = ", ".join(str(folder) for folder in outer)
    raise DataError(f"{problem} with {forms}" + (f". Looked in {looked}, which has another form" if looked else ""))


def find_datasets(data_dir: Path | str) -> list[str]:
    """The data sets known here that have a folder under `data_dir`, or are it, each folder told once: of those that may
    lie in one (DAVIS-2016 and DAVIS-2017) the first. One whose folder holds something else is told as well.
    """
    data_dir = Path(data_dir)
    found: dict[Path, str] = {}
    for name, source in _SOURCES.items():
        try:
            root = find_root(name, data_dir)
        except DataError:
            usual = _usual_folders(source, data_dir)
            if not usual:
                continue
            root = usual[0]
        found.setdefault(root, name)
    return [*found.values(), *(name for name in STILL_SETS if has_stills(data_dir, name))]


def find_root(name: str, data_dir: Path | str) -> Path:
    """Root of a data set: a folder of a usual name under `data_dir`, or within that once more, or `data_dir` itself.

    Raises DataError that says where it looked and what it expected there.
    """
    return _find(name, Path(data_dir))[0]


def read_dataset(
    name: str,
    data_dir: Path | str,
    split: str = "val",
    num_frames: int = 5,
    on_problem: Report | None = None,
    flow_root: Path | str | None = None,
) -> list[VideoSequence]:
    """All videos of a data set, in the order of its list, or by name where it has none.

    Args:
        name: one of `DATASETS`, or any other whose folder is in the authors' layout, in that of DAVIS with lists, or a
            folder of videos with masks.
        data_dir: folder that holds the set under a usual name of it, or the set itself.
        split: "train" or "val"; "test" is "val" in all sets but YouTube-VOS. Further ones are told by the readers.
        num_frames: YouTube-VOS keeps every so-maniest frame of a training video; no other set is thinned out.
        flow_root: where flow lies that is not beside the data, which may be read-only or have flow of another kind:
            `<flow_root>/<data set>/…` with the sub-tree that it would have in the data set
            (`<flow_root>/DAVIS-2016/Flows/480p/bear/00000.png`). Flow beside the data is not looked at then.
        on_problem: called with (sequence name, DataError) for each problem instead of raising, so that a check can see
            them all; the name is "" for what concerns the whole split. The sequences returned are then what is left
            without the broken parts.

    Raises:
        DataError: the set, split or a file of it is missing, empty, or ambiguous. Missing flow is no error here.
    """
    root, layout = _find(name, Path(data_dir))
    reported = 0

    def report(sequence: str, error: DataError) -> None:
        nonlocal reported
        reported += 1
        (on_problem or raise_problem)(sequence, error)

    sequences: list[VideoSequence] = []
    try:
        sequences = layout.read(root, split, report, canonical_name(name), num_frames)
        if not sequences and not reported:
            raise DataError(
                f"{canonical_name(name)}: no sequence in the {split} split of {root}; unpack the data there"
            )
    except DataError as error:
        if on_problem is None:
            raise
        on_problem("", error)
    counts = Counter(sequence.name for sequence in sequences)
    for twice in [one for one, count in counts.items() if count > 1]:
        report(twice, DataError(
            f"{canonical_name(name)}/{twice}: two videos are called so in the {split} split of {root}, and results "
            "keep videos apart by name: rename one, or give another --split"
        ))  # fmt: skip
    command = flow_command(canonical_name(name), data_dir, split, flow_root)
    sequences = [replace(sequence, flow_command=command) for sequence in sequences]
    if flow_root is None:
        return sequences
    return [_with_flow_elsewhere(sequence, root, Path(flow_root), report) for sequence in sequences]


def _with_flow_elsewhere(sequence: VideoSequence, root: Path, flow_root: Path, report: Report) -> VideoSequence:
    folder = flow_root / sequence.dataset / sequence.flow_dir.relative_to(root)
    flows = by_stem(list_files(folder, FLOW_SUFFIXES), sequence.name, report)
    return replace(sequence, flow_dir=folder, flows={stem: flows[stem] for stem in sequence.stems if stem in flows})
