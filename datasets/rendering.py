"""The pictures of a synthetic scene: frames, exact flow and masks, on the device where they are wanted.

The motion of a layer is inverted in closed form, so a frame is rendered by looking up every pixel's place on the
texture, and the flow of a pixel is where that same place lies in the next frame: exact by construction, deformation and
perspective included, with no iteration and no splatting.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F

from datasets.flow_colour import flows_to_images
from datasets.scene_textures import below_a_bent_line, smooth_noise
from datasets.scenes import Layer, SceneOptions
from datasets.transfer import send


@dataclass(frozen=True)
class Scene:
    """A clip whose pictures are still to be made (a `datasets.clips.Deferred`): layers and what was not drawn yet.

    by_motion: whether motion alone says which of the things is meant. length: frames (T). size: (H, W). rng: the
    generator as composing left it; it is not used up, so that the same scene makes the same clip again.
    """

    layers: tuple[Layer, ...]
    by_motion: bool
    length: int
    size: tuple[int, int]
    options: SceneOptions
    rng: np.random.Generator

    def pin_memory(self) -> Scene:
        return replace(self, layers=tuple(replace(layer, texture=layer.texture.pin_memory()) for layer in self.layers))

    def pictures(self, device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
        """frames and flow_images (T, 3, H, W) uint8, flow (T, 2, H, W) in pixels, masks (T, H, W) bool, on a device.

        A GPU rounds otherwise than a CPU: single pixels differ by a grey level, or by the side of an outline.
        """
        rng = copy.deepcopy(self.rng)
        frames, flow, masks = render(self.layers, self.length, self.size, device)
        frames = expose(rng, frames, flow, self.options)
        seen = flow
        # No draw where it is off: clips stay the same.
        if self.options.turbulence > 0 and rng.random() < self.options.turbulence:
            seen = stir(rng, flow, masks, may_hide=not self.by_motion)
        return {"frames": frames, "flow": flow, "masks": masks, "flow_images": flow_pictures(rng, seen, self.options)}

    def finish(self, device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        made = self.pictures(device)
        return made["frames"], made["flow_images"], made["masks"].to(torch.uint8)[:, None]


def _sample(texture: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Texture (C, h, w) at texture coordinates (T, H, W); opaque textures go on by reflection. (T, C, H, W)."""
    channels, height, width = texture.shape
    grid = torch.empty(*x.shape, 2, device=x.device)
    torch.mul(x, 2 / width, out=grid[..., 0])
    torch.mul(y, 2 / height, out=grid[..., 1])
    return F.grid_sample(
        texture[None].expand(len(x), -1, -1, -1),
        grid,
        mode="bilinear",
        padding_mode="reflection" if channels == 3 else "zeros",
        align_corners=False,
    )


