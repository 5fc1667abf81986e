"""Optical flow as the colour picture that the motion stream reads, and such a picture of a mirrored or turned scene.

The wheel is the one of Baker et al., "A Database and Evaluation Methodology for Optical Flow" (ICCV 2007): direction is
hue, speed is saturation, no motion is white. Each frame is normalised by its own largest speed, as
`torchvision.utils.flow_to_image` does, and the pictures have the same bytes. One kind of pixel differs: where rounding
takes a channel of the fastest pixel just below 0, torchvision's wraps round to 255, and ours is 0.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch

# The six arcs of the wheel: length; the channel that is full, the one that moves, the one that is empty; does it rise?
_ARCS = (
    (15, 0, 1, 2, True),  # red to yellow: green rises
    (6, 1, 0, 2, False),  # yellow to green: red falls
    (4, 1, 2, 0, True),  # green to cyan
    (11, 2, 1, 0, False),  # cyan to blue
    (13, 2, 0, 1, True),  # blue to magenta
    (6, 0, 2, 1, False),  # magenta to red
)
_COLUMNS = sum(arc[0] for arc in _ARCS)  # 55


@functools.lru_cache(maxsize=1)
def colour_wheel() -> np.ndarray:
    """The 55 colours of the wheel, (55, 3) float32 RGB in [0, 255], whole numbers. Read-only."""
    wheel = np.zeros((_COLUMNS, 3), dtype=np.float32)
    start = 0
    for length, full, moving, _, rising in _ARCS:
        ramp = np.floor(255 * np.arange(length, dtype=np.float32) / np.float32(length))
        wheel[start : start + length, full] = 255
        wheel[start : start + length, moving] = ramp if rising else 255 - ramp
        start += length
    wheel.setflags(write=False)
    return wheel


@functools.lru_cache(maxsize=4)
def _wheel_tables(device: torch.device) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
    """For each channel the colour at column k and at column k + 1, both (55,) in [0, 1]."""
    wheel = torch.from_numpy(colour_wheel().copy()).to(device) / 255.0
    return tuple((wheel[:, c].contiguous(), wheel[:, c].roll(-1).contiguous()) for c in range(3))


def flows_to_images(flows: torch.Tensor, *, finite: bool = False) -> torch.Tensor:
    """Colour pictures of a clip's flow, each frame normalised by its own largest speed.

    flows: (T, 2, H, W) float, pixels (x to the right, y down). finite: its values are taken to be, and are not looked
    at, for which a GPU would be waited for. Returns (T, 3, H, W) uint8 RGB on the same device.
    Raises ValueError on another shape or on values that are not finite.
    """
    if flows.ndim != 4 or flows.shape[1] != 2:
        raise ValueError(f"flow should have shape (T, 2, H, W), got {tuple(flows.shape)}")
    flows = flows.to(torch.float32).contiguous()  # torch's atan2 rounds strided input otherwise
    if not finite and not bool(torch.isfinite(flows.sum())) and not bool(torch.isfinite(flows).all()):
        raise ValueError("flow has values that are not finite: it cannot be coloured")
    images = torch.empty((len(flows), 3, *flows.shape[2:]), dtype=torch.uint8, device=flows.device)
    for flow, image in zip(flows, images):  # a frame at a time stays in the cache: twice as fast as a clip at once
        _colour(flow, image)
    return images


def _colour(flow: torch.Tensor, image: torch.Tensor) -> None:
    """Colour flow (2, H, W) into image (3, H, W). Operations in torchvision's order, for the same bytes."""
    u, v = flow / (flow.pow(2).sum(dim=0).sqrt_().max() + torch.finfo(torch.float32).eps)
    speed = (u.pow(2) + v.pow(2)).sqrt_()
    position = torch.atan2(v.neg_(), u.neg_()).div_(torch.pi).add_(1).div_(2).mul_(_COLUMNS - 1)
    lower = position.floor()
    weight = position.sub_(lower)
    rest = 1 - weight
    column = lower.to(torch.int32).view(-1)  # index_select is several times faster than indexing here
    for channel, tables in enumerate(_wheel_tables(flow.device)):
        here, following = (table.index_select(0, column).view_as(weight) for table in tables)
        colour = here.mul_(rest).add_(following.mul_(weight))
        # 255 * (1 - speed * (1 - colour)), not below 0; the conversion to uint8 rounds down
        image[channel] = colour.neg_().add_(1).mul_(speed).neg_().add_(1).mul_(255).clamp_(min=0).to(torch.uint8)


def flow_to_image(flow: np.ndarray) -> np.ndarray:
    """Colour picture of one flow field.

    flow: (H, W, 2) float, pixels (x to the right, y down). Returns (H, W, 3) uint8 RGB, as
    `torchvision.utils.flow_to_image` does. Raises ValueError on another shape or on values that are not finite.
    """
    flow = np.asarray(flow)
    if flow.ndim != 3 or flow.shape[2] != 2:
        raise ValueError(f"flow should have shape (H, W, 2), got {flow.shape}")
    channels_first = torch.from_numpy(np.ascontiguousarray(flow.transpose(2, 0, 1), dtype=np.float32))
    return flows_to_images(channels_first[None])[0].permute(1, 2, 0).contiguous().numpy()


