"""Measures of video salient object detection on grey maps, aggregated by the rule of the DAVSOD benchmark.

The per-frame measures are those of `pysodmetrics` (checked in the tests against its own known answers): MAE, S-measure
(alpha 0.5), F-measure (beta^2 0.3), E-measure, weighted F-measure (beta^2 1). DAVSOD's evaluation
(`EvaluateTool/main.m`) fixes the rest: each map is stretched to [0, 1] on its own, values are averaged over the frames
of a sequence and then over the sequences, and the *maximum* and *mean* over thresholds are taken of the averaged curve.
The maximum of a data set is therefore not the mean of its sequences' maxima, which is larger. Which frames are scored
is decided in `utils.evaluation.protocol`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class SaliencyScores:
    """Measures of one frame, or their mean over the frames of a sequence or the sequences of a data set."""

    mae: float
    s: float
    weighted_f: float
    adaptive_f: float
    adaptive_e: float
    f_curve: np.ndarray
    """F-measure at each of the 256 thresholds, from 255 down to 0; (256,) float64."""
    e_curve: np.ndarray
    """E-measure, the same way."""

    def summary(self) -> dict[str, float]:
        """The figures papers print, under the keys of `evaluation.json`; `MAE` is better when lower."""
        return {
            "MAE": float(self.mae),
            "S": float(self.s),
            "max_F": float(self.f_curve.max()),
            "mean_F": float(self.f_curve.mean()),
            "adp_F": float(self.adaptive_f),
            "max_E": float(self.e_curve.max()),
            "mean_E": float(self.e_curve.mean()),
            "adp_E": float(self.adaptive_e),
            "wF": float(self.weighted_f),
        }


def saliency_scores(saliency: np.ndarray, gt: np.ndarray) -> SaliencyScores:
    """All measures of one frame.

    `saliency` is a grey map `(H, W)` uint8; it is stretched to [0, 1] (a constant map is only divided by 255). `gt` is
    a mask `(H, W)`, boolean or non-zero for foreground. For an empty ground truth the F-measures are 0 whatever the
    map, as in DAVSOD's code.

    Raises `ValueError` when the sizes differ or the map is not 8-bit.
    """
    import py_sod_metrics as sod

    saliency, gt = np.asarray(saliency), np.asarray(gt, dtype=bool)
    if saliency.dtype != np.uint8 or saliency.ndim != 2:
        raise ValueError(f"a grey map (H, W) of uint8 expected, got {saliency.dtype} {saliency.shape}")
    if saliency.shape != gt.shape:
        raise ValueError(f"map {saliency.shape} and ground truth {gt.shape} differ in size")
    stretched = stretch(saliency)

    mae, s, e, weighted_f = sod.MAE(), _s_measure()(), sod.Emeasure(), sod.WeightedFmeasure()
    # FmeasureV2 is the package's F-measure to stay: its class `Fmeasure`, with the same values, warns that it will go.
    handler = sod.FmeasureHandler(beta=0.3, with_adaptive=True, with_dynamic=True)
    f = sod.FmeasureV2(metric_handlers={"fm": handler})
    for measure in (mae, s, e, weighted_f, f):
        measure.step(stretched, gt, normalize=False)
    f_results, e_results = f.get_results()["fm"], e.get_results()["em"]
    return SaliencyScores(
        mae=float(mae.get_results()["mae"]),
        s=float(s.get_results()["sm"]),
        weighted_f=float(weighted_f.get_results()["wfm"]),
        adaptive_f=float(f_results["adaptive"]),
        adaptive_e=float(e_results["adp"]),
        f_curve=np.asarray(f_results["dynamic"], dtype=np.float64),
        e_curve=np.asarray(e_results["curve"], dtype=np.float64),
    )


@functools.cache
def _s_measure() -> type:
    """The package's S-measure, which is no number where the object's centre lies in the last row or column, as that of
    one which is just coming into view there: it then multiplies the mean of blocks without any pixel by their area, 0.
    """
    import py_sod_metrics as sod

    class SMeasure(sod.Smeasure):
        def ssim(self, pred: np.ndarray, gt: np.ndarray) -> float:
            return super().ssim(pred, gt) if pred.size else 0.0

    return SMeasure


def stretch(saliency: np.ndarray) -> np.ndarray:
    """A uint8 map as float64, its smallest value at 0 and its largest at 1; a constant one keeps its value / 255."""
    values = saliency / 255
    low, high = values.min(), values.max()
    return (values - low) / (high - low) if high > low else values


def mean_scores(scores: Iterable[SaliencyScores]) -> SaliencyScores:
    """The mean of every measure and of the curves, threshold by threshold.

    Of frames for a sequence, of sequences (each one vote, whatever its length) for a data set. Raises `ValueError` for
    nothing.
    """
    scores = list(scores)
    if not scores:
        raise ValueError("no scores to average")
    return SaliencyScores(
        mae=float(np.mean([s.mae for s in scores])),
        s=float(np.mean([s.s for s in scores])),
        weighted_f=float(np.mean([s.weighted_f for s in scores])),
        adaptive_f=float(np.mean([s.adaptive_f for s in scores])),
        adaptive_e=float(np.mean([s.adaptive_e for s in scores])),
        f_curve=np.mean([s.f_curve for s in scores], axis=0),
        e_curve=np.mean([s.e_curve for s in scores], axis=0),
    )
