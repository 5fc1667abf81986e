"""Everything that is wrong with a data root, in one report: `tool.py --tools check`.

The check reads each data set as training and evaluation do, then opens every file, and goes on after each problem.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from datasets.errors import DataError
from datasets.images import (
    grey_values,
    load_flow_image,
    load_frame,
    load_mask,
    load_mask_values,
    require_size,
    void_pixels,
)
from datasets.sequences import DENSE, SEQUENCE_NAMES, TRAINING_SETS, canonical_name, find_root, read_dataset
from datasets.stills import STILL_SETS, StillImage, open_mask, read_stills
from datasets.video_sequence import MASK_SUFFIXES, VideoSequence, flow_command, list_files

ASPECT_TOLERANCE = 0.02  # a flow image of 512×288 for a frame of 854×480 differs by 0.001

SOFT_RIM = 0.05  # share of in-between pixels that a smoothed rim may have
MANY_OBJECTS = 32

EXAMPLES = 5  # problems of a kind that are printed

# Splits whose masks are kept back, but for those of first frames in some releases.
_KEPT_BACK = ("test-dev", "test-challenge")

_HINTS = {
    "layout": "unpack the data set again, or correct its list",
    "no flow": "{flow_command} makes what is missing",
    "no mask": "unpack the annotations",
    "frame": "copy or unpack these files again",
    "flow": "remove these files, then {flow_command}",
    "mask": "unpack the annotations again, of the resolution of the frames",
    "mask values": "see whether these are annotations and not pictures or results",
    "void": "nothing to do: of these pixels nobody knows which object they are, and they count as background",
    "incomplete": "nothing to do, if it is meant",
}


@dataclass(frozen=True, order=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        dataset, sequence: where; sequence is the name of a still in a set of stills, and "" for what concerns a whole
            set.
        kind: group in the report, a key of `_HINTS`.
        message: what is wrong, with the file.
        fatal: False for what may be meant, such as an incomplete download.
    """

    dataset: str
    kind: str
    sequence: str
    message: str
    fatal: bool = True


_Items = list[VideoSequence] | list[StillImage]
_Parts = dict[str, tuple[_Items, list[Problem]]]  # what was read and what is wrong with it, by split


def check_sequences(
    sequences: Sequence[VideoSequence],
    require_flow: bool = True,
    require_masks: bool = True,
    workers: int = 1,
    progress: Callable[[int], None] | None = None,
) -> list[Problem]:
    """Look at every file of the sequences and return all problems, in the order of the sequences.

    Args:
        require_flow: whether a frame without flow is a problem.
        require_masks: whether every frame of DAVIS, and of other sets at least one frame per sequence, needs a mask.
        workers: threads.
        progress: called with 1 after each frame.
    """
    problems: list[Problem] = []
    with ThreadPoolExecutor(workers) as pool:
        for sequence in sequences:
            problems += _check_presence(sequence, require_flow, require_masks)
            looks = pool.map(partial(_look, sequence), sequence.frames)
            sizes: dict[tuple[int, int], str] = {}
            flow_sizes: dict[tuple[int, int], str] = {}
            foreground = []
            for stem, look in zip(sequence.stems, looks, strict=True):
                problems += look.problems
                if look.size is not None:
                    sizes.setdefault(look.size, stem)
                if look.flow_size is not None:
                    flow_sizes.setdefault(look.flow_size, stem)
                if look.foreground is not None:
                    foreground.append(look.foreground)
                if progress is not None:
                    progress(1)
            if len(sizes) > 1:
                message = f"{sequence.frames[0].parent}: frames of {_listed(sizes)}; expected one size"
                problems.append(_problem(sequence, "frame", message))
            if len(flow_sizes) > 1:  # which `test` would stop at, see `datasets.images.LazyImages`
                message = (
                    f"{sequence.flow_dir}: flow images of {_listed(flow_sizes)}; expected one size within a "
                    "video, and test stops at the first of another"
                )
                problems.append(_problem(sequence, "flow", message))
            if foreground and not any(foreground):
                message = f"{next(iter(sequence.masks.values())).parent}: no mask of this sequence has any foreground"
                problems.append(_problem(sequence, "mask values", message, fatal=False))
    return problems


def check_stills(
    stills: Sequence[StillImage],
    dataset: str = "DUTS-TR",
    workers: int = 1,
    progress: Callable[[int], None] | None = None,
) -> list[Problem]:
    """Look at every still image and its mask as training reads them; arguments as of `check_sequences`."""
    problems: list[Problem] = []
    with ThreadPoolExecutor(workers) as pool:
        for found in pool.map(partial(_look_at_still, dataset), stills):
            problems += found
            if progress is not None:
                progress(1)
    return problems


