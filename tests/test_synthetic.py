"""Synthetic clips: the flow and the masks are right by the pixels, and a clip is a pure function of its seed."""

from __future__ import annotations

import hashlib
import math
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from torch.utils.data import DataLoader

from datasets import rendering
from datasets.errors import DataError
from datasets.rendering import _blur_along_flow, expose, flow_pictures, render, stir
from datasets.scene_motion import Motion, Ripple
from datasets.scene_textures import fill_hole, object_share
from datasets.scenes import SceneOptions, Sources, _camera, compose
from datasets.sequences import read_dataset
from datasets.stills import StillImage, read_stills
from datasets.synthetic import SyntheticClips, make_clip, make_scene, write_dataset
from tests.flow_pictures import image_to_flow

SIZE = (72, 112)
CLEAN = SceneOptions().clean()
STILL_LIFE = replace(
    CLEAN, camera_static=1.0, object_static=1.0, second_object=0.0, occluder=0.0, other_background=0.0, distractor=0.0
)


def look_up(image: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Bilinear values of image (H, W) or (H, W, C) at pixel coordinates inside it; written out for the test."""
    left, top = np.floor(x).astype(int), np.floor(y).astype(int)
    a, b = x - left, y - top
    if image.ndim == 3:
        a, b = a[..., None], b[..., None]
    upper = image[top, left] * (1 - a) + image[top, left + 1] * a
    lower = image[top + 1, left] * (1 - a) + image[top + 1, left + 1] * a
    return upper * (1 - b) + lower * b


def where_to(flow: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Target coordinates of every pixel, put inside the frame, and whether they lie inside by themselves."""
    height, width = flow.shape[:2]
    y, x = np.mgrid[:height, :width].astype(np.float64)
    x, y = x + flow[..., 0], y + flow[..., 1]
    inside = (x > 1) & (x < width - 2) & (y > 1) & (y < height - 2)
    return np.clip(x, 0, width - 1.001), np.clip(y, 0, height - 1.001), inside


def next_of(t: int, length: int) -> int:
    return t + 1 if t + 1 < length else t - 1


@pytest.mark.parametrize("water", [0.0, 1.0])
@pytest.mark.parametrize("seed", range(16))
def test_flow_takes_every_pixel_to_its_own_likeness(seed: int, water: float) -> None:
    clip = make_clip((11, seed), 4, SIZE, options=replace(CLEAN, water=water))
    frames, flows, masks = clip["frames"].astype(np.float64), clip["flow"], clip["masks"]
    for t in range(4):
        u = next_of(t, 4)
        x, y, inside = where_to(flows[t])
        found_mask = look_up(masks[u].astype(np.float64), x, y)
        # neither covered nor uncovered, and away from the feathered edge
        visible = inside & (np.abs(found_mask - masks[t]) < 0.01)
        error = np.abs(look_up(frames[u], x, y) - frames[t]).mean(axis=-1)
        assert visible.mean() > 0.3
        assert np.median(error[visible]) < 3  # grey levels: textures are sampled twice
        # the flow means something: to stay where one is fits worse wherever something moves visibly
        still_error = np.abs(frames[u] - frames[t]).mean(axis=-1)
        assert error[visible].mean() <= still_error[visible].mean() + 1
        # masks travel along the flow, but for what is covered and uncovered
        assert ((found_mask > 0.5) != (masks[t] > 0))[inside].mean() < 0.1


@pytest.mark.parametrize("seed", range(6))
def test_flow_there_and_back_ends_where_it_began(seed: int) -> None:
    """The last frame's flow points back, so with the flow before it, it makes a closed way."""
    flows = make_clip((12, seed), 3, SIZE, options=CLEAN)["flow"].astype(np.float64)
    x, y, inside = where_to(flows[1])
    back = look_up(flows[2], x, y)
    error = np.linalg.norm(flows[1] + back, axis=-1)
    assert np.median(error[inside]) < 0.02
    assert (error[inside] < 0.1).mean() > 0.7  # the rest is at edges and where something is covered


def test_motion_and_its_inverse() -> None:
    rng = np.random.default_rng(0)
    matrices = np.eye(3) + rng.normal(0, 0.1, (3, 3, 3))
    matrices[:, 2] = [0.0006, -0.0004, 1.0]
    wave = (rng.normal(0, 4, 3), rng.normal(0, 1, 3), 0.05)
    ripples = tuple(Ripple(angle, (np.full(3, 2.0), rng.normal(0, 1, 3), 0.2)) for angle in (0.4, 2.5, 5.0))
    motion = Motion(matrices, wave, wave, ripples)
    x, y = torch.arange(-50.0, 50)[None, None, :], torch.arange(-40.0, 40)[None, :, None]
    texture_x, texture_y = motion.to_texture([0, 1, 2], x, y)
    # back to the frame by plain arithmetic, point by point
    for t in range(3):
        sx, sy = texture_x[t].double().numpy(), texture_y[t].double().numpy()
        for ripple in ripples:  # a wave that runs across the way it moves points
            along = np.array([np.cos(ripple.angle), np.sin(ripple.angle)])
            amplitudes, phases, number = ripple.wave
            sway = amplitudes[t] * np.sin(number * (along[0] * sy - along[1] * sx) + phases[t])
            sx, sy = sx + along[0] * sway, sy + along[1] * sway
        sx = sx + wave[0][t] * np.sin(wave[2] * sy + wave[1][t])
        sy = sy + wave[0][t] * np.sin(wave[2] * sx + wave[1][t])
        points = np.stack([sx, sy, np.ones_like(sx)]).reshape(3, -1)
        points = matrices[t] @ points
        points = (points[:2] / points[2]).reshape(2, *sx.shape)
        np.testing.assert_allclose(points[0], x[0].numpy() + 0 * sx, atol=1e-2)
        np.testing.assert_allclose(points[1], y[0].numpy() + 0 * sx, atol=1e-2)


@pytest.mark.parametrize("waves", [False, True])
def test_the_box_of_a_layer_holds_all_of_it(waves: bool) -> None:
    """Beyond it nothing is drawn, so that an object would be cut off along straight lines."""
    rng = np.random.default_rng(1)
    for _ in range(20):
        matrices = np.eye(3) + rng.normal(0, 0.2, (3, 3, 3))
        matrices[:, :2, 2], matrices[:, 2] = rng.normal(0, 20, (3, 2)), [0.001, -0.0008, 1.0]
        wave_x, wave_y = ((rng.normal(0, 6, 3), rng.normal(0, 1, 3), 0.1) for _ in range(2))
        ripple = Ripple(rng.uniform(0, 6), (np.full(3, 5.0), rng.normal(0, 1, 3), 0.1))
        motion = Motion(matrices, wave_x, wave_y, (ripple,)) if waves else Motion(matrices)
        left, top, right, bottom = motion.box([0, 2], (40, 70))
        y, x = np.mgrid[-20:20:41j, -35:35:71j]
        places = []
        for t in (0, 2):
            cos, sin = np.cos(ripple.angle), np.sin(ripple.angle)
            sway = 5 * np.sin(0.1 * (cos * y - sin * x) + ripple.wave[1][t]) * waves
            rx, ry = x + cos * sway, y + sin * sway
            sx = rx + wave_x[0][t] * np.sin(wave_x[2] * ry + wave_x[1][t]) * waves
            sy = ry + wave_y[0][t] * np.sin(wave_y[2] * sx + wave_y[1][t]) * waves
            points = matrices[t] @ np.stack([sx, sy, np.ones_like(sx)]).reshape(3, -1)
            places.append(points[:2] / points[2])
        low, high = np.min(places, axis=(0, 2)), np.max(places, axis=(0, 2))
        assert left <= low[0] + 1e-9 and top <= low[1] + 1e-9 and right >= high[0] - 1e-9 and bottom >= high[1] - 1e-9
        if not waves:  # and no more than that
            np.testing.assert_allclose((left, top, right, bottom), (*low, *high))


def test_where_nothing_moves_there_is_no_flow() -> None:
    clip = make_clip(3, 3, SIZE, options=STILL_LIFE)
    assert (clip["flow"] == 0).all()
    assert (clip["flow_images"] == 255).all()
    assert (clip["frames"] == clip["frames"][:1]).all()
    assert 0 < clip["masks"].mean() < 1


@pytest.mark.parametrize("seed", range(5))
def test_a_still_camera_leaves_all_but_the_object_at_rest_distractors_too(seed: int) -> None:
    options = replace(CLEAN, camera_static=1.0, object_static=0.0, occluder=0.0, distractor=1.0, other_background=1.0)
    clip = make_clip((21, seed), 3, SIZE, options=options)
    background = clip["masks"] == 0
    assert (clip["flow"][background] == 0).all()
    assert np.abs(clip["flow"][~background]).max() > 0.05
    assert (clip["flow_images"][background] == 255).all()


@pytest.mark.parametrize("seed", range(5))
def test_an_object_may_show_by_parallax_alone(seed: int) -> None:
    options = replace(CLEAN, camera_static=0.0, camera_speed=(0.03, 0.03), object_static=0.0, object_parallax=1.0)
    options = replace(options, occluder=0.0, relief=0.0, second_object=0.0)
    clip = make_clip((22, seed), 2, SIZE, options=options)
    speeds = [np.median(clip["flow"][0][clip["masks"][0] == value], axis=0) for value in (0, 1)]
    assert np.linalg.norm(speeds[0] - speeds[1]) > 0.3


def test_occluders_hide_the_object_and_are_not_foreground() -> None:
    """The same scene with and without: the mask only loses pixels."""
    with_, without = (
        [make_clip((23, s), 2, SIZE, options=replace(CLEAN, occluder=p))["masks"] for s in range(8)] for p in (1.0, 0.0)
    )
    assert all((a <= b).all() for a, b in zip(with_, without))
    assert any((a < b).any() for a, b in zip(with_, without))


def test_flow_errors_touch_the_picture_only() -> None:
    right, wrong = (make_clip(5, 3, SIZE, options=replace(CLEAN, flow_errors=p)) for p in (0.0, 1.0))
    for key in ("frames", "flow", "masks"):
        np.testing.assert_array_equal(right[key], wrong[key])
    assert (right["flow_images"] != wrong["flow_images"]).any()


def test_imperfect_flow_pictures_show_about_the_right_motion() -> None:
    """They are most of what the motion stream learns from: coarse and a little wrong, but of the same place and way."""
    exact, seen, speeds = [], [], []
    for seed in range(12):
        clip = make_clip((6, seed), 2, SIZE, options=replace(CLEAN, flow_errors=1.0, camera_static=0.0))
        flow = clip["flow"].astype(np.float64)
        exact.append(flow / np.linalg.norm(flow, axis=-1).max(axis=(1, 2), keepdims=True)[..., None])
        seen.append(image_to_flow(clip["flow_images"]))
        speeds.append(np.linalg.norm(seen[-1], axis=-1).max())
    exact, seen = np.stack(exact), np.stack(seen)
    moving = np.linalg.norm(exact, axis=-1) > 0.3
    angle = np.arctan2(exact[..., 1], exact[..., 0]) - np.arctan2(seen[..., 1], seen[..., 0])
    assert np.median(np.abs(np.angle(np.exp(1j * angle[moving])))) < 0.15  # radians
    error = np.linalg.norm(exact - seen, axis=-1).mean()
    assert 0.005 < error < 0.15 and min(speeds) > 0.8
    # In its place: shifted by a twelfth of the frame either way, it fits worse.
    for axis, step in ((2, 6), (2, -6), (3, 9), (3, -9)):
        assert np.linalg.norm(exact - np.roll(seen, step, axis), axis=-1).mean() > error


class NoErrors:
    """Draws of an estimator that makes no error, on a grid of cells of the given size."""

    def __init__(self, cell: int) -> None:
        self.cell = cell

    def random(self) -> float:
        return 0.5

    def integers(self, *_: int) -> int:
        return self.cell

    def normal(self, *_: float) -> float:
        return 0.0

    def uniform(self, *_: float) -> float:
        return 0.0

    def standard_normal(self, shape: tuple[int, ...], dtype: type) -> np.ndarray:
        return np.zeros(shape, dtype)


@pytest.mark.parametrize("cell", range(2, 7))
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("size", [(192, 320), (96, 161)])
def test_coarse_flow_pictures_are_in_their_place(size: tuple[int, int], axis: int, cell: int) -> None:
    """The direction of the flow says where a pixel is from: 1.8 pi along the axis."""
    side = size[axis]
    per_pixel = 1.8 * math.pi / side
    angle = ((np.arange(side) + 0.5) / side - 0.5) * 1.8 * math.pi
    angle = np.broadcast_to(angle[:, None] if axis == 0 else angle, size)
    flow = torch.from_numpy(np.stack([np.cos(angle), np.sin(angle)]).astype(np.float32))[None]
    picture = flow_pictures(NoErrors(cell), flow, replace(CLEAN, flow_errors=1.0))
    seen = image_to_flow(picture[0].permute(1, 2, 0).numpy())  # (H, W, 2)
    turned = np.arctan2(seen[..., 1], seen[..., 0]) - angle
    pixels = np.angle(np.exp(1j * turned)).mean(axis=1 - axis) / per_pixel  # by how much the picture is shifted
    for part in np.array_split(pixels[6:-6], 3):
        assert abs(part.mean()) < 0.35


def test_motion_blur_smears_along_the_motion() -> None:
    frames = torch.rand(2, 3, 20, 30, generator=torch.Generator().manual_seed(0))
    flow = torch.zeros(2, 2, 20, 30)
    flow[0, 0], flow[1, 1] = 6.0, -6.0  # to the right in the first frame, upwards in the second
    blurred = _blur_along_flow(frames, flow, 0.5)  # a pixel either way
    for frame, axis in ((0, 2), (1, 1)):
        mean = sum(torch.roll(frames[frame], step, axis) for step in (-1, 0, 1)) / 3
        torch.testing.assert_close(blurred[frame, :, 2:-2, 2:-2], mean[:, 2:-2, 2:-2], rtol=0, atol=1e-4)
    sharp, exposed = (
        expose(np.random.default_rng(0), frames.clone(), flow, replace(SceneOptions().clean(), motion_blur=p)).float()
        for p in (0.0, 1.0)
    )
    for frame, axis in ((0, 2), (1, 1)):
        assert exposed[frame].diff(dim=axis).abs().mean() < 0.8 * sharp[frame].diff(dim=axis).abs().mean()


def test_light_changes_as_a_whole_and_noise_is_new_in_every_frame() -> None:
    grey = torch.full((4, 3, 40, 60), 0.5)
    off = SceneOptions().clean()
    flow = torch.zeros(4, 2, 40, 60)
    assert (expose(np.random.default_rng(0), grey.clone(), flow, off) == 128).all()
    lights = []
    for seed in range(8):
        lit = expose(np.random.default_rng(seed), grey.clone(), flow, replace(off, light=1.0)).float()
        assert (lit == lit[:, :, :1, :1]).all()  # alike all over a frame
        assert 255 * 0.2 < lit.min() and lit.max() < 255 * 0.8
        lights.append(lit[:, :, 0, 0])  # (T, 3)
        noisy = expose(np.random.default_rng(seed), grey.clone(), flow, replace(off, noise=1.0)).float()
        assert 0.5 < noisy.std() < 0.03 * 255 and abs(noisy.mean() - 128) < 1
        planes = noisy.flatten(0, 1).flatten(1)
        assert torch.corrcoef(planes).fill_diagonal_(0).abs().max() < 0.2
    # From clip to clip, from frame to frame, and tinted.
    for axis in range(3):
        assert float(torch.stack(lights).std(axis).mean()) > 1


def test_shapes_and_types() -> None:
    clip = make_clip(0, 2, (40, 60))
    assert {k: (v.shape, v.dtype.name) for k, v in clip.items()} == {
        "frames": ((2, 40, 60, 3), "uint8"),
        "flow": ((2, 40, 60, 2), "float32"),
        "masks": ((2, 40, 60), "uint8"),
        "flow_images": ((2, 40, 60, 3), "uint8"),
    }
    assert set(np.unique(clip["masks"])) <= {0, 1}


@pytest.mark.parametrize("length", [1, 2, 9])
@pytest.mark.parametrize("size", [(32, 32), (100, 40), (41, 97)])
def test_any_length_and_shape(length: int, size: tuple[int, int]) -> None:
    clip = make_clip((8, length), length, size)
    assert clip["frames"].shape == (length, *size, 3)
    assert np.isfinite(clip["flow"]).all()


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="clip_len"):
        make_clip(0, 0, (64, 64))
    with pytest.raises(ValueError, match="size"):
        make_clip(0, 2, (8, 64))


