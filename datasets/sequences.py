"""Finding a data set under a folder and reading its videos: `read_dataset`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from datasets import layouts
from datasets.errors import DataError
from datasets.video_sequence import Report, VideoSequence, list_folders, raise_problem

__all__ = ["DATASETS", "VideoSequence", "read_dataset"]


@dataclass(frozen=True)
class _Source:
    """How one data set is found and read."""

    folders: tuple[str, ...]  # its usual folder names, the likeliest first
    matches: Callable[[Path], bool]  # whether a folder is its root
    read: Callable[..., list[VideoSequence]]  # (root, split, report, dataset)
    expected: str  # what its root holds, for the error


_DAVIS_FOLDERS = ("DAVIS", "DAVIS-data", "DAVIS-trainval", "DAVIS-2017-trainval")

_SOURCES = {
    "DAVIS-2016": _Source(
        ("DAVIS-2016", "DAVIS2016", "DAVIS_2016", *_DAVIS_FOLDERS, "DAVIS-2017", "DAVIS2017", "DAVIS_2017"),
        layouts.has_davis_2016,
        layouts.read_davis_2016,
        "JPEGImages/480p/<sequence>/*.jpg",
    ),
    "DAVIS-2017": _Source(
        ("DAVIS-2017", "DAVIS2017", "DAVIS_2017", *_DAVIS_FOLDERS),
        layouts.has_davis_2017,
        layouts.read_davis_2017,
        "JPEGImages/480p/<sequence>/*.jpg and ImageSets/2017/<split>.txt",
    ),
}
_ALIASES = {"DAVIS": "DAVIS-2016", "DAVIS2016": "DAVIS-2016", "DAVIS2017": "DAVIS-2017"}

DATASETS: tuple[str, ...] = (*_SOURCES, *_ALIASES)


def find_root(name: str, data_dir: Path) -> Path:
    """Root of a data set: a folder of a usual name under `data_dir`, or within that once more, or `data_dir` itself.

    Raises DataError that lists where it looked and what it expected there.
    """
    source = _SOURCES[name]
    if not data_dir.is_dir():
        raise DataError(f"{data_dir}: no such folder; expected the data sets (or {name} itself) there. Set --data_dir")
    wanted = [folder.lower() for folder in source.folders]

    def usual(parent: Path) -> list[Path]:
        known = [folder for folder in list_folders(parent) if folder.name.lower() in wanted]
        return sorted(known, key=lambda folder: wanted.index(folder.name.lower()))

    outer = usual(data_dir)
    inner = [folder for parent in outer for folder in usual(parent)]
    for candidate in (*outer, *inner, data_dir):
        if source.matches(candidate):
            return candidate
    seen = ", ".join(str(folder) for folder in outer)
    raise DataError(
        f"{name} is not under {data_dir}: expected {source.expected} in it or in a folder of it called "
        f"{', '.join(source.folders)}" + (f"; looked in {seen}, which is something else" if seen else "")
    )


def read_dataset(
    name: str, data_dir: Path | str, split: str = "val", num_frames: int = 5, on_problem: Report | None = None
) -> list[VideoSequence]:
    """All videos of a data set, in the order of its list, or by name where it has none.

    Args:
        name: one of `DATASETS`.
        data_dir: folder that holds the set under a usual name of it, or the set itself.
        split: "train" or "val" in all sets.
        num_frames: YouTube-VOS keeps every so-maniest frame of a video; no other set is thinned out.
        on_problem: called with (sequence name, DataError) for each problem instead of raising, so that a check can see
            them all; the sequences returned are then what is left without the broken parts.

    Raises:
        DataError: the set, split or a file of it is missing, empty, or ambiguous. Missing flow is no error here.
    """
    dataset = _ALIASES.get(name, name)
    if dataset not in _SOURCES:
        raise DataError(f"no data set is called {name!r}; expected one of {', '.join(DATASETS)}")
    root = find_root(dataset, Path(data_dir))
    return _SOURCES[dataset].read(root, split, on_problem or raise_problem, dataset)
