"""Scoring folders of masks: DAVIS's J and F (`utils.metrics`) and the measures of salient objects (`utils.vsod`).

One call replaces the two MATLAB toolboxes that DBSNet's users send their masks to, for its own results and for those of
any other method. Predictions are paired with the ground truth by sequence and frame name, never by position, and which
frames count is part of what is written (`Protocol`). Result folders are only read.

`docs/evaluation.md` tells which rule each published table used.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import importlib.util
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from datasets.errors import DataError
from datasets.sequences import VideoSequence
from utils import tables
from utils.errors import UserError
from utils.files import write_json, write_text
from utils.metrics import BOUNDARY_TOLERANCE, sequence_statistics
from utils.parallel import default_workers, parallel_map
from utils.published import PUBLISHED, SEQUENCE_COUNTS, Published, on_sequences
from utils.scoring import THRESHOLD, FrameJob, FrameScores, score_frames
from utils.vsod import mean_scores

MEASURES = ("uvos", "vsod")
KINDS = ("binary", "crf", "probability")

_PACKAGES = {"uvos": ("cv2", "opencv-python-headless"), "vsod": ("py_sod_metrics", "pysodmetrics")}
_SUFFIXES = (".png", ".bmp", ".jpg", ".jpeg", ".tif", ".tiff", ".pgm")
_FRAMES_PER_TASK = 8
# Frames from which on several processes gain more time than they take to start.
_WORTH_PROCESSES = {"uvos": 400, "vsod": 20}


@dataclass(frozen=True)
class Protocol:
    """Which annotated frames count for one kind of measure, and how maps are read."""

    measures: str
    """"uvos" (J, F) or "vsod" (MAE, S, F, E, weighted F)."""
    skip_first: bool
    """Leave out the first annotated frame of each sequence."""
    skip_last: bool
    skip_empty: bool = False
    """Leave out frames without any foreground in the ground truth."""
    resize: bool = False
    """Bring maps of another size to that of the ground truth, instead of refusing them."""

    def select(self, stems: Sequence[str]) -> list[str]:
        """Those of a sequence's annotated frames, in order, that can count; `skip_empty` is for whoever reads them."""
        return list(stems)[int(self.skip_first) : len(stems) - int(self.skip_last)]

    def describe(self) -> dict[str, Any]:
        """All of it in words and values, for `evaluation.json`."""
        facts: dict[str, Any] = dataclasses.asdict(self)
        facts["frames"] = self.sentence()
        facts["options"] = self.options()
        if self.measures == "uvos":
            facts["binarisation"] = f"value > {THRESHOLD} of 255 (masks of 0 and 1, 1-bit and palette masks: > 0)"
            facts["boundary_tolerance"] = BOUNDARY_TOLERANCE
            facts["both_empty"] = "J = 1; F = 1 when neither has a contour"
            facts["aggregation"] = "mean, recall and decay per sequence, then the mean over sequences"
        else:
            facts["normalisation"] = "each map stretched to [0, 1] on its own; constant maps divided by 255"
            facts["empty_ground_truth"] = "F and weighted F are 0"
            facts["aggregation"] = "mean over frames, then over sequences; curves likewise, then max and mean of them"
        return facts

    def sentence(self) -> str:
        """The frames that count, as a phrase: "annotated frames without the first and last of each sequence"."""
        ends = " and ".join(n for n, skip in (("first", self.skip_first), ("last", self.skip_last)) if skip)
        phrase = "annotated frames" + (f" without the {ends} of each sequence" if ends else ", none left out")
        return phrase + (", only those with foreground in the ground truth" if self.skip_empty else "")

    def options(self) -> str:
        """The options of `--tools eval` that ask for these frames."""
        values = {name: getattr(self, name) for name in ("skip_first", "skip_last", "skip_empty")}
        return " ".join(f"--{name}" if value else f"--no-{name}" for name, value in values.items())