def digest(item: dict) -> str:
    return hashlib.sha256(b"".join(item[k].numpy().tobytes() for k in ("frames", "flows", "masks"))).hexdigest()


def test_a_clip_is_the_same_in_every_process(repository: Path) -> None:
    script = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "from test_synthetic import digest, SyntheticClips\n"
        "s = SyntheticClips(None, 10, 2, (48, 64), seed=5); s.set_epoch(2)\n"
        "print(digest(s[7]), digest(s[1]))"
    )
    output = subprocess.run([sys.executable, "-c", script], cwd=repository, capture_output=True, text=True, check=True)
    here = SyntheticClips(None, 10, 2, (48, 64), seed=5)
    here.set_epoch(2)
    assert output.stdout.split() == [digest(here[7]), digest(here[1])]


def test_workers_make_the_clips_that_the_main_process_would() -> None:
    clips = SyntheticClips(None, 4, 2, (48, 64), seed=1)
    batches = list(DataLoader(clips, batch_size=2, num_workers=2))
    for number, batch in enumerate(batches):
        assert batch["frames"].shape == (2, 2, 3, 48, 64)
        assert batch["masks"].shape == (2, 2, 1, 48, 64) and batch["valid"].all()
        for place in range(2):
            assert torch.equal(batch["frames"][place], clips[2 * number + place]["frames"])
            assert torch.equal(batch["flows"][place], clips[2 * number + place]["flows"])