def _look_at_all(
    items: _Items,
    name: str,
    split: str,
    require_flow: bool,
    workers: int,
    progress: Callable[[int], None] | None,
) -> list[Problem]:
    if name in STILL_SETS:
        return check_stills(items, name, workers, progress)
    return check_sequences(items, require_flow, split not in _KEPT_BACK, workers, progress)


def _read(
    dataset: str, data_dir: Path | str, split: str, num_frames: int, flow_root: Path | str | None
) -> tuple[_Items, list[Problem]]:
    """What could be read of a split of a data set, and what is wrong with it before any file is opened."""
    problems: list[Problem] = []

    def gather(sequence: str, error: DataError) -> None:
        problems.append(Problem(dataset, "layout", sequence, str(error)))

    try:
        if dataset in STILL_SETS:
            if split != "train":
                raise DataError(f"{dataset}: no split {split!r}; its stills are for training, expected the split train")
            stills = read_stills(data_dir, dataset, gather)
            paired = {still.mask for still in stills}
            folders = {still.mask.parent for still in stills}
            alone = [file for folder in folders for file in list_files(folder, MASK_SUFFIXES) if file not in paired]
            if alone:
                message = f"{len(alone)} masks have no image of the same stem and are not used; the first is {alone[0]}"
                problems.append(Problem(dataset, "incomplete", "", message, fatal=False))
            return stills, problems
        sequences = read_dataset(dataset, data_dir, split, num_frames, on_problem=gather, flow_root=flow_root)
    except DataError as error:  # the set itself was not found
        gather("", error)
        return [], problems
    known = SEQUENCE_NAMES.get(dataset, {}).get(split, ())
    accounted = {sequence.name for sequence in sequences} | {problem.sequence for problem in problems}
    absent = [sequence for sequence in known if sequence not in accounted]
    if absent and sequences:
        message = f"{len(absent)} of the {len(known)} sequences of {split} are not here: {', '.join(absent)}"
        problems.append(Problem(dataset, "incomplete", "", message, fatal=False))
    return sequences, problems


def run(
    data_dir: Path | str,
    datasets: Sequence[str],
    splits: Sequence[str] | None = None,
    num_frames: int = 5,
    require_flow: bool = True,
    workers: int = 1,
    flow_root: Path | str | None = None,
    only: Sequence[str] | None = None,
    bar: Callable[..., Any] | None = None,
) -> int:
    """Check data sets, of videos or of stills, and print a report, the problems grouped by set, split and kind.

    Args:
        data_dir, datasets, num_frames, flow_root: as in `datasets.read_dataset`.
        splits: which splits to check; one that a set does not have is a problem. By default those of train and val
            that it has: one of the two may be absent. Of `TRAINING_SETS` train alone.
        require_flow, workers: as in `check_sequences`.
        only: names of the sequences (or stills) to check; all by default.
        bar: makes the progress bar of a data set from tqdm's options; none is shown by default.

    Returns:
        The number of problems, those aside that may be meant.

    Raises:
        DataError: a name of `only` that no data set has.
    """
    read = {}
    for name in map(canonical_name, datasets):
        usual = ("train",) if name in TRAINING_SETS else ("train", "val")
        parts = {split: _read(name, data_dir, split, num_frames, flow_root) for split in (splits or usual)}
        if splits is None and any(sequences for sequences, _ in parts.values()):
            for split, (sequences, problems) in parts.items():
                if not sequences and all(problem.sequence == "" for problem in problems):
                    notes = [replace(problem, kind="incomplete", fatal=False) for problem in problems]
                    parts[split] = (sequences, notes)
        read[name] = parts
    if only is not None:
        read = _restricted(read, only)
    fatal = 0
    for name, parts in read.items():
        unit = "still" if name in STILL_SETS else "frame"
        total = sum(1 if unit == "still" else len(item.frames) for items, _ in parts.values() for item in items)
        shown = bar(total=total, desc=f"check {name}", unit=unit) if bar and total else nullcontext()
        with shown as counting:
            progress = None if counting is None else counting.update
            for split, (items, problems) in parts.items():
                problems += _look_at_all(items, name, split, require_flow, workers, progress)
        for split, (sequences, problems) in parts.items():
            fatal += sum(problem.fatal for problem in problems)
            for line in _report(name, data_dir, split, sequences, problems, flow_root):
                print(line)
    print("check: no problem" if fatal == 0 else f"check: {fatal} problem{'s' if fatal > 1 else ''}")
    return fatal


