"""Zoom: where the object is against plain loops, what views show, and both looks against the network by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import models.predictor
from models import DBSNet, Predictor, load_dbsnet
from models.frame_store import Storage
from models.zoom import LEAST, MARGIN, WHOLE, View, extents, follow, magnify, put_back
from tests.test_predictor import as_clip, collect, exact, make_net, make_video
from tests.test_weights import moving_disc

SIZE = (96, 160)
SMALL = (64, 96)  # two thirds of it, in multiples of 32


@pytest.fixture(scope="module")
def net() -> DBSNet:
    return make_net()


def test_an_extent_is_that_of_what_was_found() -> None:
    maps = torch.zeros(4, 50, 100)
    maps[0, 10:30, 20:80] = 0.9
    maps[0, :, 90:] = 0.5  # not found: no more likely than not
    maps[1, 49, 99] = 1  # the last position
    maps[2, 10:30, 20:80] = 1
    maps[2, 45, 95] = 1  # one of 1,201: a speck
    left, right, top, bottom = extents(maps).T.numpy()
    np.testing.assert_allclose([left[0], right[0], top[0], bottom[0]], [0.2, 0.8, 0.2, 0.6])
    np.testing.assert_allclose([left[1], right[1], top[1], bottom[1]], [0.99, 1, 0.98, 1])
    np.testing.assert_allclose([left[2], right[2], top[2], bottom[2]], [0.2, 0.8, 0.2, 0.6])
    assert np.isnan([left[3], right[3], top[3], bottom[3]]).all()
    few = torch.zeros(2, 100, 150)  # less than a ten-thousandth of the frame is nothing found
    few[0, 50, 70] = few[1, 50, 70] = few[1, 50, 71] = 1
    assert extents(few).isnan().all(1).tolist() == [True, False]


def followed(found: np.ndarray) -> np.ndarray:
    """What `follow` says it does, frame by frame: (T, 3)."""
    length = len(found)
    clear = [frame for frame in range(length) if not np.isnan(found[frame]).any()]
    filled = np.stack([np.interp(np.arange(length), clear, found[clear, side]) for side in range(4)], 1)

    def at(frame: int) -> np.ndarray:
        return filled[min(max(frame, 0), length - 1)]

    def longer(frame: int) -> float:
        return max(at(frame)[1] - at(frame)[0], at(frame)[3] - at(frame)[2])

    def largest(frame: int) -> float:  # of the 21 nearest
        frame = min(max(frame, 0), length - 1)
        return max(longer(frame + step) for step in range(-10, 11))

    def mean(value, frame: int, sigma: float) -> float:
        weights = {step: math.exp(-0.5 * (step / sigma) ** 2) for step in range(-int(4 * sigma), int(4 * sigma) + 1)}
        return sum(w * value(frame + step) for step, w in weights.items()) / sum(weights.values())

    views = []
    for frame in range(length):
        side = min(max(1.7 * mean(largest, frame, 6), 0.4), 1)
        place = []
        for first in (0, 2):
            centre = mean(lambda f, first=first: (at(f)[first] + at(f)[first + 1]) / 2, frame, 3)
            place.append(min(max(centre - side / 2, 0), 1 - side))
        views.append([*place, side])
    return np.array(views)


@pytest.mark.parametrize("length", [1, 2, 15, 60])
def test_views_follow_the_object(length: int) -> None:
    random = np.random.default_rng(length)
    frames = np.arange(length)
    centres = 0.5 + 0.45 * np.stack([np.sin(frames / 9), np.cos(frames / 13)], 1)
    sides = 0.05 + 0.5 * random.random((length, 2))
    low, high = np.clip(centres - sides / 2, 0, 1), np.clip(centres + sides / 2, 0, 1)
    found = np.stack([low[:, 0], high[:, 0], low[:, 1], high[:, 1]], 1)
    found[random.random(length) < 0.2] = np.nan
    found[0] = [0.1, 0.2, 0.3, 0.35]
    views = np.array(follow(found))
    np.testing.assert_allclose(views, followed(found), atol=1e-9)
    assert (views[:, :2] >= 0).all() and (views[:, :2] + views[:, 2:] <= 1 + 1e-9).all()


def test_a_view_is_never_small_and_the_frame_where_nothing_was_found() -> None:
    (view,) = follow(np.array([[0.5, 0.52, 0.4, 0.43]]))
    assert view.side == LEAST and view.left == pytest.approx(0.31) and view.top == pytest.approx(0.215)
    assert follow(np.full((3, 4), np.nan)) == [WHOLE] * 3
    (view,) = follow(np.array([[0.0, 0.9 / MARGIN, 0.1, 0.2]]))  # at the edge: beside the object, not beyond the frame
    assert view == pytest.approx((0, 0, 0.9))


def test_pixels_of_a_view() -> None:
    assert WHOLE.pixels(30, 70) == (0, 30, 0, 70)
    assert View(0.25, 0.5, 0.5).pixels(40, 80) == (20, 40, 20, 60)
    random = np.random.default_rng(0)
    for _ in range(300):
        height, width = random.integers(1, 90, 2)
        side = random.uniform(0.01, 1)
        left, top = random.uniform(0, 1 - side, 2)
        for (start, stop), count, place in zip(
            np.reshape(View(left, top, side).pixels(height, width), (2, 2)), (height, width), (top, left)
        ):
            assert 0 <= start < stop <= count and abs(start - place * count) <= 1
            assert abs(stop - start - side * count) <= 0.5 or stop - start == 1


def test_what_views_show() -> None:
    from PIL import Image

    images = torch.rand(2, 3, 60, 100)
    shown = magnify(images, [WHOLE, View(0.2, 0.5, 0.4)], (30, 50))
    crops = (images[0], images[1, :, 30:54, 20:60])
    for result, crop in zip(shown, crops):
        for plane, channel in zip(crop, result):
            resized = Image.fromarray(plane.numpy()).resize((50, 30), Image.Resampling.BILINEAR)
            np.testing.assert_allclose(channel, np.asarray(resized), atol=1e-5)


def test_what_was_seen_comes_back_where_it_was() -> None:
    first = torch.randn(3, 1, 60, 100)
    before = first.clone()
    closer = torch.randn(3, 1, 32, 64)
    joined = put_back(first, closer, [WHOLE, View(0.2, 0.5, 0.4), View(0.6, 0.0, 0.4)])
    assert torch.equal(first, before)
    torch.testing.assert_close(joined[:1], F.interpolate(closer[:1], size=(60, 100), mode="bilinear"))
    for index, (top, bottom, left, right) in ((1, (30, 54, 20, 60)), (2, (0, 24, 60, 100))):
        seen = F.interpolate(closer[index][None], size=(24, 40), mode="bilinear")[0]
        wanted = first[index].clone()
        for y in range(top, bottom):
            for x in range(left, right):
                # From the four sides of the view, those of the frame left out; the border is 6 % of the view.
                sides = [(x + 0.5 - left) / 40] * (left > 0) + [(right - x - 0.5) / 40] * (right < 100)
                sides += [(y + 0.5 - top) / 24] * (top > 0) + [(bottom - y - 0.5) / 24] * (bottom < 60)
                weight = min(1.0, *(side / 0.06 for side in sides))
                wanted[0, y, x] += weight * (seen[0, y - top, x - left] - first[index, 0, y, x])
        torch.testing.assert_close(joined[index], wanted)
        assert (joined[index] != first[index])[:, top + 3 : bottom - 3, left + 3 : right - 3].all()


def moving(length: int) -> np.ndarray:
    """An object that moves from left to right and grows: extents (T, 4)."""
    place, side = np.linspace(0.1, 0.6, length), np.linspace(0.1, 0.4, length)
    return np.stack([place, place + side, 0.5 * place, 0.5 * place + side], 1)


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a network without training finds is everywhere: a moving object in its place, batch by batch."""
    done = 0

    def extents_of(probabilities: Tensor) -> Tensor:
        nonlocal done
        assert probabilities.shape[1:] == SMALL
        start, done = done % 7, done + len(probabilities)
        return torch.from_numpy(moving(7)[start : start + len(probabilities)])

    monkeypatch.setattr(models.predictor, "extents", extents_of)