def test_a_scene_makes_the_same_clip_whenever_it_is_asked() -> None:
    for index in range(6):
        scene = SyntheticClips(None, 6, 2, (48, 64), seed=1, defer=True)[index]["raw"]
        item = SyntheticClips(None, 6, 2, (48, 64), seed=1)[index]
        for _ in range(2):
            assert all(torch.equal(made, item[key]) for key, made in zip(("frames", "flows", "masks"), scene.finish()))


def test_seed_epoch_and_index_all_matter() -> None:
    clips, other = (SyntheticClips(None, 3, 1, (32, 48), seed=seed) for seed in (0, 1))
    seen = [digest(clips[0]), digest(clips[1]), digest(other[0])]
    clips.set_epoch(1)
    seen.append(digest(clips[0]))
    assert len(set(seen)) == 4
    with pytest.raises(IndexError):
        clips[3]


@pytest.mark.parametrize("seed", range(4))
def test_turbulence_is_in_the_flow_picture_alone(seed: int) -> None:
    options = SceneOptions(flow_errors=0.0)
    still, stirred = (make_clip(seed, 3, SIZE, options=replace(options, turbulence=p)) for p in (0.0, 1.0))
    for key in ("frames", "flow", "masks"):
        assert np.array_equal(still[key], stirred[key]), key
    changed = (still["flow_images"] != stirred["flow_images"]).any(axis=3).mean()
    assert changed > 0.05


