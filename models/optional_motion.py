"""Motion as an option: what the network finds in the same frames at rest has its say, so that looks can tell where
motion misleads.

Not of the paper, and nothing is learned. After TMO (Cho et al., "Treating Motion as Option to Reduce Motion Dependency
in Unsupervised Video Object Segmentation", WACV 2023), which is trained so that its motion stream can be left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from models.dbsnet import DBSNet

# As `datasets.images` has it, of which the network knows nothing: the middle of the colour wheel.
NO_MOTION = 255
# Of the say. Tried on the four videos that `MODEL_CARD.md` holds out; docs/experiments.md has other values.
AT_REST = 1 / 3


def join_both(
    net: DBSNet, maps: dict[str, list[Tensor]], motionless: Sequence[Tensor]
) -> list[tuple[list[Tensor], Tensor]]:
    """Laterals and skip (`DBSNet.join`) of frames by their encoders' maps and, with those of one flow image in which
    nothing moves, of the same frames at rest.
    """
    both = [net.join(maps)]
    if motionless:
        frames = len(maps["appearance"][0])
        both.append(net.join({**maps, "motion": [x.expand(frames, -1, -1, -1) for x in motionless]}))
    return both


def weigh(moving: Tensor, resting: Tensor) -> Tensor:
    """Logits of a video with those of the same frames at rest."""
    return moving.float().lerp(resting.float(), AT_REST)


def weigh_batches(moving: Iterator[Tensor], resting: Iterator[Tensor]) -> Iterator[Tensor]:
    """`weigh` batch by batch, one of each at a time."""
    for logits in moving:
        with torch.inference_mode():
            logits = logits.clone()  # what a graph gave is written over by the next
            joined = weigh(logits, next(resting))
        yield joined