def default_protocol(dataset: str, measures: str) -> Protocol:
    """The usual rule of a data set.

    J and F drop the first and last frame on DAVIS, as its official code does, and nothing elsewhere: no official code
    exists for FBMS, and our reading is the plainest one. The measures of DAVSOD's code drop both ends on every set.
    """
    ends = measures == "vsod" or dataset.startswith("DAVIS")
    return Protocol(measures=measures, skip_first=ends, skip_last=ends)


def default_measures(dataset: str) -> tuple[str, ...]:
    """What papers report on a data set: DAVSOD and MCL are benchmarks of salient objects only."""
    return ("vsod",) if dataset in ("DAVSOD", "MCL") else MEASURES


# Finding maps


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


def find_maps(results: Path, dataset: str, folder: str = "auto") -> list[tuple[str, dict[str, Path]]]:
    """Where the maps of a data set are in a result folder: (`""` or `"crf"`, root for each kind of measure).

    Our own results have `probability/`, `binary/` and maybe `crf/` in them: J and F come from `binary/` (from
    `probability/` where there is none, which is the same), the other measures from `probability/`, and both once more
    from `crf/`. `folder` names one of them to score only that. Any other folder holds `<dataset>/<video>/<frame>.png`
    or `<video>/<frame>.png`.

    Raises `UserError` when the folder is missing or has nothing for the data set.
    """
    if not results.is_dir():
        raise UserError(f"{results}: no such folder; --results expects folders of maps, <dataset>/<video>/<frame>.png")
    own = {kind: results / kind / dataset for kind in KINDS if (results / kind).is_dir()}
    if not own:
        if folder != "auto":
            raise UserError(f"{results}: --eval_folder {folder} needs one of {', '.join(KINDS)} in it, there is none")
        root = results / dataset if (results / dataset).is_dir() else results
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


def _find_jobs(unit: Unit) -> dict[str, list[FrameJob]]:
    """The work on each sequence; everything that is missing is found here, before any of it starts."""
    problems: list[str] = []
    jobs: dict[str, list[FrameJob]] = {}
    for sequence in unit.sequences:
        annotated = sequence.annotated
        wanted: dict[str, dict[str, Path]] = {}  # stem -> measures -> map
        for measures, protocol in unit.protocols.items():
            stems = protocol.select(annotated)
            if not stems:
                raise DataError(
                    f"{unit.dataset}/{sequence.name}: no frame to score: {len(annotated)} annotated, and the rule is "
                    f"'{protocol.sentence()}'. Give --no-skip_first --no-skip_last, or leave the sequence out"
                )
            folder = unit.folders[measures] / sequence.name
            available = _list_maps(folder)
            missing = [stem for stem in stems if stem not in available]
            if missing:
                problems.append(_missing(unit, sequence.name, folder, missing, len(stems), available))
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
        problems = list(dict.fromkeys(problems))
        more = f"\n… and {len(problems) - 5} more sequences" if len(problems) > 5 else ""
        raise DataError("maps are missing:\n" + "\n".join(problems[:5]) + more)
    return jobs


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
    there = f"{len(available)} maps, the first {next(iter(available.values())).name}" if available else "no maps"
    return f"{where}: no map for {len(missing)} of {count} scored frames, {names}; {folder} has {there}"


# Scoring folders


@dataclass
class DatasetScores:
    """The figures of one folder of maps on one data set."""

    unit: Unit
    frames: dict[str, dict[str, dict[str, float]]]
    """Sequence -> frame -> values of that frame alone."""
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
        unit.jobs = _find_jobs(unit)
    count = sum(len(jobs) for unit in units for jobs in unit.jobs.values())
    workers = default_workers() if workers is None else workers
    if count < min(_WORTH_PROCESSES[measures] for unit in units for measures in unit.protocols):
        workers = min(workers, 1)

    def tasks() -> Iterator[tuple[list[FrameJob]]]:
        for unit in units:
            for jobs in unit.jobs.values():
                for start in range(0, len(jobs), _FRAMES_PER_TASK):
                    yield (jobs[start : start + _FRAMES_PER_TASK],)

    frames: list[FrameScores] = []
    with tqdm(total=count, desc="eval", unit="frame", disable=None if progress else True) as bar:
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

    annotated = {sequence.name: sequence.annotated for sequence in unit.sequences}
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
        frames={name: {frame.stem: _frame_values(frame) for frame in frames} for name, frames in parts.items()},
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
            f"{unit.name}, {unit.dataset}: {len(grey)} of {len(scored)} maps look unbinarised (for example {grey[0]}); "
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
    return [frame for frame in frames if frame.stem in stems and not (protocol.skip_empty and frame.gt_empty)]


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