def render(
    layers: Sequence[Layer], length: int, size: tuple[int, int], device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Frames (T, 3, H, W) in [0, 1], exact flow (T, 2, H, W) in pixels and mask (T, H, W) bool of a scene."""
    height, width = size
    x = torch.arange(width, dtype=torch.float32, device=device)[None, None, :] - (width - 1) / 2
    y = torch.arange(height, dtype=torch.float32, device=device)[None, :, None] - (height - 1) / 2
    times = list(range(length))
    # forward, except that the last frame looks back; a clip of one frame looks at a frame that is not shown
    targets = times[1:] + [length - 2 if length > 1 else 1]
    background, *others = layers
    texture_x, texture_y = background.motion.to_texture(times, x, y)
    frames = _sample(background.texture.to(device, non_blocking=True), texture_x, texture_y)
    flow = background.motion.move(times, targets, x, y, texture_x, texture_y)
    mask = torch.zeros(length, height, width, dtype=torch.bool, device=device)
    for layer in others:
        # only the part of the frame that the layer reaches
        box = layer.motion.box(times, (layer.texture.shape[1], layer.texture.shape[2]))
        left, right = (int(np.clip(math.floor(v + width / 2), 0, width)) for v in (box[0] - 1, box[2] + 2))
        top, bottom = (int(np.clip(math.floor(v + height / 2), 0, height)) for v in (box[1] - 1, box[3] + 2))
        if left >= right or top >= bottom:
            continue
        part_x, part_y = x[:, :, left:right], y[:, top:bottom]
        texture_x, texture_y = layer.motion.to_texture(times, part_x, part_y)
        pixels = _sample(layer.texture.to(device, non_blocking=True), texture_x, texture_y)
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
    x = (torch.arange(width, dtype=torch.float32, device=frames.device) * 2 + 1) / width - 1
    y = (torch.arange(height, dtype=torch.float32, device=frames.device) * 2 + 1) / height - 1
    blurred = frames.clone()
    grid = torch.empty(1, height, width, 2, device=frames.device)
    for time in range(length):
        for step in (-shutter / 3, shutter / 3):
            torch.add(x[None, :], flow[time, 0], alpha=step * 2 / width, out=grid[0, ..., 0])
            torch.add(y[:, None], flow[time, 1], alpha=step * 2 / height, out=grid[0, ..., 1])
            blurred[time] += F.grid_sample(frames[None, time], grid, padding_mode="border", align_corners=False)[0]
    return blurred.div_(3)


def expose(rng: np.random.Generator, frames: torch.Tensor, flow: torch.Tensor, options: SceneOptions) -> torch.Tensor:
    """What a camera adds: motion blur, changing light, noise. Returns uint8 (T, 3, H, W); overwrites `frames`."""
    length = len(frames)
    if rng.random() < options.motion_blur:
        frames = _blur_along_flow(frames, flow, rng.uniform(0.2, 0.7))
    if rng.random() < options.light:
        time = np.arange(length)
        swing = rng.uniform(0, 0.12) * np.sin(rng.uniform(0.05, 0.8) * time + rng.uniform(0, 2 * math.pi))
        gain = rng.uniform(0.75, 1.2) * (1 + swing)[:, None] * rng.uniform(0.93, 1.07, 3)[None]  # (T, 3)
        offset = rng.uniform(-0.06, 0.06)
        gains = send(gain.astype(np.float32), frames.device)[:, :, None, None]
        frames = frames.mul_(gains).add_(offset)
    if rng.random() < options.noise:
        # one field, shifted differently for every frame and channel: fresh noise would cost more than the frames
        height, width = frames.shape[2:]
        field = send(rng.standard_normal((height, width), dtype=np.float32), frames.device)
        field = field.mul_(rng.uniform(0.004, 0.02))
        for plane in frames.flatten(0, 1):
            plane += torch.roll(field, (int(rng.integers(height)), int(rng.integers(width))), (0, 1))
    exposed = torch.empty(frames.shape, dtype=torch.uint8, device=frames.device)
    for frame, picture in zip(frames, exposed):
        picture.copy_(frame.clamp_(0, 1).mul_(255).add_(0.5))
    return exposed


def stir(rng: np.random.Generator, flow: torch.Tensor, masks: torch.Tensor, *, may_hide: bool) -> torch.Tensor:
    """Flow (T, 2, H, W) of a world that moves by itself around the foreground `masks` (T, H, W): below a bent line, as
    water does, or above one, as leaves do, up to the whole of it. The motion is not rigid, some of it lasts and some is
    new in every frame, and it is about as fast as what else there is. In half of the cases where it may, it hides the
    foreground's own motion, as an estimator that is lost on water does.
    """
    length, _, height, width = flow.shape
    size = (height, width)
    place = below_a_bent_line(rng, size, 1, (-0.4, 1.2), float(rng.choice((-1.0, 1.0))), flow.device)
    rows = int(rng.integers(3, 14))
    cells = (rows, max(2, round(rows * width / height * rng.uniform(0.3, 1))))  # waves are wider than they are high
    # Numbers stay on the device, in double precision as Python's are: to ask a GPU for them is to wait for it.
    fastest = flow.pow(2).sum(dim=1).amax().sqrt().double().clamp(min=0.004 * width)
    speed = rng.uniform(0.1, 0.8) * fastest
    lasting, *passing = (smooth_noise(rng, 2, cells, size, flow.device) for _ in range(1 + length))
    # the hyperbolic tangent leaves patches that move as one, with narrow borders
    ripples = torch.stack([0.6 * lasting + 0.8 * noise for noise in passing]).mul_(2).tanh_()
    if rng.random() < 0.5 and may_hide:
        world = ~masks[:, None]
        mean = (flow * world).sum(dim=(2, 3), keepdim=True) / world.sum(dim=(2, 3), keepdim=True).clamp_(min=1)
        flow = torch.lerp(flow, mean, place * masks[:, None])
        masks = torch.zeros_like(masks)
    return flow + speed * ripples * (place * ~masks)[:, None]


def flow_pictures(rng: np.random.Generator, flow: torch.Tensor, options: SceneOptions) -> torch.Tensor:
    """Colour pictures (T, 3, H, W) of the flow, as it is or as an estimator might see it.

    The estimate is the flow on a coarse grid with smooth errors. It is coloured at half the size, as flow that was
    computed on smaller frames is; that also saves half of the time.
    """
    if rng.random() >= options.flow_errors:
        return flows_to_images(flow, finite=flow.is_cuda)
    length, _, height, width = flow.shape
    cell = int(rng.integers(2, 7))
    grid = (max(1, round(height / cell)), max(1, round(width / cell)))
    # Samples at the cells' centres, by the convention that stretches them again: nothing is moved on the way.
    coarse = F.interpolate(flow, size=grid, mode="bilinear", align_corners=False)  # (T, 2, h, w)
    fastest = coarse.pow(2).sum(dim=1).amax().sqrt().double()
    # Errors grow with speed, and there are some where nothing moves at all: the picture is then all noise.
    amount = abs(rng.normal(0, 0.04)) * fastest + rng.uniform(0, 0.0004) * width
    if rng.random() < 0.1:
        amount *= 3
    rows, columns = grid
    for cells in (3, 8):
        knots = rng.standard_normal((length, 2, cells, round(cells * columns / rows) + 1), dtype=np.float32)
        errors = F.interpolate(send(knots, flow.device), size=(rows, columns), mode="bilinear", align_corners=True)
        coarse = coarse + 0.7 * amount * errors
    half = F.interpolate(coarse, size=((height + 1) // 2, (width + 1) // 2), mode="bilinear", align_corners=False)
    pictures = flows_to_images(half, finite=half.is_cuda).float()
    return F.interpolate(pictures, size=(height, width), mode="bilinear", align_corners=False).to(torch.uint8)
