"""The loss against a loop over frames and pixels, and what labels that are not there must do."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from models import build_dbsnet
from models.losses import distillation_loss, edge_weights, segmentation_loss


def plain_frame(logits: Tensor, mask: Tensor, epsilon: float) -> tuple[float, float]:
    """BCE and soft IoU of one (H, W) frame, pixel by pixel."""
    bce = intersection = union = 0.0
    for z, m in zip(logits.flatten().tolist(), mask.flatten().tolist()):
        p = 1 / (1 + math.exp(-z))
        bce -= m * math.log(p) + (1 - m) * math.log(1 - p)
        intersection += p * m
        union += p + m - p * m
    return bce / logits.numel(), 1 - (intersection + epsilon) / (union + epsilon)


def make(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 3, 1, 16, 32, generator=generator, dtype=torch.double).float()
    masks = (torch.rand(2, 3, 1, 16, 32, generator=generator) > 0.6).to(torch.uint8)
    valid = torch.tensor([[True, False, True], [False, False, True]])
    aux = [torch.randn(2, 3, 1, 16 // s, 32 // s, generator=generator) for s in (2, 4, 8)]
    return logits, masks, valid, aux


def test_equals_the_plain_loop() -> None:
    logits, masks, valid, aux = make()
    losses = segmentation_loss(logits, masks, valid, aux, aux_weight=0.3, epsilon=2.0)
    frames = [(b, t) for b in range(2) for t in range(3) if valid[b, t]]

    def mean(maps: Tensor, targets: Tensor) -> tuple[float, float]:
        pairs = [plain_frame(maps[b, t, 0], targets[b, t, 0], 2.0) for b, t in frames]
        return sum(p[0] for p in pairs) / len(pairs), sum(p[1] for p in pairs) / len(pairs)

    bce, iou = mean(logits, masks)
    auxiliary = 0.0
    for coarse in aux:
        stride = 16 // coarse.shape[-2]
        small = masks.double().unfold(3, stride, stride).unfold(4, stride, stride).mean((-1, -2))
        auxiliary += sum(mean(coarse, small)) / 3
    assert losses["bce"].item() == pytest.approx(bce, rel=1e-5)
    assert losses["iou"].item() == pytest.approx(iou, rel=1e-5)
    assert losses["aux"].item() == pytest.approx(auxiliary, rel=1e-5)
    assert losses["total"].item() == pytest.approx(bce + iou + 0.3 * auxiliary, rel=1e-5)


def test_masks_of_any_size_meet_the_auxiliary_logits_of_the_padded_input() -> None:
    """50 x 70 is padded to 64 x 96: a cell at stride 8 answers for its own 8 x 8 pixels, border pixels repeated."""
    masks = torch.zeros(1, 1, 1, 50, 70)
    masks[..., 16:32, 40:70] = 1
    logits = torch.zeros(1, 1, 1, 50, 70)
    for stride in (8, 16, 32):
        padded = torch.zeros(64, 96)
        padded[16:32, 40:] = 1
        cells = padded.unfold(0, stride, stride).unfold(1, stride, stride).mean((-1, -2))
        coarse = torch.randn(cells.shape, generator=torch.Generator().manual_seed(stride))
        loss = segmentation_loss(logits, masks, aux=[coarse[None, None, None]], multiple=32)["aux"].item()
        assert loss == pytest.approx(sum(plain_frame(coarse, cells, 1.0)), rel=1e-5)


@pytest.mark.parametrize("size", [(32, 32), (31, 70), (64, 96)])
@pytest.mark.parametrize("flavour", ["reference", "wilile"])  # padded to multiples of 32 and of 64
def test_masks_meet_the_auxiliary_logits_of_a_network(flavour: str, size: tuple[int, int]) -> None:
    """Of masks of one kind everywhere in a cell, logits that say the same are at no distance."""
    net = build_dbsnet("xxs", flavour, dilations=(), depth=0, rounds=0).eval()
    masks = torch.zeros(1, 1, 1, *size)
    masks[..., size[1] // 2 // 16 * 16 :] = 1  # its border lies between cells of strides 8 and 16
    frames = torch.rand(1, 1, 3, *size)
    with torch.no_grad():
        logits, aux = net(frames, frames, return_aux=True)
    for coarse, stride in zip(aux[:2], (8, 16)):
        ideal = torch.full_like(coarse, -30.0)
        ideal[..., size[1] // 2 // 16 * 16 // stride :] = 30.0
        loss = segmentation_loss(logits, masks, aux=[ideal], multiple=net.multiple)["aux"].item()
        assert loss == pytest.approx(0, abs=1e-5)
    with pytest.raises(ValueError, match="do not divide"):
        segmentation_loss(logits, masks, aux=[torch.zeros(1, 1, 1, 5, 7)], multiple=net.multiple)


def test_edge_weight_equals_the_plain_loop() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(1, 2, 1, 40, 50, generator=generator)
    masks = torch.zeros(1, 2, 1, 40, 50)
    masks[0, 0, 0, 10:25, 5:44] = masks[0, 1, 0, :7] = 1
    losses = segmentation_loss(logits, masks, edge_weight=5.0, epsilon=1.0)
    bces, ious = [], []
    for frame in range(2):
        bce = total = intersection = union = 0.0
        mask = masks[0, frame, 0].double()
        for y in range(40):
            for x in range(50):
                local = mask[max(0, y - 15) : y + 16, max(0, x - 15) : x + 16].mean().item()
                weight = 1 + 5 * abs(local - mask[y, x].item())
                p, m = torch.sigmoid(logits[0, frame, 0, y, x].double()).item(), mask[y, x].item()
                bce -= weight * math.log(p if m else 1 - p)
                total += weight
                intersection += weight * p * m
                union += weight * (p + m - p * m)
        bces.append(bce / total)
        ious.append(1 - (intersection + 1) / (union + 1))
    assert losses["bce"].item() == pytest.approx(sum(bces) / 2, rel=1e-5)
    assert losses["iou"].item() == pytest.approx(sum(ious) / 2, rel=1e-5)
    # The auxiliary logits are weighed as ever: of a cell at stride 8 nobody says where in it the outline is.
    aux = [torch.randn(1, 2, 1, 5, 5, generator=generator)]
    masks, logits = masks[..., :40], logits[..., :40]
    weighed = segmentation_loss(logits, masks, aux=aux, edge_weight=5.0)
    alike = segmentation_loss(logits, masks, aux=aux)
    assert weighed["aux"] == alike["aux"] and weighed["bce"] != alike["bce"]


def test_edges_and_thin_parts_weigh_most() -> None:
    masks = torch.zeros(1, 1, 1, 96, 96)
    masks[..., 40:, 40:] = 1  # a broad part
    masks[..., 5:8, :60] = 1  # a thin one
    weights = edge_weights(masks, 5.0)[0, 0, 0]
    assert weights[6, 20] > weights[41, 70] > weights[80, 80] == 1 == weights[80, 5]
    assert weights.min() >= 1 and weights.max() <= 6


def test_frames_without_a_label_carry_no_loss_and_no_gradient() -> None:
    logits, masks, valid, aux = make()
    logits.requires_grad_()
    aux = [a.requires_grad_() for a in aux]
    segmentation_loss(logits, masks, valid, aux)["total"].backward()
    for maps in (logits, *aux):
        assert (maps.grad[~valid] == 0).all()
        assert (maps.grad[valid].abs().sum((1, 2, 3)) > 0).all()
    other = logits.detach().clone()
    other[~valid] = 100.0
    a, b = segmentation_loss(logits, masks, valid), segmentation_loss(other, masks, valid)
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_no_label_at_all_is_loss_0_with_finite_gradients() -> None:
    logits, masks, _, aux = make()
    logits.requires_grad_()
    losses = segmentation_loss(logits, masks, torch.zeros(2, 3, dtype=torch.bool), aux)
    assert all(value.item() == 0 for value in losses.values())
    losses["total"].backward()
    assert (logits.grad == 0).all()


@pytest.mark.parametrize("sign", [-200.0, 200.0])
@pytest.mark.parametrize("mask", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_empty_and_full_maps_are_finite(sign: float, mask: int, dtype: torch.dtype) -> None:
    logits = torch.full((1, 1, 1, 300, 300), sign, dtype=dtype, requires_grad=True)
    losses = segmentation_loss(logits, torch.full((1, 1, 1, 300, 300), mask, dtype=torch.uint8))
    losses["total"].backward()
    assert losses["total"].isfinite() and logits.grad.isfinite().all()
    right = (sign > 0) == bool(mask)
    assert losses["iou"].item() == pytest.approx(0.0 if right else 1.0, abs=1e-3)
    assert losses["bce"].item() == pytest.approx(0.0 if right else 200.0, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_logits_in_half_precision_lose_nothing_more(dtype: torch.dtype) -> None:
    """As autocast gives them: what they say is computed with as in single precision, and so are the sums."""
    logits, masks, valid, aux = make()
    half, coarse = logits.to(dtype), [x.to(dtype) for x in aux]
    losses = segmentation_loss(half, masks, valid, coarse)
    same = segmentation_loss(half.float(), masks, valid, [x.float() for x in coarse])
    for key, loss in losses.items():
        assert loss.dtype == torch.float32
        assert torch.equal(loss, same[key]), key


def test_without_valid_every_frame_counts_and_any_mask_type_will_do() -> None:
    logits, masks, _, _ = make()
    expected = segmentation_loss(logits, masks, torch.ones(2, 3, dtype=torch.bool))["total"]
    for same in (masks, masks.float(), masks.bool(), masks.long()):
        assert torch.equal(segmentation_loss(logits, same)["total"], expected)


def test_loss_falls_towards_the_mask() -> None:
    _, masks, valid, _ = make()
    totals = [
        segmentation_loss(scale * (2.0 * masks.float() - 1), masks, valid)["total"].item() for scale in (-2, 0, 2, 5)
    ]
    assert totals == sorted(totals, reverse=True)


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(1, 2, 1, 4, 4\) and \(1, 2, 1, 4, 5\)"):
        segmentation_loss(torch.zeros(1, 2, 1, 4, 4), torch.zeros(1, 2, 1, 4, 5))


def test_distillation_is_relative_to_the_teachers_variance() -> None:
    torch.manual_seed(0)
    levels = 20 * torch.randn(6, 1, 1)  # channels apart, as far as it takes to tell their variance from the map's
    teacher = [levels + 5 * torch.randn(4, 6, 8, 8), 0.1 * torch.randn(4, 6, 16, 16)]
    assert distillation_loss(teacher, teacher) == 0
    # The mean of each channel, which knows nothing of the picture, gives 1 whatever the maps' scale.
    means = [x.mean((0, 2, 3), keepdim=True).expand_as(x) for x in teacher]
    assert float(distillation_loss(means, teacher)) == pytest.approx(1, rel=1e-5)
    half = [(x + mean) / 2 for x, mean in zip(teacher, means)]
    assert float(distillation_loss(half, teacher)) == pytest.approx(0.25, rel=1e-5)
    own = [x.clone().requires_grad_() for x in half]
    lesson = [x.clone().requires_grad_() for x in teacher]
    distillation_loss(own, lesson).backward()
    assert all(x.grad.abs().sum() > 0 for x in own) and all(x.grad is None for x in lesson)
    with pytest.raises(ValueError, match="maps of network and teacher differ"):
        distillation_loss(half, teacher[::-1])
    with pytest.raises(ValueError, match="shorter"):
        distillation_loss(half, teacher[:1])


def test_distillation_from_a_dead_map_and_in_half_precision() -> None:
    torch.manual_seed(0)
    own = [torch.randn(2, 3, 4, 4).bfloat16().requires_grad_()]
    still = [torch.full((2, 3, 4, 4), 0.5)]  # no variance at all
    loss = distillation_loss(own, still)
    loss.backward()
    assert loss.isfinite() and own[0].grad.isfinite().all() and own[0].grad.any()
    assert distillation_loss([torch.randn(1, 3, 1, 1)], [torch.randn(1, 3, 1, 1)]).isfinite()  # nor here
    teacher = [torch.randn(2, 3, 4, 4)]
    loss = distillation_loss(own, [x.bfloat16() for x in teacher])
    assert loss.dtype == torch.float32
    assert torch.equal(loss, distillation_loss([own[0].float()], [x.bfloat16().float() for x in teacher]))