def by_hand(net: DBSNet, frames: list[np.ndarray], flows: list[np.ndarray]) -> np.ndarray:
    """Both looks through the network on whole clips."""
    views = follow(moving(len(frames)))
    own = frames[0].shape[:2]

    def resized(clip: Tensor, size: tuple[int, int]) -> Tensor:
        return F.interpolate(clip[0], size=size, mode="bilinear", antialias=True)[None]

    clips = as_clip(frames), as_clip(flows)
    with torch.inference_mode():
        first = net(*(resized(clip, SMALL) for clip in clips))[0]
        closer = net(*(magnify(clip[0], views, SIZE)[None] for clip in clips))[0]
        first = F.interpolate(first, size=own, mode="bilinear")
        return put_back(first, closer, views).sigmoid()[:, 0].numpy()


@pytest.mark.usefixtures("found")
@pytest.mark.parametrize("options", [{}, {"batch_size": 1}, {"batch_size": 5, "host_memory": 0}, {"fold": False}])
def test_two_looks_by_hand(net: DBSNet, options: dict) -> None:
    frames, flows = make_video(7, (120, 200))[0], make_video(7, (90, 150))[1]
    encoded: list[int] = []
    result = collect(exact(net, size=SIZE, zoom=True, on_encoded=encoded.append, **options)(frames, flows))
    np.testing.assert_allclose(result, by_hand(net, frames, flows), atol=2e-5)
    assert sum(encoded) == 14
    plain = collect(exact(net, size=SIZE)(frames, flows))
    assert np.abs(result - plain).max() > 0.1


