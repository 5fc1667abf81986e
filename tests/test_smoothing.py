"""Smoothing along motion: against SciPy's interpolation frame by frame, on motion that is known, and in a predictor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import cv2
import numpy as np
import pytest
import torch
from scipy import ndimage

import models.smoothing
from models import Predictor
from models.smoothing import SmallFrames, smooth
from tests.test_predictor import collect, make_net, make_video

# What the published scores were measured with.
LONGER, NEIGHBOUR, SURE, SLACK, LAG = 428, 0.3, 4.0, (0.5, 0.02), 8


def texture(height: int, width: int, seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).standard_normal((height, width, 3))
    noise = ndimage.gaussian_filter(noise, (2, 2, 0))
    return np.clip(128 + 45 * noise / noise.std(), 0, 255).astype(np.uint8)


def moving_scene(length: int, step: int = 3) -> tuple[list[np.ndarray], np.ndarray]:
    """Frames in which a square moves over a ground at rest, and its masks."""
    ground, square = texture(60, 100, 1), texture(24, 24, 2)
    frames, masks = [], np.zeros((length, 60, 100), bool)
    for index in range(length):
        left = 6 + step * index
        frame = ground.copy()
        frame[18:42, left : left + 24] = square
        masks[index, 18:42, left : left + 24] = True
        frames.append(frame)
    return frames, masks


def shown(frames: Sequence[np.ndarray]) -> SmallFrames:
    small = SmallFrames(len(frames))
    for index in reversed(range(len(frames))):
        small.show(index, frames[index])
    return small


def smoothed(maps: Sequence[np.ndarray], frames: Sequence[np.ndarray], threads: int = 1) -> np.ndarray:
    return np.stack(list(smooth(iter(maps), shown(frames), threads)))


def fetch(values: np.ndarray, flow: np.ndarray) -> np.ndarray:
    rows, columns = np.indices(values.shape)
    places = [rows + flow[..., 1], columns + flow[..., 0]]
    return ndimage.map_coordinates(values.astype(np.float64), places, order=1, mode="nearest")


def by_hand(maps: np.ndarray, frames: Sequence[np.ndarray]) -> np.ndarray:
    """Each frame for itself, by the same flow."""
    height, width = maps[0].shape
    part = min(1, LONGER / max(height, width))
    size = max(32, round(width * part)), max(32, round(height * part))
    greys = [
        cv2.resize(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY), size, interpolation=cv2.INTER_AREA) for frame in frames
    ]
    least = 1 / (1 + np.exp(SURE))
    shares = [cv2.resize(each, size, interpolation=cv2.INTER_AREA).clip(least, 1 - least) for each in maps]
    logits = [np.log(each / (1 - each)) for each in shares]
    result = maps.copy()
    for index in range(len(maps)):
        moved = np.zeros_like(logits[0])
        for other in {index - 1, index + 1} & set(range(len(maps))):
            dis = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
            there, back = dis.calc(greys[index], greys[other], None), dis.calc(greys[other], greys[index], None)
            missed = sum((there[..., axis] + fetch(back[..., axis], there)) ** 2 for axis in (0, 1))
            weight = np.exp(-missed / (SLACK[0] + SLACK[1] * (there**2).sum(-1)))
            moved += NEIGHBOUR * weight * (fetch(logits[other], there) - logits[index])
        change = cv2.resize(np.exp(moved), (width, height), interpolation=cv2.INTER_LINEAR)
        odds = result[index] / (1 - result[index]) * change
        result[index] = odds / (1 + odds)
    return result


def blurred(masks: np.ndarray, seed: int) -> np.ndarray:
    """Maps that flicker: logits of blurred masks and noise."""
    noise = np.random.default_rng(seed).standard_normal(masks.shape)
    logits = 9 * (ndimage.gaussian_filter(masks.astype(float), (0, 2, 2)) - 0.5)
    logits += 4 * ndimage.gaussian_filter(noise, (0, 3, 3)) / ndimage.gaussian_filter(noise, (0, 3, 3)).std() / 2
    return (1 / (1 + np.exp(-logits))).astype(np.float32)


@pytest.mark.parametrize("length", [2, 3, 21])
@pytest.mark.parametrize("size", [(60, 100), (90, 500), (20, 30)])  # as it is, made small, made larger
def test_each_frame_is_what_its_neighbours_make_of_it(length: int, size: tuple[int, int]) -> None:
    frames, masks = moving_scene(length, step=2)
    frames = [cv2.resize(frame, size[::-1]) for frame in frames]
    maps = blurred(np.stack([cv2.resize(mask.astype(np.uint8), size[::-1]) for mask in masks]) > 0, 3)
    kept = maps.copy()
    result = smoothed(maps, frames)
    assert result.dtype == np.float32 and np.abs(result - maps).max() > 0.1
    # OpenCV interpolates in steps of a 32nd of a pixel.
    np.testing.assert_allclose(result, by_hand(maps, frames), atol=0.02)
    np.testing.assert_array_equal(maps, kept)
    np.testing.assert_array_equal(smoothed(maps, frames, threads=3), result)


def test_the_object_is_found_where_one_frame_missed_it_and_not_where_it_was() -> None:
    frames, masks = moving_scene(13)
    maps = np.where(masks, 0.97, 0.03).astype(np.float32)
    maps[6][masks[6]] = 0.35
    result = smoothed(maps, frames) > 0.5
    assert (result[6] & masks[6]).sum() > 0.9 * masks[6].sum()
    assert (result != masks).mean((1, 2)).max() < 0.02  # whatever it does at rims
    # Without the motion it would have been smeared: by then it had moved by a quarter of its size.
    still = smoothed(maps, frames[:1] * 13) > 0.5
    assert (still[6] & masks[6]).sum() < 0.8 * masks[6].sum()


def test_where_motion_cannot_be_told_nobody_else_has_a_say() -> None:
    frames = [texture(60, 100, seed) for seed in range(6)]  # another scene in each frame
    maps = np.stack([np.full((60, 100), 0.9 if index % 2 else 0.2, np.float32) for index in range(6)])
    changed = np.abs(smoothed(maps, frames) - maps).mean()
    assert changed < 0.25 * np.abs(smoothed(maps, frames[:1] * 6) - maps).mean()


def test_what_is_certain_stays_certain() -> None:
    maps = np.zeros((3, 60, 100), np.float32)
    maps[:, :, 50:] = 1
    np.testing.assert_array_equal(smoothed(maps, [texture(60, 100)] * 3), maps)


def test_few_frames_wait_and_none_is_lost() -> None:
    frames, masks = moving_scene(20, step=1)
    maps, asked = blurred(masks, 4), 0

    def source() -> Iterator[np.ndarray]:
        nonlocal asked
        for each in maps:
            asked += 1
            yield each

    for given, _ in enumerate(smooth(source(), shown(frames)), 1):
        assert asked == min(20, given + LAG)
    assert given == 20
    alone = maps[:1]
    np.testing.assert_allclose(smoothed(alone, frames[:1]), alone, atol=1e-6)
    assert not list(smooth(iter(()), SmallFrames(0)))


def test_many_small_frames_are_kept_in_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    frames, masks = moving_scene(10)
    maps = blurred(masks, 5)
    wanted = smoothed(maps, frames)
    monkeypatch.setattr(models.smoothing, "HOST_MEMORY", 10 * 60 * 100 - 1)
    small = shown(frames)
    assert small._store.file is not None
    np.testing.assert_array_equal(np.stack(list(smooth(iter(maps), small))), wanted)
    small.close()
    assert small._store.file.closed


@pytest.mark.parametrize("options", [
    {}, {"zoom": True, "consensus": True, "readers": 3}, {"flip": True, "scales": (1.0, 1.5)}, {"clip_len": 5},
])  # fmt: skip
def test_a_predictor_smooths_its_results(options: dict) -> None:
    net, video = make_net(), make_video(23)
    plain = collect(Predictor(net, **options)(*video))
    result = list(Predictor(net, smooth=True, **options)(*video))
    assert [index for index, _ in result] == list(range(23))
    result = np.stack([each for _, each in result])
    np.testing.assert_allclose(result, smoothed(plain, video[0]), atol=1e-5)
    assert np.abs(result - plain).max() > 0.01


def test_small_frames_go_with_the_video(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = []
    close = SmallFrames.close
    monkeypatch.setattr(SmallFrames, "close", lambda self: closed.append(self) or close(self))
    net, video = make_net(), make_video(12)
    results = Predictor(net, smooth=True)(*video)
    next(results)
    assert not closed
    results.close()
    assert len(closed) == 1
    with pytest.raises(ValueError, match="frame 4 has shape"):
        collect(Predictor(net, smooth=True)([*video[0][:4], video[0][4][:-1], *video[0][5:]], video[1]))
    assert len(closed) == 2
    assert torch.equal(*(torch.from_numpy(collect(Predictor(net, smooth=True)(*video))) for _ in range(2)))