@pytest.mark.parametrize("seed", range(4))
def test_water_moves_the_ground_in_the_frames_and_leaves_the_object_alone(seed: int) -> None:
    clip = make_clip((23, seed), 3, SIZE, options=replace(STILL_LIFE, water=1.0))
    foreground = clip["masks"] > 0
    assert (clip["masks"] == clip["masks"][:1]).all() and foreground.any()
    assert (clip["flow"][foreground] == 0).all()
    moving = np.linalg.norm(clip["flow"], axis=-1) > 0
    assert moving[~foreground].any()
    changed = (clip["frames"][1:] != clip["frames"][:1]).any(axis=(0, 3))
    assert changed[moving.any(axis=0)].mean() > 0.5
    inside = ndimage.binary_erosion(foreground[0], iterations=4)  # its outline is feathered
    assert inside.any() and not changed[inside].any()


def test_a_part_of_the_ground_up_to_all_of_it_is_water() -> None:
    shares = []
    for seed in range(40):
        scene = make_scene(seed, 2, SIZE, options=replace(STILL_LIFE, water=1.0))
        assert [layer.foreground for layer in scene.layers] == [False, False, True]
        assert scene.layers[0].motion.is_static() and not scene.layers[1].motion.is_static()
        _, flow, masks = render(scene.layers[:2], 2, SIZE)
        assert not masks.any()
        shares.append(float((flow[0] != 0).any(dim=0).float().mean()))
    assert min(shares) < 0.4 and max(shares) > 0.99


@pytest.mark.parametrize("may_hide", [True, False])
def test_the_world_is_stirred_and_the_foreground_left_alone_or_hidden(may_hide: bool) -> None:
    rng = np.random.default_rng(0)
    flow = torch.zeros(3, 2, 40, 64)
    flow[:, 0, 10:30, 20:40] = 5.0
    masks = flow[:, 0] > 0
    shares, hidden = [], 0
    for _ in range(80):
        stirred = stir(rng, flow, masks, may_hide=may_hide)
        change = (stirred - flow).norm(dim=1)  # (T, H, W)
        # as fast as what else there is: at most 0.8 of the fastest in each direction
        assert 0 < change[~masks].max() <= 0.8 * 5 * 2**0.5 + 1e-5
        shares.append(float((change[~masks] > 0).float().mean()))
        assert not torch.equal(change[0], change[1])  # waves move on
        if change[masks].any():
            hidden += 1
            # where the world is stirred in full the foreground moves as the world does: at rest, but for the waves
            inside = change[masks] > 0
            assert stirred.abs().amax(dim=1)[masks][inside].min() < 4.1
        else:
            assert torch.equal(stirred[:, 0][masks], flow[:, 0][masks])
    assert min(shares) < 0.4 and max(shares) > 0.99 and (20 <= hidden <= 55 if may_hide else hidden == 0)


