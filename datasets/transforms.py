"""Augmentation of clips: one geometric change for all frames, flow pictures and masks of a clip; colour on RGB only.

A clip travels as one uint8 tensor (T, 7, h, w): RGB frame, flow picture, mask {0, 1}. The geometry (crop, scale,
aspect, flip, rotation) is then a single affine sampling whose weights are worked out once for all T x 7 planes.

All is drawn first, from the masks' place and a generator of numbers (`draw`), and done after (`apply`), on the device
that the clip is on. So the loader can draw and the training device do the work.

What happens to the motion that a flow picture shows:
- scale: nothing to do, since the picture is normalised by the frame's largest speed;
- flip: u -> -u, exactly, through the colour wheel;
- rotation: the colours turn with the picture (`rotation_flow="exact"`; "ignore" turns the pixels alone);
- crop and aspect: the normalisation stays that of the whole frame; the change of aspect (at most a fifth) is ignored.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from datasets.flow_colour import mirror_colours, turn_colours
from datasets.transfer import send


@dataclass(frozen=True)
class Augment:
    """Strength of the augmentation; the defaults are for training. Ranges are drawn from uniformly."""

    # Side of the crop relative to the largest one that fits, and its aspect relative to that of the target.
    scale: tuple[float, float] = (0.6, 1.0)
    aspect: tuple[float, float] = (0.85, 1.18)
    flip: float = 0.5  # probability
    rotation: float = 10.0  # largest angle, degrees
    rotation_probability: float = 0.5
    rotation_flow: str = "exact"  # what a rotation does to the colours of the flow picture: "exact" or "ignore"
    # Colour: the factor is drawn from 1 - x to 1 + x; the same for all frames of a clip.
    brightness: float = 0.3
    contrast: float = 0.3
    saturation: float = 0.3
    sharpness: float = 0.8
    sharpness_probability: float = 0.25

    def __post_init__(self) -> None:
        if self.rotation_flow not in ("exact", "ignore"):
            raise ValueError(f"rotation_flow should be exact or ignore, got {self.rotation_flow!r}")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale should be a range within (0, 1], got {self.scale}")
        if not 0 < self.aspect[0] <= self.aspect[1]:
            raise ValueError(f"aspect should be a range of positive numbers, got {self.aspect}")


def pack(frames: torch.Tensor, flows: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Frames and flow pictures (T, 3, h, w) and masks (T, 1, h, w), all uint8, as one clip (T, 7, h, w)."""
    return torch.cat([frames, flows, masks], dim=1)