def _frame_values(frame: FrameScores) -> dict[str, float]:
    values: dict[str, float] = {}
    if frame.uvos is not None:
        values.update(J=frame.uvos[0], F=frame.uvos[1])
    if frame.vsod is not None:
        values.update(frame.vsod.summary())
    return values


# The command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `--tools eval`; `--datasets`, `--data_dir`, `--save_dir` and `--workers` are shared ones."""
    group = parser.add_argument_group("eval")
    group.add_argument(
        "--results",
        nargs="+",
        type=Path,
        default=None,
        metavar="DIR",
        help="folders to score, also of other methods: <dataset>/<video>/<frame>.png or <video>/<frame>.png; "
        "several give one comparison. Default: --save_dir",
    )
    group.add_argument(
        "--metrics",
        nargs="+",
        choices=MEASURES,
        default=None,
        help="uvos: J and F. vsod: MAE, S, F, E, weighted F. Default: both; on DAVSOD and MCL only vsod",
    )
    group.add_argument(
        "--eval_folder",
        choices=("auto", *KINDS),
        default="auto",
        help="which maps of our own results: auto takes J and F from binary, the rest from probability, and both "
        "again from crf where it exists",
    )
    for name, what in (
        ("skip_first", "leave out the first annotated frame of each sequence"),
        ("skip_last", "leave out the last annotated frame of each sequence"),
    ):
        group.add_argument(
            f"--{name}",
            action=argparse.BooleanOptionalAction,
            default=None,
            help=f"{what}. Default: the data set's rule (yes for DAVIS, no for J and F elsewhere, yes for vsod)",
        )
    group.add_argument(
        "--skip_empty",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="leave out frames without foreground in the ground truth. Default: no",
    )
    group.add_argument(
        "--resize", action="store_true", help="bring maps of another size to that of the ground truth (never written)"
    )
    group.add_argument(
        "--published",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="rows of published figures in the comparison. Default: those of the same sequences by the usual rule",
    )
    group.add_argument(
        "--table_dir",
        type=Path,
        default=None,
        help="where the comparison goes, and what belongs to folders that are not ours. Default: --save_dir",
    )


def run(
    args: argparse.Namespace, sequences_by_dataset: dict[str, list[VideoSequence]], results: Sequence[Path]
) -> dict[str, Any]:
    """Score result folders on data sets, print the tables, and write them.

    `evaluation.json` (`protocol`, `overall`, `sequences`; keyed by data set first where there are several) and CSV per
    sequence and per frame go into the folder of our own results, or for any other folder into `--table_dir/<its name>`:
    nothing is ever written among somebody's masks. `comparison.md`, `.tex` and `.csv` go to `--table_dir`.

    Returns what `evaluation.json` of each folder holds, by the folder's name in the tables.

    Raises `DataError` and `UserError` naming what is missing or wrong; nothing is written then.
    """
    results = [Path(folder) for folder in results]
    if not results or not sequences_by_dataset:
        raise UserError("nothing to score: --results and --datasets need at least one entry each")
    names = _names(results)
    units = [
        unit
        for folder, name in zip(results, names)
        for dataset, sequences in sequences_by_dataset.items()
        for unit in _units(args, folder, name, dataset, sequences)
    ]
    for measures in sorted({measures for unit in units for measures in unit.protocols}):
        module, package = _PACKAGES[measures]
        if importlib.util.find_spec(module) is None:
            other = "vsod" if measures == "uvos" else "uvos"
            raise UserError(f"--metrics {measures} needs {package}: pip install {package}, or give --metrics {other}")

    scores = evaluate(units, workers=getattr(args, "workers", None), progress=True)

    table_dir = args.table_dir or getattr(args, "save_dir", None) or Path("evaluation")
    documents: dict[str, Any] = {}
    for folder, name in zip(results, names):
        of_folder = [score for score in scores if score.unit.results == folder]
        documents[name] = document(name, of_folder)
        target = folder if _is_own(folder) else Path(table_dir) / name.replace("/", "_")
        if not _is_own(folder) and target.resolve() == folder.resolve():
            target = target.with_name(f"{target.name}_scores")
        write_json(target / "evaluation.json", documents[name])
        for score in of_folder:
            suffix = f"_{score.unit.label}" if score.unit.label else ""
            write_text(target / f"evaluation_{score.unit.dataset}{suffix}.csv", sequences_csv(score))
            write_text(target / f"evaluation_{score.unit.dataset}{suffix}_frames.csv", frames_csv(score))
        print(f"{name}: {target / 'evaluation.json'}")

    comparison = _comparison(args, scores)
    print()
    print(tables.markdown(comparison))
    for score in scores:
        for warning in score.warnings:
            print(f"warning: {warning}")
    for suffix, write in (("md", tables.markdown), ("tex", tables.latex), ("csv", tables.comma_separated)):
        write_text(Path(table_dir) / f"comparison.{suffix}", write(comparison))
    return documents


