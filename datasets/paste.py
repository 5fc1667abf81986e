"""Copy-paste between clips: an object of one clip moves through the scene of another.

Not of the paper. A few dozen videos show each object before one background alone, which a network learns by heart; here
they are taken apart and put together anew. After Ghiasi et al., "Simple Copy-Paste is a Strong Data Augmentation Method
for Instance Segmentation" (CVPR 2021), for clips: the object keeps its own motion, and its flow comes with it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F

from datasets.clips import PICTURES, ClipDataset, Deferred, Item, RawClip
from datasets.images import NO_MOTION

# A flow image holds speeds in units of its own largest, so how fast the two are to each other is not known: one of them
# is slowed down by a factor drawn from this range.
SPEEDS = (0.3, 1.0)
# Estimated flow is no sharper than this at outlines: radius over which object and scene mix, relative to the height.
FLOW_SOFTNESS = (0.0, 1 / 40)
LARGEST = 0.5  # share of a frame: where all objects cover more, hardly a scene is left for them to be in


@dataclass(frozen=True)
class Paste:
    """How an object is put into a scene: factors of the speeds of both, and the radius over which their flow mixes,
    relative to the height.
    """

    object_speed: float
    scene_speed: float
    softness: float


def draw_paste(rng: np.random.Generator) -> Paste:
    speeds = [1.0, float(rng.uniform(*SPEEDS))]
    if rng.random() < 0.5:
        speeds.reverse()
    return Paste(*speeds, float(rng.uniform(*FLOW_SOFTNESS)))


def paste(
    scene: tuple[torch.Tensor, ...], other: tuple[torch.Tensor, ...], drawn: Paste
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The pictures of a clip with the objects of another before it.

    scene, other: frames and flows (T, 3, H, W) and masks (T, 1, H, W), uint8, of one size and on one device; these are
    left as they are. Returns the same, new; the objects of both are its objects. Where together they cover more than
    `LARGEST` of a frame, the scene stays as it is.
    """
    frames, flows, masks = scene
    together = masks.maximum(other[2])
    fits = together.float().mean(dim=(1, 2, 3)).amax() <= LARGEST  # stays on the device: nothing waits for it
    inside = other[2] * fits  # (T, 1, H, W)
    pictures = torch.lerp(frames.float(), other[0].float(), _soften(inside.float(), 1))
    motion = torch.lerp(
        _slow_down(flows, torch.where(fits, drawn.scene_speed, 1.0)),
        _slow_down(other[1], drawn.object_speed),
        _soften(inside.float(), round(drawn.softness * frames.shape[-2])),
    )
    frames, flows = (x.add_(0.5).clamp_(0, 255).to(torch.uint8) for x in (pictures, motion))
    return frames, flows, masks.maximum(inside)


def _soften(inside: torch.Tensor, radius: int) -> torch.Tensor:
    """Masks (T, 1, H, W) with outlines that are 2 * radius + 1 pixels wide."""
    return F.avg_pool2d(inside, 2 * radius + 1, 1, radius, count_include_pad=False) if radius else inside


def _slow_down(flows: torch.Tensor, factor: torch.Tensor | float) -> torch.Tensor:
    """Flow images uint8 as float, with all speeds times a factor: a colour's distance from white is its speed."""
    return NO_MOTION - (NO_MOTION - flows.float()) * factor


@dataclass(frozen=True)
class PastedClip:
    """A deferred clip, with the objects of another pasted into it."""

    scene: Deferred
    other: Deferred
    drawn: Paste

    def pin_memory(self) -> PastedClip:
        return replace(self, scene=self.scene.pin_memory(), other=self.other.pin_memory())

    def finish(self, device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return paste(self.scene.finish(device), self.other.finish(device), self.drawn)


class PastedClips(ClipDataset):
    """The clips of another set, some of them with the objects of a second clip of that set, drawn at random.

    part: a set that leaves the pictures to the training device (``raw`` in its items).
    probability: that a clip gets the objects of another. It stays without where that other is of the same video, is not
        annotated in every frame, or where one of the two shows no frames or no motion.
    defer: leave all pictures to the training device; otherwise they are made here, and are the same on a CPU.

    The items are those of `part` but for what is pasted, which depends on seed, epoch and index alone.
    """

    def __init__(self, part: ClipDataset, probability: float, defer: bool = False) -> None:
        if not 0 <= probability <= 1:
            raise ValueError(f"the probability of a pasted object should be from 0 to 1, got {probability}")
        super().__init__(len(part), part.seed)
        self.part = part
        self.probability = probability
        self.defer = defer

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        self.part.set_epoch(epoch)

    def clip(self, index: int) -> Item:
        item = self.part.clip(index)
        # A key of three numbers beside seed and epoch that no other set draws from.
        rng = self.rng(index, 3, 3)
        if rng.random() < self.probability:
            other = self.part.clip(int(rng.integers(len(self.part))))
            if _fit_together(item, other):
                item["raw"] = PastedClip(item["raw"], other["raw"], draw_paste(rng))
        if not self.defer:
            item.update(zip(PICTURES, item.pop("raw").finish()))
        return item


def _fit_together(item: Item, other: Item) -> bool:
    if any(isinstance(one["raw"], RawClip) and one["raw"].blank for one in (item, other)):
        return False
    places = [(one["dataset"], one["sequence"]) for one in (item, other)]
    return places[0] != places[1] and bool(other["valid"].all())
