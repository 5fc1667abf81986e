"""Consensus: each position against plain loops, the stream of frames against all at once, and what never changes."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from models import DBSNet, Predictor, build_dbsnet, consensus
from models.consensus import agree, describe_looks, voters
from models.frame_store import FrameStore
from models.predictor import directly
from tests.test_predictor import as_clip, collect, make_net, make_video

CPU = torch.device("cpu")
H, W, C = 2, 3, 5  # of the maps at stride 16
LIMIT, TEMPERATURE = 3.0, 0.03  # that the published scores with consensus were measured with


def make_maps(length: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits (T, 1, 4*H, 4*W) that are neither all sure nor all unsure, and looks (T, C, H, W)."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(length, 1, 4 * H, 4 * W, generator=generator)
    logits += 4 * torch.randn(length, 1, H, W, generator=generator).repeat_interleave(4, 2).repeat_interleave(4, 3)
    return logits, torch.randn(length, C, H, W, generator=generator) * torch.tensor([1, 50, 0.1, 1, 1])[:, None, None]


def store_of(looks: Tensor) -> FrameStore:
    store = FrameStore(len(looks), tuple(looks.shape[1:]), torch.float32, CPU)
    store.write(0, looks)
    return store


def corrected(logits: Tensor, looks: Tensor, batch_size: int = 4, given: int = 4) -> Tensor:
    batches = iter(logits.split(given))
    return torch.cat(list(agree(batches, store_of(looks), len(logits), batch_size, CPU, directly)))


def by_hand(logits: np.ndarray, looks: np.ndarray) -> np.ndarray:
    """What each position of each frame moves by, one after the other in double precision: (T, H, W)."""
    length = len(logits)
    share = (1 / (1 + np.exp(-logits[:, 0].astype(np.float64)))).reshape(length, H, 4, W, 4).mean((2, 4))
    moved = np.zeros((length, H, W))
    for frame in range(length):
        others = [other for other in range(frame - 64, frame + 65, 8) if other != frame and 0 <= other < length]
        if not others:
            continue
        every = np.concatenate([looks[other].reshape(C, -1).T for other in others]).astype(np.float64)
        mean, deviation = every.mean(0), every.std(0, ddof=1)
        for y in range(H):
            for x in range(W):
                own = (looks[frame, :, y, x] - mean) / deviation
                votes = []
                for other in others:
                    for position in np.ndindex(H, W):
                        theirs = (looks[(other, slice(None), *position)] - mean) / deviation
                        cosine = own @ theirs / np.linalg.norm(own) / np.linalg.norm(theirs)
                        votes.append((np.exp(cosine / TEMPERATURE), share[(other, *position)]))
                agreed = sum(weight * value for weight, value in votes) / sum(weight for weight, _ in votes)
                odds = [np.log(p / (1 - p)) for p in np.clip([agreed, share[frame, y, x]], 1e-3, 1 - 1e-3)]
                moved[frame, y, x] = np.clip(odds[0] - odds[1], -LIMIT, LIMIT)
    return moved


def test_every_position_by_hand() -> None:
    logits, looks = make_maps(19)
    moved = by_hand(logits.numpy(), looks.numpy())
    assert (np.abs(moved) == LIMIT).any() and (np.abs(moved) < 0.9 * LIMIT).mean() > 0.3
    wanted = F.interpolate(torch.from_numpy(moved)[:, None], scale_factor=4, mode="bilinear", align_corners=False)
    torch.testing.assert_close(corrected(logits, looks) - logits, wanted.float(), atol=3e-3, rtol=0)


@pytest.mark.parametrize("length", [1, 8, 9, 20, 64, 65, 150])
def test_batches_do_not_matter(length: int) -> None:
    logits, looks = make_maps(length)
    one = corrected(logits, looks, 1, 1)
    assert one.shape == logits.shape
    assert torch.equal(one, logits) == (length <= 8)  # so few have nobody who votes
    for batch_size, given in ((4, 4), (16, 5), (3, 200)):
        torch.testing.assert_close(corrected(logits, looks, batch_size, given), one, atol=1e-4, rtol=0)


def test_voters() -> None:
    assert voters(0, 8) == voters(7, 8) == ()
    assert voters(0, 9) == (8,) and voters(8, 9) == (-8,) and voters(4, 9) == ()
    assert voters(500, 1000) == (*range(-64, 0, 8), *range(8, 65, 8))


def test_it_is_the_same_backwards_and_in_a_mirror() -> None:
    logits, looks = make_maps(30)
    result = corrected(logits, looks)
    torch.testing.assert_close(corrected(logits.flip(0), looks.flip(0)).flip(0), result, atol=1e-4, rtol=0)
    torch.testing.assert_close(corrected(logits.flip(3), looks.flip(3)).flip(3), result, atol=1e-4, rtol=0)


def test_units_of_the_looks_do_not_matter() -> None:
    logits, looks = make_maps(30)
    other = looks * torch.tensor([3.0, 0.2, 1, 7, 1])[:, None, None] + torch.arange(5.0)[:, None, None]
    torch.testing.assert_close(corrected(logits, other), corrected(logits, looks), atol=1e-3, rtol=0)


def test_a_channel_that_is_the_same_everywhere_says_nothing() -> None:
    """As dead ones of an encoder are, and all in frames of one colour: no spread to measure by."""
    logits, looks = make_maps(30)
    dead = torch.cat([looks, torch.full_like(looks[:, :2], 4.0)], 1)
    torch.testing.assert_close(corrected(logits, dead), corrected(logits, looks), atol=1e-3, rtol=0)
    assert corrected(logits, torch.zeros_like(looks)).isfinite().all()


def test_logits_in_half_precision_lose_nothing_more() -> None:
    """As autocast gives them."""
    logits, looks = make_maps(20)
    half = logits.bfloat16()
    assert torch.equal(corrected(half, looks), corrected(half.float(), looks))


def test_where_all_frames_say_the_same_nothing_moves() -> None:
    _, looks = make_maps(30)
    logits = torch.full((30, 1, 4 * H, 4 * W), 1.3)
    torch.testing.assert_close(corrected(logits, looks), logits, atol=1e-4, rtol=0)


def test_what_one_frame_found_alone_is_outvoted() -> None:
    """Two looks; the object has the first. One frame misses it and takes the other for it."""
    looks = torch.randn(1, C, H, W, generator=torch.Generator().manual_seed(1)).repeat(33, 1, 1, 1)
    looks += 0.05 * torch.randn(looks.shape, generator=torch.Generator().manual_seed(2))
    logits = torch.full((33, 1, 4 * H, 4 * W), -4.0)
    logits[:, :, :4, :4] = 4.0
    truth = logits > 0
    logits[16] *= -0.5
    assert ((logits[16] > 0) != truth[16]).all()
    result = corrected(logits, looks)
    near = F.max_pool2d(truth.float(), 5, 1, 2) != -F.max_pool2d(-truth.float(), 5, 1, 2)
    inside = ~near[16]  # where votes of one position alone count
    assert inside.float().mean() > 0.3
    assert ((result[16] > 0) == truth[16])[inside].all() and ((result > 0) == truth)[torch.arange(33) != 16].all()


def test_cosines_are_never_all_held() -> None:
    """What the votes are given is such that PyTorch's kernel that goes through them piece by piece takes it."""
    logits, looks = make_maps(20)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # an error where it cannot
        piecewise = corrected(logits, looks)
    torch.testing.assert_close(piecewise, corrected(logits, looks))


