"""Clips for training and validation, cut out of videos on disk, and mixtures of such sets.

Every set here hands out the same kind of `Item`, which the default collate function batches. A set can leave the
pictures to the training device; an item then has one `Deferred` under ``raw`` in place of frames, flows and masks (a
`RawClip` to augment or a `datasets.rendering.Scene` to render), and `utils.training.loading` makes the batch.

An item depends on (seed, epoch, index) only, never on what was read before or on the worker that makes it: a run that
is resumed sees the clips that it would have seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypedDict

import numpy as np
import torch
from torch.utils.data import Dataset

from datasets.clip_frames import CacheMemory, FrameReader
from datasets.errors import DataError
from datasets.faults import Fault, apply_faults, draw_faults
from datasets.images import NO_MOTION, NO_PICTURE
from datasets.transforms import Augment, Draw, apply, draw, resize, unpack
from datasets.video_sequence import VideoSequence

PICTURES = ("frames", "flows", "masks")
CACHES = ("none", "ram")


class Deferred(Protocol):
    """A clip whose pictures the training device makes. What is random about it has been drawn."""

    def pin_memory(self) -> Deferred:
        """For the loader (PyTorch calls it by this name)."""

    def finish(self, device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Frames and flows (T, 3, H, W) and masks (T, 1, H, W), uint8, made on a device and left there."""


class Item(TypedDict, total=False):
    """A clip: its pictures, or ``raw``, and what is known of it."""

    frames: torch.Tensor  # (T, 3, H, W) uint8 RGB
    flows: torch.Tensor  # (T, 3, H, W) uint8, colour picture of the optical flow
    masks: torch.Tensor  # (T, 1, H, W) uint8 {0, 1}; 0 where there is no annotation
    raw: Deferred
    valid: torch.Tensor  # (T,) bool, whether the frame is annotated
    dataset: str
    sequence: str


