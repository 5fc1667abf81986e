"""Faults of single frames, so that there is something to carry from frame to frame.

Not of the paper. Where every frame of a training clip tells all by itself, a network that looks at single frames learns
the training videos by heart and propagation has nothing left to explain. Here some frames of a clip lose a part of what
they show, and their neighbours do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from datasets.images import NO_MOTION, NO_PICTURE

KINDS = ("still", "blurred", "hidden")

# Of "blurred": the picture is drawn at this part of its size. Of "hidden": the sides of the rectangle, relative to the
# frame's. Both are drawn from uniformly.
BLUR = (1 / 16, 1 / 4)
HIDDEN = (0.3, 0.7)


@dataclass(frozen=True)
class Fault:
    """What one frame of a clip loses.

    kind: "still": its flow shows no motion. "blurred": its picture is as unsharp as one of `amount` times its size.
        "hidden": a rectangle shows neither picture nor motion; the mask is still asked for.
    box: of "hidden": top, left, bottom, right, relative to the frame's size.
    """

    frame: int
    kind: str
    amount: float = 1.0
    box: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)


def draw_faults(length: int, probability: float, rng: np.random.Generator) -> tuple[Fault, ...]:
    """Faults of a clip of `length` frames: each frame has one with this probability, one frame at least has none."""
    faulty = rng.random(length) < probability
    spared = int(rng.integers(length))
    if faulty.all():
        faulty[spared] = False
    faults = []
    for frame in np.flatnonzero(faulty):
        kind = KINDS[int(rng.integers(len(KINDS)))]
        amount = float(rng.uniform(*BLUR))
        height, width = rng.uniform(*HIDDEN, 2)
        top, left = rng.random(2) * (1 - height, 1 - width)
        box = (float(top), float(left), float(top + height), float(left + width))
        faults.append(Fault(int(frame), kind, amount, box))
    return tuple(faults)


def apply_faults(frames: torch.Tensor, flows: torch.Tensor, faults: Sequence[Fault]) -> None:
    """Change frames and flows (T, 3, H, W) uint8, in place, on the device that they are on."""
    height, width = frames.shape[-2:]
    for fault in faults:
        frame, flow = frames[fault.frame], flows[fault.frame]
        if fault.kind == "still":
            flow.fill_(NO_MOTION)
        elif fault.kind == "blurred":
            small = max(1, round(height * fault.amount)), max(1, round(width * fault.amount))
            picture = F.interpolate(frame[None].float(), size=small, mode="area")
            picture = F.interpolate(picture, size=(height, width), mode="bilinear", align_corners=False)
            frame.copy_(picture[0].add(0.5).clamp_(0, 255))
        else:
            top, bottom = (round(height * edge) for edge in fault.box[::2])
            left, right = (round(width * edge) for edge in fault.box[1::2])
            frame[:, top:bottom, left:right] = NO_PICTURE
            flow[:, top:bottom, left:right] = NO_MOTION
