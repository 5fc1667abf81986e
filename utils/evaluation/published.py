"""Published figures of well-known methods, for comparison tables: quoted, not measured here.

Only figures whose source we could read are listed, with the source; what the rule behind each was is told in
`docs/evaluation.md`. They are of whole test sets (`SEQUENCE_COUNTS`), as fractions, rounded as published; and, for
methods whose figures of each frame are public, of any sequences of DAVIS-2016 val (`on_sequences`).
"""

from __future__ import annotations

import csv
import functools
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

SEQUENCE_COUNTS = {"DAVIS-2016": 20, "FBMS": 30, "DAVSOD": 35, "MCL": 9}
"""Test sequences that published figures are of: DAVIS-2016 val, FBMS-59 test, DAVSOD easy, MCL test."""

DAVIS_SEQUENCES = Path(__file__).with_name("published_davis2016.csv")
"""J and F of 22 methods on each sequence of DAVIS-2016 val: statistics of the figures of each frame that
davischallenge.org publishes, three digits each (davisvideochallenge.github.io, json_data/raw_eval/2016). First and last
frames are dropped. Their means over all 20 are those of its table (tests/test_metrics.py; recall to 0.0035)."""


@dataclass(frozen=True)
class Published:
    """One row: figures by the keys of `evaluation.json`, those that the source gives (J&F is the mean of its two)."""

    method: str
    dataset: str
    measures: str
    values: dict[str, float]
    source: str


_SITE = "DAVIS-2016 results of davischallenge.org (davisvideochallenge.github.io, json_data/global_eval_val_2016.js)"
_FRAMES = "figures of each frame at davischallenge.org (davisvideochallenge.github.io, json_data/raw_eval/2016)"
_FSNET = "README of GewelsJI/FSNet, DAVIS MATLAB toolbox"
_HFAN = "README of NUST-Machine-Intelligence-Laboratory/HFAN, single scale"
_SSAV = "output of the DAVSOD tool for SSAV (DengPingFan/DAVSOD)"
_PDB = "README of shenjianbing/PDB-ConvLSTM, as corrected there"
_AGS = "paper's figure as quoted in wenguanwang/AGS, issue 5"

# J mean, recall, decay; F mean, recall, decay.
_DAVIS_UVOS = (
    ("HFAN-Medium", _HFAN, (0.868, 0.961, 0.043, 0.882, 0.953, 0.011)),
    ("HFAN-Small", _HFAN, (0.862, 0.967, 0.046, 0.871, 0.955, 0.023)),
    ("FSNet + CRF", _FSNET, (0.834, 0.945, 0.032, 0.831, 0.902, 0.026)),
    ("FSNet", _FSNET, (0.823, 0.943, 0.033, 0.833, 0.919, 0.028)),
    ("MATNet", _SITE, (0.824, 0.945, 0.055, 0.807, 0.902, 0.045)),
    ("AnDiff", _SITE, (0.817, 0.909, 0.022, 0.805, 0.851, 0.006)),
    ("EPO+", _SITE, (0.806, 0.952, 0.022, 0.755, 0.879, 0.024)),
    ("COSNet", _SITE, (0.805, 0.931, 0.044, 0.795, 0.895, 0.050)),
    ("AGS", _SITE, (0.797, 0.911, 0.019, 0.774, 0.858, 0.016)),
    ("LSMO", _SITE, (0.782, 0.891, 0.041, 0.759, 0.847, 0.035)),
    ("PDB", _SITE, (0.772, 0.901, 0.009, 0.745, 0.844, -0.002)),
    ("ARP", _SITE, (0.762, 0.911, 0.070, 0.706, 0.835, 0.079)),
    ("LVO", _SITE, (0.759, 0.891, 0.000, 0.721, 0.834, 0.013)),
    ("UOVOS", _SITE, (0.739, 0.885, 0.006, 0.680, 0.806, 0.007)),
    ("FSEG", _SITE, (0.707, 0.835, 0.015, 0.653, 0.738, 0.018)),
    ("LMP", _SITE, (0.700, 0.850, 0.013, 0.659, 0.792, 0.025)),
    ("SFL", _SITE, (0.674, 0.814, 0.062, 0.667, 0.771, 0.051)),
    ("TIS", _SITE, (0.626, 0.803, 0.071, 0.596, 0.745, 0.064)),
    ("ELM", _SITE, (0.618, 0.672, 0.098, 0.612, 0.654, 0.088)),
    ("FST", _SITE, (0.558, 0.649, 0.000, 0.511, 0.516, 0.029)),
    ("CUT", _SITE, (0.552, 0.575, 0.022, 0.552, 0.610, 0.034)),
    ("NLC", _SITE, (0.551, 0.558, 0.126, 0.523, 0.519, 0.114)),
    ("MSG", _SITE, (0.533, 0.616, 0.024, 0.508, 0.600, 0.051)),
    ("KEY", _SITE, (0.498, 0.591, 0.141, 0.427, 0.375, 0.106)),
    ("CVOS", _SITE, (0.482, 0.540, 0.105, 0.447, 0.526, 0.117)),
    ("TRC", _SITE, (0.473, 0.493, 0.083, 0.441, 0.436, 0.129)),
)
_UVOS_KEYS = ("J_mean", "J_recall", "J_decay", "F_mean", "F_recall", "F_decay")


