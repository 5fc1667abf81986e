"""The rule by which masks are scored: which annotated frames count, and how maps are read.

`docs/evaluation.md` tells which rule each published table used.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from utils.evaluation.metrics import BOUNDARY_TOLERANCE
from utils.evaluation.scoring import THRESHOLD

MEASURES = ("uvos", "vsod")


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
        """Those of a sequence's annotated frames, in order, that can count; `counts` is for whoever reads them."""
        return list(stems)[int(self.skip_first) : len(stems) - int(self.skip_last)]

    def counts(self, gt_empty: bool) -> bool:
        """Whether one of those counts, by whether its ground truth is without any foreground."""
        return not (self.skip_empty and gt_empty)

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
    """What papers report on a data set: DAVSOD, each of its test sets, and MCL are benchmarks of salient objects
    only.
    """
    return ("vsod",) if dataset.startswith("DAVSOD") or dataset == "MCL" else MEASURES