@dataclass(frozen=True)
class RawClip:
    """A clip as it was read, with what was drawn for it, not augmented yet.

    planes: (T, 7, h, w) uint8; h and w differ from clip to clip. size: (H, W) it is wanted at. drawn: None for the
    whole frame, resized. blank: "flows" or "frames" that are to show nothing, or "".
    """

    planes: torch.Tensor
    size: tuple[int, int]
    drawn: Draw | None
    blank: str = ""

    def pin_memory(self) -> RawClip:
        return replace(self, planes=self.planes.pin_memory())

    def finish(self, device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        planes = self.planes.to(device, non_blocking=True)
        clip = resize(planes, self.size) if self.drawn is None else apply(planes, self.size, self.drawn)
        frames, flows, masks = unpack(clip)
        if self.blank == "flows":
            flows.fill_(NO_MOTION)
        elif self.blank == "frames":
            frames.fill_(NO_PICTURE)
        return frames, flows, masks


@dataclass(frozen=True)
class FaultyClip:
    """Any deferred clip, with faults in single frames."""

    clip: Deferred
    faults: tuple[Fault, ...]

    def pin_memory(self) -> FaultyClip:
        return replace(self, clip=self.clip.pin_memory())

    def finish(self, device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        frames, flows, masks = self.clip.finish(device)
        apply_faults(frames, flows, self.faults)
        return frames, flows, masks


def complete(item: Item, clip: Deferred, defer: bool) -> Item:
    """What is known of a clip together with the clip: as it is where `defer`, else with its pictures made here."""
    if defer:
        return {**item, "raw": clip}
    frames, flows, masks = clip.finish()
    return {**item, "frames": frames, "flows": flows, "masks": masks}


class ClipDataset(Dataset):
    """What the sets have in common: a length, a seed and an epoch.

    `clip(index)` makes item `index` of the epoch, for any index from 0; `len` says how many make an epoch.
    """

    def __init__(self, length: int, seed: int) -> None:
        if length < 1:
            raise ValueError(f"a set of clips needs a length of at least 1, got {length}")
        self.length = length
        self.seed = seed
        # In shared memory, so that loader workers that outlive an epoch (persistent_workers) see the next one begin.
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose clips come next. Call it between epochs, not while a loader is being read."""
        self._epoch[0] = epoch

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Item:
        if not 0 <= index < self.length:
            raise IndexError(f"index {index} is outside this set of {self.length} clips")
        return self.clip(index)

    def clip(self, index: int) -> Item:
        raise NotImplementedError

    def rng(self, *key: int) -> np.random.Generator:
        """The generator that belongs to `key` in this epoch."""
        return np.random.default_rng((self.seed, self.epoch, *key))


class VideoClips(ClipDataset):
    """Random clips of videos on disk.

    sequences: what `datasets.sequences.read_dataset` gives; each needs a flow image for every frame and one mask at
        least. Sequences are drawn in rounds, each once a round.
    clip_len: frames in a clip, consecutive up to the stride.
    size: (H, W) of the items. Without `augment` the whole frame is resized to it.
    augment: strength of the augmentation; None for none.
    cache: "ram" decodes everything at once, here, and keeps it as uint8 at `clip_frames.READ_SCALE` times the size:
        about 10 * H * W bytes a frame, 1.4 GB for DAVIS train at 192 x 320. Loader workers made by fork share it.
        "none" reads the files for every clip. The clips are the same.
    memory: where "ram" keeps the frames; by default memory of this process. Processes that share one decode a part of
        the videos each, and all of them have to come here.
    samples_per_epoch: length of the set; by default as many clips as hold every annotated frame once.
    strides: time steps between the frames of a clip, drawn with equal probability; a video too short for the one drawn
        takes the largest that fits. Flow stays that of neighbouring frames.
    defer: leave the augmentation to the training device (``raw`` in the items); on the CPU the clips are the same.
    flow_drop: probability that a clip's flow pictures are white, "nothing moves".
    frame_drop: probability that a clip's frames are grey and only the flow is left; never together with `flow_drop`.
    progress: called with the number of frames of each video that this process has decoded for ``cache``.

    Every clip holds an annotated frame. A video shorter than `clip_len` is read to and fro (0 1 2 1 0 ...), its frames
    annotated each time.

    Raises DataError for a sequence without masks or flow, and where a file cannot be used; ValueError for options that
    make no sense.
    """

    def __init__(
        self,
        sequences: Sequence[VideoSequence],
        clip_len: int,
        size: tuple[int, int],
        augment: Augment | None = None,
        cache: str = "none",
        samples_per_epoch: int | None = None,
        seed: int = 0,
        strides: Sequence[int] = (1, 2, 3),
        flow_drop: float = 0.0,
        frame_drop: float = 0.0,
        defer: bool = False,
        memory: CacheMemory | None = None,
        progress: Callable[[int], object] | None = None,
    ) -> None:
        if not sequences:
            raise DataError("no video sequences to take clips from")
        if clip_len < 1:
            raise ValueError(f"clip_len should be at least 1, got {clip_len}")
        if cache not in CACHES:
            raise ValueError(f"cache should be one of {', '.join(CACHES)}, got {cache!r}")
        if not strides or min(strides) < 1:
            raise ValueError(f"strides should be numbers from 1, got {tuple(strides)}")
        if min(flow_drop, frame_drop) < 0 or flow_drop + frame_drop > 1:
            raise ValueError(
                f"flow_drop and frame_drop are probabilities, together at most 1; got {flow_drop} and {frame_drop}"
            )
        for sequence in sequences:
            if not sequence.masks:
                raise DataError(
                    f"{sequence.dataset}/{sequence.name}: no masks, so it cannot be trained on; expected some beside "
                    f"the {len(sequence.frames)} frames of {sequence.frames[0].parent}, called as these are. Unpack "
                    "the annotations, or take the sequence out of the data set (its list, or its folder)"
                )
            for stem in sequence.stems:
                sequence.flow_path(stem)
        self.sequences = tuple(sequences)
        self.clip_len = clip_len
        self.size = (int(size[0]), int(size[1]))
        self.augment = augment
        self.strides = tuple(strides)
        self.flow_drop = flow_drop
        self.frame_drop = frame_drop
        self.defer = defer
        self.annotated = [
            np.array([i for i, stem in enumerate(s.stems) if stem in s.masks], dtype=np.int64) for s in self.sequences
        ]
        if samples_per_epoch is None:
            samples_per_epoch = math.ceil(sum(len(a) for a in self.annotated) / clip_len)
        super().__init__(samples_per_epoch, seed)
        self._frames = FrameReader(self.size, augment)
        self._store = self._frames.decode_all(self.sequences, memory, progress) if cache == "ram" else None

    def clip(self, index: int) -> Item:
        rng = self.rng(index)
        number = self._sequence_number(index)
        sequence = self.sequences[number]
        indices = self._draw_indices(number, rng)
        planes = self._read(number, indices)
        drawn = None if self.augment is None else draw(planes[:, 6], self.size, self.augment, rng)
        drop = rng.random()
        blank = "flows" if drop < self.flow_drop else "frames" if drop < self.flow_drop + self.frame_drop else ""
        raw = RawClip(planes, self.size, drawn, blank)
        stems = sequence.stems
        item: Item = {
            "valid": torch.tensor([stems[i] in sequence.masks for i in indices]),
            "dataset": sequence.dataset,
            "sequence": sequence.name,
        }
        return complete(item, raw, self.defer)

    def _sequence_number(self, index: int) -> int:
        """Sequences in rounds, each round in an order of its own."""
        count = len(self.sequences)
        # the sequence of four keys cannot coincide with the three of an item
        order = self.rng(index // count, 1).permutation(count)
        return int(order[index % count])

    def _draw_indices(self, number: int, rng: np.random.Generator) -> list[int]:
        """Frame numbers of a clip that holds an annotated frame."""
        count, span = len(self.sequences[number].frames), self.clip_len - 1
        stride = int(rng.choice(self.strides))
        anchor = int(rng.choice(self.annotated[number]))
        place = rng.random()
        rng.random()  # drawn and not used, so that a seed's clips stay those that the published weights saw
        if count > span:
            while stride > 1 and not self._starts(anchor, stride, count):
                stride -= 1
            starts = self._starts(anchor, stride, count)
            start = starts[int(place * len(starts))]
            indices = [start + i * stride for i in range(self.clip_len)]
        else:
            # to and fro: 0 1 2 1 0 1 ...
            period = max(1, 2 * (count - 1))
            shows = {anchor, period - anchor}  # where it comes on the way to and fro
            offsets = [o for o in range(period) if any((o + i) % period in shows for i in range(self.clip_len))]
            offset = offsets[int(place * len(offsets))]
            indices = [min(i % period, period - i % period) for i in range(offset, offset + self.clip_len)]
        return indices

    def _starts(self, anchor: int, stride: int, count: int) -> list[int]:
        """First frames of the clips with this stride that hold frame `anchor` and stay within `count` frames."""
        span = (self.clip_len - 1) * stride
        return [s for s in range(anchor - span, anchor + 1, stride) if 0 <= s and s + span < count]

    def _read(self, number: int, indices: list[int]) -> torch.Tensor:
        """Frames of a sequence as a clip (T, 7, h, w), at the size that videos are read at."""
        if self._store is not None:
            return self._store[number][torch.tensor(indices)]
        return self._frames.read(self.sequences[number], indices)


class MixedClips(ClipDataset):
    """A mixture: each item comes from one of several sets, drawn by weight.

    parts: (set, weight) pairs; weights are relative. The k-th item that an epoch takes from a part is that part's clip
    k, so a part in rounds stays in rounds, and no clip comes twice.
    """

    def __init__(self, parts: Sequence[tuple[ClipDataset, float]], length: int, seed: int = 0) -> None:
        if not parts or any(not math.isfinite(w) or w < 0 for _, w in parts) or sum(w for _, w in parts) <= 0:
            raise ValueError(f"the weights of a mixture should be positive, got {[w for _, w in parts]}")
        super().__init__(length, seed)
        self.parts = [part for part, _ in parts]
        total = sum(weight for _, weight in parts)
        self.weights = [weight / total for _, weight in parts]
        self._plan: tuple[int, np.ndarray, np.ndarray] | None = None

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        for part in self.parts:
            part.set_epoch(epoch)

    def clip(self, index: int) -> Item:
        part, number = self._planned()
        return self.parts[int(part[index])].clip(int(number[index]))

    def _planned(self) -> tuple[np.ndarray, np.ndarray]:
        """For each item of this epoch its part, and its number among the items of that part."""
        if self._plan is None or self._plan[0] != self.epoch:
            part = self.rng().choice(len(self.parts), size=self.length, p=self.weights)
            number = np.zeros(self.length, dtype=np.int64)
            for p in range(len(self.parts)):
                number[part == p] = np.arange(np.count_nonzero(part == p))
            self._plan = (self.epoch, part, number)
        return self._plan[1], self._plan[2]


class FaultyClips(ClipDataset):
    """The clips of another set, with faults in some of their frames.

    part: any set of clips, also one that leaves the pictures to the training device.
    probability: that a frame has a fault. Clips of one frame have none: there is no neighbour to go by.

    The items are those of `part` but for the faults, which depend on seed, epoch and index alone.
    """

    def __init__(self, part: ClipDataset, probability: float) -> None:
        if not 0 <= probability <= 1:
            raise ValueError(f"the probability of a fault should be from 0 to 1, got {probability}")
        super().__init__(len(part), part.seed)
        self.part = part
        self.probability = probability

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        self.part.set_epoch(epoch)

    def clip(self, index: int) -> Item:
        item = self.part.clip(index)
        # A key of three numbers beside seed and epoch, which no set below draws from.
        faults = draw_faults(len(item["valid"]), self.probability, self.rng(index, 2, 2))
        if "raw" in item:
            item["raw"] = FaultyClip(item["raw"], faults)
        else:
            apply_faults(item["frames"], item["flows"], faults)
        return item