def unpack(clip: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The frames, flow pictures and masks of a clip (T, 7, h, w), each contiguous."""
    return clip[:, :3].contiguous(), clip[:, 3:6].contiguous(), clip[:, 6:].contiguous()


def resize(clip: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """A clip (T, 7, h, w) uint8 at another size, without augmentation; antialiased, masks stay {0, 1}."""
    if tuple(clip.shape[2:]) == tuple(size):
        return clip
    resized = F.interpolate(clip.float(), size=size, mode="bilinear", align_corners=False, antialias=True)
    return _finish(resized[:, :6], resized[:, 6:])


@dataclass(frozen=True)
class Colours:
    """Changes of a clip's colours, as factors; 1 changes nothing. `sharpness` None: left as it is."""

    brightness: float
    contrast: float
    saturation: float
    sharpness: float | None


@dataclass(frozen=True)
class Draw:
    """What was drawn for one clip: `matrix` as `draw_view` gives it, by how much (radians) the motion that the flow's
    colours stand for is turned and whether it is mirrored then, and the changes of colour.
    """

    matrix: np.ndarray
    turn: float
    mirror: bool
    colours: Colours


def draw(masks: torch.Tensor, size: tuple[int, int], options: Augment, rng: np.random.Generator) -> Draw:
    """All that is random about the view, (H, W) = size, of a clip whose masks are (T, h, w), on the CPU; drawn in a
    fixed order.
    """
    matrix, angle, flipped = draw_view(masks, size, options, rng)
    # The view's axes lie at the angle within the source, so what moves there along them has the angle 0 here.
    turn = -angle if options.rotation_flow == "exact" else 0.0
    return Draw(matrix, turn, flipped, draw_colours(options, rng))


def apply(clip: torch.Tensor, size: tuple[int, int], drawn: Draw) -> torch.Tensor:
    """The view of a clip (T, 7, h, w) uint8 that was drawn for it, (T, 7, H, W) uint8 with masks {0, 1}, on the clip's
    device.
    """
    sampled = sample_view(clip, size, drawn.matrix)
    if drawn.turn or drawn.mirror:
        flows = sampled[:, 3:6].add_(0.5).to(torch.uint8)
        if drawn.turn:
            flows = turn_colours(flows, drawn.turn)
        sampled[:, 3:6] = mirror_colours(flows) if drawn.mirror else flows
    sampled[:, :3] = change_colours(sampled[:, :3], drawn.colours)
    return _finish(sampled[:, :6], sampled[:, 6:])


def draw_view(
    masks: torch.Tensor, size: tuple[int, int], options: Augment, rng: np.random.Generator
) -> tuple[np.ndarray, float, bool]:
    """Draw a crop, a rotation and a flip for a clip whose masks are (T, h, w).

    Returns the matrix (2, 3) that takes the view's coordinates, in [-1, 1] across it, to pixels from the centre of the
    source, the angle (radians) at which the crop lies in the source, and whether the view is flipped. The crop lies
    within the source; of four draws, the first that keeps half of the object's pixels is taken, and the last one aims
    at the object, so that few clips lose it.
    """
    height, width = masks.shape[1:]
    step = max(1, min(height, width) // 48)
    object_rows, object_columns = torch.nonzero(masks[:, ::step, ::step].amax(dim=0), as_tuple=True)
    object_x = object_columns.numpy() * step - (width - 1) / 2
    object_y = object_rows.numpy() * step - (height - 1) / 2
    angle = 0.0
    if rng.random() < options.rotation_probability:
        angle = math.radians(rng.uniform(-options.rotation, options.rotation))
    aspect = size[1] / size[0] * rng.uniform(*options.aspect)
    # The largest crop of this aspect whose corners, turned by the angle, stay inside.
    cos, sin = abs(math.cos(angle)), abs(math.sin(angle))
    half_y = min(width / (aspect * cos + sin), height / (aspect * sin + cos)) / 2 * rng.uniform(*options.scale)
    half_x = aspect * half_y
    flipped = rng.random() < options.flip
    room_x = max(0.0, width / 2 - half_x * cos - half_y * sin)
    room_y = max(0.0, height / 2 - half_x * sin - half_y * cos)
    centres = rng.uniform(-1, 1, (4, 2)) * (room_x, room_y)
    aim = rng.random()
    if len(object_x):
        chosen = int(aim * len(object_x))
        centres[3] = np.clip((object_x[chosen], object_y[chosen]), (-room_x, -room_y), (room_x, room_y))
    cosine, sine = math.cos(angle), math.sin(angle)
    for x, y in centres:
        if len(object_x) == 0:
            break
        u = (cosine * (object_x - x) + sine * (object_y - y)) / half_x
        v = (cosine * (object_y - y) - sine * (object_x - x)) / half_y
        if np.mean((np.abs(u) < 1) & (np.abs(v) < 1)) >= 0.5:
            break
    sign = -1 if flipped else 1
    matrix = np.array([[sign * half_x * cosine, -half_y * sine, x], [sign * half_x * sine, half_y * cosine, y]])
    return matrix, angle, flipped


def sample_view(clip: torch.Tensor, size: tuple[int, int], matrix: np.ndarray) -> torch.Tensor:
    """The view of `draw_view` as float (T, 7, H, W), bilinear; beyond the edge the source is mirrored."""
    length, planes, height, width = clip.shape
    # Only the part that is seen is converted to float.
    corners = matrix @ np.array([[-1, 1, -1, 1], [-1, -1, 1, 1], [1, 1, 1, 1]])
    low = np.floor(corners.min(axis=1) + (width / 2, height / 2)).astype(int) - 2
    high = np.ceil(corners.max(axis=1) + (width / 2, height / 2)).astype(int) + 2
    left, top = np.maximum(low, 0)
    right, bottom = np.minimum(high, (width, height))
    part = clip[:, :, top:bottom, left:right].to(torch.float32)
    part_height, part_width = part.shape[2:]
    # source pixels from the source's centre -> grid_sample's coordinates of the part
    shift = np.array([(width - left - right) / 2, (height - top - bottom) / 2])
    theta = matrix.copy()
    theta[:, 2] += shift
    theta = theta * np.array([[2 / part_width], [2 / part_height]])
    grid = F.affine_grid(send(theta.astype(np.float32), clip.device)[None], (1, 1, *size), align_corners=False)
    planes_together = part.reshape(1, length * planes, part_height, part_width)  # (T, 7, h, w) -> (1, 7T, h, w)
    sampled = F.grid_sample(planes_together, grid, padding_mode="reflection", align_corners=False)
    return sampled.view(length, planes, *size)


def draw_colours(options: Augment, rng: np.random.Generator) -> Colours:
    """Changes of colour for one clip."""
    brightness, contrast, saturation = (
        rng.uniform(1 - x, 1 + x) for x in (options.brightness, options.contrast, options.saturation)
    )
    sharpen = rng.random() < options.sharpness_probability
    sharpness = rng.uniform(1 - options.sharpness, 1 + options.sharpness)
    return Colours(brightness, contrast, saturation, sharpness if sharpen else None)


def change_colours(frames: torch.Tensor, colours: Colours) -> torch.Tensor:
    """Brightness, contrast, saturation and sharpness of frames (T, 3, H, W) float in [0, 255], alike for a clip."""
    brightness, contrast, saturation = colours.brightness, colours.contrast, colours.saturation
    if colours.sharpness is not None:
        soft = F.avg_pool2d(frames, 3, 1, 1, count_include_pad=False)
        frames = torch.lerp(soft, frames, colours.sharpness)
    # The first three are linear in the colour of a pixel: x -> M x + o. Contrast turns about the clip's mean grey.
    luma = np.array([0.299, 0.587, 0.114])
    mix = brightness * contrast * (saturation * np.eye(3) + (1 - saturation) * luma[None, :].repeat(3, axis=0))
    mean = frames[:, :, ::4, ::4].mean(dim=(0, 2, 3)).double()  # (3,)
    pivot = mean @ send(luma, frames.device)
    length, _, height, width = frames.shape
    matrix = send(mix.astype(np.float32), frames.device).expand(length, 3, 3)
    flat = torch.bmm(matrix, frames.reshape(length, 3, height * width))  # (T, 3, H * W)
    return flat.add_(pivot * (brightness * (1 - contrast))).clamp_(0, 255).view(length, 3, height, width)


def _finish(colours: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Float colours (T, 6, H, W) in [0, 255] and masks (T, 1, H, W) in [0, 1] as a uint8 clip."""
    clip = torch.empty(len(colours), 7, *colours.shape[2:], dtype=torch.uint8, device=colours.device)
    clip[:, :6] = colours.add(0.5).clamp_(0, 255)
    clip[:, 6:] = masks >= 0.5
    return clip