@pytest.mark.parametrize(("rivals", "share"), [(0.0, 0.0), (1.0, 1.0)])
def test_a_scene_knows_whether_motion_alone_says_what_is_meant(rivals: float, share: float) -> None:
    options = SceneOptions(other_background=0.0, distractor=rivals)
    scenes = [make_scene(seed, 2, SIZE, options=options) for seed in range(5)]
    assert sum(scene.by_motion for scene in scenes) == share * 5
    # A still as it is has no rivals, whatever the odds of them.
    still = [make_scene(seed, 2, SIZE, options=replace(options, natural=1.0)) for seed in range(5)]
    assert not any(scene.by_motion for scene in still)


@pytest.mark.parametrize("seed", range(4))
def test_what_is_meant_by_motion_alone_moves_and_its_motion_is_not_hidden(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside another thing at rest, an object at rest would be foreground for no reason that can be seen."""
    options = SceneOptions(
        camera_static=1.0, object_static=1.0, other_background=0.0, second_object=0.0, turbulence=1.0
    )
    stirred = []
    monkeypatch.setattr(rendering, "stir", lambda rng, flow, masks, may_hide: stirred.append(may_hide) or flow)
    alone, beside = (make_clip(seed, 3, SIZE, options=replace(options, distractor=p)) for p in (0.0, 1.0))
    assert not alone["flow"].any() and alone["masks"].any()
    assert np.abs(beside["flow"][beside["masks"] > 0]).max() > 0.05
    assert stirred == [True, False]


def test_the_camera_follows_an_object_that_is_tracked() -> None:
    options = SceneOptions(
        camera_static=0.0,
        camera_speed=(0.03, 0.03),
        camera_shake=0.0,
        relief=0.0,
        object_static=0.0,
        object_parallax=0.0,
    )
    options = replace(options, object_speed=(0.003, 0.003), deformation=0.0, second_object=0.0, occluder=0.0).clean()
    for tracked in (0.0, 1.0):
        ratios = []
        for seed in range(12):
            clip = make_clip(seed, 3, SIZE, options=replace(options, object_tracked=tracked))
            speed = np.hypot(*np.moveaxis(clip["flow"], -1, 0))
            inside = clip["masks"] > 0
            if inside.any():
                ratios.append(np.median(speed[inside]) / np.median(speed[~inside]))
        assert np.median(ratios) < 0.3 if tracked else 0.6 < np.median(ratios) < 1.5


@pytest.mark.parametrize(("name", "foreground"), [
    ("noise", [False, True]), ("second_object", [False, True, True]), ("occluder", [False, True, False]),
])  # fmt: skip
def test_what_is_in_a_scene(name: str, foreground: list[bool]) -> None:
    options = replace(CLEAN, second_object=0.0, occluder=0.0)
    for seed in range(3):
        scene = make_scene(seed, 2, SIZE, options=replace(options, **{name: 1.0}))
        assert [layer.foreground for layer in scene.layers] == foreground


def test_how_camera_and_object_move() -> None:
    options = replace(CLEAN, camera_static=0.0, object_static=0.0, object_parallax=0.0, second_object=0.0, occluder=0.0)

    def motions(seed: int, **changes: float) -> tuple[Motion, Motion]:
        layers = make_scene(seed, 6, SIZE, options=replace(options, **changes)).layers
        return layers[0].motion, layers[1].motion

    for seed in range(3):
        still, moving = motions(seed, camera_static=1.0, deformation=0.0)
        assert still.is_static() and moving.wave_x is moving.wave_y is None
        turns = moving.matrices[:, :2, :2] / np.sqrt(np.linalg.det(moving.matrices[:, :2, :2]))[:, None, None]
        assert np.ptp(turns, axis=0).max() > 1e-3 and np.ptp(np.linalg.det(moving.matrices)) > 1e-3
        assert all(motions(seed, camera_static=1.0, deformation=1.0)[1].wave_x[0] != 0)
        # A second object is there to move, whether or not the first does.
        rest = {"camera_static": 1.0, "object_static": 1.0, "other_background": 0.0, "distractor": 0.0}
        layers = make_scene(seed, 6, SIZE, options=replace(options, **rest, second_object=1.0)).layers
        assert [layer.motion.is_static() for layer in layers] == [True, False, True]
        # Of a camera: perspective, rows that move by different amounts, a hand that is not steady.
        flat, deep = (motions(seed, relief=p)[0] for p in (0.0, 1.0))
        assert flat.wave_x is None and np.ptp(deep.wave_x[0]) > 0
        assert (np.abs(flat.matrices[1:, 2, :2]) > 1e-7).all()
        steady, shaken = (
            _camera(np.random.default_rng(seed), 6, SIZE, replace(options, camera_shake=p), False)[1]
            for p in (0.0, 1.0)
        )
        assert not (shaken - steady)[0].any() and (shaken - steady)[1:].all()


# --- stills -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def duts(tmp_path: Path) -> Path:
    """Three made-up stills in the layout of DUTS-TR."""
    rng = np.random.default_rng(0)
    for folder in ("DUTS-TR-Image", "DUTS-TR-Mask"):
        (tmp_path / "DUTS-TR" / folder).mkdir(parents=True)
    for number in range(3):
        picture = np.full((60, 90, 3), (40, 90, 40), dtype=np.uint8) + rng.integers(0, 20, (60, 90, 3), dtype=np.uint8)
        mask = np.zeros((60, 90), dtype=np.uint8)
        mask[20:40, 30 : 50 + 5 * number] = 255
        picture[mask > 0] = (220, 30, 30)
        Image.fromarray(picture).save(tmp_path / "DUTS-TR" / "DUTS-TR-Image" / f"s{number}.jpg", quality=95)
        Image.fromarray(mask).save(tmp_path / "DUTS-TR" / "DUTS-TR-Mask" / f"s{number}.png")
    return tmp_path


def test_stills_are_found_from_either_folder(duts: Path) -> None:
    stills = read_stills(duts)
    assert [s.name for s in stills] == ["s0", "s1", "s2"]
    assert read_stills(duts / "DUTS-TR") == stills
    (duts / "outer").mkdir()
    (duts / "outer" / "DUTS-TR").symlink_to(duts)  # unpacked into a folder of its own name
    assert [s.name for s in read_stills(duts / "outer")] == ["s0", "s1", "s2"]
    assert all(s.image.stem == s.mask.stem for s in stills)


def test_broken_still_sets_say_what_is_wrong(duts: Path) -> None:
    with pytest.raises(DataError, match="no image folder"):
        read_stills(duts / "elsewhere")
    (duts / "DUTS-TR" / "DUTS-TR-Mask" / "s1.png").unlink()
    with pytest.raises(DataError, match=r"1 of 3 .*s1\.jpg"):
        read_stills(duts)
    images, masks = (duts / "DUTS-TR" / f"DUTS-TR-{kind}" for kind in ("Image", "Mask"))
    masks.rename(duts / "kept")
    with pytest.raises(DataError, match=f"{masks} is missing"):
        read_stills(duts)
    (duts / "kept").rename(masks)
    for image in images.iterdir():
        image.unlink()
    with pytest.raises(DataError, match=f"no images in {images}"):
        read_stills(duts)


def test_the_object_of_a_still_is_the_mask(duts: Path) -> None:
    """The object is the only red thing in the stills, so its colour tells where it is."""
    stills = read_stills(duts)
    options = replace(CLEAN, other_background=0.0, distractor=0.0, second_object=0.0, occluder=0.0)
    for seed in range(6):
        clip = make_clip(seed, 3, SIZE, stills[seed % 3], stills, options)
        red = clip["frames"].astype(int)
        red = (red[..., 0] - red[..., 1]) > 60
        mask = clip["masks"] > 0
        assert (red & mask).sum() / (red | mask).sum() > 0.9


def test_what_an_object_leaves_behind_is_like_its_surroundings() -> None:
    """Neither its colours, which bleed over its edge, nor a smooth patch, which would tell where it was."""
    hole = torch.zeros(60, 90, dtype=torch.bool)
    hole[20:40, 30:60] = True
    roughness = []
    for seed in range(5):
        rng = np.random.default_rng(seed)
        picture = torch.from_numpy(rng.uniform(0.2, 0.4, (3, 60, 90)).astype(np.float32))
        picture[:, 18:42, 28:62] = 1.0
        filled = fill_hole(rng, picture, hole)
        outside = torch.ones_like(hole)
        outside[17:43, 27:63] = False
        torch.testing.assert_close(filled[:, outside], picture[:, outside])
        assert filled.max() < 0.7
        steps = filled.diff(dim=2).abs()
        roughness.append(float(steps[:, 20:40, 30:59].mean() / steps[:, :15].mean()))
    assert np.mean(roughness) > 0.5


def test_backgrounds_and_distractors_are_of_other_stills(duts: Path) -> None:
    own, *others = read_stills(duts)
    for still in others:  # blue things on white
        picture = np.where(np.asarray(Image.open(still.mask))[..., None] > 0, [30, 30, 220], [235, 235, 235])
        Image.fromarray(picture.astype(np.uint8)).save(still.image, quality=95)
    options = replace(CLEAN, second_object=0.0, occluder=0.0)

    def shares(**changes: float) -> np.ndarray:
        """Of the background: how much of it is white, and how much is blue; mean and maximum over some clips."""
        found = []
        for index in range(6):
            changed = replace(options, **{"other_background": 0.0, "distractor": 0.0, **changes})
            clips = SyntheticClips(others, 6, 1, SIZE, options=changed, defer=True)
            clips._draw_still = lambda index: own
            red, green, blue = clips[index]["raw"].layers[0].texture.numpy()
            found.append([np.mean((red > 0.8) & (green > 0.8)), np.mean(blue > red + 0.4)])
        return np.array([np.mean(found, axis=0), np.max(found, axis=0)])

    assert not shares().any()
    distractor = shares(distractor=1.0)
    assert distractor[0, 1] > 0.005 and distractor[0, 0] < 0.05
    other = shares(other_background=1.0)
    assert other[0, 0] > 0.5 and other[1, 1] > 0.02  # with its own thing in some


def test_a_natural_scene_is_the_still_under_a_moving_camera(duts: Path) -> None:
    stills = read_stills(duts)
    rest = replace(CLEAN, natural=1.0, camera_static=1.0)
    for seed, still in enumerate(stills):
        clip = make_clip(seed, 2, SIZE, still, stills, rest)
        assert not clip["flow"].any() and np.array_equal(clip["frames"][0], clip["frames"][1])
        assert clip["masks"].any()
    # All that moves moves as one: the object's flow is that of the background around it.
    moving = replace(CLEAN, natural=1.0, camera_static=0.0, relief=0.0, camera_speed=(0.02, 0.03))
    for seed, still in enumerate(stills):
        clip = make_clip(seed, 2, SIZE, still, stills, moving)
        flow = clip["flow"][0].astype(np.float64)
        y, x = np.mgrid[: SIZE[0], : SIZE[1]]
        # A homography's flow is smooth: a quadratic in x and y fits it all over the frame.
        terms = np.stack([x**0, x, y, x * y, x**2, y**2], axis=-1).reshape(-1, 6).astype(np.float64)
        fit, *_ = np.linalg.lstsq(terms, flow.reshape(-1, 2), rcond=None)
        assert np.abs(terms @ fit - flow.reshape(-1, 2)).max() < 0.05
    # Off by default, and then no draw is made for it: clips of a seed stay what they were.
    assert SceneOptions().natural == 0


def test_what_rests_goes_with_a_ground_that_has_relief(duts: Path) -> None:
    """Or natural scenes would show their object by its motion: by a jump of the flow at its rim."""
    stills = read_stills(duts)
    options = replace(CLEAN, natural=1.0, relief=1.0, camera_static=0.0, camera_speed=(0.02, 0.03))
    jumps = []
    for seed in range(12):
        clip = make_clip((41, seed), 6, SIZE, stills[seed % len(stills)], stills, options)
        for flow, mask in zip(clip["flow"].astype(np.float64), clip["masks"].astype(bool)):
            near = ndimage.binary_dilation(mask, iterations=3) & ~mask
            rim = mask & ~ndimage.binary_erosion(mask, iterations=2)
            share = ndimage.uniform_filter(near.astype(float), 7)
            rim &= share > 0.1
            around = [ndimage.uniform_filter(flow[..., c] * near, 7) / np.maximum(share, 0.1) for c in (0, 1)]
            jump = np.hypot(*(flow[..., c] - around[c] for c in (0, 1)))[rim]
            if jump.size:
                jumps.append(np.median(jump) / np.median(np.hypot(flow[..., 0], flow[..., 1])))
    assert len(jumps) > 30 and np.quantile(jumps, 0.9) < 0.05


def test_an_object_at_home_begins_in_its_place(duts: Path) -> None:
    """Also one that moves: where it was cut out is a hole that it covers at first."""
    stills = read_stills(duts)
    mask = np.zeros((60, 90), dtype=np.uint8)
    mask[:25, 55:] = 255
    for still in stills:  # at the picture's edge, where an object is at home in every scene
        Image.fromarray(mask).save(still.mask)
    options = replace(CLEAN, other_background=0.0, distractor=0.0, second_object=0.0, occluder=0.0)
    moved = 0
    for seed in range(40):
        first = []
        for static in (0.0, 1.0):
            sources = Sources(stills[seed % len(stills)], stills, SIZE)
            rng = np.random.default_rng((42, seed))
            layers, _ = compose(rng, 4, SIZE, sources, replace(options, object_static=static))
            first.append(layers[-1].motion.matrices)
        np.testing.assert_allclose(first[0][0], first[1][0], atol=1e-9)
        moved += not np.allclose(first[0][3], first[1][3])
    assert moved > 20


def test_stills_whose_object_is_too_large_are_drawn_anew(tmp_path: Path) -> None:
    """Portrait pictures, of which a wide frame shows the middle: there the object covers 0, 20, …, 100 percent."""
    for kind in ("Image", "Mask"):
        (tmp_path / "DUTS-TR" / f"DUTS-TR-{kind}").mkdir(parents=True)
    for tenth in range(0, 11, 2):
        mask = np.zeros((200, 100), dtype=np.uint8)
        mask[:10] = 255  # outside the view: rows 70 to 130 of the middle, at 60 x 100
        mask[70:130, : 10 * tenth] = 255
        picture = Image.fromarray(np.repeat(mask[..., None], 3, axis=2))
        picture.save(tmp_path / "DUTS-TR" / "DUTS-TR-Image" / f"{tenth}.jpg")
        Image.fromarray(mask).save(tmp_path / "DUTS-TR" / "DUTS-TR-Mask" / f"{tenth}.png")
    stills = read_stills(tmp_path)
    for still in stills:
        assert object_share(still, (60, 100)) == pytest.approx(int(still.name) / 10, abs=0.01)
    clips = {limit: SyntheticClips(stills, 60, 1, (60, 100), options=SceneOptions(largest_object=limit))
             for limit in (1.0, 0.5)}  # fmt: skip
    names = {limit: [clips[limit][i]["sequence"] for i in range(60)] for limit in clips}
    assert set(names[1.0]) == {"0", "2", "4", "6", "8", "10"} and set(names[0.5]) == {"0", "2", "4"}
    # A still that is small enough at once stays, so that the option changes no more than it has to.
    assert all(b == a for a, b in zip(names[1.0], names[0.5]) if a in ("0", "2", "4"))
    # Of any shape, however the numbers round.
    for width, height in ((400, 247), (399, 266), (300, 400), (101, 333), (267, 400)):
        mask = Image.fromarray(np.full((height, width), 255, dtype=np.uint8))
        mask.save(tmp_path / "mask.png")
        still = StillImage("full", tmp_path / "mask.png", tmp_path / "mask.png")
        assert all(object_share(still, size) == 1 for size in ((384, 672), (192, 320), (320, 576), (height, width)))
    # Where none is small enough a clip still comes.
    large = SyntheticClips(
        [s for s in stills if s.name == "10"], 2, 1, (60, 100), options=SceneOptions(largest_object=0.1)
    )
    assert large[0]["sequence"] == "10"


def test_unusable_stills_are_named(duts: Path) -> None:
    still = read_stills(duts)[0]
    Image.fromarray(np.zeros((60, 90), dtype=np.uint8)).save(still.mask)
    with pytest.raises(DataError, match=r"s0\.png.*brighter"):
        make_clip(0, 2, SIZE, still)
    Image.fromarray(np.full((30, 30), 255, dtype=np.uint8)).save(still.mask)
    with pytest.raises(DataError, match=r"s0\.png: the mask is 30x30"):
        make_clip(0, 2, SIZE, still)
    still.image.write_bytes(still.image.read_bytes()[:700])
    with pytest.raises(DataError, match=r"s0\.jpg: cannot be read"):
        make_clip(0, 2, SIZE, still)
    with pytest.raises(DataError, match=r"gone\.jpg"):
        make_clip(0, 2, SIZE, StillImage("gone", still.image.with_name("gone.jpg"), still.mask))
    with pytest.raises(DataError, match="no still images"):
        SyntheticClips([], 4, 2, SIZE)


def test_stills_that_pillow_stumbles_over_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It raises more than OSError: ValueError for a header cut off, an error of its own for gigantic pictures."""
    still = StillImage("a", tmp_path / "a.jpg", tmp_path / "a.png")
    Image.new("RGB", (40, 30)).save(still.image)
    Image.new("L", (40, 30), 255).save(still.mask)
    whole = still.mask.read_bytes()
    still.mask.write_bytes(
        whole[:8] + b"\0\0\0\x04IHDR" + whole[16:20] + zlib.crc32(b"IHDR" + whole[16:20]).to_bytes(4, "big")
    )
    with pytest.raises(DataError, match=r"a\.png: cannot be read"):
        make_clip(0, 2, SIZE, still)
    still.mask.write_bytes(whole)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DataError, match=r"a\.jpg: cannot be read"):
        make_clip(0, 2, SIZE, still)


