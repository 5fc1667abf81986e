"""Consensus over a video: what looks alike in other frames votes on where a frame's object is.

Not of the paper, and nothing is learned: each position of a frame asks the positions of other frames that look like it
what the network found there, and its logit moves towards their answer. A tree that hides the object for some frames
was seen without it in others, and a parked car was left out in most. After Faktor and Irani, "Video Segmentation by
Non-Local Consensus Voting" (BMVC 2014), who let regions vote by colour and shape; here positions at stride 16 vote,
by the appearance encoder's map at stride 8.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from models.cuda_graphs import Run
from models.frame_store import FrameStore

# Chosen on the four videos that `MODEL_CARD.md` holds out; docs/experiments.md has what other values gave.
STEP, REACH = 8, 8  # the frames that vote are 8, 16, … 64 before and after
TEMPERATURE = 0.03  # of the softmax over cosines
LIMIT = 3.0  # logits by which a vote moves a position at most: it overrules a network that is unsure
_CERTAIN = 1e-3  # probabilities count as no nearer to 0 and 1


def can_agree(streams: Collection[str]) -> bool:
    """Whether a network of these streams sees how frames look."""
    return "appearance" in streams


def describe_looks(maps: Tensor) -> Tensor:
    """Appearance maps at stride 8, (n, C, H/8, W/8) -> what positions at stride 16 are compared by, (n, C, H/16,
    W/16).
    """
    return F.avg_pool2d(maps, 2)


def voters(frame: int, length: int) -> tuple[int, ...]:
    """How far away the frames are that vote on a frame; none in a video of no more than `STEP` frames."""
    offsets = (STEP * number for number in range(-REACH, REACH + 1))
    return tuple(offset for offset in offsets if offset and 0 <= frame + offset < length)


def vote(looks: Tensor, others: Tensor, opinions: Tensor) -> Tensor:
    """What positions that look alike found, for each position: (n, N) in [0, 1].

    Args:
        looks: (n, N, C) of n frames' positions.
        others: (n, M, N, C) of the positions of M other frames for each.
        opinions: (n, M, N) the probabilities there.
    """
    # Kernels that never hold all N x M*N cosines want channels side by side; given others, PyTorch holds them.
    looks, others = looks.contiguous(), others.contiguous()
    # Standardised per channel, so that none drowns the others, by the frames that vote: another scene has other looks.
    mean, deviation = others.mean((1, 2), keepdim=True), others.std((1, 2), keepdim=True) + 1e-5  # (n, 1, 1, C)
    keys = F.normalize((others - mean) / deviation, dim=-1).flatten(1, 2)  # (n, M, N, C) -> (n, M*N, C)
    queries = F.normalize((looks - mean[:, 0]) / deviation[:, 0], dim=-1)
    # They want values as wide as keys, too: the probabilities are the first channel.
    values = F.pad(opinions.flatten(1, 2)[..., None], (0, keys.shape[-1] - 1))  # (n, M, N) -> (n, M*N, C)
    if looks.device.type == "cuda":  # whose kernels of this kind are for half precision; cosines have room in it
        queries, keys, values = queries.half(), keys.half(), values.half()
    agreed = F.scaled_dot_product_attention(
        queries[:, None], keys[:, None], values[:, None], scale=1 / TEMPERATURE
    )  # (n, 1, N, C)
    return agreed[:, 0, :, 0].float()


def correct(logits: Tensor, looks: Tensor, own: Tensor, others: Tensor, opinions: Tensor) -> Tensor:
    """Logits at stride 4, (n, 1, H/4, W/4), moved by what `vote` says of the positions at stride 16.

    Args:
        looks: (n, C, H/16, W/16), from `describe_looks`.
        own: (n, H/16, W/16), from `opinion`.
        others: (n, M, C, H/16, W/16), the looks of those who vote.
        opinions: (n, M, H/16, W/16), theirs.
    """
    agreed = vote(
        looks.flatten(2).transpose(1, 2),  # (n, C, h, w) -> (n, N, C)
        others.flatten(3).transpose(2, 3),  # (n, M, C, h, w) -> (n, M, N, C)
        opinions.flatten(2),  # (n, M, h, w) -> (n, M, N)
    )
    moved = agreed.view_as(own).logit(_CERTAIN) - own.logit(_CERTAIN)  # (n, h, w)
    moved = moved.clamp(-LIMIT, LIMIT)[:, None]
    return logits + F.interpolate(moved, size=logits.shape[-2:], mode="bilinear", align_corners=False)


def opinion(logits: Tensor) -> Tensor:
    """The share of the object in each position at stride 16, (n, H/16, W/16), by logits (n, 1, H/4, W/4)."""
    return F.avg_pool2d(logits.sigmoid(), 4)[:, 0]


@torch.inference_mode()
def agree(
    batches: Iterator[Tensor], looks: FrameStore, length: int, batch_size: int, device: torch.device, run: Run
) -> Iterator[Tensor]:
    """A video's logits, corrected, in the same order and in batches of at most so many; they lag by the reach of the
    frames that vote.

    Args:
        batches: logits (n, 1, H/4, W/4) of all frames in order.
        looks: what `describe_looks` gave of all frames.
        run: is given the work of each batch.
    """
    waiting: deque[Tensor] = deque()  # logits (1, H/4, W/4) of frames that are not corrected yet
    opinions: dict[int, Tensor] = {}  # of the frames that may still vote
    done = seen = 0
    for logits in batches:
        logits = logits.float().clone()  # what a graph gave is written over by the next
        waiting.extend(logits)
        opinions.update(enumerate(opinion(logits), seen))
        seen += len(logits)
        while done < seen and (seen == length or done + batch_size - 1 + STEP * REACH < seen):
            stop = min(done + batch_size, length)
            first, last = max(done - STEP * REACH, 0), min(stop + STEP * REACH, length)
            around = looks.read(first, last, device)
            said = torch.stack([opinions[frame] for frame in range(first, last)])
            for offsets, group in groupby(range(done, stop), key=lambda frame: voters(frame, length)):
                count = len(list(group))
                x, start = torch.stack([waiting.popleft() for _ in range(count)]), done - first
                if offsets:
                    own = [of[start : start + count] for of in (around, said)]  # (count, …)
                    voting = [
                        torch.stack([of[start + offset : start + offset + count] for offset in offsets], 1)
                        for of in (around, said)
                    ]  # (count, M, …)
                    (x,) = run(("consensus",), lambda *inputs: (correct(*inputs),), x, *own, *voting, by_row=True)
                yield x
                done += count
            for frame in [frame for frame in opinions if frame < done - STEP * REACH]:
                del opinions[frame]
