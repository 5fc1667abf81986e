"""Where the features of a video's frames are kept between the passes of `models.predictor`.

In half precision: on the accelerator while they are few, in host memory up to a limit, and beyond that in a temporary
file.
"""

from __future__ import annotations

import os
import tempfile
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor


class FrameStore:
    """One tensor of a fixed shape per frame of a video, written and read in ranges; in memory or in a temporary
    file.
    """

    def __init__(self, length: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | None) -> None:
        """`device` says where the tensors live; None puts them into a file, which vanishes with the store."""
        self.shape, self.dtype = shape, dtype
        self.tensor: Tensor | None = None
        self.file: BinaryIO | None = None
        if device is not None:
            self.tensor = torch.empty((length, *shape), dtype=dtype, device=device)
        else:
            self.file = tempfile.TemporaryFile(prefix="dbsnet-features-")
        self.stride = int(np.prod(shape)) * dtype.itemsize

    def write(self, start: int, value: Tensor) -> None:
        """Store (n, …) as frames start … start+n-1."""
        value = value.to(self.dtype)
        if self.tensor is not None:
            self.tensor[start : start + len(value)] = value.to(self.tensor.device)
        else:
            # Flat first: maps of 1×1 can have any strides and still count as contiguous.
            data = memoryview(value.contiguous().cpu().reshape(-1).view(torch.uint8).numpy())
            offset = start * self.stride
            try:
                while data:  # one call may write less than asked
                    written = os.pwrite(self.file.fileno(), data, offset)
                    data, offset = data[written:], offset + written
            except OSError as error:
                error.filename = tempfile.gettempdir()  # a full disk: which one?
                raise

    def read(self, start: int, stop: int, like: torch.device) -> Tensor:
        """Frames start … stop-1 in float32 on the device `like`: (n, …)."""
        if self.tensor is not None:
            return self.tensor[start:stop].to(like).float()
        raw = torch.empty((stop - start) * self.stride, dtype=torch.uint8, device="cpu")
        data, offset = memoryview(raw.numpy()), start * self.stride
        while data:
            count = os.preadv(self.file.fileno(), [data], offset)
            if not count:
                raise OSError(f"the temporary feature file ended at byte {offset}, expected {stop * self.stride}")
            data, offset = data[count:], offset + count
        return raw.view(self.dtype).view(stop - start, *self.shape).to(like).float()

    def close(self) -> None:
        """Free the memory or the file."""
        self.tensor = None
        if self.file is not None:
            self.file.close()


class Storage:
    """Makes the stores of one video and decides where each lives, by what has been handed out already."""

    def __init__(
        self, length: int, device: torch.device, dtype: torch.dtype, device_memory: int, host_memory: int
    ) -> None:
        self.length, self.dtype = length, dtype
        if device.type == "cuda":  # the network needs room as well, whatever the card
            free = torch.cuda.mem_get_info(device)[0] + _unused_by_pytorch(device)
            device_memory = min(device_memory, free // 4)
        self.places = [(torch.device("cpu"), host_memory)] if device.type == "cpu" else [
            (device, device_memory), (torch.device("cpu"), host_memory)]  # fmt: skip
        self.used = [0] * len(self.places)
        self.stores: dict[FrameStore, int | None] = {}  # with the place of each; None: a file

    def new(self, shape: tuple[int, ...]) -> FrameStore:
        size = self.length * int(np.prod(shape)) * self.dtype.itemsize
        place = next((i for i, (_, limit) in enumerate(self.places) if self.used[i] + size <= limit), None)
        store = FrameStore(self.length, shape, self.dtype, None if place is None else self.places[place][0])
        if place is not None:
            self.used[place] += size
        self.stores[store] = place
        return store

    def free(self, store: FrameStore) -> None:
        place = self.stores.pop(store)
        if place is not None:
            self.used[place] -= self.length * store.stride
        store.close()

    def close(self) -> None:
        for store in self.stores:
            store.close()
        self.stores.clear()


def _unused_by_pytorch(device: torch.device) -> int:
    """Bytes of a GPU that PyTorch has and nobody uses. Not those in which graphs work: no other tensor comes there."""
    index = torch.cuda.current_device() if device.index is None else device.index
    segments = (part for part in torch.cuda.memory_snapshot() if part["device"] == index)
    return sum(part["total_size"] - part["allocated_size"] for part in segments if part["segment_pool_id"] == (0, 0))
