"""Comparison tables of several results on one data set, ranked, as Markdown, LaTeX and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal

_STEPS = {True: Decimal("0.1"), False: Decimal("0.001")}


@dataclass(frozen=True)
class Column:
    """One measure: its key in `evaluation.json`, and how papers write it."""

    key: str
    title: str
    latex: str
    higher_is_better: bool = True
    percent: bool = False

    def format(self, value: float | None) -> str:
        """As papers print it; a dash where there is no figure. What rounds to zero has no sign."""
        if value is None:
            return "–"
        # 0.8155, the J&F of 0.824 and 0.807, is 81.6 and not what is left of it in binary.
        exact = Decimal(repr(round(float(value), 9)))
        text = str((100 * exact if self.percent else exact).quantize(_STEPS[self.percent], ROUND_HALF_UP))
        return text.removeprefix("-") if float(text) == 0 else text


COLUMNS: dict[str, tuple[Column, ...]] = {
    "uvos": (
        Column("J_mean", "J mean", r"$\mathcal{J}$ Mean", percent=True),
        Column("J_recall", "J recall", r"$\mathcal{J}$ Recall", percent=True),
        Column("J_decay", "J decay", r"$\mathcal{J}$ Decay", percent=True, higher_is_better=False),
        Column("F_mean", "F mean", r"$\mathcal{F}$ Mean", percent=True),
        Column("F_recall", "F recall", r"$\mathcal{F}$ Recall", percent=True),
        Column("F_decay", "F decay", r"$\mathcal{F}$ Decay", percent=True, higher_is_better=False),
        Column("J&F", "J&F", r"$\mathcal{J}\&\mathcal{F}$", percent=True),
    ),
    "vsod": (
        Column("S", "S", r"$S_\alpha$"),
        Column("max_F", "max F", r"$F_\beta^{\max}$"),
        Column("mean_F", "mean F", r"$F_\beta^{\mathrm{mean}}$"),
        Column("adp_F", "adp F", r"$F_\beta^{\mathrm{adp}}$"),
        Column("max_E", "max E", r"$E_\xi^{\max}$"),
        Column("mean_E", "mean E", r"$E_\xi^{\mathrm{mean}}$"),
        Column("adp_E", "adp E", r"$E_\xi^{\mathrm{adp}}$"),
        Column("wF", "wF", r"$F_\beta^{w}$"),
        Column("MAE", "MAE", "MAE", higher_is_better=False),
    ),
}
"""The first column of each ranks the rows."""

_MARKS = (r"$^\dagger$", r"$^\ddagger$")
"""Of published rows in LaTeX: one for each choice of sequences that they are of, two at most in a table."""

_TITLES = {"uvos": "J and F (percent)", "vsod": "salient objects"}


@dataclass(frozen=True)
class Row:
    """A method's figures, by the keys of `COLUMNS`; those it lacks stay empty."""

    method: str
    values: Mapping[str, float]
    published: bool = False
    """Not measured here but quoted, from `source`."""
    source: str = ""
    of: str = ""
    """Of which sequences published figures are, where that has to be said: "these 8 sequences"."""

    @property
    def title(self) -> str:
        """The method, and whether its figures are quoted."""
        return f"{self.method} (published{', ' + self.of if self.of else ''})" if self.published else self.method


@dataclass(frozen=True)
class Table:
    """All rows for one data set and one kind of measure ("uvos" or "vsod"), in any order."""

    dataset: str
    measures: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    @property
    def columns(self) -> tuple[Column, ...]:
        """The measures that any row has a figure for."""
        return tuple(c for c in COLUMNS[self.measures] if any(c.key in row.values for row in self.rows))

    def ranked(self) -> list[tuple[int | None, Row]]:
        """Rows with their rank by the first column, best first; equal figures share a rank, a missing one has none."""
        key = COLUMNS[self.measures][0].key
        order = sorted(self.rows, key=lambda row: -row.values.get(key, float("-inf")))
        ranked: list[tuple[int | None, Row]] = []
        for position, row in enumerate(order, start=1):
            value = row.values.get(key)
            tied = ranked and value is not None and ranked[-1][1].values.get(key) == value
            ranked.append((None if value is None else ranked[-1][0] if tied else position, row))
        return ranked

    def best(self, column: Column) -> str:
        """The best figure of a column, as printed: figures that print alike share it."""
        values = [row.values[column.key] for row in self.rows if column.key in row.values]
        return column.format(max(values) if column.higher_is_better else min(values))

    def sources(self) -> list[str]:
        """Where the published figures come from, each source once, with the methods quoted from it."""
        methods: dict[str, list[str]] = {}
        for row in self.rows:
            if row.published:
                methods.setdefault(row.source, []).append(row.method)
        return [f"{', '.join(names)}: {source}" for source, names in methods.items()]


