"""Figures of whole data sets: DAVIS's J and F (`metrics`) and the measures of salient objects (`vsod`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from datasets.errors import DataError
from datasets.sequences import DENSE
from utils.errors import number_of
from utils.evaluation.metrics import sequence_statistics
from utils.evaluation.protocol import Protocol
from utils.evaluation.result_maps import Unit, find_jobs, is_own, made_of_others
from utils.evaluation.scoring import THRESHOLD, FrameJob, FrameScores, score_frames
from utils.evaluation.vsod import mean_scores
from utils.parallel import count_of_workers, parallel_map
from utils.progress import progress_bar

_FRAMES_PER_TASK = 8
# Frames from which on several processes gain more time than they take to start.
WORTH_PROCESSES = {"uvos": 400, "vsod": 20}


@dataclass
class DatasetScores:
    """The figures of one folder of maps on one data set."""

    unit: Unit
    frames: dict[str, dict[str, dict[str, float]]]
    """Sequence -> frame -> values of that frame alone, those that entered the sequence's figures."""
    sequences: dict[str, dict[str, float]]
    overall: dict[str, float]
    """Keys of `evaluation.json`: `J_mean J_recall J_decay F_mean F_recall F_decay J&F`, `MAE S max_F …`."""
    alternatives: list[dict[str, Any]]
    """J and F under the other conventions that the same frames allow."""
    notes: dict[str, Any]
    """How many maps were thresholded, resized, and how many frames had an empty ground truth."""
    warnings: list[str]


def evaluate(units: Sequence[Unit], workers: int | None = None, progress: bool = False) -> list[DatasetScores]:
    """Score every unit, with `workers` processes (default: one per processor); the result does not depend on them.

    Raises `DataError` naming the sequence, frame or file that is missing, unreadable or of another size.
    """
    for unit in units:
        unit.jobs = find_jobs(unit, progress)
    count = sum(len(jobs) for unit in units for jobs in unit.jobs.values())
    workers = count_of_workers(workers)
    if count < min(WORTH_PROCESSES[measures] for unit in units for measures in unit.protocols):
        workers = min(workers, 1)

    def tasks() -> Iterator[tuple[list[FrameJob]]]:
        for unit in units:
            for jobs in unit.jobs.values():
                for start in range(0, len(jobs), _FRAMES_PER_TASK):
                    yield (jobs[start : start + _FRAMES_PER_TASK],)

    frames: list[FrameScores] = []
    with progress_bar(total=count, desc="eval", unit="frame", disable=not progress) as bar:
        for part in parallel_map(score_frames, tasks(), workers):
            frames += part
            bar.update(len(part))

    scores, position = [], 0
    for unit in units:
        parts = {}
        for name, jobs in unit.jobs.items():
            parts[name] = frames[position : position + len(jobs)]
            position += len(jobs)
        scores.append(_summarise(unit, parts))
    return scores


def _summarise(unit: Unit, parts: dict[str, list[FrameScores]]) -> DatasetScores:
    everything = [frame for frames in parts.values() for frame in frames]
    warnings: list[str] = []
    notes: dict[str, Any] = {"frames_with_empty_ground_truth": sum(frame.gt_empty for frame in everything)}
    if any(frame.resized for frame in everything):
        notes["resized_maps"] = sum(frame.resized for frame in everything)
    if "uvos" in unit.protocols:
        parts = _settle_masks(unit, parts, notes, warnings)
    if "vsod" in unit.protocols and not is_own(unit.results) and not any(f.vsod_kind == "grey" for f in everything):
        parts = {
            name: [f if f.vsod_from_1 is None else dataclasses.replace(f, vsod=f.vsod_from_1) for f in frames]
            for name, frames in parts.items()
        }

    annotated = {sequence.name: sequence.annotated for sequence in unit.sequences}
    lacking = {s.name: len(s) - len(s.annotated) for s in unit.sequences if len(s) > len(s.annotated)}
    if lacking and unit.dataset in DENSE:
        first, count = next(iter(lacking.items()))
        more = f" and of {number_of(len(lacking) - 1, 'more sequence')}" if len(lacking) > 1 else ""
        warnings.append(
            f"{unit.name}, {unit.dataset}: no ground truth of {number_of(count, 'frame')} of {first}{more}, though "
            "the release has a mask for every frame: these figures are not of the official frames. Unpack the "
            "annotations again (--tools check names the frames)"
        )
    others = made_of_others(unit)
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        warnings.append(
            f"{unit.name}: the maps of {others[0]}{more} were made of other frames than there are now (another "
            "number of them, or other files): run --tools test again, if these are meant"
        )
    blank = [name for name, frames in parts.items() if all(frame.gt_empty for frame in frames)]
    if blank:
        warnings.append(
            f"{unit.name}, {unit.dataset}: no scored mask of {', '.join(blank[:5])}{' …' if len(blank) > 5 else ''} "
            "has any foreground in the ground truth; --tools check says what is odd about the values of masks"
        )
    sequences: dict[str, dict[str, float]] = {name: {} for name in parts}
    overall: dict[str, float] = {}
    alternatives = []
    if "uvos" in unit.protocols:
        protocol = unit.protocols["uvos"]
        per_sequence = {
            name: _uvos_statistics(unit, name, _counted(protocol, annotated[name], frames))
            for name, frames in parts.items()
        }
        for name, values in per_sequence.items():
            sequences[name].update(values)
        overall.update(_mean_rows(list(per_sequence.values())))
        alternatives = _alternatives(unit, annotated, parts)
    if "vsod" in unit.protocols:
        protocol = unit.protocols["vsod"]
        means = []
        for name, frames in parts.items():
            counted = _counted(protocol, annotated[name], frames)
            if not counted:
                raise DataError(_nothing_left(unit, name))
            means.append(mean_scores(frame.vsod for frame in counted))
            sequences[name].update({"vsod_frames": len(counted), **means[-1].summary()})
        overall["vsod_frames"] = sum(int(sequences[name]["vsod_frames"]) for name in parts)
        overall.update(mean_scores(means).summary())
    return DatasetScores(
        unit=unit,
        frames={name: _values_of_frames(unit, frames) for name, frames in parts.items()},
        sequences=sequences,
        overall=overall,
        alternatives=alternatives,
        notes=notes,
        warnings=warnings,
    )


