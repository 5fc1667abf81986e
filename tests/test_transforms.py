"""Augmentation: one geometry for everything in a clip, colours of frames only, motion that stays true under a flip."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance

from datasets.flow_colour import flows_to_images
from datasets.transforms import (
    Augment,
    Colours,
    apply,
    change_colours,
    draw,
    draw_colours,
    draw_view,
    pack,
    resize,
    sample_view,
    unpack,
)
from tests.flow_pictures import image_to_flow

NO_COLOUR = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "sharpness_probability": 0.0}
IDENTITY = Augment(scale=(1, 1), aspect=(1, 1), flip=0.0, rotation_probability=0.0, **NO_COLOUR)


def augment(clip: torch.Tensor, size: tuple[int, int], options: Augment, rng: np.random.Generator) -> torch.Tensor:
    """A random view of a clip (T, 7, h, w): (T, 7, H, W)."""
    return apply(clip, size, draw(clip[:, 6], size, options, rng))


def blob_clip(length: int = 3, height: int = 90, width: int = 150, seed: int = 0) -> torch.Tensor:
    """A clip in which frame and flow picture both show the mask: 255 where the object is."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    masks = []
    for _ in range(length):
        cy, cx, r = rng.uniform(0.3, 0.7) * height, rng.uniform(0.3, 0.7) * width, rng.uniform(0.15, 0.3) * height
        masks.append(np.hypot(y - cy, x - cx) < r)
    mask = torch.from_numpy(np.stack(masks).astype(np.uint8))[:, None]
    picture = (mask * 255).expand(-1, 3, -1, -1)
    return pack(picture, picture, mask)


@pytest.mark.parametrize("seed", range(10))
def test_frames_flows_and_masks_are_moved_alike(seed: int) -> None:
    options = Augment(rotation_flow="ignore", rotation_probability=1.0, **NO_COLOUR)
    clip = blob_clip()
    drawn = draw(clip[:, 6], (64, 96), options, np.random.default_rng(seed))
    frames, flows, masks = unpack(apply(clip, (64, 96), replace(drawn, mirror=False)))  # the pixels, not the colours
    assert frames.shape == flows.shape == (3, 3, 64, 96) and masks.shape == (3, 1, 64, 96)
    assert set(masks.unique().tolist()) <= {0, 1}
    assert torch.equal(frames, flows)
    assert torch.equal((frames[:, :1] >= 128), masks.bool())


