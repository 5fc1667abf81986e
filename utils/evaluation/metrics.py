"""Region similarity J and contour accuracy F of DAVIS, and their statistics over a sequence.

The definitions are those of the official DAVIS-16 code (Perazzi et al., CVPR 2016; `davis-matlab`); the values equal
its published ones (`docs/evaluation.md` says how that was checked). Masks are `(H, W)`, boolean or anything whose
non-zero values are foreground. `jaccard` needs NumPy only, so that training can validate without OpenCV.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np

BOUNDARY_TOLERANCE = 0.008
"""Of the image's diagonal: 8 pixels at 480x854."""


def jaccard(pred: np.ndarray, gt: np.ndarray) -> float:
    """J, the intersection of two masks `(H, W)` over their union, in [0, 1]; 1 where both are empty.

    Raises `ValueError` when the masks are not of one shape.
    """
    return _jaccard(*_as_masks(pred, gt))


def boundary_f(pred: np.ndarray, gt: np.ndarray) -> float:
    """F, the harmonic mean of the precision and recall of the contour of `pred` against that of `gt`, in [0, 1].

    A contour pixel counts as found when the other contour has a pixel within `boundary_radius`. Two masks without any
    contour score 1, one without a contour against one with scores 0. The frame of the image is no contour, so a mask
    that fills the image has none; this is DAVIS's rule, and F = 1 for an empty ground truth and a full prediction
    follows from it.

    Raises `ValueError` when the masks are not of one shape.
    """
    return _boundary_f(*_as_masks(pred, gt))


def jaccard_and_boundary_f(pred: np.ndarray, gt: np.ndarray) -> tuple[float, float]:
    """`(jaccard, boundary_f)` of one frame, a little faster than the two calls."""
    pred, gt = _as_masks(pred, gt)
    return _jaccard(pred, gt), _boundary_f(pred, gt)


def boundary_radius(shape: tuple[int, int]) -> int:
    """`BOUNDARY_TOLERANCE` of an image (H, W) in pixels, rounded up."""
    return math.ceil(BOUNDARY_TOLERANCE * math.hypot(*shape))


def boundary_map(mask: np.ndarray) -> np.ndarray:
    """One-pixel contour of a mask `(H, W)` as a boolean map of its size (`seg2bmap` of the Berkeley benchmark).

    A pixel belongs to the contour when it differs from its right, lower, or lower right neighbour. In the last row only
    the right one counts, in the last column only the lower one, and the last pixel never does.
    """
    mask = np.asarray(mask, dtype=bool)
    boundary = np.zeros_like(mask)
    body = mask[:-1, :-1]
    np.logical_xor(body, mask[:-1, 1:], out=boundary[:-1, :-1])
    boundary[:-1, :-1] |= body ^ mask[1:, :-1]
    boundary[:-1, :-1] |= body ^ mask[1:, 1:]
    boundary[-1, :-1] = mask[-1, :-1] ^ mask[-1, 1:]
    boundary[:-1, -1] = mask[:-1, -1] ^ mask[1:, -1]
    return boundary


def sequence_statistics(values: Sequence[float] | np.ndarray) -> dict[str, float]:
    """`mean`, `recall` (the share above 0.5) and `decay` of the per-frame values of one sequence, in order of time.

    Decay is the mean of the first quarter minus that of the last: positive where quality is lost over time.
    Neighbouring quarters share a frame, as in the official code. Frame numbers stay whole integers here; the Python
    ports of that code keep them in 8 bits, which is wrong from 257 frames on.

    Raises `ValueError` when there are no values, or one of them is not finite.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or values.size == 0 or not np.isfinite(values).all():
        raise ValueError(f"statistics need one or more finite values in one dimension, got {values.shape}: {values}")
    # MATLAB rounds halves away from zero; in exact integers: round(k * (n - 1) / 4).
    ends = [(2 * k * (values.size - 1) + 4) // 8 for k in range(5)]
    first, last = values[ends[0] : ends[1] + 1], values[ends[3] : ends[4] + 1]
    return {
        "mean": float(values.mean()),
        "recall": float((values > 0.5).mean()),
        "decay": float(first.mean() - last.mean()),
    }


def _as_masks(pred: np.ndarray, gt: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    pred, gt = np.asarray(pred, dtype=bool), np.asarray(gt, dtype=bool)
    if pred.ndim != 2 or pred.shape != gt.shape:
        raise ValueError(f"masks of one size (H, W) expected, got prediction {pred.shape} and ground truth {gt.shape}")
    return pred, gt


def _jaccard(pred: np.ndarray, gt: np.ndarray) -> float:
    union = np.count_nonzero(pred | gt)
    return np.count_nonzero(pred & gt) / union if union else 1.0


def _boundary_f(pred: np.ndarray, gt: np.ndarray) -> float:
    radius = boundary_radius(gt.shape)
    # Everything that follows happens near the two objects; one pixel around them keeps their outer contour.
    window = _window(pred, gt)
    if window is None:
        return 1.0
    pred, gt = np.ascontiguousarray(pred[window]), np.ascontiguousarray(gt[window])
    pred_boundary, gt_boundary = boundary_map(pred), boundary_map(gt)
    pred_count, gt_count = np.count_nonzero(pred_boundary), np.count_nonzero(gt_boundary)
    if pred_count == 0 or gt_count == 0:
        return float(pred_count == gt_count)

    precision = np.count_nonzero(pred_boundary & _dilate(gt_boundary, radius)) / pred_count
    recall = np.count_nonzero(gt_boundary & _dilate(pred_boundary, radius)) / gt_count
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _window(pred: np.ndarray, gt: np.ndarray) -> tuple[slice, slice] | None:
    """The smallest window with both masks and one pixel around them, within the image; None when both are empty."""
    either = pred | gt
    rows, columns = np.flatnonzero(either.any(axis=1)), np.flatnonzero(either.any(axis=0))
    if rows.size == 0:
        return None
    return slice(max(rows[0] - 1, 0), rows[-1] + 2), slice(max(columns[0] - 1, 0), columns[-1] + 2)


def _dilate(boundary: np.ndarray, radius: int) -> np.ndarray:
    import cv2

    return cv2.dilate(boundary.view(np.uint8), _disk(radius)).view(bool)


@functools.lru_cache(maxsize=16)
def _disk(radius: int) -> np.ndarray:
    """All offsets within a Euclidean distance of `radius`, (2r + 1, 2r + 1) uint8."""
    y, x = np.ogrid[-radius : radius + 1, -radius : radius + 1]
    return (x * x + y * y <= radius * radius).astype(np.uint8)