def _is_own(folder: Path) -> bool:
    return any((folder / kind).is_dir() for kind in KINDS)


def _names(folders: Sequence[Path]) -> list[str]:
    """Short names for folders: the last part of the path, and as many before it as tell two of one name apart."""
    resolved = [folder.resolve() for folder in folders]
    if len(set(resolved)) < len(resolved):
        raise UserError("--results: a folder is given twice")
    names = [path.name for path in resolved]
    depth = 1
    while len(set(names)) < len(names):
        depth += 1
        names = [
            name if names.count(name) == 1 else "/".join(path.parts[-depth:]) for name, path in zip(names, resolved)
        ]
    return names


def _units(
    args: argparse.Namespace, folder: Path, name: str, dataset: str, sequences: list[VideoSequence]
) -> list[Unit]:
    if not sequences:
        raise UserError(f"{dataset}: no sequences to score")
    protocols = {}
    for measures in args.metrics or default_measures(dataset):
        given = {key: getattr(args, key) for key in ("skip_first", "skip_last", "skip_empty")}
        given = {key: value for key, value in given.items() if value is not None}
        protocols[measures] = dataclasses.replace(default_protocol(dataset, measures), **given, resize=args.resize)
    return [
        Unit(
            name=f"{name} + CRF" if label else name,
            results=folder,
            label=label,
            dataset=dataset,
            sequences=sequences,
            folders=folders,
            protocols=protocols,
            known_grey=_is_own(folder) and folders["uvos"].parent.name in ("crf", "probability"),
        )
        for label, folders in find_maps(folder, dataset, args.eval_folder)
    ]


# What is written


def document(name: str, scores: Sequence[DatasetScores]) -> dict[str, Any]:
    """What `evaluation.json` holds for the folder `name`.

    With one data set `protocol`, `overall` and `sequences` are of that set; with several each of the three is keyed by
    the data set's name first. `crf` has the same three for the maps after the CRF.
    """
    datasets = list(dict.fromkeys(score.unit.dataset for score in scores))
    result: dict[str, Any] = {"results": name, "datasets": datasets}
    for label in ("", "crf"):
        of_label = {score.unit.dataset: score for score in scores if score.unit.label == label}
        if not of_label:
            continue
        parts = {
            "protocol": {dataset: _protocol(score) for dataset, score in of_label.items()},
            "overall": {dataset: score.overall for dataset, score in of_label.items()},
            "sequences": {dataset: score.sequences for dataset, score in of_label.items()},
            "alternatives": {dataset: score.alternatives for dataset, score in of_label.items()},
        }
        if len(datasets) == 1:
            parts = {key: value[datasets[0]] for key, value in parts.items()}
        if label:
            result[label] = parts
        else:
            result.update(parts)
    result["warnings"] = [warning for score in scores for warning in score.warnings]
    return result


