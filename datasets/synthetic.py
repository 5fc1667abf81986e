"""Synthetic video clips with exact optical flow and exact masks, from still images or from nothing at all.

A scene is a stack of layers: a background, one or two objects cut out along their masks, sometimes an occluder in
front. Every layer is a flat texture with a motion of its own: a homography for each frame, and two waves (a horizontal
shear that depends on y, then a vertical one that depends on x). Both can be inverted in closed form, so a frame is
rendered by looking up every pixel's place on the texture, and the flow of a pixel is where that same place lies in the
next frame: exact by construction, deformation and perspective included, with no iteration and no splatting.

A clip is a pure function of its seed: the same in every process, worker and order of access.
"""

from __future__ import annotations

import io
import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from datasets.clips import ClipDataset, Item
from datasets.errors import DataError
from datasets.flow_colour import flows_to_images
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
    # What makes it hard.
    other_background: float = 0.4  # the background is another picture
    distractor: float = 0.25  # another picture's object, fixed to the background: not foreground
    occluder: float = 0.15
    motion_blur: float = 0.25
    light: float = 0.5
    noise: float = 0.3
    # Flow picture (never the exact flow): coarse and slightly wrong, as an estimator's is.
    flow_errors: float = 0.75

    def clean(self) -> SceneOptions:
        """The same scenes without blur, light changes, noise and flow errors: what the exactness tests look at."""
        return replace(self, motion_blur=0.0, light=0.0, noise=0.0, flow_errors=0.0)


# ---------------------------------------------------------------------------------------------------------------------
# Motion


