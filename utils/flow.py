"""Optical flow: from the frames of a data set, or of a user's own video, to the images that the motion stream reads.

The flow of frame t is the motion t -> t+1 and is stored under frame t's stem; the last frame's is t -> t-1, and a video
of one frame has zero flow. Two methods: RAFT (Teed & Deng, ECCV 2020, https://arxiv.org/abs/2003.12039) in
torchvision's implementation, and DIS (Kroeger et al., ECCV 2016, https://arxiv.org/abs/1603.03590) in OpenCV's, which
needs no weights.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from datasets.errors import DataError
from datasets.flow_colour import flow_to_image
from datasets.images import load_flow_image
from datasets.video_sequence import FLOW_SUFFIXES, FRAME_SUFFIXES, list_files
from models.errors import CheckpointError
from utils.errors import UserError
from utils.files import write_bytes, write_json
from utils.parallel import parallel_map, share_of_workers
from utils.video import FolderFrames, LazyFrames

if TYPE_CHECKING:
    import torch

    from datasets.sequences import VideoSequence
    from utils.distributed import Processes

METHODS = ("raft", "raft_small", "dis")
FORMATS = ("png", "jpg")
RAW_FORMATS = ("npz", "flo")
# Weights that torchvision offers. C_T_V1 is princeton-vl's raft-things.pth (for raft_small: raft-small.pth) in
# torchvision's keys, the file that RAFT's own demo uses, hence the default; the others were trained by torchvision, or
# on Sintel and KITTI as well.
DEFAULT_WEIGHTS = "C_T_V1"
# RAFT's correlation pyramid: 1/8 resolution, then halved three times, must leave two rows and columns.
RAFT_MULTIPLE, RAFT_LEAST = 8, 128
# DIS refuses very small images; below this side they are padded.
DIS_LEAST = 32
JPEG_QUALITY = 95
# Beside the images, what they were made with: going on with other settings would mix two kinds of flow in one video.
RECORD = "flow.json"
RETRY = "--overwrite makes the flow again"


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
        """What `RECORD` holds: the settings, of which a weights file counts by its name, wherever it lies."""
        weights = Path(self.weights).name if self.weights else DEFAULT_WEIGHTS
        raft = self.method != "dis"
        return {
            **asdict(self),
            "weights": weights if raft else None,
            "iters": self.iters if raft else None,
            "size": list(self.size) if self.size else None,
        }


# ---------------------------------------------------------------------------------------------------------------------
# Weights of RAFT
# ---------------------------------------------------------------------------------------------------------------------

# princeton-vl's names -> torchvision's, applied in this order; both name the same tensors.
_PRINCETON_RULES: tuple[tuple[str, str], ...] = (
    (r"^fnet\.", "feature_encoder."),
    (r"^cnet\.", "context_encoder."),
    # encoder trunk: stem, then four residual or bottleneck blocks, then the last 1x1
    (r"^(\w+_encoder)\.conv1\.", r"\1.convnormrelu.0."),
    (r"^(\w+_encoder)\.norm1\.", r"\1.convnormrelu.1."),
    (r"^(\w+_encoder)\.conv2\.", r"\1.conv."),
    (r"^(\w+_encoder\.layer\d\.\d)\.conv(\d)\.", r"\1.convnormrelu\2.0."),
    (r"^(\w+_encoder\.layer\d\.\d)\.norm(\d)\.", r"\1.convnormrelu\2.1."),
    # update block
    (r"^update_block\.encoder\.convc(\d)\.", r"update_block.motion_encoder.convcorr\1.0."),
    (r"^update_block\.encoder\.convf(\d)\.", r"update_block.motion_encoder.convflow\1.0."),
    (r"^update_block\.encoder\.conv\.", r"update_block.motion_encoder.conv.0."),
    (r"^update_block\.gru\.conv([zrq])(\d)\.", r"update_block.recurrent_block.convgru\2.conv\1."),
    (r"^update_block\.gru\.conv([zrq])\.", r"update_block.recurrent_block.convgru1.conv\1."),  # RAFT-small has one
    (r"^update_block\.mask\.0\.", "mask_predictor.convrelu.0."),
    (r"^update_block\.mask\.2\.", "mask_predictor.conv."),
)
# The norm of a block's shortcut is registered twice there: as norm3 (residual) or norm4 (bottleneck) and in downsample.
_PRINCETON_TWICE = re.compile(r"^([fc]net\.layer\d\.\d)\.norm([34])\.(\w+)$")


def torchvision_key(key: str) -> str:
    """The name in torchvision's RAFT of a tensor of princeton-vl's RAFT (without ``module.``)."""
    for pattern, replacement in _PRINCETON_RULES:
        key = re.sub(pattern, replacement, key)
    return key


def convert_raft_state(state: dict[str, torch.Tensor], source: str = "RAFT weights") -> dict[str, torch.Tensor]:
    """Weights of RAFT under torchvision's names, from torchvision's or princeton-vl's, with or without ``module.``.

    Raises:
        CheckpointError: keys of neither format.
    """
    import torch

    state = {key.removeprefix("module."): value for key, value in state.items()}
    if any(key.startswith("feature_encoder.") for key in state):
        return state
    if not any(key.startswith("fnet.") for key in state):
        raise CheckpointError(
            f"{source}: these are not weights of RAFT. Expected keys of torchvision (feature_encoder…) or of "
            f"princeton-vl (fnet…), got {', '.join(list(state)[:3]) or 'none'}"
        )
    converted = {}
    for key, value in state.items():
        twice = _PRINCETON_TWICE.match(key)
        shortcut = f"{twice[1]}.downsample.1.{twice[3]}" if twice else None
        # In a bottleneck norm3 is a norm of its own; it is a duplicate only where the block has no conv of that number.
        if twice and shortcut in state and f"{twice[1]}.conv{twice[2]}.weight" not in state:
            if not torch.equal(value, state[shortcut]):
                raise CheckpointError(f"{source}: {key} and {shortcut} should be one tensor, but differ")
            continue
        converted[torchvision_key(key)] = value
    return converted


def load_raft(method: str = "raft", weights: str | None = None) -> torch.nn.Module:
    """torchvision's ``raft_large`` (method ``raft``) or ``raft_small`` with weights, in evaluation mode, on the CPU.

    Args:
        weights: a file (.pth, .safetensors), or a name of torchvision's own weights, which are downloaded once; None is
            ``C_T_V1``.

    Raises:
        UserError: weights that are not there and cannot be downloaded.
        CheckpointError: a file that is not exactly this network.
    """
    from torchvision.models import optical_flow

    small = method == "raft_small"
    build = optical_flow.raft_small if small else optical_flow.raft_large
    known = optical_flow.Raft_Small_Weights if small else optical_flow.Raft_Large_Weights
    model = build(weights=None)

    source = weights or DEFAULT_WEIGHTS
    if Path(source).is_file():
        state = convert_raft_state(_read_state(Path(source)), source)
        is_small = not any(key.startswith("mask_predictor.") for key in state)
        if is_small != small:
            there = "raft_small" if is_small else "raft"
            raise CheckpointError(f"{source}: holds the weights of {there}, not of {method}: add --flow_method {there}")
    elif source in known.__members__:
        try:
            state = known[source].get_state_dict(progress=True, check_hash=True)
        except (OSError, HTTPException, RuntimeError) as error:
            raise UserError(
                f"the weights of {method} could not be downloaded from {known[source].url} ({error}). Either download "
                "that file elsewhere and give it by --flow_weights FILE (princeton-vl's raft-things.pth or "
                "raft-small.pth do as well), or choose --flow_method dis, which needs none"
            ) from error
    else:
        raise UserError(
            f"--flow_weights {source}: no such file, and none of torchvision's weights of {method} "
            f"({', '.join(known.__members__)}). --flow_method dis needs no weights"
        )
    _load_strict(model, state, source)
    return model.eval()


def _read_state(path: Path) -> dict[str, torch.Tensor]:
    import pickle

    import torch

    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load

            state = load(path.read_bytes())
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError) as error:
        reason = str(error).split("\n", 1)[0]
        raise CheckpointError(f"{path}: cannot be read as a weights file; is it complete? ({reason})") from error
    except Exception as error:  # safetensors' own error derives from Exception alone
        if type(error).__name__ != "SafetensorError":
            raise
        raise CheckpointError(f"{path}: cannot be read as a safetensors file; is it complete? ({error})") from error
    for nest in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(nest), dict):
            state = state[nest]
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise CheckpointError(f"{path}: expected a dictionary of tensors, got {type(state).__name__} of other things")
    return state


def _load_strict(model: torch.nn.Module, state: dict[str, torch.Tensor], source: str) -> None:
    expected = model.state_dict()
    missing = [key for key in expected if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in expected]
    misshaped = [
        f"{key} {tuple(state[key].shape)} for {tuple(expected[key].shape)}"
        for key in expected
        if key in state and state[key].shape != expected[key].shape
    ]
    problems = [
        f"{len(keys)} {what} (first: {keys[0]})"
        for what, keys in (("missing", missing), ("unexpected", unexpected), ("mis-shaped", misshaped))
        if keys
    ]
    if problems:
        raise CheckpointError(f"{source}: not exactly the weights of this RAFT: {'; '.join(problems)}")
    # A counter that only training reads; files of old PyTorch lack it.
    counters = {k: v for k, v in expected.items() if k.endswith("num_batches_tracked")}
    model.load_state_dict({**counters, **state}, strict=True)


# ---------------------------------------------------------------------------------------------------------------------
# Flow of pairs and of videos
# ---------------------------------------------------------------------------------------------------------------------


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
        import torch

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
    amounts = []
    for side in size:
        missing = max(least, math.ceil(side / multiple) * multiple) - side
        amounts += [missing // 2, missing - missing // 2]
    return tuple(amounts)


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
    from PIL import Image

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


def compute_flows(
    frames: Sequence[np.ndarray],
    method: str = "raft",
    weights: str | None = None,
    size: tuple[int, int] | None = None,
    device: str | torch.device = "cpu",
    batch_size: int = 4,
    iters: int = 20,
    indices: Iterable[int] | None = None,
    estimator: FlowEstimator | None = None,
) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (t, flow) for every frame of a video; flow is (H, W, 2) float32 in pixels at the size it is computed at.

    Args:
        frames: a sequence (``len``, ``[i]``) of (H, W, 3) uint8 RGB arrays; lazy ones are read in order, once.
        method, weights, size, iters: see `FlowSettings`.
        batch_size: pairs that RAFT takes at once; does not change the result beyond rounding.
        indices: only these frames, ascending; all by default.
        estimator: one made before, instead of ``method``, ``weights``, ``iters`` and ``device``, to load weights once.

    Raises:
        UserError, CheckpointError: as `load_raft`. DataError: frames of different sizes, or flow that is not finite.
    """
    if batch_size < 1:
        raise UserError(f"--flow_batch {batch_size}: expected 1 or more")
    if estimator is None:
        estimator = FlowEstimator(FlowSettings(method, weights, size, iters), device)
    batch: list[tuple[int, np.ndarray, np.ndarray]] = []

    def estimate() -> Iterator[tuple[int, np.ndarray]]:
        flows = estimator(np.stack([first for _, first, _ in batch]), np.stack([second for _, _, second in batch]))
        for (t, _, _), flow in zip(batch, flows):
            if not np.isfinite(flow).all():
                raise DataError(f"the flow of frame {t} is not finite; are the weights damaged?")
            yield t, flow

    for t, first, second in frame_pairs(frames, size, indices):
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


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FlowFiles:
    """How flow is stored: the colour image as ``image_format``, and the raw flow beside it if ``raw_format`` is set."""

    image_format: str = "png"
    raw_format: str | None = None

    def __post_init__(self) -> None:
        if self.image_format not in FORMATS:
            raise UserError(f"--flow_format {self.image_format}: expected one of {', '.join(FORMATS)}")
        if self.raw_format is not None and self.raw_format not in RAW_FORMATS:
            raise UserError(f"--flow_raw {self.raw_format}: expected one of {', '.join(RAW_FORMATS)}")

    def write(self, flow_dir: Path, stem: str, flow: np.ndarray) -> None:
        """Stores one flow (H, W, 2) under ``stem``; an image of that stem in the other format is replaced."""
        if self.raw_format is not None:
            write_raw_flow(flow_dir / f"{stem}.{self.raw_format}", flow)
        from PIL import Image

        image = flow_to_image(flow)
        path = flow_dir / f"{stem}.{self.image_format}"
        # Two images of one stem would be ambiguous to a reader, hence first away with the other one.
        for suffix in FLOW_SUFFIXES:
            if suffix != path.suffix:
                (flow_dir / f"{stem}{suffix}").unlink(missing_ok=True)
        buffer = io.BytesIO()
        if self.image_format == "png":
            # A third of the time of the usual level, for files that are a third larger.
            Image.fromarray(image).save(buffer, format="PNG", compress_level=2)
        else:
            # Full chroma resolution: hue is the direction of motion, and its edges are the edges of objects.
            Image.fromarray(image).save(buffer, format="JPEG", quality=JPEG_QUALITY, subsampling=0)
        write_bytes(path, buffer.getvalue())

    def complete(self, flow_dir: Path, stem: str) -> bool:
        """Whether everything of this stem is there, in whichever image format, and can be read to its end."""
        try:
            image = next((p for p in (flow_dir / f"{stem}{s}" for s in FLOW_SUFFIXES) if p.is_file()), None)
            if image is None:
                return False
            load_flow_image(image)
            if self.raw_format is not None:
                read_raw_flow(flow_dir / f"{stem}.{self.raw_format}")
        except DataError:
            return False
        return True