def _restricted(read: dict[str, _Parts], only: Sequence[str]) -> dict[str, _Parts]:
    """What was read, of the sequences in `only`, and what else is wrong with a set or split of which nothing was.

    Raises DataError for a name that is nowhere, unless nothing could be read at all.
    """
    known = [
        name
        for parts in read.values()
        for sequences, problems in parts.values()
        for name in [*(sequence.name for sequence in sequences), *(problem.sequence for problem in problems)]
        if name
    ]
    unknown = [name for name in only if name not in known]
    if known and unknown:
        near = difflib.get_close_matches(unknown[0], known, cutoff=0.5) or known[:30]  # there are thousands of stills
        names = ", ".join(dict.fromkeys(near))
        raise DataError(f"--sequences {unknown[0]}: not in {', '.join(read)}; expected names such as {names}")
    kept: dict[str, _Parts] = {}
    for dataset, parts in read.items():
        for split, (sequences, problems) in parts.items():
            chosen = [sequence for sequence in sequences if sequence.name in only]
            wanted = [*only] if sequences else [*only, ""]
            left = [problem for problem in problems if problem.sequence in wanted]
            if chosen or any(problem.fatal for problem in left):
                kept.setdefault(dataset, {})[split] = (chosen, left)
    return kept


def _report(
    name: str,
    data_dir: Path | str,
    split: str,
    items: _Items,
    problems: list[Problem],
    flow_root: Path | str | None,
) -> Iterator[str]:
    root = None
    if name in STILL_SETS:
        unit, counts = "still", f"{len(items)} stills with a mask"
        if items:
            root = items[0].image.parent.parent
    else:
        unit = "sequence"
        if items:
            root = find_root(name, data_dir)
        frames, flows, masks = (sum(len(getattr(s, kind)) for s in items) for kind in ("frames", "flows", "masks"))
        several = "" if len(items) == 1 else "s"
        counts = f"{len(items)} sequence{several}, {frames} frames, {flows} with flow, {masks} with a mask"
    yield f"{name} {split}{f' in {root}' if root else ''}: {counts}"
    hints = dict(_HINTS)
    command = flow_command(name, data_dir, split, flow_root)
    for kind in ("no flow", "flow"):
        hints[kind] = hints[kind].format(flow_command=command)
    if root and (root / "Annotations_unsupervised").is_dir() and not (root / "Annotations").exists():
        unread = root / "Annotations_unsupervised"
        hints["no mask"] = f"masks lie in {unread}, which is not read: rename it, or link it, to Annotations"
    for kind, hint in hints.items():
        group = [problem for problem in problems if problem.kind == kind]
        if not group:
            continue
        count = len({problem.sequence for problem in group if problem.sequence})
        within = f" in {count} {unit}{'s' if count > 1 else ''}" if count else ""
        note = "" if any(problem.fatal for problem in group) else " (a note)"
        yield f"  {kind}: {len(group)}{within}{note}; {hint}"
        for problem in group[:EXAMPLES]:
            yield f"    {problem.message}"
        if len(group) > EXAMPLES:
            yield f"    … and {len(group) - EXAMPLES} more"


@dataclass(frozen=True)
class _Look:
    """What looking at one frame, its flow and its mask gave."""

    problems: list[Problem]
    size: tuple[int, int] | None  # (height, width) of the frame, None where it cannot be read
    flow_size: tuple[int, int] | None  # of its flow, None where there is none or something is wrong with it already
    foreground: bool | None  # whether the mask has any, None where there is no mask that can be read


def _listed(sizes: dict[tuple[int, int], str]) -> str:
    """Sizes (height, width), each with the first frame that has it, in words."""
    found = ", ".join(f"{width}×{height} at {stem}" for (height, width), stem in sizes.items())
    return f"{len(sizes)} sizes ({found})"


def _problem(sequence: VideoSequence, kind: str, message: str, fatal: bool = True) -> Problem:
    return Problem(sequence.dataset, kind, sequence.name, message, fatal)


def _check_presence(sequence: VideoSequence, require_flow: bool, require_masks: bool) -> list[Problem]:
    problems = []
    if require_flow and not sequence.flows:
        message = f"{sequence.flow_dir}: no flow image for any frame of {sequence.name} ({len(sequence)} in all)"
        problems.append(_problem(sequence, "no flow", message))
    elif require_flow:
        for stem in sequence.stems:
            if stem not in sequence.flows:
                message = f"{sequence.flow_dir / stem}.png (or .jpg): no flow image for {sequence.name}/{stem}"
                problems.append(_problem(sequence, "no flow", message))
    if not require_masks:
        return problems
    if not sequence.masks:
        message = f"{sequence.dataset}/{sequence.name}: no frame has a mask ({len(sequence)} in all)"
        problems.append(_problem(sequence, "no mask", message))
    elif sequence.dataset in DENSE:
        folder = next(iter(sequence.masks.values())).parent
        for stem in sequence.stems:
            if stem not in sequence.masks:
                problems.append(
                    _problem(sequence, "no mask", f"{folder / stem}.png: no mask for {sequence.name}/{stem}")
                )
    return problems