def test_frames_come_as_soon_as_those_that_vote_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, looks = make_maps(300)
    asked = 0

    def batches() -> Iterator[Tensor]:
        nonlocal asked
        for batch in logits.split(4):
            asked += len(batch)
            yield batch

    kept = weakref.WeakSet()  # memory must not grow with the video
    old = consensus.opinion

    def watched(logits: Tensor) -> list[Tensor]:
        found = [frame.clone() for frame in old(logits)]
        kept.update(found)
        return found

    monkeypatch.setattr(consensus, "opinion", watched)
    results = agree(batches(), store_of(looks), 300, 4, CPU, directly)
    given = 0
    for batch in results:
        given += len(batch)
        assert len(kept) <= 2 * 64 + 2 * 4
        assert asked <= min(300, given + 64 + 4)
    assert given == 300


def test_a_predictor_corrects_the_logits_of_its_network() -> None:
    net, (frames, flows) = make_net(window=64), make_video(19)
    with torch.inference_mode():
        maps = net.encoder_maps(as_clip(frames)[0], as_clip(flows)[0])
        levels, skip = net.join(maps)
        levels = [net.refine(i, net.propagation[i](x[None]))[0] for i, x in enumerate(levels)]
        plain = net.decode(levels, skip)
        seen = maps["appearance"][1]  # at stride 8: what four of its positions look like together
        looks = sum(seen[..., row::2, column::2] for row in (0, 1) for column in (0, 1)) / 4
        torch.testing.assert_close(describe_looks(seen), looks)
        logits = corrected(plain, looks)
        wanted, before = (
            F.interpolate(x, scale_factor=4, mode="bilinear", align_corners=False).sigmoid()[:, 0].numpy()
            for x in (logits, plain)
        )
    assert np.abs(wanted - before).max() > 0.03
    for options in ({}, {"host_memory": 0}, {"batch_size": 3, "fold": False}):
        predictor = Predictor(net, store_dtype=torch.float32, consensus=True, **options)
        np.testing.assert_allclose(collect(predictor(frames, flows)), wanted, atol=2e-4)
    mirrored = collect(Predictor(net, store_dtype=torch.float32, consensus=True, flip=True)(frames, flows))
    other = collect(
        Predictor(net, store_dtype=torch.float32, consensus=True)(
            [f[:, ::-1] for f in frames], [f[:, ::-1] for f in flows]
        )
    )
    np.testing.assert_allclose(mirrored, (wanted + other[..., ::-1]) / 2, atol=2e-4)
    half = collect(Predictor(net, consensus=True)(frames, flows))
    assert 0 < np.abs(half - wanted).max() < 0.05


def test_what_cannot_vote() -> None:
    with pytest.raises(ValueError, match="whole videos .* clip_len=4"):
        Predictor(make_net(), consensus=True, clip_len=4)
    blind: DBSNet = build_dbsnet("xxs", streams=("motion",))
    with pytest.raises(ValueError, match="appearance stream"):
        Predictor(blind, consensus=True)


@pytest.mark.gpu
def test_half_precision_on_a_gpu_is_close() -> None:
    logits, looks = make_maps(40)
    batches = iter(logits.cuda().split(4))
    store = FrameStore(40, tuple(looks.shape[1:]), torch.float32, torch.device("cuda"))
    store.write(0, looks)
    result = torch.cat(list(agree(batches, store, 40, 8, torch.device("cuda"), directly))).cpu()
    torch.testing.assert_close(result, corrected(logits, looks), atol=0.1, rtol=0)