def write_raw_flow(path: Path, flow: np.ndarray) -> None:
    """Writes flow (H, W, 2) as ``.npz`` (key ``flow``, float16: 1/16 pixel at speeds up to 128) or Middlebury ``.flo``.

    A ``.flo`` file is the float32 tag 202021.25, the int32 width and height, then float32 u and v by pixel, row by row.
    """
    buffer = io.BytesIO()
    if path.suffix == ".npz":
        np.savez_compressed(buffer, flow=flow.astype(np.float16))
    elif path.suffix == ".flo":
        buffer.write(b"PIEH" + np.array([flow.shape[1], flow.shape[0]], "<i4").tobytes() + flow.astype("<f4").tobytes())
    else:
        raise ValueError(f"{path}: raw flow is stored as .npz or .flo")
    write_bytes(path, buffer.getvalue())


def read_raw_flow(path: str | Path) -> np.ndarray:
    """Reads what `write_raw_flow` wrote: (H, W, 2) float32, in pixels.

    Raises:
        DataError: a file that is missing, damaged or of another kind.
    """
    import zipfile

    path = Path(path)
    try:
        if path.suffix == ".npz":
            with np.load(path) as archive:
                flow = archive["flow"].astype(np.float32)
        else:
            data = path.read_bytes()
            width, height = np.frombuffer(data, "<i4", count=2, offset=4).tolist()
            if data[:4] != b"PIEH" or len(data) != 12 + 8 * width * height:
                raise ValueError("not a Middlebury .flo file, or cut short")
            flow = np.frombuffer(data, "<f4", offset=12).reshape(height, width, 2).copy()
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: cannot be read as raw flow ({error})") from error
    if flow.ndim != 3 or flow.shape[2] != 2:
        raise DataError(f"{path}: expected flow of shape (H, W, 2), got {flow.shape}")
    return flow


