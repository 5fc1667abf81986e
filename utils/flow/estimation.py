"""Optical flow of pairs of frames and of videos, by RAFT (`raft`) or by DIS (Kroeger et al., ECCV 2016,
https://arxiv.org/abs/1603.03590), OpenCV's, which needs no weights.

The flow of frame t is the motion t -> t+1; the last frame's is t -> t-1, and a video of one frame has zero flow.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from datasets.errors import DataError
from utils.errors import UserError
from utils.files import short_sha256
from utils.flow.raft import DEFAULT_WEIGHTS, load_raft

METHODS = ("raft", "raft_small", "dis")
# RAFT's correlation pyramid: 1/8 resolution, then halved three times, must leave two rows and columns.
RAFT_MULTIPLE, RAFT_LEAST = 8, 128
# DIS refuses very small images; below this side they are padded.
DIS_LEAST = 32


_sha256 = functools.cache(short_sha256)  # asked for with each video


@dataclass(frozen=True)
class FlowSettings:
    """What the flow of a video depends on.

    Attributes:
        method: ``raft``, ``raft_small`` or ``dis``.
        weights: a file in torchvision's or princeton-vl's key format, or the name of one of torchvision's own weights;
            None is torchvision's ``C_T_V1``. Not for ``dis``.
        size: (H, W) at which flow is computed and stored, in pixels of that size; None is the frame's own size.
        iters: updates of RAFT; its authors use 20 for pictures like these.
    """

    method: str = "raft"
    weights: str | None = None
    size: tuple[int, int] | None = None
    iters: int = 20

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UserError(f"--flow_method {self.method}: expected one of {', '.join(METHODS)}")
        if self.method == "dis" and self.weights is not None:
            raise UserError("--flow_weights is for RAFT: leave it out, or choose --flow_method raft or raft_small")
        if self.size is not None and (len(self.size) != 2 or min(self.size) < 1):
            raise UserError(f"--flow_size {self.size}: expected a height and a width above 0")
        if self.iters < 1:
            raise UserError(f"--flow_iters {self.iters}: expected 1 or more")

    def record(self) -> dict[str, Any]:
        """The settings as `utils.flow.files.RECORD` keeps them; a weights file counts by its name and content, wherever
        it lies.
        """
        weights = Path(self.weights).name if self.weights else DEFAULT_WEIGHTS
        raft = self.method != "dis"
        in_file = raft and self.weights is not None and Path(self.weights).is_file()
        return {
            **asdict(self),
            "weights": weights if raft else None,
            "iters": self.iters if raft else None,
            "size": list(self.size) if self.size else None,
            **({"weights_sha256": _sha256(Path(self.weights))} if in_file else {}),
        }


class FlowEstimator:
    """Flow of pairs of frames: ``estimator(first, second)``, arrays (B, H, W, 3) uint8 RGB -> (B, H, W, 2) float32.

    The flow is that of first -> second in pixels, x to the right and y down, at the size of the frames given; padding
    is put on and taken off inside. `FlowSettings.size` is applied by `compute_flows`, not here.

    RAFT's weights are loaded at the first pair, or by `load`.

    Raises:
        UserError, CheckpointError: see `load_raft`; there is no fall-back from one method to another.
    """

    def __init__(self, settings: FlowSettings, device: str | torch.device = "cpu") -> None:
        self.settings = settings
        self.device = device
        self._model: torch.nn.Module | None = None

    def load(self) -> torch.nn.Module:
        """RAFT with its weights, on the device."""
        if self._model is None:
            self._model = load_raft(self.settings.method, self.settings.weights).to(self.device)
        return self._model

    def __call__(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        if first.shape != second.shape or first.ndim != 4 or first.shape[3] != 3 or first.dtype != np.uint8:
            raise ValueError(
                f"expected two uint8 arrays (B, H, W, 3) of one shape, got {first.dtype} {first.shape} and "
                f"{second.dtype} {second.shape}"
            )
        if self.settings.method == "dis":
            return np.stack([dis_flow(a, b) for a, b in zip(first, second)])
        return self._raft(first, second)

    def _raft(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        height, width = first.shape[1:3]
        top, bottom, left, right = padding((height, width), RAFT_MULTIPLE, RAFT_LEAST)

        def prepare(frames: np.ndarray) -> torch.Tensor:
            # (B, H, W, 3) uint8 -> (B, 3, H, W) in [-1, 1], the range that torchvision's RAFT expects
            images = torch.from_numpy(np.ascontiguousarray(frames)).to(self.device).permute(0, 3, 1, 2).float()
            images = images / 127.5 - 1
            return torch.nn.functional.pad(images, (left, right, top, bottom), mode="replicate")

        with torch.inference_mode():
            # one flow per update, each better than the one before
            flow = self.load()(prepare(first), prepare(second), num_flow_updates=self.settings.iters)[-1]
        flow = flow[:, :, top : top + height, left : left + width]
        return flow.permute(0, 2, 3, 1).float().cpu().numpy()  # (B, 2, H, W) -> (B, H, W, 2)


def padding(size: tuple[int, int], multiple: int, least: int) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) that brings ``size`` to multiples of ``multiple``, at least ``least``; centred."""
    down, across = (max(least, math.ceil(side / multiple) * multiple) - side for side in size)
    return down // 2, down - down // 2, across // 2, across - across // 2


