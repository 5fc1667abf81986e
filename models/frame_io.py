"""What stands between a video in host memory and a device: images read ahead, and maps handed out."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import nullcontext
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

Start = TypeVar("Start")
Made = TypeVar("Made")


class Images:
    """The frames or the flow images of one video, as its passes ask for them from their threads.

    Args:
        images: (H, W, 3) uint8 RGB each, all of one size.
        what: one of them, for errors.
        turns: held while an image is asked for and copied: what decodes may have one position, and one buffer.
        pool: threads that ask for several images at once, in any order, and take no turns; None: one after the other.
        show: is given each image that was asked for, with its number.
    """

    def __init__(
        self,
        images: Sequence[np.ndarray],
        what: str,
        turns: threading.Lock,
        pool: Executor | None = None,
        show: Callable[[int, np.ndarray], None] | None = None,
    ) -> None:
        self.images, self.what, self.show = images, what, show
        self.turns = nullcontext() if pool else turns
        self.map = pool.map if pool else map
        self.shape: tuple[int, ...] | None = None  # of the first that was asked for

    def __len__(self) -> int:
        return len(self.images)

    def load(self, start: int, stop: int, mirror: Callable[[np.ndarray], np.ndarray] | None, pinned: bool) -> Tensor:
        """Images start … stop-1 as a (n, 3, H, W) uint8 tensor of host memory; `mirror` is applied to each.

        Raises ValueError for what is no picture, or one of another size.
        """
        stacked: Tensor | None = None

        def fetch(index: int) -> None:
            nonlocal stacked
            with self.turns:
                image = checked_picture(self.images[index])
                if self.shape is None:
                    self.shape = image.shape
                if image.shape != self.shape:
                    raise ValueError(
                        f"{self.what} {index} has shape {image.shape}, the first one {self.shape}: all of a video need "
                        "one size"
                    )
                if stacked is None:
                    # On the CPU whatever the default device is: only there is memory that arrays can share.
                    stacked = torch.empty(
                        (stop - start, *self.shape), dtype=torch.uint8, device="cpu", pin_memory=pinned
                    )
                place = stacked[index - start].numpy()
                np.copyto(place, image)
            if self.show is not None:
                self.show(index, place)
            if mirror is not None:
                mirrored = mirror(place.copy())
                if mirrored.shape != self.shape:
                    raise ValueError(f"a mirrored {self.what} has shape {mirrored.shape}, expected {self.shape}")
                np.copyto(place, mirrored)

        fetch(start)  # alone: it says how much memory all of them need
        for _ in self.map(fetch, range(start + 1, stop)):
            pass
        return stacked.permute(0, 3, 1, 2)  # (n, H, W, 3) -> (n, 3, H, W)


def checked_picture(image: np.ndarray) -> np.ndarray:
    """The image itself; ValueError for what is no (H, W, 3) array of uint8."""
    if getattr(image, "dtype", None) != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        described = f"{getattr(image, 'dtype', type(image).__name__)} {getattr(image, 'shape', '')}".strip()
        raise ValueError(f"frames and flow images are arrays (H, W, 3) of uint8, RGB, got {described}")
    if not image.size:
        raise ValueError(f"a frame or flow image without pixels: shape {image.shape}")
    return image


def read_ahead(make: Callable[[Start], Made], starts: Sequence[Start], depth: int = 2) -> Iterator[Made]:
    """Yield make(start) in order while a thread prepares the next ones; an error inside it is raised here."""
    results: queue.Queue = queue.Queue(depth)
    stopped = threading.Event()

    def put(item: object) -> bool:
        while not stopped.is_set():
            try:
                results.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for start in starts:
                if not put((make(start), None)):
                    return
        except BaseException as error:  # handed over and raised in the caller's thread
            put((None, error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        for _ in starts:
            value, error = results.get()
            if error is not None:
                raise error
            yield value
    finally:
        stopped.set()
        thread.join()


def hand_out(batches: Iterator[Tensor]) -> Generator[np.ndarray, None, None]:
    """Batches (n, H, W) of maps on a device -> one (H, W) array of host memory after the other.

    From a GPU they come one batch late: each is copied while the next one is computed, and nothing waits for the device
    before it has been given something to do.
    """
    late: tuple[Tensor, torch.cuda.Event] | None = None
    for batch in batches:
        if batch.device.type != "cuda":
            yield from batch.cpu().numpy()
            continue
        host = torch.empty(batch.shape, dtype=batch.dtype, device="cpu", pin_memory=True)
        with torch.inference_mode():
            host.copy_(batch, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record(torch.cuda.current_stream(batch.device))
        late, ready = (host, copied), late
        if ready is not None:
            yield from _landed(*ready)
    if late is not None:
        yield from _landed(*late)


def _landed(host: Tensor, copied: torch.cuda.Event) -> Iterator[np.ndarray]:
    copied.synchronize()
    yield from host.clone().numpy()  # whoever keeps them must not keep page-locked memory, which is scarce