def markdown(tables: Sequence[Table]) -> str:
    """One section for each table, columns aligned so that it also reads well on a screen; the best figures are bold."""
    return "\n".join(_markdown(table) for table in tables)


def _markdown(table: Table) -> str:
    columns = table.columns
    arrows = ["↑" if column.higher_is_better else "↓" for column in columns]
    cells = [["#", "method", *(f"{column.title} {arrow}" for column, arrow in zip(columns, arrows))]]
    for rank, row in table.ranked():
        cells.append([str(rank or "–"), row.title.replace("|", r"\|")])
        for column in columns:
            text = column.format(row.values.get(column.key))
            bold = column.key in row.values and text == table.best(column) and len(table.rows) > 1
            cells[-1].append(f"**{text}**" if bold else text)
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    lines = [
        "| " + " | ".join(c.ljust(w) if i == 1 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths))) + " |"
        for line in cells
    ]
    rule = "|" + "|".join(f":{'-' * (w + 1)}" if i == 1 else f"{'-' * (w + 1)}:" for i, w in enumerate(widths)) + "|"
    section = [f"## {table.dataset}: {_TITLES[table.measures]}", "", lines[0], rule, *lines[1:], ""]
    section += [f"- {note}" for note in table.notes]
    section += [f"- Published: {source}" for source in table.sources()]
    return "\n".join(section) + "\n"


def latex(tables: Sequence[Table]) -> str:
    """One `table` environment for each (package booktabs); published rows carry a dagger, and where some are of other
    sequences than the rest two; the caption says of which. Sources are comments.
    """
    return "\n".join(_latex(table) for table in tables)


def _latex(table: Table) -> str:
    columns = table.columns
    heads = [rf"{c.latex} ${chr(92)}{'uparrow' if c.higher_is_better else 'downarrow'}$" for c in columns]
    lines = [f"% {note}" for note in (*table.notes, *(f"Published: {source}" for source in table.sources()))]
    lines += [
        r"\begin{table}",
        r"\centering",
        r"\begin{tabular}{rl" + "c" * len(columns) + "}",
        r"\toprule",
        " & ".join(["", "Method", *heads]) + r" \\",
        r"\midrule",
    ]
    ranked = table.ranked()
    marks = dict(zip(dict.fromkeys(row.of for _, row in ranked if row.published), _MARKS))
    for rank, row in ranked:
        cells = [str(rank or "--"), _escape(row.method) + (marks[row.of] if row.published else "")]
        for column in columns:
            text = column.format(row.values.get(column.key))
            bold = column.key in row.values and text == table.best(column) and len(table.rows) > 1
            text = text.replace("–", "--")
            text = f"${text}$" if text.startswith("-") and text != "--" else text
            cells.append(rf"\textbf{{{text}}}" if bold else text)
        lines.append(" & ".join(cells) + r" \\")
    daggers = "".join(f" {mark} as published{', ' + _escape(of) if of else ''}." for of, mark in marks.items())
    lines += [
        r"\bottomrule",
        r"\end{tabular}",
        rf"\caption{{{_escape(table.dataset)}, {_escape(_TITLES[table.measures])}.{daggers}}}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _escape(text: str) -> str:
    escapes = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    escapes.update({c: "\\" + c for c in "&%$#_{}"})
    return "".join(escapes.get(character, character) for character in text)


def comma_separated(tables: Sequence[Table]) -> str:
    """All tables in one, as fractions in full precision; `published` is yes or no, `of` as in `Row`."""
    keys = [column.key for measures in COLUMNS for column in COLUMNS[measures]]
    rows = []
    for table in tables:
        for rank, row in table.ranked():
            known = {column.key for column in table.columns}
            values = [row.values.get(key, "") if key in known else "" for key in keys]
            published = "yes" if row.published else "no"
            facts = [table.dataset, table.measures, rank or "", row.method, published]
            rows.append([*facts, *values, row.source, row.of])
    return csv_text(["dataset", "measures", "rank", "method", "published", *keys, "source", "of"], rows)


def csv_text(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A CSV file with ``\\n`` line ends."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return buffer.getvalue()