def dis_flow(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """DIS flow, medium preset, of two frames (H, W, 3) uint8 RGB: (H, W, 2) float32 in pixels."""
    import cv2

    height, width = first.shape[:2]
    top, bottom, left, right = padding((height, width), 1, DIS_LEAST)

    def prepare(frame: np.ndarray) -> np.ndarray:
        grey = cv2.cvtColor(np.ascontiguousarray(frame), cv2.COLOR_RGB2GRAY)
        return np.pad(grey, ((top, bottom), (left, right)), mode="edge")

    dis = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    flow = dis.calc(prepare(first), prepare(second), None)
    return np.ascontiguousarray(flow[top : top + height, left : left + width], dtype=np.float32)


def frame_pairs(
    frames: Sequence[np.ndarray], size: tuple[int, int] | None = None, indices: Iterable[int] | None = None
) -> Iterator[tuple[int, np.ndarray, np.ndarray | None]]:
    """Yields (t, frame t, its partner), resized to ``size`` (H, W): the next frame, for the last one the one before.

    A video of one frame has no partner: None. Every frame is asked for once where ``indices`` ascend.

    Raises:
        DataError: two frames of different sizes.
    """

    def fetch(index: int) -> np.ndarray:
        frame = np.asarray(frames[index])
        if size is not None and frame.shape[:2] != tuple(size):
            # Pillow's bicubic filter widens with the reduction, so that small sizes do not alias.
            frame = np.asarray(Image.fromarray(frame).resize((size[1], size[0]), Image.Resampling.BICUBIC))
        return frame

    count = len(frames)
    held: dict[int, np.ndarray] = {}
    for t in range(count) if indices is None else indices:
        partner = t + 1 if t + 1 < count else t - 1
        held = {i: held[i] if i in held else fetch(i) for i in sorted({t, max(partner, 0)})}
        if count == 1:
            yield t, held[t], None
            continue
        if held[t].shape != held[partner].shape:
            raise DataError(
                f"frames {t} and {partner} have different shapes, {held[t].shape} and {held[partner].shape}: flow "
                "needs frames of one size"
            )
        yield t, held[t], held[partner]


def check_batch_size(batch_size: int) -> None:
    """Raises UserError for a number of pairs that RAFT cannot take at once."""
    if batch_size < 1:
        raise UserError(f"--flow_batch {batch_size}: expected 1 or more")


def compute_flows(
    frames: Sequence[np.ndarray],
    estimator: FlowEstimator,
    batch_size: int = 4,
    indices: Iterable[int] | None = None,
) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (t, flow) for every frame of a video; flow is (H, W, 2) float32 in pixels at the size it is computed at.

    Args:
        frames: a sequence (``len``, ``[i]``) of (H, W, 3) uint8 RGB arrays; lazy ones are read in order, once.
        batch_size: pairs that RAFT takes at once; does not change the result beyond rounding.
        indices: only these frames, ascending; all by default.

    Raises:
        UserError: a batch size below 1. DataError: frames of different sizes, or flow that is not finite.
    """
    check_batch_size(batch_size)
    batch: list[tuple[int, np.ndarray, np.ndarray]] = []

    def estimate() -> Iterator[tuple[int, np.ndarray]]:
        flows = estimator(np.stack([first for _, first, _ in batch]), np.stack([second for _, _, second in batch]))
        for (t, _, _), flow in zip(batch, flows):
            if not np.isfinite(flow).all():
                raise DataError(f"the flow of frame {t} is not finite; are the weights damaged?")
            yield t, flow

    for t, first, second in frame_pairs(frames, estimator.settings.size, indices):
        if second is None:
            yield t, np.zeros((*first.shape[:2], 2), np.float32)
            continue
        if batch and batch[0][1].shape != first.shape:
            raise DataError(f"frame {t} has another shape than frame {batch[0][0]}: flow needs frames of one size")
        batch.append((t, first, second))
        if len(batch) == batch_size:
            yield from estimate()
            batch = []
    if batch:
        yield from estimate()
