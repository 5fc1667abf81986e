"""Reading back what `--tools eval` and `--tools test` wrote into a folder of results, for the page and the demo."""

from __future__ import annotations

import csv
import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.crf import FIELD as CRF_FIELD
from utils.errors import UserError
from utils.evaluation.tables import COLUMNS
from utils.inference.maps import FIELD, made_with, of_run


@dataclass(frozen=True)
class Scores:
    """What ``eval`` wrote of one data set; parts by "" and, where it was run, "crf".

    Attributes:
        overall: part -> figure -> value.
        sequences: part -> sequence -> figure -> value.
        frames: part -> sequence -> stem -> J, or S where there is no J.
        counted: the frames that count, in words.
        key, frame_key: the figure that ranks sequences, and that of one frame ("J_mean" and "J", or "S").
    """

    dataset: str
    overall: dict[str, dict[str, float]]
    sequences: dict[str, dict[str, dict[str, float]]]
    frames: dict[str, dict[str, dict[str, float]]]
    counted: str
    key: str
    frame_key: str

    @property
    def measures(self) -> str:
        """Which of `utils.evaluation.tables.COLUMNS` the page shows."""
        return "uvos" if self.key == "J_mean" else "vsod"

    @property
    def ranked(self) -> list[str]:
        """The sequences, best first."""
        return sorted(self.sequences[""], key=lambda name: -self.sequences[""][name][self.key])

    def words(self, value: float | None) -> str:
        """A figure as the tables print it: in percent for J and F, as a fraction for the others."""
        return COLUMNS[self.measures][0].format(value)


def read_scores(save_dir: Path, document: dict[str, Any], dataset: str) -> Scores:
    """One data set's part of evaluation.json and of the CSV files beside it.

    Raises:
        UserError: the data set was not scored there, or its files were removed.
    """
    if dataset not in document.get("datasets", []):
        raise UserError(
            f"{save_dir / 'evaluation.json'}: has {', '.join(document.get('datasets', [])) or 'nothing'}, not "
            f"{dataset}; run --tools eval with the same --datasets"
        )
    several = len(document["datasets"]) > 1

    def part(source: dict[str, Any], name: str) -> dict[str, Any]:
        return source[name][dataset] if several else source[name]

    sources = {"": document, **({"crf": document["crf"]} if "crf" in document else {})}
    sources = {label: source for label, source in sources.items() if "overall" in source}  # crf/ may be alone
    sources = {label: source for label, source in sources.items() if not several or dataset in source["overall"]}
    overall = {label: part(source, "overall") for label, source in sources.items()}
    if "" not in overall:
        raise UserError(
            f"{save_dir / 'evaluation.json'}: has figures of {', '.join(overall) or 'no'} maps alone; run --tools eval "
            "where probability/ is beside crf/"
        )
    protocol = part(document, "protocol")
    if any(protocol[name].get("maps", "").startswith("crf/") for name in ("uvos", "vsod") if name in protocol):
        raise UserError(
            f"{save_dir / 'evaluation.json'}: has figures of crf/ alone, as --eval_folder crf makes them, and the page "
            "has those of before the CRF beside them; run --tools eval without --eval_folder"
        )
    key, frame_key = ("J_mean", "J") if "J_mean" in overall[""] else ("S", "S")
    frames: dict[str, dict[str, dict[str, float]]] = {}
    for label in sources:
        name = f"evaluation_{dataset}{'_' + label if label else ''}_frames.csv"
        if not (save_dir / name).is_file():
            raise UserError(f"{save_dir / name}: no such file, though evaluation.json is there; run --tools eval again")
        frames[label] = {}
        for row in read_rows(save_dir / name, ("sequence", "frame", frame_key), frame_key):
            if row[frame_key]:
                frames[label].setdefault(row["sequence"], {})[row["frame"]] = float(row[frame_key])
        lacking = [sequence for sequence in part(sources[label], "sequences") if sequence not in frames[label]]
        if lacking:
            raise UserError(f"{save_dir / name}: has no frame of {lacking[0]}; run --tools eval again")
    return Scores(
        dataset=dataset,
        overall=overall,
        sequences={label: part(source, "sequences") for label, source in sources.items()},
        frames=frames,
        counted=protocol["uvos" if key == "J_mean" else "vsod"]["frames"],
        key=key,
        frame_key=frame_key,
    )


def read_rows(path: Path, columns: Collection[str], *numbers: str) -> list[dict[str, str]]:
    """The lines of a CSV file that `--tools eval` wrote.

    Args:
        columns: those that it has to have. numbers: those whose values are numbers or empty.

    Raises:
        UserError: it is not as `eval` wrote it; a spreadsheet program that opened it may have saved it otherwise.
    """
    try:
        with open(path, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        for row in rows:
            if any(row.get(column) is None for column in columns):
                raise ValueError(f"expected the columns {', '.join(columns)}, separated by commas")
            for column in numbers:
                float(row[column] or 0)
    except (ValueError, csv.Error) as error:  # a UnicodeDecodeError is one
        raise UserError(
            f"{path}: not as --tools eval writes it ({error}); has another program saved it? Run --tools eval again"
        ) from error
    return rows


def read_making(save_dir: Path, score: Scores) -> dict[str, dict[str, Any]]:
    """What the maps of a data set say they were made with: by `--tools test` ("") and, where it was run, by the CRF.

    `eval` scores maps of one making only, so that one speaks for all: the first that says so, or the first that says
    that it was seen in a shape of its own. `test.json` would not do: it is of the last run, which may have been of
    another data set or of somebody's own video.
    """
    found: dict[str, dict[str, Any]] = {}
    for label, kind, field in (("", "probability", FIELD), ("crf", "crf", CRF_FIELD)):
        making = (
            made_with(save_dir / kind / score.dataset / name / f"{next(iter(frames))}.png", field)
            for name, frames in score.frames.get(label, {}).items()
        )
        said = [made for made in making if made is not None]
        if said:
            found[label] = max(said, key=lambda made: "resized" in made)  # the first of these, else the first
    return found


def tells_of(record: dict[str, Any], making: dict[str, dict[str, Any]]) -> bool:
    """Whether what `test.json` holds is of the run that made these maps."""
    if not record or "" not in making:
        return False
    made = of_run(making[""])
    made.pop("flow", None)  # which the record of a run does not have, since each data set may have another
    return made == of_run(record["settings"])


def read_written(path: Path, tool: str) -> dict[str, Any]:
    """What a tool wrote; raises UserError where it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); run --tools {tool} again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: not what --tools {tool} writes, a JSON object; run it again")
    return content