def _settle_masks(
    unit: Unit, parts: dict[str, list[FrameScores]], notes: dict[str, Any], warnings: list[str]
) -> dict[str, list[FrameScores]]:
    """Decide what maps of only 0 and 1 are: masks, unless the folder holds grey maps; there they are nearly black."""
    scored = [(name, frame) for name, frames in parts.items() for frame in frames if frame.uvos is not None]
    kinds = {kind: sum(frame.kind == kind for _, frame in scored) for kind in ("zero", "0/1", "0/255", "grey")}
    notes["maps_by_values"] = {kind: count for kind, count in kinds.items() if count}
    grey = [f"{name}/{frame.stem}" for name, frame in scored if frame.kind == "grey"]
    if grey and not unit.known_grey:
        if max(frame.peak for _, frame in scored) <= THRESHOLD:
            raise DataError(
                f"{unit.name}, {unit.dataset}: no map has a value above {THRESHOLD}, and they are no 0/1 masks either "
                f"(highest value {max(frame.peak for _, frame in scored)}; one is {grey[0]}). J and F need masks of 0 "
                "and 255 or 0 and 1; save object labels as indexed PNG with a palette"
            )
        warnings.append(
            f"{unit.name}, {unit.dataset}: {len(grey)} of {number_of(len(scored), 'map')} "
            f"look{'s' if len(grey) == 1 else ''} unbinarised (for example {grey[0]}); "
            f"J and F are of the maps > {THRESHOLD}. DAVIS's MATLAB code would threshold each at half its own maximum "
            "instead, which is another figure: binarise before comparing"
        )
    if grey or unit.known_grey:
        return parts
    return {
        name: [f if f.uvos_from_1 is None else dataclasses.replace(f, uvos=f.uvos_from_1) for f in frames]
        for name, frames in parts.items()
    }


def _counted(protocol: Protocol, annotated: Sequence[str], frames: list[FrameScores]) -> list[FrameScores]:
    stems = set(protocol.select(annotated))
    return [frame for frame in frames if frame.stem in stems and protocol.counts(frame.gt_empty)]


def _uvos_statistics(unit: Unit, name: str, frames: list[FrameScores]) -> dict[str, float]:
    if not frames:
        raise DataError(_nothing_left(unit, name))
    j = sequence_statistics([frame.uvos[0] for frame in frames])
    f = sequence_statistics([frame.uvos[1] for frame in frames])
    row: dict[str, float] = {"uvos_frames": len(frames)}
    row.update({f"J_{key}": value for key, value in j.items()})
    row.update({f"F_{key}": value for key, value in f.items()})
    row["J&F"] = (j["mean"] + f["mean"]) / 2
    return row


def _nothing_left(unit: Unit, name: str) -> str:
    return f"{unit.dataset}/{name}: no frame has foreground in the ground truth; leave out --skip_empty or the sequence"


def _mean_rows(rows: list[dict[str, float]]) -> dict[str, float]:
    """The unweighted mean over sequences; frames are added up."""
    return {
        key: sum(int(row[key]) for row in rows) if key == "uvos_frames" else float(np.mean([row[key] for row in rows]))
        for key in rows[0]
    }


def _alternatives(
    unit: Unit, annotated: dict[str, tuple[str, ...]], parts: dict[str, list[FrameScores]]
) -> list[dict[str, Any]]:
    """J and F under the stricter selections of the frames that were scored anyway; FBMS has no agreed one."""
    ours = unit.protocols["uvos"]
    ends = [(ours.skip_first, ours.skip_last)]
    if ends != [(True, True)]:
        ends.append((True, True))
    empties = [ours.skip_empty]
    if not ours.skip_empty and any(frame.gt_empty for frames in parts.values() for frame in frames):
        empties.append(True)
    found = []
    for skip_first, skip_last in ends:
        for skip_empty in empties:
            other = dataclasses.replace(ours, skip_first=skip_first, skip_last=skip_last, skip_empty=skip_empty)
            counted = {name: _counted(other, annotated[name], frames) for name, frames in parts.items()}
            if other == ours or not all(counted.values()):
                continue
            rows = [_uvos_statistics(unit, name, frames) for name, frames in counted.items()]
            chosen = {"skip_first": skip_first, "skip_last": skip_last, "skip_empty": skip_empty}
            found.append({**chosen, "frames": other.sentence(), "options": other.options(), **_mean_rows(rows)})
    return found


def _values_of_frames(unit: Unit, frames: list[FrameScores]) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for frame in frames:
        values: dict[str, float] = {}
        counts = {name for name, protocol in unit.protocols.items() if protocol.counts(frame.gt_empty)}
        if frame.uvos is not None and "uvos" in counts:
            values.update(J=frame.uvos[0], F=frame.uvos[1])
        if frame.vsod is not None and "vsod" in counts:
            values.update(frame.vsod.summary())
        if values:
            found[frame.stem] = values
    return found
