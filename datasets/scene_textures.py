"""What the layers of a synthetic scene show: stills read from disk or drawn, objects cut out, the holes they leave."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from datasets.errors import DataError
from datasets.images import DECODING_ERRORS, decode_reduced
from datasets.stills import StillImage, open_mask
from datasets.transfer import send


def smooth_noise(
    rng: np.random.Generator,
    channels: int,
    cells: tuple[int, int],
    size: tuple[int, int],
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Noise of about unit variance that varies over `cells` (rows, columns) across `size`; (channels, H, W)."""
    cells = (max(2, min(cells[0], size[0])), max(2, min(cells[1], size[1])))
    grid = send(rng.standard_normal((1, channels, *cells), dtype=np.float32), device)
    return F.interpolate(grid, size=size, mode="bilinear", align_corners=True)[0]


def below_a_bent_line(
    rng: np.random.Generator,
    size: tuple[int, int],
    ends: float,
    offset: tuple[float, float],
    upright: float,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """The part of a picture below a bent line, (H, W) in [0, 1] with a soft edge, or above it where `upright` is -1.

    ends: how far the picture reaches from its middle, up and down. offset: the range that the height of the line is
    drawn from, in the same units.
    """
    ramp = torch.linspace(-ends, ends, size[0], device=device)[:, None] * upright
    place = ramp + 0.4 * smooth_noise(rng, 1, (3, 5), size, device)[0] + rng.uniform(*offset)
    return (8 * place).clamp_(0, 1)


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
        field = field + weight * smooth_noise(rng, 1, (rows, round(rows * width / height)), size)[0]
        cells, weight = cells * 2.2, weight * roughness
    if rng.random() < 0.4:  # stripes or ripples, bent by what is there already
        turn, count = rng.uniform(0, math.pi), rng.uniform(4, 25)
        field = field + rng.uniform(0.2, 1.0) * torch.sin(count * (math.cos(turn) * x + math.sin(turn) * y) + field)
    field = torch.sigmoid(rng.uniform(1.0, 3.0) * field)
    texture = colours[0][:, None, None] * (1 - field) + colours[1][:, None, None] * field
    patches = torch.sigmoid(6 * smooth_noise(rng, 1, (4, 6), size) - rng.uniform(0, 6))
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


def draw_still(rng: np.random.Generator, size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
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
    part.copy_(torch.where(mask[rows, columns], _draw_texture(rng, (part.shape[1], part.shape[2]), colours), part))
    return background, mask


def _extent(mask: torch.Tensor) -> tuple[slice, slice]:
    """Rows and columns of the smallest box that holds a mask (H, W), which must not be empty."""
    rows, columns = torch.where(mask.any(dim=1))[0], torch.where(mask.any(dim=0))[0]
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)


def object_share(still: StillImage, size: tuple[int, int]) -> float:
    """How much of the largest centred view of a still with the shape of `size` (H, W) its object covers, in [0, 1]."""
    mask = open_mask(still)
    scale = min(mask.width / size[1], mask.height / size[0])
    # Rounding must not bring the view, which touches two sides, beyond them.
    margin_x, margin_y = (max(0.0, (side - scale * n) / 2) for side, n in zip(mask.size, size[::-1]))
    box = (margin_x, margin_y, mask.width - margin_x, mask.height - margin_y)
    view = mask.point(lambda value: 255 * (value >= 128)).resize((64, 64), Image.Resampling.BOX, box)
    return float(np.asarray(view).mean()) / 255


def load_still(still: StillImage, size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Picture (3, h, w) in [0, 1] and mask (h, w) bool of a still, reduced where it is far larger than needed."""
    height, width = size
    try:
        needed = (math.ceil(1.3 * height), math.ceil(1.3 * width))
        picture, full, box = decode_reduced(still.image, lambda _: needed)
    except DECODING_ERRORS as error:
        raise DataError(f"{still.image}: cannot be read as an image ({error}); replace or remove it") from error
    mask = open_mask(still)
    if full != (mask.height, mask.width):
        raise DataError(
            f"{still.mask}: the mask is {mask.width}x{mask.height}, its image {still.image} is "
            f"{full[1]}x{full[0]}; they must be of one size"
        )
    ratio = min(picture.width / width, picture.height / height)
    if ratio > 1.4:
        target = (max(1, round(picture.width * 1.2 / ratio)), max(1, round(picture.height * 1.2 / ratio)))
        picture = picture.resize(target, Image.Resampling.BILINEAR, box)
    if mask.size != picture.size:
        mask = mask.resize(picture.size, Image.Resampling.BILINEAR)
    object_ = torch.from_numpy(np.asarray(mask) >= 128)
    if not bool(object_.any()):
        raise DataError(f"{still.mask}: no pixel of the mask is brighter than 127; a still needs an object")
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


def fill_hole(rng: np.random.Generator, picture: torch.Tensor, hole: torch.Tensor) -> torch.Tensor:
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


def cut_out(picture: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, tuple[float, float]]:
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