def _protocol(score: DatasetScores) -> dict[str, Any]:
    facts = {measures: protocol.describe() for measures, protocol in score.unit.protocols.items()}
    for measures, root in score.unit.folders.items():
        if measures in facts:
            facts[measures]["maps"] = str(root.relative_to(score.unit.results))
    return {"sequences": len(score.sequences), **facts, **score.notes}


def sequences_csv(score: DatasetScores) -> str:
    """One line per sequence and a last one, `mean`, for the data set; fractions in full precision."""
    rows = [[name, *values.values()] for name, values in score.sequences.items()]
    rows.append(["mean", *score.overall.values()])
    return _csv(["sequence", *score.overall], rows)


def frames_csv(score: DatasetScores) -> str:
    """One line per scored frame. Maxima and means over thresholds are of that frame's own curve."""
    keys = list(dict.fromkeys(key for frames in score.frames.values() for values in frames.values() for key in values))
    rows = [
        [name, stem, *(values.get(key, "") for key in keys)]
        for name, frames in score.frames.items()
        for stem, values in frames.items()
    ]
    return _csv(["sequence", "frame", *keys], rows)


def _csv(header: list[str], rows: list[list[Any]]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return buffer.getvalue()


def _comparison(args: argparse.Namespace, scores: Sequence[DatasetScores]) -> list[tables.Table]:
    found = []
    for dataset in dict.fromkeys(score.unit.dataset for score in scores):
        for measures in MEASURES:
            ours = [s for s in scores if s.unit.dataset == dataset and measures in s.unit.protocols]
            if not ours:
                continue
            protocol = ours[0].unit.protocols[measures]
            rows = [tables.Row(score.unit.name, score.overall) for score in ours]
            count = len(ours[0].sequences)
            notes = [f"{count} sequence{'s' if count > 1 else ''}; {protocol.sentence()} ({protocol.options()})."]
            for score in ours if measures == "uvos" else []:
                for other in score.alternatives:
                    figures = ", ".join(f"{key} {100 * other[key]:.1f}" for key in ("J_mean", "F_mean", "J&F"))
                    notes.append(f"{score.unit.name} by another convention, {other['options']}: {figures}.")
            usual = dataclasses.replace(default_protocol(dataset, measures), resize=protocol.resize)
            more, note = _published_rows(
                dataset, measures, tuple(ours[0].sequences), by_the_usual_rule=protocol == usual, wanted=args.published
            )
            rows += more
            notes += [note] if note else []
            found.append(tables.Table(dataset=dataset, measures=measures, rows=tuple(rows), notes=tuple(notes)))
    return found


def _published_rows(
    dataset: str, measures: str, sequences: Sequence[str], *, by_the_usual_rule: bool, wanted: bool | None
) -> tuple[list[tables.Row], str]:
    """Published figures that compare with those of these sequences, and a note on what is left out.

    Where a part of the test set was scored, methods that published figures of each frame are compared on that part;
    figures of the whole set are added where they are asked for (`wanted`).
    """
    whole_set = [p for p in PUBLISHED if p.dataset == dataset and p.measures == measures]
    if not whole_set or wanted is False:
        return [], ""
    total, count = SEQUENCE_COUNTS[dataset], len(sequences)
    whole = count == total and by_the_usual_rule
    same = []
    if by_the_usual_rule and not whole and (dataset, measures) == ("DAVIS-2016", "uvos"):
        same = on_sequences(sequences)
    rows = [_published_row(p, f"these {count} sequences" if count > 1 else "this sequence") for p in same]
    if whole or wanted:
        known = {p.method for p in same}
        of = "" if whole else f"all {total} sequences"
        rows += [_published_row(p, of) for p in whole_set if p.method not in known]
        return rows, ""
    words = "Published figures of the whole set" if same else "Published figures"
    return rows, f"{words} are left out: they are of all {total} sequences by the usual rule. --published adds them."


def _published_row(p: Published, of: str) -> tables.Row:
    return tables.Row(p.method, p.values, published=True, source=p.source, of=of)