@pytest.mark.data
def test_clips_from_duts(real_data: Path) -> None:
    stills = read_stills(real_data)
    clips = SyntheticClips(stills, 8, 3, (96, 160))
    items = [clips[i] for i in range(8)]
    assert {i["sequence"] for i in items} <= {s.name for s in stills}
    assert 0.02 < np.mean([i["masks"].float().mean() for i in items]) < 0.6


# --- on disk ----------------------------------------------------------------------------------------------------------


def test_a_written_set_is_read_as_davis_2016(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path, "DAVIS", videos=4, frames=3, size=(48, 64), seed=7, options=CLEAN)
    train, val = (read_dataset("DAVIS-2016", tmp_path, split) for split in ("train", "val"))
    assert [s.name for s in train] == ["video-000", "video-001", "video-002"]
    assert [s.name for s in val] == ["video-003"]
    assert all(len(s.frames) == len(s.flows) == len(s.masks) == 3 for s in train + val)
    clip = make_clip((7, 3), 3, (48, 64), options=CLEAN)
    stem = val[0].stems[1]
    np.testing.assert_array_equal(np.asarray(Image.open(val[0].masks[stem])), clip["masks"][1] * 255)
    np.testing.assert_array_equal(np.asarray(Image.open(val[0].flows[stem])), clip["flow_images"][1])
    frame = np.asarray(Image.open(val[0].frames[1])).astype(int)
    assert np.abs(frame - clip["frames"][1]).mean() < 9  # JPEG, at half the resolution for colour
    assert not [p for p in folder.rglob("*") if p.name.startswith(".")]


