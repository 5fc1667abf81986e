"""``--tools eval``: scores folders of masks, compares them and writes the figures.

One call replaces the two MATLAB toolboxes that DBSNet's users send their masks to, for its own results and for those of
any other method. Beside this: `protocol` says which frames count, as the figures do; `result_maps` finds the maps,
`dataset_scores` makes the figures, `tables` sets them side by side.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from datasets.sequences import SEQUENCE_NAMES, VideoSequence
from utils.errors import UserError, number_of
from utils.evaluation import tables
from utils.evaluation.dataset_scores import DatasetScores, evaluate
from utils.evaluation.protocol import MEASURES, default_measures, default_protocol
from utils.evaluation.published import PUBLISHED, SEQUENCE_COUNTS, Published, on_sequences
from utils.evaluation.result_maps import KINDS, Unit, find_maps, is_own, require_folder
from utils.files import write_json, write_text

_PACKAGES = {"uvos": ("cv2", "opencv-python-headless"), "vsod": ("py_sod_metrics", "pysodmetrics")}


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
        "--resize",
        action="store_true",
        help="scale maps of another size to that of the ground truth (files stay as they are)",
    )
    group.add_argument(
        "--published",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="add published figures to the comparison. Default: only those of the same sequences by the usual rule",
    )
    group.add_argument(
        "--table_dir",
        default=None,
        help="folder of the comparison, and of the figures of folders that are not ours. Default: --save_dir",
    )


def check(args: argparse.Namespace, datasets: Sequence[str]) -> None:
    """Refuses what `run` would refuse before it looks at a map, for whoever has much to do before.

    Raises:
        UserError: a package is not installed that the figures of these data sets need, a folder of ``--results`` is
            not there or given twice, ``--table_dir`` or ``--save_dir`` is a file.
    """
    if args.results:
        _names(args.results)
    made = [Path(folder).resolve() for folder in (args.save_dir, args.demo_dir)]  # by the tools before, perhaps
    for folder in args.results or []:
        if not any(folder.resolve().is_relative_to(place) for place in made):
            require_folder(folder)
    for name in ("table_dir", "save_dir"):
        place = getattr(args, name)
        if place is not None and Path(place).exists() and not Path(place).is_dir():
            raise UserError(f"--{name} {place}: a file; expected the name of a folder, or of none yet")
    _require_packages(measures for name in datasets for measures in args.metrics or default_measures(name))


def _require_packages(measures: Iterable[str]) -> None:
    for name in sorted(set(measures)):
        module, package = _PACKAGES[name]
        if importlib.util.find_spec(module) is None:
            other = "vsod" if name == "uvos" else "uvos"
            raise UserError(f"--metrics {name} needs {package}: pip install {package}, or give --metrics {other}")


def run(
    args: argparse.Namespace, sequences_by_dataset: dict[str, list[VideoSequence]], results: Sequence[Path]
) -> dict[str, Any]:
    """Score result folders on data sets, print the tables, and write them.

    `evaluation.json` (see `document`) and CSV per sequence and per frame go into the folder of our own results, or for
    any other folder into `--table_dir/<its name>`: nothing is ever written among somebody's masks. `comparison.md`,
    `.tex` and `.csv` go to `--table_dir`.

    Returns what `evaluation.json` of each folder holds, by the folder's name in the tables.

    Raises `DataError` and `UserError` naming what is missing or wrong; nothing is written then.
    """
    results = [Path(folder) for folder in results]
    if not results or not sequences_by_dataset:
        raise UserError("nothing to score: --results and --datasets need at least one entry each")
    if args.eval_folder != "auto" and not any(map(is_own, results)):
        raise UserError(
            f"{results[0]}: --eval_folder {args.eval_folder} needs one of {', '.join(KINDS)} in it, there is none"
        )
    names = _names(results)
    units = [
        unit
        for folder, name in zip(results, names)
        for dataset, sequences in sequences_by_dataset.items()
        for unit in _units(args, folder, name, dataset, sequences)
    ]
    _require_packages(measures for unit in units for measures in unit.protocols)
    table_dir = args.table_dir or args.save_dir
    for folder in results:
        if Path(table_dir).resolve() == folder.resolve() and not is_own(folder):
            raise UserError(
                f"{folder}: the folder of masks is where the figures would go as well, and nothing is written among "
                "masks that --tools test did not make; give another place for them: --table_dir DIR"
            )

    scores = evaluate(units, workers=args.workers, progress=True)
    documents: dict[str, Any] = {}
    taken = {folder.resolve() for folder in results}  # by masks, or by the figures of another folder
    for folder, name in zip(results, names):
        of_folder = [score for score in scores if score.unit.results == folder]
        documents[name] = document(name, of_folder)
        target = folder if is_own(folder) else Path(table_dir) / name.replace("/", "_")
        while target.resolve() in taken and not is_own(folder):
            target = target.with_name(f"{target.name}_scores")
        taken.add(target.resolve())
        # The old one goes first and the new one comes last: cut short between them (a full disk, Ctrl-C), `report`
        # would else show new figures beside the frames of old ones.
        (target / "evaluation.json").unlink(missing_ok=True)
        for score in of_folder:
            suffix = f"_{score.unit.label}" if score.unit.label else ""
            write_text(target / f"evaluation_{score.unit.dataset}{suffix}.csv", sequences_csv(score))
            write_text(target / f"evaluation_{score.unit.dataset}{suffix}_frames.csv", frames_csv(score))
        write_json(target / "evaluation.json", documents[name])
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
            name=f"{name} + CRF" if label or (is_own(folder) and folders["uvos"].parent.name == "crf") else name,
            results=folder,
            label=label,
            dataset=dataset,
            sequences=sequences,
            folders=folders,
            protocols=protocols,
            known_grey=is_own(folder) and folders["uvos"].parent.name in ("crf", "probability"),
        )
        for label, folders in find_maps(folder, dataset, args.eval_folder)
    ]


# What is written


def document(name: str, scores: Sequence[DatasetScores]) -> dict[str, Any]:
    """What `evaluation.json` holds for the folder `name`.

    With one data set `protocol`, `overall`, `sequences` and `alternatives` (the figures by other conventions) are of
    that set; with several each of the four is keyed by the data set's name first. `crf` has the same four for the maps
    after the CRF. `warnings` are of all of it.
    """
    datasets = list(dict.fromkeys(score.unit.dataset for score in scores))
    result: dict[str, Any] = {"results": name, "datasets": datasets}
    for label in ("", "crf"):
        of_label = {score.unit.dataset: score for score in scores if score.unit.label == label}
        if not of_label:
            continue
        parts: dict[str, dict[str, Any]] = {
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
    return tables.csv_text(["sequence", *score.overall], rows)


def frames_csv(score: DatasetScores) -> str:
    """One line per scored frame. Maxima and means over thresholds are of that frame's own curve."""
    keys = list(dict.fromkeys(key for frames in score.frames.values() for values in frames.values() for key in values))
    rows = [
        [name, stem, *(values.get(key, "") for key in keys)]
        for name, frames in score.frames.items()
        for stem, values in frames.items()
    ]
    return tables.csv_text(["sequence", "frame", *keys], rows)


def _comparison(args: argparse.Namespace, scores: Sequence[DatasetScores]) -> list[tables.Table]:
    found = []
    for dataset in dict.fromkeys(score.unit.dataset for score in scores):
        for measures in MEASURES:
            ours = [s for s in scores if s.unit.dataset == dataset and measures in s.unit.protocols]
            if not ours:
                continue
            protocol = ours[0].unit.protocols[measures]
            rows = [tables.Row(score.unit.name, score.overall) for score in ours]
            count = number_of(len(ours[0].sequences), "sequence")
            notes = [f"{count}; {protocol.sentence()} ({protocol.options()})."]
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
    # By name where the names are known: twenty sequences of DAVIS can be of its train split.
    names = SEQUENCE_NAMES.get(dataset)
    whole = (count == total if names is None else set(sequences) == set(names["val"])) and by_the_usual_rule
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