def test_all_frames_of_a_clip_get_the_same_change() -> None:
    clip = torch.randint(0, 256, (1, 7, 80, 120), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    clip[:, 6] = clip[:, 6] > 128
    clip = clip.expand(4, -1, -1, -1)
    for seed in range(5):
        view = augment(clip, (64, 96), Augment(sharpness_probability=1.0), np.random.default_rng(seed))
        # contrast turns about the clip's mean, which is each frame's mean here
        assert all(torch.equal(view[0], view[t]) for t in range(4))


def test_without_strength_nothing_changes() -> None:
    clip = torch.randint(0, 256, (2, 7, 64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    clip[:, 6] = clip[:, 6] > 128
    assert torch.equal(augment(clip, (64, 96), IDENTITY, np.random.default_rng(0)), clip)


def test_a_flip_mirrors_pixels() -> None:
    clip = blob_clip()
    drawn = draw(clip[:, 6], (90, 150), replace(IDENTITY, flip=1.0), np.random.default_rng(0))
    assert drawn.mirror
    assert torch.equal(apply(clip, (90, 150), replace(drawn, mirror=False)), clip.flip(3))


def test_a_flip_mirrors_the_motion_that_the_flow_picture_shows() -> None:
    y, x = np.mgrid[-1:1:64j, -1:1:96j].astype(np.float32)
    flow = torch.from_numpy(np.stack([3 * x + y + 1, 2 * y - x * x]))[None]
    clip = pack(*(flows_to_images(flow) for _ in range(2)), torch.ones(1, 1, 64, 96, dtype=torch.uint8))
    mirrored_scene = torch.stack([-flow[:, 0], flow[:, 1]], dim=1).flip(3)
    expected = flows_to_images(mirrored_scene).int()
    drawn = draw(clip[:, 6], (64, 96), replace(IDENTITY, flip=1.0), np.random.default_rng(0))
    mirrored, pixels_alone = (
        (apply(clip, (64, 96), each)[:, 3:6].int() - expected).abs().float().mean()
        for each in (drawn, replace(drawn, mirror=False))
    )
    assert mirrored < 1
    assert pixels_alone > 20


@pytest.mark.parametrize("flip", [0.0, 1.0])
@pytest.mark.parametrize("rotation", [10, 180])
def test_a_rotation_turns_the_motion_that_the_flow_picture_shows(rotation: float, flip: float) -> None:
    """Against following two points of the source, one where the other moves to, into the view."""
    y, x = np.mgrid[-1:1:64j, -1:1:96j].astype(np.float32)
    flow = np.stack([3 * x + y + 1, 2 * y - x * x])  # (2, h, w)
    clip = pack(*(flows_to_images(torch.from_numpy(flow)[None]) for _ in range(2)), torch.ones(1, 1, 64, 96).byte())
    errors = {}
    for mode in ("exact", "ignore"):
        options = Augment(
            scale=(1, 1), aspect=(1, 1), flip=flip, rotation=rotation, rotation_probability=1.0, rotation_flow=mode,
            **NO_COLOUR,
        )  # fmt: skip
        rng = np.random.default_rng(5)
        matrix, angle, _ = draw_view(clip[:, 6], (40, 60), options, np.random.default_rng(5))
        assert abs(angle) > math.radians(rotation) / 3
        view = augment(clip, (40, 60), options, rng)[0, 3:6].permute(1, 2, 0).numpy()
        # source pixels from the source's centre -> pixels of the view
        onto = np.linalg.inv(matrix[:, :2]) * np.array([[30], [20]])
        expected = np.einsum("ij,jhw->hwi", onto, flow / np.linalg.norm(flow, axis=0)) / np.linalg.norm(onto[:, 0])
        rows, columns = np.mgrid[:40, :60]
        places = np.stack([(columns + 0.5) / 30 - 1, (rows + 0.5) / 20 - 1, np.ones_like(rows)])
        j, i = np.rint(np.einsum("ij,jhw->ihw", matrix, places) + np.array([47.5, 31.5])[:, None, None]).astype(int)
        shown, wanted = image_to_flow(view), expected[i, j]
        fast = np.linalg.norm(shown, axis=-1) > 0.2
        angles = np.arctan2(shown[..., 1], shown[..., 0]) - np.arctan2(wanted[..., 1], wanted[..., 0])
        errors[mode] = np.degrees(np.median(np.abs((angles + np.pi) % (2 * np.pi) - np.pi)[fast]))
    assert errors["exact"] < 1.5
    assert errors["ignore"] == pytest.approx(abs(math.degrees(angle)), abs=1.5)


def test_without_a_rotation_colours_are_left_as_they_are() -> None:
    clip = torch.randint(0, 256, (2, 7, 40, 60), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    clip[:, 6] = clip[:, 6] > 128
    for options in (Augment(rotation=0, flip=0.5), Augment(rotation=10, rotation_probability=0)):
        for seed in range(4):
            views = [
                augment(clip, (32, 48), replace(options, rotation_flow=mode), np.random.default_rng(seed))
                for mode in ("exact", "ignore")
            ]
            assert torch.equal(*views)


@pytest.mark.parametrize("rotation", [20, 180])
@pytest.mark.parametrize("size", [(64, 96), (96, 64), (80, 80)])
def test_views_stay_inside_the_source(size: tuple[int, int], rotation: int) -> None:
    masks = torch.zeros(2, 90, 150, dtype=torch.uint8)
    rng = np.random.default_rng(0)
    corners = np.array([[-1, 1, -1, 1], [-1, -1, 1, 1], [1, 1, 1, 1]])
    for _ in range(300):
        matrix, *_ = draw_view(masks, size, Augment(rotation=rotation, rotation_probability=1.0), rng)
        reach = np.abs(matrix @ corners).max(axis=1)
        assert reach[0] <= 75 + 1e-6 and reach[1] <= 45 + 1e-6


def test_views_keep_the_aspect_that_was_asked_for() -> None:
    """A circle stays a circle where aspect jitter is off, whatever the shapes of source and target."""
    y, x = np.mgrid[:120, :200]
    mask = torch.from_numpy((np.hypot(y - 60, x - 100) < 30).astype(np.uint8))[None, None]
    clip = pack((mask * 255).expand(-1, 3, -1, -1), (mask * 255).expand(-1, 3, -1, -1), mask)
    options = Augment(scale=(1, 1), aspect=(1, 1), rotation_probability=1.0, **NO_COLOUR)
    for size in [(64, 64), (48, 96)]:
        seen = augment(clip, size, options, np.random.default_rng(1))[0, 6].numpy() > 0
        rows, columns = np.flatnonzero(seen.any(axis=1)), np.flatnonzero(seen.any(axis=0))
        assert abs(np.ptp(rows) - np.ptp(columns)) <= 1


def test_crops_seldom_lose_the_object() -> None:
    mask = torch.zeros(2, 90, 150, dtype=torch.uint8)
    mask[:, 10:30, 5:25] = 1
    black = torch.zeros(2, 3, 90, 150, dtype=torch.uint8)
    clip = pack(black, black, mask[:, None])
    options = Augment(scale=(0.5, 0.7))
    kept = [augment(clip, (64, 96), options, np.random.default_rng(s))[:, 6].any().item() for s in range(60)]
    assert np.mean(kept) == 1
    rows, columns = np.mgrid[10:30, 5:25]
    points = np.stack([columns - 74.5, rows - 44.5]).reshape(2, -1)
    for seed in range(150):
        matrix, *_ = draw_view(mask, (64, 96), options, np.random.default_rng(seed))
        places = np.linalg.solve(matrix[:, :2], points - matrix[:, 2:])
        assert (np.abs(places) < 1).all(axis=0).mean() >= 0.5  # of its pixels


def test_crops_go_all_over_the_source_where_the_object_stays_in_view() -> None:
    """Not always to the object, which would teach that it lies in the middle."""
    mask = torch.zeros(1, 90, 150, dtype=torch.uint8)
    mask[:, 40:50, 70:80] = 1
    options = Augment(scale=(0.7, 0.7), aspect=(1, 1), flip=0.0, rotation_probability=0.0)
    places = []
    for seed in range(200):
        matrix, *_ = draw_view(mask, (60, 80), options, np.random.default_rng(seed))
        room = np.array([75, 45]) - (matrix[0, 0], matrix[1, 1])  # of the crop's centre, from that of the source
        places.append(matrix[:, 2] / room)
    # Evenly from edge to edge, whose standard deviation is 0.58; the object is in every such crop's height.
    spread = np.std(places, axis=0)
    assert 0.4 < spread[0] < 0.65 and 0.53 < spread[1] < 0.63 and np.abs(np.mean(places, axis=0)).max() < 0.15
    assert np.abs(places).max() <= 1 + 1e-9


def test_draws_are_from_the_ranges_asked_for() -> None:
    options = Augment(
        scale=(0.5, 0.9), aspect=(0.8, 1.2), flip=0.3, rotation=20, rotation_probability=0.3,
        brightness=0.1, contrast=0.2, saturation=0.3, sharpness=0.4, sharpness_probability=0.6,
    )  # fmt: skip
    found: dict[str, list[float]] = {}
    chances = np.zeros(3)
    for seed in range(300):
        rng = np.random.default_rng(seed)
        matrix, angle, flipped = draw_view(torch.zeros(1, 90, 150), (60, 80), options, rng)
        colours = draw_colours(options, rng)
        half_x, half_y = np.linalg.norm(matrix[:, :2], axis=0)
        drawn = {"aspect": half_x / half_y / (80 / 60), **vars(colours)}
        if angle:
            drawn["rotation"] = math.degrees(angle)
        else:  # of the largest that fits
            drawn["scale"] = max(half_x / 75, half_y / 45)
        chances += (angle != 0, flipped, colours.sharpness is not None)
        for name, value in drawn.items():
            found.setdefault(name, []).extend([] if value is None else [value])
    ranges = {"scale": (0.5, 0.9), "aspect": (0.8, 1.2), "rotation": (-20, 20), "brightness": (0.9, 1.1),
              "contrast": (0.8, 1.2), "saturation": (0.7, 1.3), "sharpness": (0.6, 1.4)}  # fmt: skip
    assert found.keys() == ranges.keys()
    for name, (low, high) in ranges.items():
        room = 0.1 * (high - low)
        assert low - 1e-9 <= min(found[name]) < low + room and high - room < max(found[name]) <= high + 1e-9, name
    np.testing.assert_allclose(chances / 300, (0.3, 0.3, 0.6), atol=0.1)


def test_a_sampled_view_is_what_a_plain_loop_finds() -> None:
    rng = np.random.default_rng(3)
    clip = torch.randint(0, 256, (1, 7, 40, 60), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    matrix, *_ = draw_view(clip[:, 6] * 0, (10, 16), Augment(rotation_probability=1.0, flip=1.0), rng)
    sampled = sample_view(clip, (10, 16), matrix)[0].numpy()
    source = clip[0].numpy().astype(np.float64)
    for row in range(10):
        for column in range(16):
            view = np.array([(2 * column + 1) / 16 - 1, (2 * row + 1) / 10 - 1, 1])
            x, y = matrix @ view + np.array([59 / 2, 39 / 2])
            x, y = np.clip(x, 0, 58.999), np.clip(y, 0, 38.999)
            i, j = int(y), int(x)
            a, b = x - j, y - i
            expected = (source[:, i, j] * (1 - a) + source[:, i, j + 1] * a) * (1 - b)
            expected += (source[:, i + 1, j] * (1 - a) + source[:, i + 1, j + 1] * a) * b
            np.testing.assert_allclose(sampled[:, row, column], expected, atol=0.05)
    # Up to the source's edge, where a larger view looks beyond the centres of its last pixels: nothing turns dark.
    whole = sample_view(torch.full((1, 7, 20, 30), 200).byte(), (40, 60), np.array([[15.0, 0, 0], [0, 10, 0]]))
    torch.testing.assert_close(whole, torch.full_like(whole, 200))


def test_colour_changes_touch_frames_only() -> None:
    clip = blob_clip()
    clip[:, :3] = torch.randint(0, 256, (3, 3, 90, 150), dtype=torch.uint8)
    options = replace(IDENTITY, brightness=0.4, contrast=0.4, saturation=0.4, sharpness_probability=1.0)
    changed = augment(clip, (90, 150), options, np.random.default_rng(0))
    assert (changed[:, :3] != clip[:, :3]).float().mean() > 0.5
    assert torch.equal(changed[:, 3:], clip[:, 3:])


class FixedDraws:
    """Stands in for a generator: uniform draws give the upper end, chances are always taken."""

    def uniform(self, low: float, high: float) -> float:
        return high

    def random(self) -> float:
        return 0.0


@pytest.mark.parametrize(
    ("name", "enhancer"),
    [("brightness", ImageEnhance.Brightness), ("saturation", ImageEnhance.Color), ("contrast", ImageEnhance.Contrast)],
)
def test_colour_changes_are_those_of_pillow(name: str, enhancer: type) -> None:
    pixels = np.random.default_rng(0).integers(60, 160, (40, 60, 3), dtype=np.uint8)
    expected = np.asarray(enhancer(Image.fromarray(pixels)).enhance(1.3)).astype(int)
    options = replace(IDENTITY, **{name: 0.3})
    frames = torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
    found = change_colours(frames, draw_colours(options, FixedDraws()))[0].permute(1, 2, 0).round().numpy()
    assert np.abs(found - expected).max() <= 2


def test_sharpness_below_one_smooths_and_above_sharpens() -> None:
    frames = torch.rand(1, 3, 40, 60, generator=torch.Generator().manual_seed(0)) * 100 + 60
    options = replace(IDENTITY, sharpness=0.5, sharpness_probability=1.0)
    spreads = []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        spreads.append(float(change_colours(frames, draw_colours(options, rng)).std() / frames.std()))
    assert min(spreads) < 0.95 and max(spreads) > 1.05
    flat = torch.full((2, 3, 5, 6), 90.0)  # up to its border
    torch.testing.assert_close(change_colours(flat.clone(), Colours(1, 1, 1, 0.2)), flat)


def test_contrast_turns_about_the_mean_of_all_frames() -> None:
    """A frame that is darker than the others stays so, and by as much more."""
    levels = torch.tensor([60.0, 100.0, 140.0])[:, None, None, None]
    changed = change_colours(levels.expand(3, 3, 8, 12).clone(), Colours(1.1, 1.5, 1, None))
    expected = 1.1 * (100 + 1.5 * (levels - 100))
    torch.testing.assert_close(changed, expected.expand_as(changed), rtol=0, atol=1e-3)


def test_resizing_for_validation_is_plain() -> None:
    clip = blob_clip(2, 90, 150)
    assert resize(clip, (90, 150)) is clip
    half = resize(clip, (45, 75))
    assert set(half[:, 6].unique().tolist()) == {0, 1}
    assert ((half[:, 0] >= 128) == half[:, 6].bool()).float().mean() > 0.999
    expected = clip[:, 6].float().mean()
    assert abs(half[:, 6].float().mean() - expected) < 0.01


def test_the_same_draws_give_the_same_view() -> None:
    clip = blob_clip()
    views = [augment(clip, (64, 96), Augment(), np.random.default_rng(s)) for s in (4, 4, 5)]
    assert torch.equal(views[0], views[1])
    assert not torch.equal(views[0], views[2])


@pytest.mark.parametrize(
    "wrong",
    [
        {"rotation_flow": "maybe"},
        {"scale": (0.5, 1.5)},
        {"scale": (0.8, 0.5)},
        {"aspect": (0, 1)},
    ],
)
def test_impossible_options_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Augment(**wrong)