def test_a_data_set_of_stills_shows_what_clips_of_them_do(tmp_path: Path, duts: Path) -> None:
    """For an estimator to make its flow, as that of real videos."""
    stills = read_stills(duts)
    folder = write_dataset(
        tmp_path,
        "own",
        videos=3,
        frames=2,
        size=(48, 64),
        seed=5,
        flows=False,
        validation=0,
        options=CLEAN,
        stills=stills,
    )
    assert not (folder / "Flows").exists()
    clips = SyntheticClips(stills, 3, 2, (48, 64), seed=5, options=CLEAN)
    videos = read_dataset("own", tmp_path, "train")
    assert len(videos) == 3
    for index, video in enumerate(videos):
        clip = clips[index]
        for t, stem in enumerate(video.stems):
            np.testing.assert_array_equal(np.asarray(Image.open(video.masks[stem])), clip["masks"][t, 0] * 255)
            frame = np.asarray(Image.open(video.frames[t])).astype(int)
            assert np.abs(frame - clip["frames"][t].permute(1, 2, 0).numpy()).mean() < 9


def test_flow_and_the_split_are_options(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path, videos=3, frames=2, size=(32, 48), flows=False, validation=2)
    assert not (folder / "Flows").exists()
    lists = folder / "ImageSets" / "2016"
    assert (lists / "train.txt").read_text().split() == ["video-000"]
    assert (lists / "val.txt").read_text().split() == ["video-001", "video-002"]
    with pytest.raises(ValueError, match="validation"):
        write_dataset(tmp_path, videos=2, validation=3)