def _decode(image: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Position on the wheel in [0, 54], spread (max - min) and max of float RGB in [0, 255]; white is at position 0."""
    largest, smallest = image.max(axis=-1), image.min(axis=-1)
    spread = largest - smallest
    ratio = (image - smallest[..., None]) / np.maximum(spread, 1e-6)[..., None]
    position = np.zeros_like(spread)
    start = 0
    for length, full, moving, empty, rising in _ARCS:
        here = (image[..., full] >= image[..., moving]) & (image[..., moving] >= image[..., empty]) & (spread > 0)
        part = ratio[..., moving] if rising else 1 - ratio[..., moving]
        position = np.where(here, start + length * part, position)
        start += length
    return np.minimum(position, _COLUMNS - 1), spread, largest


# Tables of all colours at 7 bits a channel, red in the highest bits: 2**21 entries, 8 MB a device.


def _all_colours() -> np.ndarray:
    """The colours of such a table, (2**21, 3) float32."""
    levels = np.arange(128, dtype=np.float32) * 2 + 1  # so that white stays exactly white
    return np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3)


def _table_index(images: torch.Tensor) -> torch.Tensor:
    """Where a table has the colours of images (T, 3, H, W) uint8, (T, H, W) int32."""
    red, green, blue = ((images[:, c] >> 1).to(torch.int32) for c in range(3))
    return (red << 14) | (green << 7) | blue


@functools.lru_cache(maxsize=4)
def _mirror_table(device: torch.device) -> torch.Tensor:
    """Colour of the mirrored motion for every colour, int32 0xRRGGBB."""
    position, spread, largest = _decode(_all_colours())
    half = (_COLUMNS - 1) / 2
    # u -> -u turns the angle a of the wheel into pi - a: 27 - k for the left half of the wheel, 81 - k for the right
    mirrored = np.where(position < half, half - position, 3 * half - position)
    wheel = np.concatenate([colour_wheel(), colour_wheel()[:1]])
    lower = np.minimum(mirrored.astype(np.int64), _COLUMNS - 1)
    weight = (mirrored - lower)[:, None]
    colour = (1 - weight) * wheel[lower] + weight * wheel[lower + 1]
    table = np.clip(np.rint(largest[:, None] - spread[:, None] * (1 - colour / 255)), 0, 255).astype(np.int32)
    return torch.from_numpy(table[:, 0] << 16 | table[:, 1] << 8 | table[:, 2]).to(device)


def mirror_colours(images: torch.Tensor) -> torch.Tensor:
    """Flow pictures with every motion mirrored left to right (u -> -u), the pixels left where they are.

    images: (T, 3, H, W) uint8 RGB, on any device; returns the same. A table of all colours at 7 bits a channel does it,
    so the result is within about one grey level of colouring the mirrored flow. Flip the pixels as well to mirror a
    scene.
    """
    index = _table_index(images)
    mirrored = _mirror_table(images.device).index_select(0, index.flatten()).view_as(index)  # (T, H, W)
    return torch.stack([mirrored >> 16, mirrored >> 8 & 255, mirrored & 255], dim=1).to(torch.uint8)


@functools.lru_cache(maxsize=4)
def _position_table(device: torch.device) -> torch.Tensor:
    """Position on the wheel, in [0, 54], of every colour, float32."""
    return torch.from_numpy(_decode(_all_colours())[0].astype(np.float32)).to(device)


def turn_colours(images: torch.Tensor, angle: float) -> torch.Tensor:
    """Flow pictures with every motion turned by `angle` (radians, from x to the right towards y down), the pixels left
    where they are.

    images: (T, 3, H, W) uint8 RGB, on any device; returns the same. Hues are read at 7 bits a channel, so the result is
    within about one grey level of colouring the turned flow. Turn the pixels as well to turn a scene.
    """
    position = _position_table(images.device).index_select(0, _table_index(images).flatten())
    # Once around is 54 columns: the last of the 55 and the first are one direction, motion to the left.
    position = position.add_(angle / (2 * math.pi) * (_COLUMNS - 1)).remainder_(_COLUMNS - 1)
    lower = position.to(torch.int32)
    weight = position.sub_(lower)
    largest = images.amax(dim=1).flatten().float()
    spread = largest - images.amin(dim=1).flatten()
    turned = torch.empty_like(images)
    for channel, (here, following) in enumerate(_wheel_tables(images.device)):
        colour = torch.lerp(here.index_select(0, lower), following.index_select(0, lower), weight)
        level = torch.addcmul(largest, spread, colour.sub_(1)).add_(0.5).clamp_(0, 255)
        turned[:, channel] = level.view_as(turned[:, channel])
    return turned
