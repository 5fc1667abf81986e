"""Synthetic scenes: what is in them and how it moves, drawn from a seed; `datasets.rendering` makes the pictures.

A scene is a stack of layers: a background, one or two objects cut out along their masks, sometimes an occluder in
front. Every layer is a flat texture with a motion of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F

from datasets.scene_motion import Motion, Ripple, Wave, keep_in_view, log_uniform, similarity, smooth_path
from datasets.scene_textures import below_a_bent_line, cut_out, draw_still, fill_hole, load_still, smooth_noise
from datasets.stills import StillImage


@dataclass(frozen=True)
class SceneOptions:
    """What happens in a scene: probabilities in [0, 1], speeds as fractions of the frame's width per frame."""

    # Camera: still, or drifting at a speed drawn log-uniformly between the two.
    camera_static: float = 0.2
    camera_speed: tuple[float, float] = (0.001, 0.03)
    camera_shake: float = 0.3
    relief: float = 0.5  # the background has depth: its rows move by different amounts
    # Object: how it moves relative to the world.
    object_static: float = 0.05  # not at all: only its looks give it away
    object_parallax: float = 0.12  # only because it stands nearer than the background (when the camera moves)
    object_tracked: float = 0.35  # the camera follows it
    object_speed: tuple[float, float] = (0.003, 0.05)
    deformation: float = 0.7
    second_object: float = 0.12  # a second moving foreground object
    natural: float = 0.0  # the still as it is: nothing is cut out of its place, only the camera may move
    # The most that a still's object may cover of the view that the frame's shape leaves; beyond it another still is
    # drawn. An object that fills the frame passes for a background, and costs as much loss as fifty other clips.
    largest_object: float = 1.0
    # What makes it hard.
    other_background: float = 0.4  # the background is another picture
    distractor: float = 0.25  # another picture's object, fixed to the background: not foreground
    occluder: float = 0.15
    turbulence: float = 0.0  # a part of the world moves by itself, as water and leaves do; in the flow picture only
    water: float = 0.0  # a part of the ground moves by itself in the frames, too, and the flow is that of its waves
    motion_blur: float = 0.25
    light: float = 0.5
    noise: float = 0.3
    # Flow picture (never the exact flow): coarse and slightly wrong, as an estimator's is.
    flow_errors: float = 0.75

    def clean(self) -> SceneOptions:
        """The same scenes without blur, light changes, noise and flow errors: what the exactness tests look at."""
        return replace(self, motion_blur=0.0, light=0.0, noise=0.0, flow_errors=0.0)


@dataclass(frozen=True)
class Layer:
    """A texture (3 or 4, h, w), premultiplied where it has an alpha channel, and how it moves."""

    texture: torch.Tensor
    motion: Motion
    foreground: bool


