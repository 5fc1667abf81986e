"""Finding the maps of a result folder, ours or any other method's, and pairing them with the ground truth.

Maps are paired by sequence and frame name, never by position. Result folders are only read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets.errors import DataError
from datasets.sequences import VideoSequence, canonical_name
from datasets.video_sequence import list_folders
from utils.crf import FIELD as CRF_FIELD
from utils.errors import UserError, number_of
from utils.evaluation.protocol import Protocol
from utils.evaluation.scoring import FrameJob
from utils.inference.maps import FIELD as TEST_FIELD
from utils.inference.maps import IN_OWN_SHAPE, are_of_others, notes, of_run, shape_seen
from utils.progress import progress_bar

KINDS = ("binary", "crf", "probability")

_SHAPE = "videos of another shape:"  # beside what maps say of how they were made: `shape_seen`
_SUFFIXES = (".png", ".bmp", ".jpg", ".jpeg", ".tif", ".tiff", ".pgm")


@dataclass
class Unit:
    """One folder of maps on one data set: a row of the comparison."""

    name: str
    """As in tables: the folder's name, and "+ CRF" for the maps after it."""
    results: Path
    label: str
    """"" or "crf": the part of `evaluation.json` that it goes to."""
    dataset: str
    sequences: list[VideoSequence]
    folders: dict[str, Path]
    """Root of the maps for each kind of measure, holding `<video>/<frame>.png`."""
    protocols: dict[str, Protocol]
    known_grey: bool = False
    """Maps that are meant to be grey (our `probability/` and `crf/`): thresholding them is nothing to warn of."""
    jobs: dict[str, list[FrameJob]] = field(default_factory=dict)


def is_own(folder: Path) -> bool:
    """Whether a result folder is one that `--tools test` writes, with `KINDS` in it."""
    return any((folder / kind).is_dir() for kind in KINDS)


def require_folder(results: Path) -> None:
    """Raises UserError where a folder of ``--results``, or ``--save_dir`` in their place, is not there."""
    if not results.is_dir():
        raise UserError(
            f"{results}: no such folder; --results expects folders of maps, <dataset>/<video>/<frame>.png; without it "
            "those in --save_dir are scored: run --tools test first"
        )


def find_maps(results: Path, dataset: str, folder: str = "auto") -> list[tuple[str, dict[str, Path]]]:
    """Where the maps of a data set are in a result folder: (`""` or `"crf"`, root for each kind of measure).

    Our own results have `probability/`, `binary/` and maybe `crf/` in them: J and F come from `binary/` (from
    `probability/` where there is none, which is the same), the other measures from `probability/`, and both once more
    from `crf/`. `folder` names one of them to score only that. Any other folder, whatever `folder` says, holds
    `<dataset>/<video>/<frame>.png`, the data set by any of its names, or `<video>/<frame>.png`.

    Raises `UserError` when the folder is missing, has nothing for the data set, or has it under two names.
    """
    require_folder(results)
    own = {kind: results / kind / dataset for kind in KINDS if (results / kind).is_dir()}
    if not own:
        root = _root_of(results, dataset)
        return [("", {"uvos": root, "vsod": root})]
    # A folder whose maps were all removed (by `test`, for being of older maps) is as good as none.
    present = {kind: path for kind, path in own.items() if any(path.rglob("*.png"))}
    if folder != "auto":
        if folder not in present:
            raise UserError(f"{results / folder / dataset}: no such folder; --eval_folder {folder} expects maps there")
        return [("", {"uvos": present[folder], "vsod": present[folder]})]
    rows = []
    main = present.get("binary", present.get("probability"))
    if main is not None:
        rows.append(("", {"uvos": main, "vsod": present.get("probability", main)}))
    if "crf" in present:
        rows.append(("crf", {"uvos": present["crf"], "vsod": present["crf"]}))
    if not rows:
        raise UserError(
            f"{results}: no maps of {dataset} in {', '.join(f'{kind}/{dataset}' for kind in own)}; run --tools test on "
            f"{dataset} first, or leave it out of --datasets"
        )
    return rows


