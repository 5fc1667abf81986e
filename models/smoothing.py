"""Smoothing along motion: each frame's mask listens to the frames before and after, where the object was and will be.

Not of the paper, and nothing is learned. A network that sees a video frame by frame flickers where it is not sure. The
optical flow between two frames, there and back, says which position of one is which of the other, and where it cannot
tell: what comes back elsewhere than where it began is hidden or out of sight, and has no say. All of that is done
small, and only how far logits move is enlarged.
"""

from __future__ import annotations

import functools
import math
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch

from models.frame_store import FrameStore

# Tried on the four videos that `MODEL_CARD.md` holds out; docs/experiments.md has what other values gave.
LONGER = 428  # pixels of the longer side, at most: the size at which frames are compared
NEIGHBOUR = 0.3  # the say of each of the two frames
SURE = 4.0  # logits count as no larger
SLACK = 0.5, 0.02  # squared pixels, and parts of the squared motion, by which motion there and back may miss
LAG = 8  # frames by which results are late, so that several threads can look for motion
HOST_MEMORY = 256 << 20  # bytes of small frames that are kept there; more are kept in a file
_LEAST = 32  # pixels of a side: OpenCV's flow wants no fewer
_NEAREST = 1 / (1 + math.exp(SURE))  # to 0 and 1 that probabilities count as


class Motion(NamedTuple):
    """Between two frames, small: how to find each position of one in the other, and how much it can be relied on."""

    forward: np.ndarray  # (h, w, 2) pixels from the first to the second
    seen_after: np.ndarray  # (h, w) in [0, 1], of the first's positions
    backward: np.ndarray
    seen_before: np.ndarray  # of the second's


class SmallFrames:
    """The frames of a video, small and grey, as they are shown by those who read them: in any order, more than once."""

    def __init__(self, length: int) -> None:
        self.length = length
        self._store: FrameStore | None = None
        self._lock = threading.Lock()
        self._shown = [False] * length

    def show(self, index: int, frame: np.ndarray) -> None:
        """frame: (H, W, 3) uint8 RGB."""
        import cv2

        with self._lock:  # several threads read
            if self._shown[index]:
                return
            if self._store is None:
                height, width = _small(frame.shape[:2])
                fits = self.length * height * width <= HOST_MEMORY
                place = torch.device("cpu") if fits else None
                self._store = FrameStore(self.length, (height, width), torch.uint8, place)
            self._shown[index] = True
        height, width = self._store.shape
        grey = cv2.resize(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY), (width, height), interpolation=cv2.INTER_AREA)
        self._store.write(index, torch.from_numpy(grey)[None])

    def motion(self, index: int) -> Motion:
        """Between a frame and the next, both of which have been shown."""
        import cv2

        first, second = self._store.read(index, index + 2, torch.device("cpu")).to(torch.uint8).numpy()
        flow = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
        forward, backward = flow.calc(first, second, None), flow.calc(second, first, None)
        return Motion(forward, _returns(forward, backward), backward, _returns(backward, forward))

    def close(self) -> None:
        if self._store is not None:
            self._store.close()


def smooth(probabilities: Iterator[np.ndarray], frames: SmallFrames, threads: int = 1) -> Iterator[np.ndarray]:
    """A video's maps (H, W) in [0, 1], smoothed, in the same order; they lag by `LAG` frames.

    Args:
        frames: have been shown as far as there are maps.
        threads: that do so while the next maps are made.
    """
    waiting: deque[Future[np.ndarray]] = deque()  # frames that are not given out yet
    before: _Frame | None = None
    own: _Frame | None = None
    with ThreadPoolExecutor(threads) as pool:
        # What a task waits for was always submitted before it, so no number of threads is too small.
        for index, probability in enumerate(probabilities):
            after = _Frame(
                probability,
                pool.submit(_small_logits, probability),
                pool.submit(frames.motion, index - 1) if index else None,
            )
            if own is not None:
                waiting.append(pool.submit(_smoothed, before, own, after))
                before = own._replace(probability=None)
            own = after
            if len(waiting) >= LAG:
                yield waiting.popleft().result()
        if own is not None:
            waiting.append(pool.submit(_smoothed, before, own, None))
        while waiting:
            yield waiting.popleft().result()


class _Frame(NamedTuple):
    probability: np.ndarray | None
    logits: Future[np.ndarray]  # small
    motion: Future[Motion] | None  # from the frame before it, which the first has not


def _smoothed(before: _Frame | None, own: _Frame, after: _Frame | None) -> np.ndarray:
    """The map of a frame, moved by those of its neighbours."""
    logits = own.logits.result()
    moved = np.zeros_like(logits)
    if before is not None:
        motion = own.motion.result()
        moved += motion.seen_before * (_fetch(before.logits.result(), motion.backward) - logits)
    if after is not None:
        motion = after.motion.result()
        moved += motion.seen_after * (_fetch(after.logits.result(), motion.forward) - logits)
    return _moved(own.probability, NEIGHBOUR * moved)


def _small(shape: tuple[int, ...]) -> tuple[int, int]:
    """The size of a small frame: no larger than the frame, but where that is too small for OpenCV."""
    part = min(1.0, LONGER / max(shape))
    height, width = (max(_LEAST, round(side * part)) for side in shape)
    return height, width


def _small_logits(probability: np.ndarray) -> np.ndarray:
    import cv2

    height, width = _small(probability.shape)
    small = cv2.resize(probability, (width, height), interpolation=cv2.INTER_AREA)
    small = np.clip(small, _NEAREST, 1 - _NEAREST)
    return np.log(small / (1 - small))


def _fetch(values: np.ndarray, motion: np.ndarray) -> np.ndarray:
    """What another frame (h, w, …) has where the positions of this one are in it, by the motion (h, w, 2) there."""
    import cv2

    places = _positions(*motion.shape[:2]) + motion
    return cv2.remap(values, places, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


@functools.lru_cache(maxsize=1)  # asked for six times a frame
def _positions(height: int, width: int) -> np.ndarray:
    """Column and row of each position: (h, w, 2) float32."""
    rows, columns = np.mgrid[:height, :width].astype(np.float32)
    return np.stack([columns, rows], -1)


def _returns(there: np.ndarray, back: np.ndarray) -> np.ndarray:
    """How much motion can be relied on, (h, w) in (0, 1]: as far as what goes there and back is where it began."""
    missed = there + _fetch(back, there)
    return np.exp(-np.square(missed).sum(-1) / (SLACK[0] + SLACK[1] * np.square(there).sum(-1)))


def _moved(probability: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """A map (H, W), its logits moved by those of a small one (h, w)."""
    import cv2

    odds = cv2.resize(np.exp(logits), probability.shape[::-1], interpolation=cv2.INTER_LINEAR)
    object_, other = probability * odds, 1 - probability
    return object_ / (object_ + other)
