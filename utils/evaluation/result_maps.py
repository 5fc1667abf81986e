"""Finding the maps of a result folder, ours or any other method's, and pairing them with the ground truth.

Maps are paired by sequence and frame name, never by position. Result folders are only read.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from datasets.errors import DataError
from datasets.sequences import VideoSequence
from utils.errors import UserError
from utils.evaluation.protocol import Protocol
from utils.evaluation.scoring import FrameJob

KINDS = ("binary", "crf", "probability")

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


def find_jobs(unit: Unit) -> dict[str, list[FrameJob]]:
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
