"""Reading maps and scoring frames: what the processes of `utils.evaluation.dataset_scores` run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from datasets.errors import DataError
from datasets.images import is_coloured, load_mask, load_mask_values, palette_colours
from utils.evaluation.metrics import jaccard_and_boundary_f
from utils.evaluation.vsod import SaliencyScores, saliency_scores

THRESHOLD = 127
"""A map is foreground above this, out of 255, as DBSNet's authors binarise."""


def read_map(path: Path | str) -> tuple[np.ndarray, str]:
    """A predicted map of any of the usual PNG kinds as `(H, W)` uint8, and what kind of values it holds.

    1-bit images and images with a coloured palette (labels; any object is foreground) become 0 and 255; grey images,
    also those stored as RGB or with a grey palette, keep their values. The kind is "zero", "0/1", "0/255" or "grey".

    Raises `DataError` for an unreadable file, a coloured image, or more than 8 bits.
    """
    values, mode = load_mask_values(path)
    if mode == "1":
        values = values * np.uint8(255)
    elif mode == "P":
        colours = palette_colours(path)
        values = (values > 0) * np.uint8(255) if is_coloured(colours) else colours[..., 0]
    elif mode == "RGB":
        if is_coloured(values):
            raise DataError(f"{path}: a coloured image; expected a mask or grey map (1-bit, grey or indexed PNG)")
        values = values[..., 0]
    elif mode != "L":
        raise DataError(f"{path}: more than 8 bits per pixel; expected an 8-bit map (0 to 255). Save it as 8-bit PNG")
    values = np.ascontiguousarray(values)
    return values, _kind(values)


def _kind(values: np.ndarray) -> str:
    peak = int(values.max(initial=0))
    if peak == 0:
        return "zero"
    if peak in (1, 255) and np.count_nonzero(values) == np.count_nonzero(values == peak):
        return f"0/{peak}"
    return "grey"


def resized_map(values: np.ndarray, kind: str, shape: tuple[int, int]) -> np.ndarray:
    """A map (H, W) uint8 of a kind of `read_map` at another size: masks by the nearest pixel, so that they stay masks;
    grey maps bilinearly, to be thresholded afterwards.
    """
    method = Image.Resampling.BILINEAR if kind == "grey" else Image.Resampling.NEAREST
    return np.asarray(Image.fromarray(values).resize((shape[1], shape[0]), method))


@dataclass(frozen=True)
class FrameJob:
    """One frame to score; `uvos` and `vsod` are the maps for these measures, or None."""

    stem: str
    gt: Path
    mask_rule: str
    uvos: Path | None
    vsod: Path | None
    resize: bool


@dataclass(frozen=True)
class FrameScores:
    """Everything known about one frame."""

    stem: str
    gt_empty: bool
    uvos: tuple[float, float] | None = None
    """J and F of the map above 127."""
    uvos_from_1: tuple[float, float] | None = None
    """J and F of a map of only 0 and 1, read as a mask; which reading holds depends on the other maps of the folder."""
    kind: str = ""
    """Kind of the values that J and F were computed from, see `read_map`."""
    peak: int = 0
    resized: bool = False
    vsod: SaliencyScores | None = None
    vsod_kind: str = ""
    """Kind of the values that they were computed from."""
    vsod_from_1: SaliencyScores | None = None
    """Of a map of 1 alone, read as a mask of the whole image: stretched, other maps of 0 and 1 are masks anyway."""


def score_frames(jobs: list[FrameJob]) -> list[FrameScores]:
    """Scores of frames, in order. Raises `DataError` for a file that cannot be read, or is of another size."""
    return [_score_frame(job) for job in jobs]


def _score_frame(job: FrameJob) -> FrameScores:
    gt = load_mask(job.gt, job.mask_rule).astype(bool)
    maps: dict[Path, tuple[np.ndarray, str]] = {}
    resized = False
    for path in {path for path in (job.uvos, job.vsod) if path is not None}:
        values, kind = read_map(path)
        if values.shape != gt.shape:
            if not job.resize:
                raise DataError(
                    f"{path}: {values.shape[1]}×{values.shape[0]} pixels (width × height), but the ground truth "
                    f"{job.gt} has {gt.shape[1]}×{gt.shape[0]}. Save maps at the size of the video, or give --resize"
                )
            values, resized = resized_map(values, kind, gt.shape), True
        maps[path] = values, kind

    facts: dict[str, Any] = {}
    if job.uvos is not None:
        values, kind = maps[job.uvos]
        facts.update(uvos=jaccard_and_boundary_f(values > THRESHOLD, gt), kind=kind, peak=int(values.max(initial=0)))
        if kind == "0/1":
            facts["uvos_from_1"] = jaccard_and_boundary_f(values > 0, gt)
    if job.vsod is not None:
        values, kind = maps[job.vsod]
        facts.update(vsod=saliency_scores(values, gt), vsod_kind=kind)
        if kind == "0/1" and values.all():
            facts["vsod_from_1"] = saliency_scores(values * np.uint8(255), gt)
    return FrameScores(stem=job.stem, gt_empty=not gt.any(), resized=resized, **facts)
