"""Training loss: binary cross-entropy + soft IoU, of the logits and of the auxiliary ones.

The paper does not state its loss; this is the one of the same authors' later public code, with an epsilon in the soft
IoU (theirs is 0/0 for an empty mask under an empty prediction).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from models.dbsnet import pad_to_multiple

EDGE_WINDOW = 31
"""Side in pixels of the window over which `edge_weights` averages: that of F3Net (arXiv:1911.11445) at 352x352."""


def edge_weights(masks: Tensor, edge_weight: float) -> Tensor:
    """Weights of pixels, greatest beside outlines and on thin parts: 1 + `edge_weight` * |local mean - mask|.

    Those of F3Net (arXiv:1911.11445, section 3.4), whose edge_weight is 5. The local mean is over the part of a
    31x31 window that lies inside the frame.

    Args:
        masks: (B, T, 1, H, W), 0 or 1, float.

    Returns (B, T, 1, H, W), from 1 to 1 + `edge_weight`.
    """
    flat = masks.flatten(0, 1)  # (B, T, 1, H, W) -> (B*T, 1, H, W)
    mean = F.avg_pool2d(flat, EDGE_WINDOW, stride=1, padding=EDGE_WINDOW // 2, count_include_pad=False)
    return 1 + edge_weight * (mean.view_as(masks) - masks).abs()


def _bce_and_iou(
    logits: Tensor, masks: Tensor, valid: Tensor, epsilon: float, edge_weight: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Means over the valid frames; logits and masks (B, T, 1, H, W), valid (B, T) float."""
    count = valid.sum().clamp(min=1)
    bce = F.binary_cross_entropy_with_logits(logits, masks, reduction="none")
    probability = logits.sigmoid()
    overlap, either = probability * masks, probability + masks - probability * masks
    if edge_weight:
        weights = edge_weights(masks, edge_weight)
        bce, overlap, either = (
            bce * weights / weights.mean((2, 3, 4), keepdim=True),
            overlap * weights,
            either * weights,
        )
    bce = bce.mean((2, 3, 4))  # (B, T)
    intersection, union = overlap.sum((2, 3, 4)), either.sum((2, 3, 4))
    iou = 1 - (intersection + epsilon) / (union + epsilon)  # (B, T)
    return (bce * valid).sum() / count, (iou * valid).sum() / count


def segmentation_loss(logits: Tensor, masks: Tensor, valid: Tensor | None = None, aux: Sequence[Tensor] = (), *,
                      multiple: int = 1, aux_weight: float = 0.4, edge_weight: float = 0.0,
                      epsilon: float = 1.0) -> dict[str, Tensor]:  # fmt: skip
    """BCE + soft IoU, plus `aux_weight` times the mean of the same on the auxiliary logits.

    Args:
        logits: (B, T, 1, H, W).
        masks: (B, T, 1, H, W), 0 or 1, any dtype.
        valid: (B, T); frames without a label carry no loss. A batch without any label has loss 0. None: all are valid.
        aux: logits (B, T, 1, h, w) at coarser strides; the masks are averaged down to them.
        multiple: what the network has padded its input to (`DBSNet.multiple`), and with it the auxiliary logits.
        edge_weight: of `edge_weights`, which then weigh both terms on `logits`; 0: every pixel counts alike.
        epsilon: pixels added to intersection and union.

    Returns scalars ``total``, ``bce``, ``iou`` and ``aux``. Raises ValueError for shapes that do not fit.
    """
    if logits.shape != masks.shape:
        raise ValueError(f"logits and masks must have one shape, got {tuple(logits.shape)} and {tuple(masks.shape)}")
    logits, masks = logits.float(), masks.float()  # half precision would lose the sums
    valid = torch.ones(logits.shape[:2], device=logits.device) if valid is None else valid.to(logits.dtype)
    bce, iou = _bce_and_iou(logits, masks, valid, epsilon, edge_weight)
    auxiliary = logits.new_zeros(())
    padded = pad_to_multiple(masks.flatten(0, 1), multiple) if aux else masks  # (B, T, 1, H, W) -> (B*T, 1, H, W)
    for coarse in aux:
        if any(side % part for side, part in zip(padded.shape[-2:], coarse.shape[-2:])):
            raise ValueError(
                f"auxiliary logits of {tuple(coarse.shape[-2:])} do not divide masks of {tuple(padded.shape[-2:])}, "
                f"padded to multiples of {multiple}"
            )
        small = F.adaptive_avg_pool2d(padded, coarse.shape[-2:]).view(coarse.shape)  # -> (B, T, 1, h, w)
        auxiliary = auxiliary + sum(_bce_and_iou(coarse.float(), small, valid, epsilon)) / len(aux)
    return {"total": bce + iou + aux_weight * auxiliary, "bce": bce, "iou": iou, "aux": auxiliary}


def distillation_loss(maps: Sequence[Tensor], teacher_maps: Sequence[Tensor]) -> Tensor:
    """Mean squared difference of a network's maps from a teacher's, each relative to the teacher's variance.

    1 is what the mean of the teacher's map would give, 0 a perfect copy. The variance is that of the clips given, so
    clips weigh a little otherwise where a step is divided otherwise. Of whole maps rather than of the mask: each
    position of every frame is a lesson then, with a label or without (as FitNets, arXiv:1412.6550, but where both
    networks have the same maps already); so are those of the border that a size is padded by.

    Args:
        maps, teacher_maps: (N, C, h, w) from `DBSNet.forward(return_maps=…)`; the teacher's take no gradient.
    """
    total = maps[0].new_zeros((), dtype=torch.float32)
    for own, theirs in zip(maps, teacher_maps, strict=True):
        if own.shape != theirs.shape:
            raise ValueError(f"maps of network and teacher differ: {tuple(own.shape)} and {tuple(theirs.shape)}")
        theirs = theirs.detach().float()
        total = total + F.mse_loss(own.float(), theirs) / theirs.var((0, 2, 3), correction=0).mean().clamp(min=1e-6)
    return total / len(maps)
