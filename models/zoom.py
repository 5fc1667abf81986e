"""Zoom: a first, smaller look at whole frames, and a closer one where the object is.

Not of the paper, and nothing is learned: the network segments the video at two thirds of its size, a window follows
what it found, and the second time it sees what is in the window, at its full size. Small objects become larger, and
an object stays in the middle while a camera loses it. What lies outside is taken from the first look.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# Tried on the four videos that `MODEL_CARD.md` holds out; docs/experiments.md has what other values gave.
FIRST = 2 / 3  # of the network's size, for the first look
MARGIN = 1.7  # of the window, by the longer side of what was found
LEAST = 0.4  # of the frame: a smaller window would show more of the interpolation than of the object
_TAIL = 0.005  # of what was found lies beyond its extent, on each side: specks far away do not count
_FEWEST = 1e-4  # of the frame is the object at least, or it was not found
_REACH, _SMOOTH = 10, 6.0  # frames: a window is as large as the largest so near, and changes slowly
_BORDER = 0.06  # of the window, in which the closer look gives way to the first


class View(NamedTuple):
    """A part of a frame, in multiples of its width and height. It has the frame's shape."""

    left: float
    top: float
    side: float

    def pixels(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Its first and last row and column of a picture of this size, the last not included: at least one of each."""

        def span(start: float, count: int) -> tuple[int, int]:
            length = max(1, round(self.side * count))
            first = min(max(0, round(start * count)), count - length)
            return first, first + length

        return *span(self.top, height), *span(self.left, width)


WHOLE = View(0.0, 0.0, 1.0)


def extents(probabilities: Tensor) -> Tensor:
    """Where the object is in each map (n, H, W): (n, 4) first and last column, first and last row, as parts of width
    and height; NaN where there is none.
    """
    found = probabilities * (probabilities > 0.5)
    total = found.sum((1, 2))  # (n,)
    sides = []
    for axis, other in ((2, 1), (1, 2)):
        share = found.sum(other).cumsum(1) / total[:, None]  # (n, W), then (n, H)
        count = probabilities.shape[axis]
        sides += [(share < _TAIL).sum(1) / count, ((share < 1 - _TAIL).sum(1) + 1) / count]
    enough = total >= _FEWEST * probabilities.shape[1] * probabilities.shape[2]
    return torch.stack(sides, 1).where(enough[:, None], torch.nan)


def follow(found: np.ndarray) -> list[View]:
    """One window for each frame of a video, by its `extents` (T, 4). Where nothing was found it is between those of the
    frames that know; in a video in which nothing was, it is the whole frame.
    """
    known = np.flatnonzero(~np.isnan(found).any(1))
    if not len(known):
        return [WHOLE] * len(found)
    frames = np.arange(len(found))
    left, right, top, bottom = (np.interp(frames, known, found[known, side]) for side in range(4))
    longer = np.maximum(right - left, bottom - top)
    near = np.lib.stride_tricks.sliding_window_view(np.pad(longer, _REACH, mode="edge"), 2 * _REACH + 1)
    side = np.clip(MARGIN * _smooth(near.max(1), _SMOOTH), LEAST, 1)
    centres = (_smooth((first + last) / 2, _SMOOTH / 2) for first, last in ((left, right), (top, bottom)))
    x, y = (np.clip(centre, side / 2, 1 - side / 2) - side / 2 for centre in centres)  # within the frame
    return [View(*map(float, values)) for values in zip(x, y, side)]


def _smooth(values: np.ndarray, sigma: float) -> np.ndarray:
    """A Gaussian mean over the frames (T,), the first and the last going on for ever."""
    reach = int(4 * sigma)
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    return np.convolve(np.pad(values, reach, mode="edge"), weights / weights.sum(), mode="valid")


def magnify(images: Tensor, views: Sequence[View], size: tuple[int, int]) -> Tensor:
    """What the views of pictures (n, 3, H, W) show, at one size: (n, 3, h, w)."""
    parts = []
    for image, view in zip(images, views):
        top, bottom, left, right = view.pixels(*image.shape[-2:])
        part = image[None, :, top:bottom, left:right]
        parts.append(F.interpolate(part, size=size, mode="bilinear", align_corners=False, antialias=True))
    return torch.cat(parts)


def put_back(first: Tensor, closer: Tensor, views: Sequence[View]) -> Tensor:
    """Logits of both looks, joined: (n, 1, H, W).

    Args:
        first: (n, 1, H, W) of whole frames.
        closer: (n, 1, h, w) of what the views show.
    """
    joined = first.clone()
    height, width = first.shape[-2:]
    for logits, look, view in zip(joined, closer, views):
        top, bottom, left, right = view.pixels(height, width)
        part = logits[:, top:bottom, left:right]
        seen = F.interpolate(look[None], size=part.shape[-2:], mode="bilinear", align_corners=False)[0]
        rows = _weights(top, bottom, height, first.device)
        columns = _weights(left, right, width, first.device)
        part.lerp_(seen, torch.minimum(rows[:, None], columns))  # a view: it changes `joined`
    return joined


def _weights(start: int, stop: int, count: int, device: torch.device) -> Tensor:
    """How much the closer look counts at each row (or column) of its window: less near the window's border, but for a
    border that is the frame's.
    """
    place = torch.arange(stop - start, device=device) + 0.5
    ends = [place] * (start > 0) + [stop - start - place] * (stop < count)
    weights = torch.ones(stop - start, device=device)
    for distance in ends:
        weights = torch.minimum(weights, distance / (_BORDER * (stop - start)))
    return weights.clamp(0, 1)