def _davis_uvos() -> tuple[Published, ...]:
    rows = []
    for method, source, figures in _DAVIS_UVOS:
        values = dict(zip(_UVOS_KEYS, figures))
        values["J&F"] = (values["J_mean"] + values["F_mean"]) / 2
        rows.append(Published(method, "DAVIS-2016", "uvos", values, source))
    return tuple(rows)


PUBLISHED: tuple[Published, ...] = (
    *_davis_uvos(),
    Published("AGS", "FBMS", "uvos", {"J_mean": 0.760}, _AGS),
    Published("PDB", "FBMS", "uvos", {"J_mean": 0.723}, _PDB),
    # Its README gives one E and one F without saying which; our reading: the maxima, which FSNet's tool prints.
    Published("HFAN-Medium", "DAVIS-2016", "vsod", {"S": 0.938, "max_E": 0.983, "max_F": 0.935, "MAE": 0.008}, _HFAN),
    Published("HFAN-Small", "DAVIS-2016", "vsod", {"S": 0.934, "max_E": 0.983, "max_F": 0.929, "MAE": 0.009}, _HFAN),
    Published(
        "SSAV", "DAVIS-2016", "vsod", {"S": 0.893, "adp_F": 0.765, "max_F": 0.861, "mean_F": 0.814, "MAE": 0.028}, _SSAV
    ),
    Published(
        "SSAV", "DAVSOD", "vsod", {"S": 0.744, "adp_F": 0.602, "max_F": 0.640, "mean_F": 0.609, "MAE": 0.087}, _SSAV
    ),
)


@functools.cache
def _davis_sequences() -> dict[str, dict[str, dict[str, float]]]:
    """Method -> sequence of DAVIS-2016 val -> figures."""
    methods: dict[str, dict[str, dict[str, float]]] = {}
    with DAVIS_SEQUENCES.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            figures = {key: float(row[key]) for key in _UVOS_KEYS}
            methods.setdefault(row["method"], {})[row["sequence"]] = figures
    return methods


def on_sequences(names: Collection[str]) -> list[Published]:
    """Rows of J and F on these sequences of DAVIS-2016 val alone, best first; none where one is not of val."""
    rows = []
    for method, sequences in _davis_sequences().items():
        if not names or not sequences.keys() >= set(names):
            continue
        values = {key: fmean(sequences[name][key] for name in names) for key in _UVOS_KEYS}
        values["J&F"] = (values["J_mean"] + values["F_mean"]) / 2
        rows.append(Published(method, "DAVIS-2016", "uvos", values, _FRAMES))
    return sorted(rows, key=lambda row: -row.values["J_mean"])