def _root_of(results: Path, dataset: str) -> Path:
    """Where another method's maps of a data set are: in a folder called as it is, or in `results` itself."""
    if (results / dataset).is_dir():
        return results / dataset
    called = [folder for folder in list_folders(results) if canonical_name(folder.name) == dataset]
    if len(called) > 1:
        raise UserError(
            f"{results}: {' and '.join(folder.name for folder in called)} are both called as {dataset} is; give the "
            f"one that is meant: --results {called[0]}"
        )
    return called[0] if called else results


def find_jobs(unit: Unit, progress: bool = False) -> dict[str, list[FrameJob]]:
    """The work on each sequence; everything that is missing is found here, before any of it starts."""
    problems: dict[str, list[str]] = {}  # by sequence
    jobs: dict[str, list[FrameJob]] = {}
    for sequence in unit.sequences:
        annotated = sequence.annotated
        wanted: dict[str, dict[str, Path]] = {}  # stem -> measures -> map
        for measures, protocol in unit.protocols.items():
            stems = protocol.select(annotated)
            if not annotated:
                raise DataError(
                    f"{unit.dataset}/{sequence.name}: no mask of its {number_of(len(sequence), 'frame')}, so there is "
                    "nothing to score; unpack the annotations (--tools check says more), or leave the sequence out"
                )
            if not stems:
                others = [other for other, rule in unit.protocols.items() if rule.select(annotated)]
                alone = f", give --metrics {others[0]}, which has another rule," if others else ""
                raise DataError(
                    f"{unit.dataset}/{sequence.name}: no frame to score: {len(annotated)} annotated, and the rule is "
                    f"'{protocol.sentence()}'. Give --no-skip_first --no-skip_last{alone} or leave the sequence out"
                )
            folder = unit.folders[measures] / sequence.name
            available = _list_maps(folder)
            missing = [stem for stem in stems if stem not in available]
            if missing:
                where = problems.setdefault(sequence.name, [])
                where.append(_missing(unit, sequence.name, folder, missing, len(stems), available))
                continue
            for stem in stems:
                wanted.setdefault(stem, {})[measures] = available[stem]
        jobs[sequence.name] = [
            FrameJob(
                stem=stem,
                gt=sequence.masks[stem],
                mask_rule=sequence.mask_rule,
                uvos=wanted[stem].get("uvos"),
                vsod=wanted[stem].get("vsod"),
                resize=any(protocol.resize for protocol in unit.protocols.values()),
            )
            for stem in annotated
            if stem in wanted
        ]
    if problems:
        refined = is_own(unit.results) and unit.folders.get("uvos", Path()).parent.name == "crf"
        advice = "\n--tools crf makes them; --eval_folder binary scores without the CRF" if refined else ""
        shown = list(problems.values())[:5]
        more = f"\n… and of {number_of(len(problems) - 5, 'more sequence')}" if len(problems) > 5 else ""
        raise DataError(
            "maps are missing:\n" + "\n".join(dict.fromkeys(line for part in shown for line in part)) + more + advice
        )
    _require_one_making(unit, jobs, progress)
    return jobs


def made_of_others(unit: Unit) -> list[str]:
    """The videos whose maps, of our own, were made of other frames than there are now, by names and sizes of files."""
    if unit.label or not is_own(unit.results):  # the CRF's are of these
        return []
    folder = unit.results / "probability" / unit.dataset
    others = (s.name for s in unit.sequences if are_of_others(folder / s.name, s.stems, s.frames))
    return [f"{unit.dataset}/{name}" for name in others]