@pytest.mark.usefixtures("found")
def test_it_votes_in_both_looks_and_is_averaged_over_passes(net: DBSNet) -> None:
    video = make_video(7, (120, 200))
    mirrored = tuple([image[:, ::-1] for image in images] for images in video)

    def result(video: tuple, **options) -> np.ndarray:
        return collect(exact(net, size=SIZE, zoom=True, **options)(*video))

    # The object of the fixture is at the same place in the mirrored video.
    both = (result(video) + result(mirrored)[..., ::-1]) / 2
    np.testing.assert_allclose(result(video, flip=True), both, atol=1e-5)
    assert np.abs(both - result(video)).max() > 0.01
    np.testing.assert_allclose(result(video, consensus=True), result(video), atol=1e-6)  # seven frames: nobody votes


def test_votes_change_both_looks(net: DBSNet, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, ...]] = []
    agree = models.predictor.agree

    def watched(batches, *rest):
        for batch in agree(batches, *rest):
            asked.append(tuple(batch.shape[-2:]))
            yield batch

    monkeypatch.setattr(models.predictor, "agree", watched)
    video = make_video(12, SIZE)
    voted = collect(exact(net, zoom=True, consensus=True)(*video))
    assert set(asked) == {(16, 24), (24, 40)}
    assert np.abs(voted - collect(exact(net, zoom=True)(*video))).max() > 0.01


def test_where_nothing_is_found_the_second_look_is_the_only_one(monkeypatch: pytest.MonkeyPatch) -> None:
    net = make_net()
    with torch.no_grad():
        net.decoder.head.bias -= 100
    video = make_video(5, SIZE)
    result, plain = collect(exact(net, zoom=True)(*video)), collect(exact(net)(*video))
    assert plain.max() < 0.5
    np.testing.assert_allclose(result, plain, atol=1e-6)


def test_the_published_weights_find_a_disc_in_both_looks(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("timm")
    frames, flows, masks = moving_disc(6)
    sides: list[float] = []

    def watched(found: np.ndarray) -> list[View]:
        views = follow(found)
        sides.extend(view.side for view in views)
        return views

    monkeypatch.setattr(models.predictor, "follow", watched)
    net = load_dbsnet(repository / "weights" / "dbsnet_lite2.safetensors")
    found = collect(Predictor(net, size=(96, 160), zoom=True)(frames, flows)) > 0.5
    assert len(sides) == 6 and all(0.6 < side < 0.9 for side in sides)  # 1.7 times 26 of 64 pixels is 0.69
    assert (found & masks).sum() / (found | masks).sum() > 0.9


@pytest.mark.parametrize("options", [{}, {"consensus": True}, {"optional_motion": True}])
def test_the_features_of_the_first_look_make_room(net: DBSNet, options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    def most(zoom: bool) -> int:
        used: list[int] = []

        class Watched(Storage):
            def new(self, shape):
                store = super().new(shape)
                used.append(sum(self.used))
                return store

        monkeypatch.setattr(models.predictor, "Storage", Watched)
        collect(Predictor(net, zoom=zoom, **options)(*make_video(9, SIZE)))
        return max(used)

    logits = 9 * 2 * (SMALL[0] // 4) * (SMALL[1] // 4)
    assert most(True) == most(False) + logits


def test_whoever_takes_results_is_not_in_inference_mode(net: DBSNet) -> None:
    results = Predictor(net, zoom=True, consensus=True)(*make_video(9, SIZE))
    for _ in zip(range(5), results):
        assert not torch.is_inference_mode_enabled()
    results.close()
    assert not torch.is_inference_mode_enabled()


def test_clips_are_not_looked_at_twice(net: DBSNet) -> None:
    with pytest.raises(ValueError, match="zoom needs whole videos, got clip_len=4"):
        Predictor(net, zoom=True, clip_len=4)