@dataclass(frozen=True)
class FlowTask:
    """The flow to make of one video.

    Attributes:
        frames: a sequence of (H, W, 3) uint8 RGB arrays, such as `utils.video.LazyFrames`.
        stems: one name per frame.
        flow_dir: where the files go.
        pending: indices of the frames whose flow is to be made, ascending; `pending_frames` finds them.
        source: what tells this video from another one of the same name, for `RECORD`.
    """

    frames: Sequence[np.ndarray]
    stems: Sequence[str]
    flow_dir: Path
    pending: Sequence[int]
    source: dict[str, Any] | None = None


def pending_frames(
    stems: Sequence[str],
    flow_dir: Path,
    settings: FlowSettings,
    files: FlowFiles,
    overwrite: bool = False,
    source: dict[str, Any] | None = None,
) -> list[int]:
    """Indices of the frames that have no readable flow yet; all of them if ``overwrite``.

    Raises:
        UserError: ``flow_dir`` holds flow made with other settings or of another source, and ``overwrite`` is False.
    """
    if overwrite:
        return list(range(len(stems)))
    _check_record(flow_dir, settings.record() | (source or {}))
    return [t for t, stem in enumerate(stems) if not files.complete(flow_dir, stem)]


def write_flows(
    videos: Iterable[FlowTask],
    settings: FlowSettings,
    files: FlowFiles | None = None,
    *,
    device: str | torch.device = "cpu",
    batch_size: int = 4,
    workers: int | None = None,
) -> Iterator[tuple[Path, str]]:
    """Makes the flow files that `FlowTask.pending` names, and yields (flow_dir, stem) after each.

    DIS runs on ``workers`` processes; with RAFT these colour and write while the next pairs are computed. Frames are
    read here, in order, so a video of any length is never in memory.

    Raises:
        As `compute_flows`, before anything is written if the weights are missing.
    """
    files = files or FlowFiles()
    estimator = FlowEstimator(settings, device)

    def tasks() -> Iterator[tuple]:
        for video in videos:
            if not video.pending:
                continue
            if settings.method != "dis":
                estimator.load()
            _begin(
                Path(video.flow_dir), [video.stems[t] for t in video.pending], settings.record() | (video.source or {})
            )
            if settings.method == "dis":
                pairs = frame_pairs(video.frames, settings.size, video.pending)
            else:
                pairs = compute_flows(
                    video.frames,
                    size=settings.size,
                    batch_size=batch_size,
                    indices=video.pending,
                    estimator=estimator,
                )
            for t, *arrays in pairs:
                yield Path(video.flow_dir), video.stems[t], files, *arrays

    yield from parallel_map(_dis_job if settings.method == "dis" else _write_job, tasks(), workers)