def _require_one_making(unit: Unit, jobs: dict[str, list[FrameJob]], progress: bool) -> None:
    """Our own maps of one row, wherever they are, must be of one network with the same options, and of one CRF.

    A run that was stopped leaves those of the run before it in place, and their scores together mean nothing.
    """
    all_frames = [(name, frame) for name, frames in jobs.items() for frame in frames]
    # Each map is opened, which takes minutes for a hundred thousand.
    own = is_own(unit.results)
    with progress_bar(all_frames, desc="eval: what made them", unit="frame", leave=False, disable=not progress) as look:
        found = [(f"{name}/{frame.stem}", dict(_making(unit, name, frame, own))) for name, frame in look]
    if any("flow" not in making for _, making in found):  # older maps do not tell
        for _, making in found:
            making.pop("flow", None)
    kept = any(making.get(_SHAPE) == IN_OWN_SHAPE for _, making in found)
    for _, making in found:  # maps of videos that have the shape of the size are the same either way
        if kept:
            making.setdefault(_SHAPE, IN_OWN_SHAPE)
        else:
            making.pop(_SHAPE, None)
    makings: dict[str, tuple[str, dict[str, Any]]] = {}  # as text -> the first frame that has it, and what it is
    for place, making in found:
        makings.setdefault(json.dumps(making, sort_keys=True), (place, making))
    if len(makings) < 2:
        return
    (first, one), (second, other), *_ = makings.values()
    differing = [key for key in (*one, *other) if one.get(key) != other.get(key)]
    words = ", ".join(f"{key} {one.get(key)} and {other.get(key)}" for key in dict.fromkeys(differing))
    tool = "crf" if all(key.startswith("crf ") for key in differing) else "test"
    raise DataError(
        f"{unit.name}, {unit.dataset}: the maps are of different runs: {first} and {second} differ in {words}. A run "
        f"that was stopped leaves such a mixture: run --tools {tool} again with the options that are wanted (it keeps "
        "the maps that are right)"
    )


def _making(unit: Unit, sequence: str, frame: FrameJob, own: bool) -> Iterator[tuple[str, Any]]:
    """What `test` and the CRF wrote into their maps of a frame about how they were made.

    Args:
        own: whether the probability map lies beside the one that is scored, which does not tell all then.
    """
    scored = frame.uvos or frame.vsod
    grey = unit.results / "probability" / unit.dataset / sequence / f"{frame.stem}.png"
    said: dict[str, Any] = {}
    for path in {scored, grey} if own else {scored}:  # a map has the note of one of the two, so the order is all one
        here, size = notes(path, TEST_FIELD, CRF_FIELD)
        said |= here
        shape = shape_seen(here.get(TEST_FIELD) or {}, size)
        if shape is not None:
            yield _SHAPE, shape
    yield from of_run(said.get(TEST_FIELD) or {}).items()
    for key, value in of_run(said.get(CRF_FIELD) or {}).items():
        yield f"crf {key}", value


def _list_maps(folder: Path) -> dict[str, Path]:
    maps: dict[str, Path] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if path.suffix.lower() in _SUFFIXES and not path.name.startswith("."):
            if path.stem in maps:
                raise DataError(f"{folder}: two maps of frame {path.stem}, {maps[path.stem].name} and {path.name}")
            maps[path.stem] = path
    return maps


def _missing(
    unit: Unit, sequence: str, folder: Path, missing: list[str], count: int, available: dict[str, Path]
) -> str:
    where = f"{unit.name}, {unit.dataset}/{sequence}"
    if not folder.is_dir():
        others = (
            sorted(path.name for path in folder.parent.iterdir() if path.is_dir()) if folder.parent.is_dir() else []
        )
        there = f"it has {', '.join(others[:5])}{' …' if len(others) > 5 else ''}" if others else "it has no folders"
        return f"{where}: no folder {folder} ({there})"
    names = ", ".join(f"{stem}.png" for stem in missing[:3]) + (" …" if len(missing) > 3 else "")
    there = "no maps"
    if available:
        first = next(iter(available.values())).name
        there = f"{number_of(len(available), 'map')}, {'the first ' if len(available) > 1 else ''}{first}"
    return f"{where}: no map for {len(missing)} of {number_of(count, 'scored frame')}, {names}; {folder} has {there}"