@dataclass
class _Motion:
    """Where the points of a texture lie in each frame.

    Texture coordinates are pixels from the texture's centre, frame coordinates pixels from the frame's centre. A point
    is moved by the two waves and then by the homography.
    """

    matrices: np.ndarray  # (T, 3, 3) float64, texture -> frame
    # Per frame amplitude and phase, and the wave number, of x += a sin(k y + p), then y += b sin(m x + q)
    wave_x: tuple[np.ndarray, np.ndarray, float] | None = None
    wave_y: tuple[np.ndarray, np.ndarray, float] | None = None

    def to_texture(self, times: list[int], x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Texture coordinates, each (T, H, W), of the frame coordinates x (1, 1, W), y (1, H, 1)."""
        x, y = _project(np.linalg.inv(self.matrices)[times], x, y)
        if self.wave_y is not None:
            y = y.sub_(_wave(self.wave_y, times, x))
        if self.wave_x is not None:
            x = x.sub_(_wave(self.wave_x, times, y))
        return x, y

    def to_frame(self, times: list[int], x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Frame coordinates at `times` of texture coordinates; the inverse of `to_texture`."""
        if self.wave_x is not None:
            x = x + _wave(self.wave_x, times, y)
        if self.wave_y is not None:
            y = y + _wave(self.wave_y, times, x)
        return _project(self.matrices[times], x, y)

    def move(
        self,
        times: list[int],
        targets: list[int],
        x: torch.Tensor,
        y: torch.Tensor,
        texture_x: torch.Tensor,
        texture_y: torch.Tensor,
    ) -> torch.Tensor:
        """Flow (T, 2, H, W) in pixels from `times` to `targets` at frame coordinates x, y with their texture places."""
        if self.is_static():
            return torch.zeros(len(times), 2, *texture_x.shape[1:])
        if self.wave_x is None and self.wave_y is None:  # one homography instead of two
            new_x, new_y = _project(self.matrices[targets] @ np.linalg.inv(self.matrices[times]), x, y)
        else:
            new_x, new_y = self.to_frame(targets, texture_x, texture_y)
        return torch.stack([new_x.sub_(x), new_y.sub_(y)], dim=1)

    def box(self, times: list[int], extent: tuple[int, int]) -> np.ndarray:
        """Frame coordinates that hold a texture of `extent` (h, w) at all of `times`: (left, top, right, bottom)."""
        half = np.array([extent[1], extent[0]]) / 2
        for axis, wave in enumerate((self.wave_x, self.wave_y)):
            if wave is not None:
                half[axis] += np.abs(wave[0]).max()
        corners = np.array([[i * half[0], j * half[1], 1.0] for i in (-1, 1) for j in (-1, 1)])
        points = self.matrices[times] @ corners.T  # (T, 3, 4)
        points = points[:, :2] / points[:, 2:]
        return np.concatenate([points.min(axis=(0, 2)), points.max(axis=(0, 2))])

    def is_static(self) -> bool:
        """True where no frame differs from the first, so that the flow is zero and not merely tiny."""
        waves = [w for w in (self.wave_x, self.wave_y) if w is not None]
        return all(np.all(a == a[:1]) for a in [self.matrices, *(w[0] for w in waves), *(w[1] for w in waves)])


def _project(matrices: np.ndarray, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Points through one homography per frame; matrices (T, 3, 3), x and y broadcast to (T, H, W)."""
    matrices = matrices / matrices[:, 2:, 2:]
    m = torch.from_numpy(matrices.astype(np.float32))[:, :, :, None, None]  # (T, 3, 3, 1, 1)
    new_x = torch.addcmul(m[:, 0, 0] * x, m[:, 0, 1], y).add_(m[:, 0, 2])
    new_y = torch.addcmul(m[:, 1, 0] * x, m[:, 1, 1], y).add_(m[:, 1, 2])
    if np.any(matrices[:, 2, :2]):
        depth = torch.addcmul(m[:, 2, 0] * x, m[:, 2, 1], y).add_(1).reciprocal_()
        new_x, new_y = new_x.mul_(depth), new_y.mul_(depth)
    return new_x, new_y


def _wave(wave: tuple[np.ndarray, np.ndarray, float], times: list[int], along: torch.Tensor) -> torch.Tensor:
    amplitude, phase = (torch.from_numpy(v[times].astype(np.float32))[:, None, None] for v in wave[:2])
    return along.mul(wave[2]).add_(phase).sin_().mul_(amplitude)


def _path(rng: np.random.Generator, length: int, speed: float, limit: float) -> np.ndarray:
    """A smooth path through 0 at the first frame that starts at about `speed` a frame and stays within 2 `limit`."""
    if speed == 0:
        return np.zeros(length)
    frequency = max(rng.uniform(0.01, 0.05), abs(speed) / (2 * math.pi * limit))
    phase = rng.uniform(-0.7, 0.7)
    angle = 2 * math.pi * frequency * np.arange(length) + phase
    return speed / (2 * math.pi * frequency) * (np.sin(angle) - math.sin(phase))


def _log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return math.exp(rng.uniform(math.log(low), math.log(high)))


def _similarity(x: np.ndarray, y: np.ndarray, angle: np.ndarray | float = 0.0, scale: np.ndarray | float = 1.0):
    """Matrices (T, 3, 3): scale, turn by `angle` (radians), then shift by (x, y)."""
    x, y, angle, scale = np.broadcast_arrays(*(np.atleast_1d(np.asarray(v, float)) for v in (x, y, angle, scale)))
    cos, sin, zero, one = scale * np.cos(angle), scale * np.sin(angle), np.zeros_like(x), np.ones_like(x)
    return np.stack([cos, -sin, x, sin, cos, y, zero, zero, one], axis=-1).reshape(-1, 3, 3)


def _camera(rng: np.random.Generator, length: int, size: tuple[int, int], options: SceneOptions, still: bool):
    """Movement of the view, (T, 3, 3) in frame coordinates with the identity first; its shift is (T, 2)."""
    width = size[1]
    if still:
        return np.repeat(np.eye(3)[None], length, axis=0), np.zeros((length, 2))
    speed, heading = _log_uniform(rng, *options.camera_speed) * width, rng.uniform(0, 2 * math.pi)
    # cameras pan more than they tilt
    shift_x = _path(rng, length, speed * math.cos(heading), 0.25 * width)
    shift_y = _path(rng, length, 0.5 * speed * math.sin(heading), 0.15 * width)
    angle = _path(rng, length, math.radians(rng.normal(0, 0.3)), 0.08)
    zoom = np.exp(_path(rng, length, rng.normal(0, 0.004), 0.12))
    if rng.random() < options.camera_shake:
        shake = rng.normal(0, rng.uniform(0.0005, 0.004) * width, (2, length))
        shift_x, shift_y = shift_x + shake[0] - shake[0, 0], shift_y + shake[1] - shake[1, 0]
    tilt = np.repeat(np.eye(3)[None], length, axis=0)
    tilt[:, 2, 0] = _path(rng, length, rng.normal(0, 0.004) / width, 0.08 / width)
    tilt[:, 2, 1] = _path(rng, length, rng.normal(0, 0.004) / width, 0.08 / width)
    return _similarity(shift_x, shift_y, angle, zoom) @ tilt, np.stack([shift_x, shift_y], axis=1)


def _keep_in_view(track: np.ndarray, half: np.ndarray) -> np.ndarray:
    """Pull a track of centres (T, 2) smoothly back into the box |x| < half; nearly the identity in its middle."""
    return track / (1 + (np.abs(track) / half) ** 4) ** 0.25


# ---------------------------------------------------------------------------------------------------------------------
# Textures


def _smooth_noise(rng: np.random.Generator, channels: int, cells: tuple[int, int], size: tuple[int, int]):
    """Noise of about unit variance that varies over `cells` (rows, columns) across `size`; (channels, H, W)."""
    cells = (max(2, min(cells[0], size[0])), max(2, min(cells[1], size[1])))
    grid = torch.from_numpy(rng.standard_normal((1, channels, *cells), dtype=np.float32))
    return F.interpolate(grid, size=size, mode="bilinear", align_corners=True)[0]


def _draw_texture(rng: np.random.Generator, size: tuple[int, int], palette: np.ndarray) -> torch.Tensor:
    """A made-up surface, (3, H, W) in [0, 1]: gradient, noise at several scales, stripes and shapes. palette (3, 3)."""
    height, width = size
    colours = torch.from_numpy(palette.astype(np.float32))
    y = torch.linspace(-1, 1, height)[:, None]
    x = torch.linspace(-1, 1, width)[None, :] * (width / height)
    angle = rng.uniform(0, 2 * math.pi)
    field = rng.uniform(0, 0.8) * (math.cos(angle) * x + math.sin(angle) * y)
    roughness = rng.uniform(0.45, 0.9)
    cells, weight = rng.uniform(2, 5), rng.uniform(0.4, 1.0)
    for _ in range(5):
        rows = round(cells)
        field = field + weight * _smooth_noise(rng, 1, (rows, round(rows * width / height)), size)[0]
        cells, weight = cells * 2.2, weight * roughness
    if rng.random() < 0.4:  # stripes or ripples, bent by what is there already
        turn, count = rng.uniform(0, math.pi), rng.uniform(4, 25)
        field = field + rng.uniform(0.2, 1.0) * torch.sin(count * (math.cos(turn) * x + math.sin(turn) * y) + field)
    field = torch.sigmoid(rng.uniform(1.0, 3.0) * field)
    texture = colours[0][:, None, None] * (1 - field) + colours[1][:, None, None] * field
    patches = torch.sigmoid(6 * _smooth_noise(rng, 1, (4, 6), size) - rng.uniform(0, 6))
    texture = texture + patches * (colours[2][:, None, None] - texture)
    for _ in range(int(rng.integers(0, 9))):  # things: boxes and ellipses, some large and faint
        cx, cy = rng.uniform(-1, 1) * width / height, rng.uniform(-1, 1)
        half_x, half_y, turn = rng.uniform(0.04, 0.5), rng.uniform(0.04, 0.35), rng.uniform(0, math.pi)
        power, sharpness, strength = (2 if rng.random() < 0.5 else 8), rng.uniform(6, 30), rng.uniform(0.3, 1.0)
        colour = torch.from_numpy(rng.uniform(0, 1, (3, 1, 1)).astype(np.float32))
        # only the square that the turned shape reaches
        reach = math.hypot(half_x, half_y)
        top, bottom = (round(np.clip((cy + d + 1) / 2, 0, 1) * height) for d in (-reach, reach))
        left, right = (round(np.clip(((cx + d) * height / width + 1) / 2, 0, 1) * width) for d in (-reach, reach))
        part_x, part_y = x[:, left:right] - cx, y[top:bottom] - cy
        u = (math.cos(turn) * part_x + math.sin(turn) * part_y) / half_x
        v = (math.cos(turn) * part_y - math.sin(turn) * part_x) / half_y
        distance = u.abs().pow_(power) + v.abs().pow_(power)
        inside = ((1 - distance) * sharpness).clamp_(0, 1) * strength
        part = texture[:, top:bottom, left:right]
        part += inside * (colour - part)
    return texture.clamp_(0, 1)


def _draw_shape(rng: np.random.Generator, size: tuple[int, int]) -> torch.Tensor:
    """A made-up outline, (H, W) bool: a wavy blob, or a body with limbs."""
    height, width = size
    # The centre keeps the shape in the picture; sizes are fractions of the height.
    cx, cy = rng.uniform(-0.4, 0.4) * width / height, rng.uniform(-0.35, 0.35)
    y = torch.linspace(-1, 1, height)[:, None] - cy
    x = torch.linspace(-1, 1, width)[None, :] * (width / height) - cx
    radius = rng.uniform(0.2, 0.5)
    if rng.random() < 0.5:
        angle = torch.atan2(y.expand(height, width), x.expand(height, width))
        outline = torch.ones(())
        for k in range(1, 6):
            outline = outline + rng.normal(0, 0.25 / k) * torch.cos(k * angle + rng.uniform(0, 2 * math.pi))
        stretch = rng.uniform(0.6, 1.6)
        distance = torch.sqrt((x / stretch) ** 2 + (y * stretch) ** 2)
        return distance < radius * outline.clamp(0.35, 1.8)
    inside = torch.zeros(height, width, dtype=torch.bool)
    turn = rng.uniform(0, 2 * math.pi)
    for part in range(int(rng.integers(2, 6))):
        reach = 0.0 if part == 0 else radius * rng.uniform(0.6, 1.1)
        px, py = reach * math.cos(turn), reach * math.sin(turn)
        half_x = radius * (rng.uniform(0.6, 1.0) if part == 0 else rng.uniform(0.2, 0.5))
        half_y = radius * (rng.uniform(0.4, 0.9) if part == 0 else rng.uniform(0.15, 0.45))
        tilt = rng.uniform(0, math.pi)
        u = (math.cos(tilt) * (x - px) + math.sin(tilt) * (y - py)) / half_x
        v = (math.cos(tilt) * (y - py) - math.sin(tilt) * (x - px)) / half_y
        inside |= u * u + v * v < 1
        turn += rng.uniform(0.8, 2.2)
    return inside


def _draw_still(rng: np.random.Generator, size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """A made-up still: picture (3, H, W) in [0, 1] with an object on it, and the object's mask (H, W) bool."""
    palette = rng.uniform(0, 1, (3, 3))
    background = _draw_texture(rng, size, palette)
    mask = _draw_shape(rng, size)
    if not bool(mask.any()):  # all outside the picture
        mask[size[0] // 3 : size[0] // 2, size[1] // 3 : size[1] // 2] = True
    # a third of the objects wear the colours of their surroundings and show only by moving
    colours = palette if rng.random() < 0.3 else rng.uniform(0, 1, (3, 3))
    rows, columns = _extent(mask)
    part = background[:, rows, columns]
    part.copy_(torch.where(mask[rows, columns], _draw_texture(rng, tuple(part.shape[1:]), colours), part))
    return background, mask


def _extent(mask: torch.Tensor) -> tuple[slice, slice]:
    """Rows and columns of the smallest box that holds a mask (H, W), which must not be empty."""
    rows, columns = torch.where(mask.any(dim=1))[0], torch.where(mask.any(dim=0))[0]
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)


def _load_still(still: StillImage, size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Picture (3, h, w) in [0, 1] and mask (h, w) bool of a still, reduced where it is far larger than needed."""
    height, width = size
    try:
        with Image.open(still.image) as picture:
            full_size = picture.size
            picture.draft("RGB", (math.ceil(1.3 * width), math.ceil(1.3 * height)))
            picture = picture.convert("RGB")
    except (OSError, SyntaxError) as error:
        raise DataError(f"{still.image}: cannot be read as an image ({error}); replace or remove it") from error
    try:
        with Image.open(still.mask) as mask:
            mask_size, mask = mask.size, mask.convert("L")
    except (OSError, SyntaxError) as error:
        raise DataError(f"{still.mask}: cannot be read as an image ({error}); replace or remove it") from error
    if full_size != mask_size:
        raise DataError(
            f"{still.mask}: the mask is {mask_size[0]}x{mask_size[1]}, its image {still.image} is "
            f"{full_size[0]}x{full_size[1]}; they must be of one size"
        )
    ratio = min(picture.width / width, picture.height / height)
    if ratio > 1.4:
        target = (max(1, round(picture.width * 1.2 / ratio)), max(1, round(picture.height * 1.2 / ratio)))
        picture = picture.resize(target, Image.Resampling.BILINEAR)
    if mask.size != picture.size:
        mask = mask.resize(picture.size, Image.Resampling.BILINEAR)
    object_ = torch.from_numpy(np.asarray(mask) >= 128)
    if not bool(object_.any()):
        raise DataError(f"{still.mask}: no pixel of the mask is brighter than 128; a still needs an object")
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)  # (h, w, 3) -> (3, h, w)
    return pixels.to(torch.float32).div_(255), object_


def _halve(image: torch.Tensor) -> torch.Tensor:
    """Means of 2 x 2 pixels of (C, H, W); an odd last row or column is repeated first. Faster than avg_pool2d."""
    image = F.pad(image[None], (0, image.shape[2] % 2, 0, image.shape[1] % 2), mode="replicate")[0]
    rows = image[:, 0::2] + image[:, 1::2]
    return (rows[:, :, 0::2] + rows[:, :, 1::2]).mul_(0.25)


def _grow(mask: torch.Tensor, radius: int) -> torch.Tensor:
    """Mask (H, W) bool, grown by a square of the given radius."""
    for _ in range(radius):
        mask = mask.clone()
        mask[1:] |= mask[:-1].clone()
        mask[:-1] |= mask[1:].clone()
        mask[:, 1:] |= mask[:, :-1].clone()
        mask[:, :-1] |= mask[:, 1:].clone()
    return mask


def _fill(rng: np.random.Generator, picture: torch.Tensor, hole: torch.Tensor) -> torch.Tensor:
    """Picture (3, h, w) with the hole (h, w) filled from its surroundings.

    Pull-push over an image pyramid gives the colours. Fine structure from elsewhere in the picture goes on top, since a
    smooth patch would tell a network where the object was.
    """
    height, width = hole.shape
    known = (~_grow(hole, 3)).float()[None]  # the object's edge bleeds into the picture
    # pull: averages of what is known, at half the size each time
    levels = [torch.cat([picture * known, known])]  # (4, h, w)
    while min(levels[-1].shape[1:]) > 2:
        levels.append(_halve(levels[-1]))
    # push: back up, keeping what is known at each level
    filled = levels[-1][None, :3] / levels[-1][None, 3:].clamp_min(1e-6)
    for depth in reversed(range(len(levels) - 1)):
        level = levels[depth]
        filled = F.interpolate(filled, size=level.shape[1:], mode="bilinear", align_corners=False)
        filled = torch.addcmul(level[None, :3], 1 - level[3:], filled)
        if depth == min(3, len(levels) - 2):
            coarse = filled  # an eighth of the size: what remains of the picture above it is its fine structure
    detail = picture - F.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=False)[0]
    shift = (int(rng.integers(height)), int(rng.integers(width)))
    detail = torch.roll(detail * known, shift, (1, 2)).flip(2)
    return torch.addcmul(filled[0], 1 - known, detail).clamp_(0, 1)


@dataclass
class _Layer:
    """A texture (3 or 4, h, w), premultiplied where it has an alpha channel, and how it moves."""

    texture: torch.Tensor
    motion: _Motion
    foreground: bool


def _cut_out(picture: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, tuple[float, float]]:
    """The object as a premultiplied RGBA texture (4, h, w), and its centre (x, y) from the picture's centre.

    The edge is feathered over about two pixels; half coverage runs along the mask's edge.
    """
    height, width = mask.shape
    rows, columns = _extent(mask)
    pad = 3
    alpha = F.pad(mask[rows, columns].float()[None, None], (pad,) * 4)
    alpha = F.avg_pool2d(alpha, 3, 1, 1)[0]
    colour = F.pad(picture[None, :, rows, columns], (pad,) * 4, mode="replicate")[0]
    centre = ((columns.start + columns.stop - width) / 2, (rows.start + rows.stop - height) / 2)
    return torch.cat([colour * alpha, alpha]), centre


# ---------------------------------------------------------------------------------------------------------------------
# Scenes


@dataclass
class _Sources:
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
            picture, mask = _draw_still(rng, (round(1.15 * self.size[0]), round(1.15 * self.size[1])))
        else:
            picture, mask = _load_still(still, self.size)
        if rng.random() < 0.5:
            picture, mask = picture.flip(2), mask.flip(1)
        return picture, mask


def _waves(rng: np.random.Generator, length: int, extent: tuple[float, float], speed: float):
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
    view: np.ndarray | None,
) -> _Layer:
    """Cut the object out and give it a motion. view: the background's first matrix, to keep the object in its place."""
    height, width = size
    texture, centre = _cut_out(picture, mask)
    extent = (texture.shape[1], texture.shape[2])
    if view is not None:
        place = view @ _similarity(*np.array(centre))[0]
    else:
        # a new place, at a size between a hundredth and a third of the frame
        area = float(mask.sum())
        scale = math.sqrt(_log_uniform(rng, 0.012, 0.3) * height * width / area)
        scale = min(scale, 3.0, 1.1 * width / extent[1], 1.1 * height / extent[0])  # no blow-ups of tiny objects
        place = _similarity(
            rng.uniform(-0.35, 0.35) * width, rng.uniform(-0.3, 0.3) * height, math.radians(rng.normal(0, 8)), scale
        )[0]
    kind = rng.random()
    static = kind < options.object_static
    kind -= options.object_static
    parallax = not static and kind < options.object_parallax and bool(np.any(camera_shift))
    kind -= options.object_parallax
    tracked = not static and not parallax and 0 <= kind < options.object_tracked
    if static:
        return _Layer(texture, _Motion(camera @ place), True)
    heading = rng.uniform(0, 2 * math.pi)
    if parallax:
        shift = rng.choice([-0.5, 0.4, 0.7, 1.0]) * camera_shift
        angle, zoom, speed = np.zeros(length), np.ones(length), 0.0
    else:
        speed = _log_uniform(rng, *options.object_speed) * width * (0.3 if tracked else 1.0)
        shift = np.stack(
            [
                _path(rng, length, speed * math.cos(heading), 0.25 * width),
                _path(rng, length, 0.6 * speed * math.sin(heading), 0.15 * height),
            ],
            axis=1,
        )
        angle = _path(rng, length, math.radians(rng.normal(0, 1.0)), 0.25)
        zoom = np.exp(_path(rng, length, rng.normal(0, 0.008), 0.2))
    world = place[None] if tracked else camera @ place
    # Turn and grow about the object's own centre, and keep that centre near the picture.
    centres = np.broadcast_to(world[:, :2, 2] / world[:, 2:, 2], (length, 2))
    reach = rng.uniform(0.35, 0.55) * np.array([width, height])
    goal = _keep_in_view(centres + shift, reach)
    matrices = _similarity(goal[:, 0], goal[:, 1], angle, zoom) @ _similarity(-centres[:, 0], -centres[:, 1]) @ world
    wave_x = wave_y = None
    if speed and rng.random() < options.deformation:
        texels = speed / math.sqrt(abs(np.linalg.det(place[:2, :2])))
        wave_x, wave_y = _waves(rng, length, extent, rng.uniform(0.1, 0.7) * texels)
    return _Layer(texture, _Motion(matrices, wave_x, wave_y), True)


def _occluder_layer(
    rng: np.random.Generator, size: tuple[int, int], background: _Layer, camera: np.ndarray, camera_shift: np.ndarray
) -> _Layer:
    """A post or rail in front of everything: not foreground, moves with the camera, a little faster than the world."""
    height, width = size
    upright = rng.random() < 0.7
    thickness = max(4, round(rng.uniform(0.02, 0.08) * width))
    long = round(1.6 * (height if upright else width))
    ripple = _smooth_noise(rng, 1, (2, int(rng.integers(4, 12))), (2, long))[0, :1] * rng.uniform(0, 0.25)
    across = torch.linspace(-1, 1, thickness + 6)[:, None] * (1 + 6 / thickness)
    alpha = ((1 - (across - ripple).abs()) * thickness / 4 + 0.5).clamp_(0, 1)[None]  # (1, thickness + 6, long)
    source = background.texture[:3]
    sample = F.interpolate(source[None, :, : max(2, thickness)], size=alpha.shape[1:], mode="bilinear")[0]
    tint = torch.from_numpy(rng.uniform(0, 1, (3, 1, 1)).astype(np.float32))
    mix = rng.uniform(0.2, 0.8)
    texture = torch.cat([(mix * tint + (1 - mix) * sample) * alpha, alpha])
    turn = (math.pi / 2 if upright else 0) + math.radians(rng.normal(0, 8))
    place = _similarity(rng.uniform(-0.35, 0.35) * width, rng.uniform(-0.35, 0.35) * height, turn, 1.0)[0]
    nearer = rng.uniform(0.0, 0.8) * camera_shift
    return _Layer(texture, _Motion(_similarity(nearer[:, 0], nearer[:, 1]) @ camera @ place), False)


def _compose(
    rng: np.random.Generator, length: int, size: tuple[int, int], sources: _Sources, options: SceneOptions
) -> list[_Layer]:
    """The layers of a scene, back to front."""
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
            backdrop = _fill(rng, *surroundings)
    else:
        backdrop = _fill(rng, picture, mask)
    source_height, source_width = backdrop.shape[1:]
    cover = max(width / source_width, height / source_height) * rng.uniform(1.02, 1.3)
    slack = np.array([source_width * cover - width, source_height * cover - height]) / 2
    view = _similarity(*(slack * rng.uniform(-1, 1, 2)), 0.0, cover)[0]

    distractor = sources.other(rng) if rng.random() < options.distractor else None
    if distractor is not None:
        cut, _ = _cut_out(*distractor)
        target = math.sqrt(_log_uniform(rng, 0.01, 0.12) * source_height * source_width / float(distractor[1].sum()))
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
    background = _Layer(backdrop, _Motion(camera @ view, wave_x, wave_y), False)

    # An object on its own background mostly stays where it was; one that the picture's edge cuts off always does.
    at_edge = bool(mask[0].any() | mask[-1].any() | mask[:, 0].any() | mask[:, -1].any())
    at_home = surroundings is None and (at_edge or natural or rng.random() < 0.5)
    layers = [background]
    second = sources.other(rng) if rng.random() < options.second_object else None
    if second is not None:
        moving = replace(options, object_static=0.0)
        layers.append(_object_layer(rng, length, size, moving, *second, camera, camera_shift, None))
    if surroundings is not None or distractor is not None:
        options = replace(options, object_static=0.0)  # nothing would say which of the things is meant
    layers.append(
        _object_layer(rng, length, size, options, picture, mask, camera, camera_shift, view if at_home else None)
    )
    if rng.random() < options.occluder:
        layers.append(_occluder_layer(rng, size, background, camera, camera_shift))
    return layers


# ---------------------------------------------------------------------------------------------------------------------
# Rendering


def _sample(texture: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Texture (C, h, w) at texture coordinates (T, H, W); opaque textures go on by reflection. (T, C, H, W)."""
    channels, height, width = texture.shape
    grid = torch.empty(*x.shape, 2)
    torch.mul(x, 2 / width, out=grid[..., 0])
    torch.mul(y, 2 / height, out=grid[..., 1])
    return F.grid_sample(
        texture[None].expand(len(x), -1, -1, -1),
        grid,
        mode="bilinear",
        padding_mode="reflection" if channels == 3 else "zeros",
        align_corners=False,
    )


def _render(layers: list[_Layer], length: int, size: tuple[int, int]):
    """Frames (T, 3, H, W) in [0, 1], exact flow (T, 2, H, W) in pixels and mask (T, H, W) bool of a scene."""
    height, width = size
    x = torch.arange(width, dtype=torch.float32)[None, None, :] - (width - 1) / 2
    y = torch.arange(height, dtype=torch.float32)[None, :, None] - (height - 1) / 2
    times = list(range(length))
    # forward, except that the last frame looks back; a clip of one frame looks at a frame that is not shown
    targets = times[1:] + [length - 2 if length > 1 else 1]
    background, *others = layers
    texture_x, texture_y = background.motion.to_texture(times, x, y)
    frames = _sample(background.texture, texture_x, texture_y)
    flow = background.motion.move(times, targets, x, y, texture_x, texture_y)
    mask = torch.zeros(length, height, width, dtype=torch.bool)
    for layer in others:
        # only the part of the frame that the layer reaches
        box = layer.motion.box(times, layer.texture.shape[1:])
        left, right = (int(np.clip(math.floor(v + width / 2), 0, width)) for v in (box[0] - 1, box[2] + 2))
        top, bottom = (int(np.clip(math.floor(v + height / 2), 0, height)) for v in (box[1] - 1, box[3] + 2))
        if left >= right or top >= bottom:
            continue
        part_x, part_y = x[:, :, left:right], y[:, top:bottom]
        texture_x, texture_y = layer.motion.to_texture(times, part_x, part_y)
        pixels = _sample(layer.texture, texture_x, texture_y)
        alpha = pixels[:, 3:]
        visible = alpha[:, 0] >= 0.5
        part = (..., slice(top, bottom), slice(left, right))
        frames[part].mul_(1 - alpha).add_(pixels[:, :3])
        layer_flow = layer.motion.move(times, targets, part_x, part_y, texture_x, texture_y)
        flow[part] = torch.where(visible[:, None], layer_flow, flow[part])
        mask[part] = (mask[part] | visible) if layer.foreground else (mask[part] & ~visible)
    return frames, flow, mask


def _blur_along_flow(frames: torch.Tensor, flow: torch.Tensor, shutter: float) -> torch.Tensor:
    """Motion blur: the mean of each frame shifted along its flow by thirds of the shutter time."""
    length, _, height, width = frames.shape
    # grid_sample's own coordinates: one pixel is 2 / size
    x = (torch.arange(width, dtype=torch.float32) * 2 + 1) / width - 1
    y = (torch.arange(height, dtype=torch.float32) * 2 + 1) / height - 1
    blurred = frames.clone()
    grid = torch.empty(1, height, width, 2)
    for time in range(length):
        for step in (-shutter / 3, shutter / 3):
            torch.add(x[None, :], flow[time, 0], alpha=step * 2 / width, out=grid[0, ..., 0])
            torch.add(y[:, None], flow[time, 1], alpha=step * 2 / height, out=grid[0, ..., 1])
            blurred[time] += F.grid_sample(frames[None, time], grid, padding_mode="border", align_corners=False)[0]
    return blurred.div_(3)


def _expose(rng: np.random.Generator, frames: torch.Tensor, flow: torch.Tensor, options: SceneOptions) -> torch.Tensor:
    """What a camera adds: motion blur, changing light, noise. Returns uint8 (T, 3, H, W); overwrites `frames`."""
    length = len(frames)
    if rng.random() < options.motion_blur:
        frames = _blur_along_flow(frames, flow, rng.uniform(0.2, 0.7))
    if rng.random() < options.light:
        time = np.arange(length)
        swing = rng.uniform(0, 0.12) * np.sin(rng.uniform(0.05, 0.8) * time + rng.uniform(0, 2 * math.pi))
        gain = rng.uniform(0.75, 1.2) * (1 + swing)[:, None] * rng.uniform(0.93, 1.07, 3)[None]  # (T, 3)
        offset = rng.uniform(-0.06, 0.06)
        frames = frames.mul_(torch.from_numpy(gain.astype(np.float32))[:, :, None, None]).add_(offset)
    if rng.random() < options.noise:
        # one field, shifted differently for every frame and channel: fresh noise would cost more than the frames
        height, width = frames.shape[2:]
        field = torch.from_numpy(rng.standard_normal((height, width), dtype=np.float32)).mul_(rng.uniform(0.004, 0.02))
        for plane in frames.flatten(0, 1):
            plane += torch.roll(field, (int(rng.integers(height)), int(rng.integers(width))), (0, 1))
    exposed = torch.empty(frames.shape, dtype=torch.uint8)
    for frame, picture in zip(frames, exposed):
        picture.copy_(frame.clamp_(0, 1).mul_(255).add_(0.5))
    return exposed


def _flow_pictures(rng: np.random.Generator, flow: torch.Tensor, options: SceneOptions) -> torch.Tensor:
    """Colour pictures (T, 3, H, W) of the flow, as it is or as an estimator might see it.

    The estimate is the flow on a coarse grid with smooth errors. It is coloured at half the size, as flow that was
    computed on smaller frames is; that also saves half of the time.
    """
    if rng.random() >= options.flow_errors:
        return flows_to_images(flow)
    length, _, height, width = flow.shape
    cell = int(rng.integers(2, 7))
    coarse = flow[:, :, cell // 2 :: cell, cell // 2 :: cell]  # (T, 2, h, w)
    fastest = float(coarse.pow(2).sum(dim=1).amax().sqrt())
    # Errors grow with speed, and there are some where nothing moves at all: the picture is then all noise.
    amount = abs(rng.normal(0, 0.04)) * fastest + rng.uniform(0, 0.0004) * width
    if rng.random() < 0.1:
        amount *= 3
    rows, columns = coarse.shape[2:]
    for cells in (3, 8):
        grid = rng.standard_normal((length, 2, cells, round(cells * columns / rows) + 1), dtype=np.float32)
        noise = F.interpolate(torch.from_numpy(grid), size=(rows, columns), mode="bilinear", align_corners=True)
        coarse = coarse + 0.7 * amount * noise
    half = F.interpolate(coarse, size=((height + 1) // 2, (width + 1) // 2), mode="bilinear", align_corners=False)
    pictures = flows_to_images(half).float()
    return F.interpolate(pictures, size=(height, width), mode="bilinear", align_corners=False).to(torch.uint8)


def _clip(
    seed: int | Sequence[int],
    clip_len: int,
    size: tuple[int, int],
    still: StillImage | None,
    others: Sequence[StillImage],
    options: SceneOptions,
) -> dict[str, torch.Tensor]:
    """A clip as tensors, channels first: frames, flow, masks (T, H, W) bool, flow_images."""
    if clip_len < 1:
        raise ValueError(f"clip_len should be at least 1, got {clip_len}")
    if min(size) < 16:
        raise ValueError(f"size should be at least (16, 16), got {tuple(size)}")
    rng = np.random.default_rng(seed)
    # One frame more than is shown where there is only one: its flow needs somewhere to go.
    layers = _compose(rng, max(clip_len, 2), size, _Sources(still, others, size), options)
    frames, flow, mask = _render(layers, clip_len, size)
    return {
        "frames": _expose(rng, frames, flow, options),
        "flow": flow,
        "masks": mask,
        "flow_images": _flow_pictures(rng, flow, options),
    }


def make_clip(
    seed: int | Sequence[int],
    clip_len: int,
    size: tuple[int, int],
    still: StillImage | None = None,
    others: Sequence[StillImage] = (),
    options: SceneOptions | None = None,
) -> dict[str, np.ndarray]:
    """One synthetic clip, a pure function of its arguments.

    seed: non-negative integer, or several. size: (H, W) of the frames. still: the picture whose object moves; drawn
    procedurally where None. others: stills to take other backgrounds, distractors and second objects from (drawn where
    `still` is None).

    Returns frames (T, H, W, 3) uint8 RGB; flow (T, H, W, 2) float32 in pixels, exact, of frame t to t + 1 under t, the
    last one to t - 1; masks (T, H, W) uint8 {0, 1}; flow_images (T, H, W, 3) uint8, coloured from the exact flow or,
    with probability `options.flow_errors`, from one as imperfect as an estimator's.
    Raises DataError where a still cannot be used, ValueError on impossible sizes.
    """
    clip = _clip(seed, clip_len, size, still, others, options or SceneOptions())
    return {
        "frames": clip["frames"].permute(0, 2, 3, 1).contiguous().numpy(),
        "flow": clip["flow"].permute(0, 2, 3, 1).contiguous().numpy(),
        "masks": clip["masks"].to(torch.uint8).numpy(),
        "flow_images": clip["flow_images"].permute(0, 2, 3, 1).contiguous().numpy(),
    }


class SyntheticClips(ClipDataset):
    """Synthetic clips made on the fly, in the loader's workers; items as in `datasets.clips`, every frame valid.

    stills: pictures to make them from; drawn procedurally where None. Clip i of epoch e depends on (seed, e, i) only.
    Raises DataError where the list of stills is empty or one of them cannot be used.
    """

    def __init__(
        self,
        stills: Sequence[StillImage] | None,
        length: int,
        clip_len: int,
        size: tuple[int, int],
        seed: int = 0,
        options: SceneOptions | None = None,
    ) -> None:
        if stills is not None and not stills:
            raise DataError("no still images to make synthetic clips from; give some, or None to draw them")
        super().__init__(length, seed)
        self.stills = stills
        self.clip_len = clip_len
        self.size = (int(size[0]), int(size[1]))
        self.options = options or SceneOptions()

    def clip(self, index: int) -> Item:
        still, name = None, f"drawn-{index:06d}"
        if self.stills is not None:
            still = self.stills[int(self.rng(index, 1).integers(len(self.stills)))]
            name = still.name
        key = (self.seed, self.epoch, index)
        clip = _clip(key, self.clip_len, self.size, still, self.stills or (), self.options)
        return {
            "frames": clip["frames"],
            "flows": clip["flow_images"],
            "masks": clip["masks"].to(torch.uint8)[:, None],
            "valid": torch.ones(self.clip_len, dtype=torch.bool),
            "dataset": "synthetic",
            "sequence": name,
        }


# ---------------------------------------------------------------------------------------------------------------------
# On disk


def write_dataset(
    root: str | Path,
    name: str = "synthetic",
    videos: int = 4,
    frames: int = 24,
    size: tuple[int, int] = (128, 224),
    seed: int = 0,
    stills: Sequence[StillImage] | None = None,
    flows: bool = True,
    validation: int | None = None,
    options: SceneOptions | None = None,
) -> Path:
    """Write synthetic videos as a data set in the layout of DAVIS-2016; returns its folder, `root/name`.

    JPEGImages/480p/<video>/00000.jpg, Annotations/480p/<video>/00000.png (0/255), Flows/480p/<video>/00000.png (where
    `flows`), ImageSets/2016/train.txt and val.txt. validation: how many of the videos, the last ones, are val; by
    default a quarter, at least one where there are two videos or more. A single video is in both lists.
    """
    if videos < 1 or frames < 1:
        raise ValueError(f"videos and frames should be at least 1, got {videos} and {frames}")
    if validation is None:
        validation = max(1, videos // 4)
    if not 0 <= validation <= videos:
        raise ValueError(f"validation should be between 0 and {videos}, got {validation}")
    folder = Path(root) / name
    names = []
    for video in range(videos):
        still = None
        if stills:
            still = stills[int(np.random.default_rng((seed, video, 1)).integers(len(stills)))]
        clip = make_clip((seed, video), frames, size, still, stills or (), options)
        names.append(f"video-{video:03d}")
        for index in range(frames):
            place = Path("480p") / names[-1] / f"{index:05d}"
            _save(folder / "JPEGImages" / place.with_suffix(".jpg"), clip["frames"][index])
            _save(folder / "Annotations" / place.with_suffix(".png"), clip["masks"][index] * 255)
            if flows:
                _save(folder / "Flows" / place.with_suffix(".png"), clip["flow_images"][index])
    train = names if videos == 1 else names[: videos - validation]
    for split, members in (("train", train), ("val", names[videos - validation :])):
        _write(folder / "ImageSets" / "2016" / f"{split}.txt", "".join(f"{n}\n" for n in members).encode())
    return folder


def _save(path: Path, array: np.ndarray) -> None:
    buffer = io.BytesIO()
    if path.suffix == ".jpg":
        Image.fromarray(array).save(buffer, "JPEG", quality=92)
    else:
        Image.fromarray(array).save(buffer, "PNG", compress_level=3)
    _write(path, buffer.getvalue())


def _write(path: Path, data: bytes) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(temporary, 0o644)  # mkstemp makes it private
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