def _dis_job(
    flow_dir: Path, stem: str, files: FlowFiles, first: np.ndarray, second: np.ndarray | None
) -> tuple[Path, str]:
    flow = np.zeros((*first.shape[:2], 2), np.float32) if second is None else dis_flow(first, second)
    return _write_job(flow_dir, stem, files, flow)


def _write_job(flow_dir: Path, stem: str, files: FlowFiles, flow: np.ndarray) -> tuple[Path, str]:
    files.write(flow_dir, stem, flow)
    return flow_dir, stem


def _begin(flow_dir: Path, stems: Sequence[str], record: dict[str, Any]) -> None:
    """Says in `RECORD` how the flow of these frames is being made. Flow that was made otherwise (``--overwrite``) goes
    first: after an interruption it would pass for the new.
    """
    path = flow_dir / RECORD
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        before = None  # flow of unknown making
    if before != record:
        for stem in stems:
            for suffix in (*FLOW_SUFFIXES, *(f".{raw}" for raw in RAW_FORMATS)):
                (flow_dir / f"{stem}{suffix}").unlink(missing_ok=True)
    write_json(path, record)


def _check_record(flow_dir: Path, wanted: dict[str, Any]) -> None:
    path = flow_dir / RECORD
    if not path.is_file():
        return
    try:
        made = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); remove it, or {RETRY}") from error
    differing = [key for key in wanted if made.get(key) != wanted[key]]
    if differing:
        raise UserError(
            f"{flow_dir}: holds flow made with other settings or of another video ("
            + ", ".join(f"{key} {made.get(key)}, now {wanted[key]}" for key in differing)
            + f"); give the same options to go on with it, choose another folder, or {RETRY}"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the ``--flow_…`` options; ``--workers`` and ``--overwrite`` come from `utils.parallel.add_arguments`."""
    group = parser.add_argument_group("flow")
    group.add_argument(
        "--flow_method", choices=METHODS, default="raft", help="default: %(default)s; dis has no weights"
    )
    group.add_argument(
        "--flow_weights",
        metavar="FILE",
        help="RAFT's weights, in torchvision's or princeton-vl's format, or a name of torchvision's "
        f"(default {DEFAULT_WEIGHTS}, downloaded)",
    )
    group.add_argument(
        "--flow_size",
        type=int,
        nargs=2,
        metavar=("H", "W"),
        help="compute and store at this size; default: frame's own",
    )
    group.add_argument("--flow_iters", type=int, default=20, help="updates of RAFT; default: %(default)s")
    group.add_argument("--flow_batch", type=int, default=4, help="pairs RAFT takes at once; default: %(default)s")
    group.add_argument("--flow_format", choices=FORMATS, default="png", help="of the flow images; default: %(default)s")
    group.add_argument(
        "--flow_raw",
        nargs="?",
        const="npz",
        choices=RAW_FORMATS,
        help="also store the flow itself beside its image: npz (float16, the default) or Middlebury flo (float32)",
    )


def settings_from(args: argparse.Namespace) -> FlowSettings:
    """The settings that the ``--flow_…`` options say."""
    return FlowSettings(
        args.flow_method, args.flow_weights, tuple(args.flow_size) if args.flow_size else None, args.flow_iters
    )


def run(
    args: argparse.Namespace,
    sequences: Sequence[VideoSequence],
    processes: Processes,
) -> int:
    """``--tools flow``: makes the flow images that are missing, in each sequence's ``flow_dir``; returns how many of
    them this process made.

    The partner of a frame is its neighbour in the folder, also where the data set is thinned out (``--num_frames``), so
    that stored flow does not depend on that option (our reading).

    Args:
        sequences: the same in all processes, which share out what is missing, and the workers.

    Raises:
        UserError, CheckpointError, DataError: see `pending_frames` and `write_flows`.
    """
    from tqdm import tqdm

    from utils.distributed import share_out

    settings = settings_from(args)
    files = FlowFiles(args.flow_format, args.flow_raw)
    # By folder, since two data sets can share videos, as DAVIS-2016 and DAVIS-2017 do.
    videos: dict[Path, list[VideoSequence]] = {}
    for sequence in sequences:
        videos.setdefault(sequence.flow_dir, []).append(sequence)
    folders = list(videos)

    def missing(index: int) -> set[str]:
        return {
            sequence.stems[t]
            for sequence in videos[folders[index]]
            for t in pending_frames(sequence.stems, sequence.flow_dir, settings, files, args.overwrite)
        }

    lengths = [max(len(sequence) for sequence in videos[folder]) for folder in folders]
    pending = {folders[index]: stems for index, stems in share_out(processes, lengths, missing, "flow").items()}
    total = sum(len(stems) for stems in pending.values())
    everywhere = int(processes.reduce([total])[0])
    if processes.is_main:
        others = f", {total} of them here" if processes.world_size > 1 else ""
        print(f"flow: {everywhere} frames to do{others}, by {settings.method}", flush=True)
    workers = args.workers if processes.world_size == 1 else share_of_workers(args.workers, processes.world_size)

    def tasks() -> Iterator[FlowTask]:
        for flow_dir, stems in pending.items():
            sequence = videos[flow_dir][-1]
            neighbours = {path.stem: path for path in list_files(sequence.frames[0].parent, FRAME_SUFFIXES)}
            neighbours.update({path.stem: path for path in sequence.frames})
            frames = FolderFrames(list(neighbours.values()))
            todo = [t for t, stem in enumerate(frames.stems) if stem in stems]
            yield FlowTask(frames, frames.stems, flow_dir, todo)

    with tqdm(total=total, desc=f"flow ({settings.method})", unit="frame", disable=not processes.is_main) as progress:
        written = write_flows(
            tasks(), settings, files, device=processes.device, batch_size=args.flow_batch, workers=workers
        )
        for flow_dir, _ in written:
            progress.set_postfix_str(flow_dir.name, refresh=False)
            progress.update()
    return total


def video_flows(
    args: argparse.Namespace, frames: LazyFrames, flow_dir: str | Path, device: str | torch.device = "cpu"
) -> FolderFrames:
    """Flow images of a user's own video: makes what is missing in ``flow_dir``, and returns all of them, read lazily.

    Args:
        frames: from `utils.video.open_video` or `open_folder`.
        args: the ``--flow_…`` options, ``workers`` and ``overwrite``.

    Raises:
        UserError: ``flow_dir`` belongs to another video, or as `write_flows`. DataError, CheckpointError: likewise.
    """
    from tqdm import tqdm

    settings = settings_from(args)
    files = FlowFiles(args.flow_format, args.flow_raw)
    flow_dir = Path(flow_dir)
    first = frames.files[0]
    source = {
        "video": first.name if len(frames.files) == 1 else first.parent.name,
        "frames": len(frames),
        "bytes": sum(path.stat().st_size for path in frames.files),
    }
    pending = pending_frames(frames.stems, flow_dir, settings, files, args.overwrite, source)
    task = FlowTask(frames, frames.stems, flow_dir, pending, source)
    written = write_flows([task], settings, files, device=device, batch_size=args.flow_batch, workers=args.workers)
    for _ in tqdm(written, total=len(pending), desc=f"flow ({settings.method})", unit="frame"):
        pass
    images = {path.stem: path for path in list_files(flow_dir, FLOW_SUFFIXES)}
    return FolderFrames([images[stem] for stem in frames.stems])
