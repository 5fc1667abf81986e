"""Videos to segment: where their results go, and their pictures, decoded when they are asked for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from datasets.images import NO_MOTION, NO_PICTURE, LazyImages, load_flow_image, load_frame
from datasets.video_sequence import VideoSequence
from utils.video import FolderFrames, LazyFrames

if TYPE_CHECKING:
    from utils.flow.beside import FlowBeside

# What training shows where it takes one of the two inputs away (`datasets.clips.VideoClips`: flow_drop, frame_drop).
BLANKS = {"flow": NO_MOTION, "frames": NO_PICTURE}
# Threads that decode a data set's pictures: a frame of 854×480 with its flow image takes some 5 ms of a core, and a GPU
# waits for less.
READERS = 4


class SharedFrames(Sequence[np.ndarray]):
    """`LazyFrames` that several threads may ask. The decoder of a video file has one position, so they take turns, and
    should ask in order; of frames in files each reads its own, and none is kept.
    """

    def __init__(self, frames: LazyFrames) -> None:
        self.frames, self._lock = frames, threading.Lock()
        self.in_files = isinstance(frames, FolderFrames)

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, index: int) -> np.ndarray:  # type: ignore[override]
        if self.in_files:
            return self.frames.decode(range(len(self))[index])
        with self._lock:
            return self.frames[index]


@dataclass(frozen=True)
class Video:
    """One video to segment: where its results go (below ``probability/`` and ``binary/``), and its pictures."""

    place: Path
    stems: tuple[str, ...]
    frames: Sequence[np.ndarray]
    flows: Sequence[np.ndarray] | None  # None: segmented without
    readers: int = 1  # threads that may ask for pictures at once, in any order
    sources: tuple[Path, ...] = ()  # files of frames and flow: the maps of other ones are made anew
    wait: Callable[[], None] | None = None  # returns when its flow, which is still being made, is all there
    flow_dir: Path | None = None  # of a data set's video that is segmented with flow
    frame_files: tuple[Path, ...] = ()  # of frames alone

    def probability(self, save_dir: Path, stem: str) -> Path:
        return save_dir / "probability" / self.place / f"{stem}.png"

    def binary(self, save_dir: Path, stem: str) -> Path:
        return save_dir / "binary" / self.place / f"{stem}.png"


def video_of(sequence: VideoSequence, with_flow: bool = True, making: FlowBeside | None = None) -> Video:
    """A video of a data set.

    Args:
        with_flow: False needs none.
        making: makes what flow is missing.

    Raises:
        DataError: a frame without flow; names the file, and the command that makes it.
    """
    place, frames = Path(sequence.dataset, sequence.name), LazyImages(sequence.frames, load_frame)
    if not with_flow:
        return Video(place, sequence.stems, frames, None, READERS, sequence.frames, frame_files=sequence.frames)
    folder = sequence.flow_dir
    flows = [(making and making.path(folder, stem)) or sequence.flow_path(stem) for stem in sequence.stems]
    return Video(
        place=place,
        stems=sequence.stems,
        frames=frames,
        flows=LazyImages(flows, load_flow_image),
        readers=READERS,
        sources=(*sequence.frames, *flows),
        wait=partial(making.wait, folder) if making is not None and making.pending.get(folder) else None,
        flow_dir=folder,
        frame_files=sequence.frames,
    )


class Blank(Sequence[np.ndarray]):
    """Images of one grey level in place of others, of their sizes."""

    def __init__(self, images: Sequence[np.ndarray], level: int) -> None:
        self.images, self.level = images, level

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> np.ndarray:  # type: ignore[override]
        return np.full_like(self.images[index], self.level)
