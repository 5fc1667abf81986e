"""The frames that clips are cut out of: read from their files, or decoded once and kept in memory (``cache: ram``).

A frame, its flow picture and its mask lie together as planes, (7, h, w) uint8: red, green and blue of the frame, those
of the flow picture, and the mask {0, 1}, 0 where there is no annotation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
import torch
from PIL import Image

from datasets.errors import DataError
from datasets.images import (
    DECODING_ERRORS,
    decode_reduced,
    image_size,
    load_flow_image,
    load_frame,
    load_mask,
    require_size,
)
from datasets.transforms import Augment
from datasets.video_sequence import VideoSequence

# Videos are read at up to this multiple of the size that is trained on: room for crops, at a bounded cost.
READ_SCALE = 1.2


class CacheMemory(Protocol):
    """Memory for decoded frames that processes fill and use together.

    rank, count: the number of this process among those that share it, and how many these are.
    """

    rank: int
    count: int

    def allocate(self, sizes: Sequence[int]) -> list[torch.Tensor]:
        """(size,) uint8 of each size, the same bytes in all of the processes; each has to ask for them."""

    def wait(self) -> None:
        """Until all of them are here."""


class OwnMemory:
    """Memory of this process alone."""

    rank, count = 0, 1

    def allocate(self, sizes: Sequence[int]) -> list[torch.Tensor]:
        return [torch.empty(size, dtype=torch.uint8) for size in sizes]  # one by one, as spawned workers copy them

    def wait(self) -> None:
        pass


class FrameReader:
    """Reads frames of videos at the size for clips of `size` (H, W), with the augmentation's room for crops.

    Its methods raise DataError where a file cannot be used, or where the frames of a video are not of one size.
    """

    def __init__(self, size: tuple[int, int], augment: Augment | None) -> None:
        self.size = size
        self.augment = augment

    def read(self, sequence: VideoSequence, indices: Sequence[int]) -> torch.Tensor:
        """Some frames of a sequence, (T, 7, h, w) uint8; each is read once, however often it is named."""
        planes = {i: self._read_frame(sequence, i) for i in sorted(set(indices))}
        first = min(planes)
        for index, found in planes.items():
            _require_one_size(sequence, index, found, first, planes[first].shape[1:])
        return torch.stack([planes[i] for i in indices])

    def decode_all(
        self,
        sequences: Sequence[VideoSequence],
        memory: CacheMemory | None = None,
        progress: Callable[[int], object] | None = None,
    ) -> list[torch.Tensor]:
        """All frames of each sequence, (T, 7, h, w) uint8, decoded by the processes that share `memory`, together.

        progress: called with the number of frames of each video that this process has decoded.
        """
        memory = memory or OwnMemory()
        shapes = [self._shape(sequence) for sequence in sequences]
        parts = memory.allocate([math.prod(shape) for shape in shapes])
        store = [part.view(shape) for part, shape in zip(parts, shapes)]

        def decode(number: int) -> int:
            sequence, planes = sequences[number], store[number]
            for index in range(len(sequence)):
                found = self._read_frame(sequence, index)
                _require_one_size(sequence, index, found, 0, planes.shape[2:])
                planes[index] = found
            return len(sequence)

        with ThreadPoolExecutor(2) as pool:  # decoding releases the interpreter's lock
            for frames in pool.map(decode, decoded_by(memory, len(sequences))):
                if progress is not None:
                    progress(frames)
        memory.wait()
        return store

    def _shape(self, sequence: VideoSequence) -> tuple[int, int, int, int]:
        return (len(sequence), 7, *read_size(image_size(sequence.frames[0]), self.size, self.augment))

    def _read_frame(self, sequence: VideoSequence, index: int) -> torch.Tensor:
        """One frame with its flow picture and mask, (7, h, w) uint8."""
        path = sequence.frames[index]
        stem = path.stem
        frame, full_size = _load_reduced(path, lambda full: read_size(full, self.size, self.augment), load_frame)
        width, height = frame.size
        flow_path = sequence.flow_path(stem)
        flow, flow_size = _load_reduced(flow_path, lambda _: (height, width), load_flow_image)
        if abs(math.log(flow_size[0] * full_size[1] / (flow_size[1] * full_size[0]))) > 0.05:
            raise DataError(
                f"{flow_path}: {flow_size[1]}x{flow_size[0]} pixels, not the shape of its frame {path} "
                f"({full_size[1]}x{full_size[0]}); remove it and make it again: "
                f"{sequence.flow_command}"
            )
        stack = np.zeros((7, height, width), dtype=np.uint8)
        stack[:3] = np.asarray(frame).transpose(2, 0, 1)
        stack[3:6] = np.asarray(flow).transpose(2, 0, 1)
        if stem in sequence.masks:
            mask = load_mask(sequence.masks[stem], sequence.mask_rule)
            require_size(sequence.masks[stem], mask.shape, full_size, path)
            if mask.shape != (height, width):
                smooth = Image.fromarray(mask * 255).resize((width, height), Image.Resampling.BILINEAR)
                mask = np.asarray(smooth) >= 128
            stack[6] = mask
        return torch.from_numpy(stack)


def decoded_by(memory: CacheMemory, videos: int) -> range:
    """Which of so many videos `FrameReader.decode_all` decodes in this process."""
    return range(memory.rank, videos, memory.count)


def read_size(full: tuple[int, int], size: tuple[int, int], augment: Augment | None) -> tuple[int, int]:
    """Size (h, w) at which a frame of size `full` is read."""
    if augment is None:
        return size
    scale = min(1.0, READ_SCALE * max(size[0] / full[0], size[1] / full[1]))
    return round(full[0] * scale), round(full[1] * scale)


def cache_bytes(sequences: Sequence[VideoSequence], size: tuple[int, int], augment: Augment | None) -> int:
    """The memory that `FrameReader.decode_all` takes, without decoding anything. Raises DataError."""
    frames = FrameReader(size, augment)
    return sum(math.prod(frames._shape(sequence)) for sequence in sequences)


def _require_one_size(
    sequence: VideoSequence, index: int, planes: torch.Tensor, first: int, size: Sequence[int]
) -> None:
    if planes.shape[1:] != tuple(size):
        raise DataError(
            f"{sequence.frames[index]}: not of the size of {sequence.frames[first]}; "
            "the frames of a video must be of one size"
        )


def _load_reduced(path, target_of, load) -> tuple[Image.Image, tuple[int, int]]:
    """A picture at the size (h, w) that `target_of` its own size gives, and its own size.

    A JPEG is decoded at half or a quarter of its size where that is enough, which saves most of the time.
    """
    if path.suffix.lower() in (".jpg", ".jpeg"):
        try:
            picture, full, box = decode_reduced(path, target_of)
        except DECODING_ERRORS as error:
            raise DataError(
                f"{path}: cannot be read as an image ({error}); expected a whole JPEG file, copy or unpack it again"
            ) from error
    else:
        pixels = load(path)
        full = pixels.shape[:2]
        picture = Image.fromarray(pixels)
        box = (0, 0, *picture.size)
    height, width = target_of(full)
    if picture.size != (width, height) or box != (0, 0, width, height):
        picture = picture.resize((width, height), Image.Resampling.BILINEAR, box)
    return picture, full