@dataclass
class Sources:
    """Where a scene's pictures come from: stills, or drawn."""

    still: StillImage | None
    others: Sequence[StillImage]
    size: tuple[int, int]

    def first(self, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        return self._get(rng, self.still)

    def other(self, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Another picture with its mask; None where the scene is made from a still and there are no others."""
        if self.still is None:
            return self._get(rng, None)
        if not self.others:
            return None
        return self._get(rng, self.others[int(rng.integers(len(self.others)))])

    def _get(self, rng: np.random.Generator, still: StillImage | None) -> tuple[torch.Tensor, torch.Tensor]:
        if still is None:
            picture, mask = draw_still(rng, (round(1.15 * self.size[0]), round(1.15 * self.size[1])))
        else:
            picture, mask = load_still(still, self.size)
        if rng.random() < 0.5:
            picture, mask = picture.flip(2), mask.flip(1)
        return picture, mask


def _camera(
    rng: np.random.Generator, length: int, size: tuple[int, int], options: SceneOptions, still: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Movement of the view, (T, 3, 3) in frame coordinates with the identity first; its shift is (T, 2)."""
    width = size[1]
    if still:
        return np.repeat(np.eye(3)[None], length, axis=0), np.zeros((length, 2))
    speed, heading = log_uniform(rng, *options.camera_speed) * width, rng.uniform(0, 2 * math.pi)
    # cameras pan more than they tilt
    shift_x = smooth_path(rng, length, speed * math.cos(heading), 0.25 * width)
    shift_y = smooth_path(rng, length, 0.5 * speed * math.sin(heading), 0.15 * width)
    angle = smooth_path(rng, length, math.radians(rng.normal(0, 0.3)), 0.08)
    zoom = np.exp(smooth_path(rng, length, rng.normal(0, 0.004), 0.12))
    if rng.random() < options.camera_shake:
        shake = rng.normal(0, rng.uniform(0.0005, 0.004) * width, (2, length))
        shift_x, shift_y = shift_x + shake[0] - shake[0, 0], shift_y + shake[1] - shake[1, 0]
    tilt = np.repeat(np.eye(3)[None], length, axis=0)
    tilt[:, 2, 0] = smooth_path(rng, length, rng.normal(0, 0.004) / width, 0.08 / width)
    tilt[:, 2, 1] = smooth_path(rng, length, rng.normal(0, 0.004) / width, 0.08 / width)
    return similarity(shift_x, shift_y, angle, zoom) @ tilt, np.stack([shift_x, shift_y], axis=1)


def _waves(rng: np.random.Generator, length: int, extent: tuple[float, float], speed: float) -> list[Wave]:
    """Two waves for a texture of `extent` (h, w), of about one period across it; points sway at up to about `speed`."""
    waves = []
    time = np.arange(length)
    for across, along in ((extent[1], extent[0]), (extent[0], extent[1])):
        pulse = 2 * math.pi * rng.uniform(0.015, 0.1)
        strength = min(0.06 * across, speed / pulse)
        amplitude = strength * np.sin(pulse * time + rng.uniform(0, 2 * math.pi))
        phase = rng.uniform(0, 2 * math.pi) + rng.normal(0, 0.5) * pulse * time
        waves.append((amplitude, phase, 2 * math.pi * rng.uniform(0.4, 1.2) / along))
    return waves


def _object_layer(
    rng: np.random.Generator,
    length: int,
    size: tuple[int, int],
    options: SceneOptions,
    picture: torch.Tensor,
    mask: torch.Tensor,
    camera: np.ndarray,
    camera_shift: np.ndarray,
    ground: Motion,
    at_home: bool,
) -> Layer:
    """Cut the object out and give it a motion. ground: the background's; at_home: it begins in its place there."""
    height, width = size
    view = ground.matrices[0]  # the camera begins with the identity
    texture, centre = cut_out(picture, mask)
    extent = (texture.shape[1], texture.shape[2])
    if at_home:
        place = view @ similarity(*np.array(centre))[0]
    else:
        # a new place, at a size between a hundredth and a third of the frame
        area = float(mask.sum())
        scale = math.sqrt(log_uniform(rng, 0.012, 0.3) * height * width / area)
        scale = min(scale, 3.0, 1.1 * width / extent[1], 1.1 * height / extent[0])  # no blow-ups of tiny objects
        place = similarity(
            rng.uniform(-0.35, 0.35) * width, rng.uniform(-0.3, 0.3) * height, math.radians(rng.normal(0, 8)), scale
        )[0]
    kind = rng.random()
    static = kind < options.object_static
    kind -= options.object_static
    parallax = not static and kind < options.object_parallax and bool(np.any(camera_shift))
    kind -= options.object_parallax
    tracked = not static and not parallax and 0 <= kind < options.object_tracked
    if static and ground.wave_x is not None:  # it goes with the ground where it stands
        amplitude, phase, k = ground.wave_x
        if at_home:  # point by point: its texels are the ground's
            return Layer(texture, Motion(camera @ place, (amplitude, phase + k * centre[1], k)), True)
        within = np.linalg.inv(view) @ place
        sway = similarity(amplitude * np.sin(k * within[1, 2] + phase), 0.0)
        return Layer(texture, Motion(camera @ view @ sway @ within), True)
    if static:
        return Layer(texture, Motion(camera @ place), True)
    heading = rng.uniform(0, 2 * math.pi)
    if parallax:
        shift = rng.choice([-0.5, 0.4, 0.7, 1.0]) * camera_shift
        angle, zoom, speed = np.zeros(length), np.ones(length), 0.0
    else:
        speed = log_uniform(rng, *options.object_speed) * width * (0.3 if tracked else 1.0)
        shift = np.stack(
            [
                smooth_path(rng, length, speed * math.cos(heading), 0.25 * width),
                smooth_path(rng, length, 0.6 * speed * math.sin(heading), 0.15 * height),
            ],
            axis=1,
        )
        angle = smooth_path(rng, length, math.radians(rng.normal(0, 1.0)), 0.25)
        zoom = np.exp(smooth_path(rng, length, rng.normal(0, 0.008), 0.2))
    world = place[None] if tracked else camera @ place
    # Turn and grow about the object's own centre, and keep that centre near the picture.
    centres = np.broadcast_to(world[:, :2, 2] / world[:, 2:, 2], (length, 2))
    reach = rng.uniform(0.35, 0.55) * np.array([width, height])
    goal = keep_in_view(centres + shift, reach)
    if at_home:  # where it begins, too, wherever in the picture that is
        goal = goal + centres[:1] - keep_in_view(centres[:1], reach)
    matrices = similarity(goal[:, 0], goal[:, 1], angle, zoom) @ similarity(-centres[:, 0], -centres[:, 1]) @ world
    wave_x = wave_y = None
    if speed and rng.random() < options.deformation:
        texels = speed / math.sqrt(abs(np.linalg.det(place[:2, :2])))
        wave_x, wave_y = _waves(rng, length, extent, rng.uniform(0.1, 0.7) * texels)
    return Layer(texture, Motion(matrices, wave_x, wave_y), True)


def _water_layer(rng: np.random.Generator, length: int, size: tuple[int, int], ground: Layer) -> Layer:
    """A part of the ground that moves by itself, as water does: below a bent line, or above it, as leaves do, up to
    the whole of it. Ripples of many lengths and directions run through it, and it drifts. It looks as the ground does.
    """
    _, width = size
    view = ground.motion.matrices[0]
    texel = 1 / math.sqrt(abs(np.linalg.det(view[:2, :2])))  # texture pixels in a pixel of the frame
    # Beyond the picture's edges, which a camera may pass, the ground goes on by reflection; so does the water.
    margin = [side // 4 for side in ground.texture.shape[1:]]
    texture = F.pad(ground.texture[None], (margin[1], margin[1], margin[0], margin[0]), mode="reflect")[0]
    extent = (texture.shape[1], texture.shape[2])
    alpha = below_a_bent_line(rng, extent, 1.5, (-0.2, 1.4), float(rng.choice((-1.0, 1.0), p=(0.3, 0.7))))[None]
    speed = log_uniform(rng, 0.002, 0.02) * width * texel
    ripples = []
    for _ in range(int(rng.integers(4, 9))):
        number = 2 * math.pi / (log_uniform(rng, 0.04, 0.5) * width * texel)
        pulse = rng.choice((-1.0, 1.0)) * rng.uniform(0.15, 1.2)  # radians a frame
        # as fast as it should be, but never so steep that its looks are lost
        amplitude = min(rng.uniform(0.3, 1.0) * speed / abs(pulse), 0.2 / number)
        phases = rng.uniform(0, 2 * math.pi) + pulse * np.arange(length)
        ripples.append(Ripple(rng.uniform(0, 2 * math.pi), (np.full(length, amplitude), phases, number)))
    heading, drift = rng.uniform(0, 2 * math.pi), rng.uniform(0, 0.5) * speed
    current = similarity(
        smooth_path(rng, length, drift * math.cos(heading), 0.1 * extent[1]),
        smooth_path(rng, length, drift * math.sin(heading), 0.1 * extent[0]),
    )
    return Layer(
        torch.cat([texture * alpha, alpha]),
        replace(ground.motion, matrices=ground.motion.matrices @ current, ripples=tuple(ripples)),
        False,
    )


def _occluder_layer(
    rng: np.random.Generator, size: tuple[int, int], background: Layer, camera: np.ndarray, camera_shift: np.ndarray
) -> Layer:
    """A post or rail in front of everything: not foreground, moves with the camera, a little faster than the world."""
    height, width = size
    upright = rng.random() < 0.7
    thickness = max(4, round(rng.uniform(0.02, 0.08) * width))
    long = round(1.6 * (height if upright else width))
    ripple = smooth_noise(rng, 1, (2, int(rng.integers(4, 12))), (2, long))[0, :1] * rng.uniform(0, 0.25)
    across = torch.linspace(-1, 1, thickness + 6)[:, None] * (1 + 6 / thickness)
    alpha = ((1 - (across - ripple).abs()) * thickness / 4 + 0.5).clamp_(0, 1)[None]  # (1, thickness + 6, long)
    source = background.texture[:3]
    sample = F.interpolate(source[None, :, : max(2, thickness)], size=alpha.shape[1:], mode="bilinear")[0]
    tint = torch.from_numpy(rng.uniform(0, 1, (3, 1, 1)).astype(np.float32))
    mix = rng.uniform(0.2, 0.8)
    texture = torch.cat([(mix * tint + (1 - mix) * sample) * alpha, alpha])
    turn = (math.pi / 2 if upright else 0) + math.radians(rng.normal(0, 8))
    place = similarity(rng.uniform(-0.35, 0.35) * width, rng.uniform(-0.35, 0.35) * height, turn, 1.0)[0]
    nearer = rng.uniform(0.0, 0.8) * camera_shift
    return Layer(texture, Motion(similarity(nearer[:, 0], nearer[:, 1]) @ camera @ place), False)


def compose(
    rng: np.random.Generator, length: int, size: tuple[int, int], sources: Sources, options: SceneOptions
) -> tuple[list[Layer], bool]:
    """The layers of a scene, back to front, and whether motion alone says which of the things in it is meant."""
    height, width = size
    picture, mask = sources.first(rng)
    natural = options.natural > 0 and rng.random() < options.natural  # no draw where it is off: clips stay the same
    if natural:
        options = replace(
            options, object_static=1.0, other_background=0.0, distractor=0.0, second_object=0.0, occluder=0.0
        )
    camera_still = rng.random() < options.camera_static
    camera, camera_shift = _camera(rng, length, size, options, camera_still)
    surroundings = sources.other(rng) if rng.random() < options.other_background else None
    if surroundings is not None:
        backdrop = surroundings[0]
        # Its own object stays in half of them: a salient thing that is part of the world.
        if rng.random() < 0.5:
            backdrop = fill_hole(rng, *surroundings)
    else:
        backdrop = fill_hole(rng, picture, mask)
    source_height, source_width = backdrop.shape[1:]
    cover = max(width / source_width, height / source_height) * rng.uniform(1.02, 1.3)
    slack = np.array([source_width * cover - width, source_height * cover - height]) / 2
    x, y = slack * rng.uniform(-1, 1, 2)
    view = similarity(x, y, 0.0, cover)[0]

    distractor = sources.other(rng) if rng.random() < options.distractor else None
    if distractor is not None:
        cut, _ = cut_out(*distractor)
        target = math.sqrt(log_uniform(rng, 0.01, 0.12) * source_height * source_width / float(distractor[1].sum()))
        new = [max(2, min(round(target * n), m - 1)) for n, m in zip(cut.shape[1:], backdrop.shape[1:])]
        cut = F.interpolate(cut[None], size=new, mode="bilinear", antialias=True)[0]
        top, left = (int(rng.integers(m - n)) for n, m in zip(new, backdrop.shape[1:]))
        backdrop = backdrop.clone()
        region = backdrop[:, top : top + new[0], left : left + new[1]]
        region.mul_(1 - cut[3:]).add_(cut[:3])

    wave_x = wave_y = None
    if not camera_still and rng.random() < options.relief:
        # Depth that varies over the rows: the camera's shift reaches them in different measure.
        depth = rng.uniform(-0.5, 0.5)
        wave_number = 2 * math.pi * rng.uniform(0.2, 0.8) / source_height
        wave_x = (depth * camera_shift[:, 0] / cover, np.full(length, rng.uniform(0, 2 * math.pi)), wave_number)
    background = Layer(backdrop, Motion(camera @ view, wave_x, wave_y), False)

    # An object on its own background mostly stays where it was; one that the picture's edge cuts off always does.
    at_edge = bool(mask[0].any() | mask[-1].any() | mask[:, 0].any() | mask[:, -1].any())
    at_home = surroundings is None and (at_edge or natural or rng.random() < 0.5)
    layers = [background]
    if options.water > 0 and rng.random() < options.water:  # no draw where it is off: clips stay the same
        layers.append(_water_layer(rng, length, size, background))
    second = sources.other(rng) if rng.random() < options.second_object else None
    if second is not None:
        moving = replace(options, object_static=0.0)
        layers.append(_object_layer(rng, length, size, moving, *second, camera, camera_shift, background.motion, False))
    by_motion = surroundings is not None or distractor is not None
    if by_motion:
        options = replace(options, object_static=0.0)
    layers.append(
        _object_layer(rng, length, size, options, picture, mask, camera, camera_shift, background.motion, at_home)
    )
    if rng.random() < options.occluder:
        layers.append(_occluder_layer(rng, size, background, camera, camera_shift))
    return layers, by_motion