def _attempt(problems: list[Problem], dataset: str, name: str, kind: str, read: Callable[[], Any]) -> Any:
    """What `read` returns; where it raises DataError, None, and a problem more."""
    try:
        return read()
    except DataError as error:
        problems.append(Problem(dataset, kind, name, str(error)))
        return None


def _look_at_still(dataset: str, still: StillImage) -> list[Problem]:
    problems: list[Problem] = []
    attempt = partial(_attempt, problems, dataset, still.name)
    size = attempt("frame", lambda: load_frame(still.image).shape[:2])
    mask = attempt("mask", lambda: np.asarray(open_mask(still)))  # (H, W)
    if size and mask is not None:
        attempt("mask", lambda: require_size(still.mask, mask.shape, size, still.image))
    if mask is not None and not (mask >= 128).any():
        message = (
            f"{still.mask}: no pixel of the mask is brighter than 127, so there is no object; training stops at this "
            f"still when it draws it. Remove it and {still.image.name}"
        )
        problems.append(Problem(dataset, "mask values", still.name, message))
    return problems


def is_stretched(flow: tuple[int, int], frame: tuple[int, int]) -> bool:
    """Whether a size of flow (H, W) is of another aspect than that of its frame (H, W)."""
    return abs(flow[1] / flow[0] / (frame[1] / frame[0]) - 1) > ASPECT_TOLERANCE


def _look(sequence: VideoSequence, frame: Path) -> _Look:
    problems: list[Problem] = []
    stem = frame.stem
    attempt = partial(_attempt, problems, sequence.dataset, sequence.name)
    size = attempt("frame", lambda: load_frame(frame).shape[:2])
    flow_size = None
    if stem in sequence.flows:
        flow = sequence.flows[stem]
        flow_size = attempt("flow", lambda: load_flow_image(flow).shape[:2])
        if size and flow_size and is_stretched(flow_size, size):
            message = (
                f"{flow}: {flow_size[1]}×{flow_size[0]} pixels (width × height), another aspect than "
                f"{size[1]}×{size[0]} of {frame}; it was made from other frames, padded, or made at a --flow_size of "
                "another aspect"
            )
            problems.append(_problem(sequence, "flow", message))
            flow_size = None
    foreground = None
    if stem in sequence.masks:
        mask = sequence.masks[stem]
        values = attempt("mask", lambda: load_mask(mask, sequence.mask_rule))
        if values is not None:
            foreground = bool(values.any())
            if size:
                attempt("mask", lambda: require_size(mask, values.shape, size, frame))
            doubt = _doubtful_values(mask, sequence.mask_rule)
            if doubt is not None:
                problems.append(_problem(sequence, *doubt))
    return _Look(problems, size, flow_size, foreground)


def _doubtful_values(mask: Path, rule: str) -> tuple[str, str, bool] | None:
    """Kind and message of what is odd about the values of a mask, and whether that is fatal; None for a mask as its
    rule says.

    Under "above_128" a grey image should hold 0 and 255 (or 0 and 1). A few pixels in between are the smoothed rim of a
    shape, which is a note; many are a picture, and a mask whose object is darker than 129 would be lost. Under
    "nonzero" every value may be an object, but many greys mean a picture or a smoothed mask, whose faint rim would
    count in full. There are void pixels under "nonzero" alone, and they are a note.
    """
    if rule == "fbms":
        return None
    values, mode = load_mask_values(mask)
    void = void_pixels(mask, values, mode) if rule == "nonzero" else None
    if void is not None:
        return "void", f"{mask}: {void.mean():.2%} of the pixels have index 255 beside those of objects", False
    if mode == "RGB":
        colours, values = values, values.max(axis=2)  # (H, W, 3) -> (H, W)
        dark = (values > 128) & (grey_values(colours) <= 128)
        if rule in ("above_128", "objects") and dark.any():
            message = (
                f"{mask}: {dark.mean():.2%} of the pixels have colours whose grey value is at most 128, and would be "
                "background; expected objects in white, or a palette"
            )
            return "mask values", message, True
    if mode not in ("L", "RGB"):
        return None
    present = np.unique(values)
    top = int(present.max())
    if rule in ("above_128", "objects"):
        between = np.isin(values, present[(present > 0) & (present < 255)]).mean()
        if top > 1 and between:
            message = (
                f"{mask}: not binary: {present.size} values up to {top}, {between:.2%} of the pixels between 0 and 255"
            )
            return "mask values", message, bool(top <= 128 or between > SOFT_RIM)
    elif present.size > MANY_OBJECTS:
        message = f"{mask}: {present.size} grey values; expected one per object, and all above 0 count as foreground"
        return "mask values", message, True
    return None
