"""`tool.py --tools test`: masks of whole videos, for data sets and for a user's own video.

Each frame gives ``<save_dir>/probability/<dataset>/<video>/<stem>.png``, 8-bit grey at the frame's own size, and
``<save_dir>/binary/…``, 255 where the grey value is above 127. Frames and flow images are decoded when they are needed,
so a video of any length is never in memory.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from datasets.images import NO_MOTION, NO_PICTURE, LazyImages, load_flow_image, load_frame
from datasets.video_sequence import FRAME_SUFFIXES, VideoSequence
from utils.errors import UserError
from utils.evaluation.scoring import THRESHOLD
from utils.files import write_bytes, write_json
from utils.progress import progress_bar

if TYPE_CHECKING:
    from tqdm import tqdm

    from models.dbsnet import DBSNet
    from utils.distributed import Processes
    from utils.video import LazyFrames

PUBLISHED_WEIGHTS = Path(__file__).resolve().parent.parent / "weights" / "dbsnet_lite2.safetensors"
"""The weights that come with the project, used where no ``--checkpoint`` is given."""

DEFAULT_SIZE = (384, 640)
# Text field of the probability maps: what they were made with, so that a later run knows which of them it may keep.
FIELD = "dbsnet-test"
# Beside the maps, the same and more in full, for the report.
RECORD = "test.json"
WRITERS, WAITING = 2, 32  # threads that write maps, and maps that may wait for them


# ---------------------------------------------------------------------------------------------------------------------
# The network and what it was trained for
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Weights:
    """A network and where it came from.

    Attributes:
        net: in evaluation mode, on the CPU.
        path: of the checkpoint.
        sha256: of the file, the first 16 digits.
        notes: what the file says about itself (metadata of a .safetensors, step and options of a training checkpoint).
        size: (H, W) that the file says its network is for, or None.
    """

    net: DBSNet
    path: Path
    sha256: str
    notes: dict[str, str] = field(default_factory=dict)
    size: tuple[int, int] | None = None


def find_checkpoint(given: str | Path | None) -> Path:
    """The checkpoint that a command means: the one given, or the published weights.

    Raises:
        UserError: none given, and no published weights in this checkout.
    """
    if given is not None:
        return Path(given)
    if PUBLISHED_WEIGHTS.is_file():
        return PUBLISHED_WEIGHTS
    raise UserError(
        f"no weights: this checkout has no {PUBLISHED_WEIGHTS.parent.name}/{PUBLISHED_WEIGHTS.name}. Give --checkpoint "
        "FILE (last.pt, best.pt or weights.safetensors of a training run), or train first: python main.py …; "
        "python tool.py --tools demo needs no weights"
    )


def load_weights(given: str | Path | None) -> Weights:
    """The network of a checkpoint (`find_checkpoint`) with its notes.

    Raises:
        UserError: no checkpoint given and none published. CheckpointError: unreadable, or of another network.
    """
    from models import load_dbsnet

    path = find_checkpoint(given)
    net = load_dbsnet(path)
    notes, size = read_notes(path)
    return Weights(net, path, hashlib.sha256(path.read_bytes()).hexdigest()[:16], notes, size)


def read_notes(path: Path) -> tuple[dict[str, str], tuple[int, int] | None]:
    """What a checkpoint says about itself beside its tensors, and the (H, W) it is for, if it says so.

    A .safetensors has these in its metadata (key ``size``: ``"384 640"``), a training checkpoint in its options.

    Raises:
        UserError: a ``size`` that is not two numbers.
    """
    from models.state_dicts import read_checkpoint

    content = read_checkpoint(path)
    if "metadata" in content:
        metadata = content["metadata"]
        notes = {key: value for key, value in metadata.items() if key not in ("format", "config")}
        if "size" not in metadata:
            return notes, None
        words = metadata["size"].split()
        if len(words) != 2 or not all(word.isdecimal() and int(word) > 0 for word in words):
            raise UserError(f"{path}: its metadata say size {metadata['size']!r}; expected height and width: 384 640")
        return notes, (int(words[0]), int(words[1]))
    options = content.get("config") or {}
    best = content.get("best") or {}
    notes = {"step": str(content.get("step", "unknown"))}
    if "J" in best and best.get("step") == content.get("step"):  # the figure is not that of another step's weights
        notes["J"] = f"{best['J']:.4f}"
    if options.get("datasets"):
        notes["trained_on"] = ", ".join(options["datasets"])
    size = options.get("size")
    return notes, (int(size[0]), int(size[1])) if size else None


# ---------------------------------------------------------------------------------------------------------------------
# Videos to segment
# ---------------------------------------------------------------------------------------------------------------------


class SharedFrames(Sequence[np.ndarray]):
    """`LazyFrames` that several threads may ask: a decoder has one position, so they take turns."""

    def __init__(self, frames: LazyFrames) -> None:
        self.frames, self._lock = frames, threading.Lock()

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, index: int) -> np.ndarray:  # type: ignore[override]
        with self._lock:
            return self.frames[index]


@dataclass(frozen=True)
class Video:
    """One video to segment: where its results go (below ``probability/`` and ``binary/``), and its pictures."""

    place: Path
    stems: tuple[str, ...]
    frames: Sequence[np.ndarray]
    flows: Sequence[np.ndarray]
    sources: tuple[Path, ...] = ()  # files of frames and flow, which maps must not be older than

    def probability(self, save_dir: Path, stem: str) -> Path:
        return save_dir / "probability" / self.place / f"{stem}.png"

    def binary(self, save_dir: Path, stem: str) -> Path:
        return save_dir / "binary" / self.place / f"{stem}.png"


def video_of(sequence: VideoSequence) -> Video:
    """A video of a data set.

    Raises:
        DataError: a frame without flow; names the file, and the command that makes it.
    """
    flows = [sequence.flow_path(stem) for stem in sequence.stems]
    return Video(
        place=Path(sequence.dataset, sequence.name),
        stems=sequence.stems,
        frames=LazyImages(sequence.frames, load_frame),
        flows=LazyImages(flows, load_flow_image),
        sources=(*sequence.frames, *flows),
    )


# What training shows where it takes one of the two inputs away (`datasets.clips.VideoClips`: flow_drop, frame_drop).
BLANKS = {"flow": NO_MOTION, "frames": NO_PICTURE}
# Those of `models.growth.take_out`, named here too: the command line is read in processes that do without torch.
PARTS = ("propagation", "refinement", "co_dga")


class Blank(Sequence[np.ndarray]):
    """Images of one grey level in place of others, of their sizes."""

    def __init__(self, images: Sequence[np.ndarray], level: int) -> None:
        self.images, self.level = images, level

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> np.ndarray:  # type: ignore[override]
        return np.full_like(self.images[index], self.level)


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``test`` alone; ``--size``, ``--batch_size`` and ``--amp`` are shared with ``bench``."""
    group = parser.add_argument_group("test")
    group.add_argument("--clip_len", type=int, metavar="N", help="overlapping clips of N frames; default: whole video")
    group.add_argument("--flip", action="store_true", help="average with the result on the mirrored video")
    group.add_argument(
        "--scales", type=float, nargs="+", default=[1.0], metavar="S", help="average over these multiples of --size"
    )
    group.add_argument(
        "--without",
        choices=(*BLANKS, *PARTS),
        help="blind one stream, to see what the other does alone (flow, frames), or take out a part of the network, to "
        "see what it contributes (propagation, refinement, co_dga)",
    )


def settings_from(args: argparse.Namespace, weights: Weights) -> dict[str, Any]:
    """What the maps depend on. Not the batch size, nor the device, which change them by rounding alone.

    Raises:
        UserError: an option out of range.
    """
    if args.batch_size < 1:
        raise UserError(f"--batch_size {args.batch_size}: expected 1 or more")
    if args.clip_len is not None and args.clip_len < 1:
        raise UserError(f"--clip_len {args.clip_len}: expected 1 or more")
    if min(args.scales) <= 0:
        raise UserError(f"--scales {' '.join(map(str, args.scales))}: expected numbers above 0")
    if args.size is not None and min(args.size) < 1:
        raise UserError(f"--size {args.size[0]} {args.size[1]}: expected a height and a width above 0")
    return {
        "weights": weights.sha256,
        "size": list(args.size or weights.size or DEFAULT_SIZE),
        "clip_len": args.clip_len,
        "flip": args.flip,
        "scales": list(args.scales),
        "amp": args.amp,
        "without": args.without,
        **({"flow_dir": str(Path(args.flow_dir).resolve())} if args.flow_dir else {}),
    }


def settings_of(video: Video, settings: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """The settings for one video: a size that nobody gave is turned where the video is upright and the size is not, or
    the other way about, rather than squeezing it into the wrong shape.
    """
    (height, width), (h, w) = video.frames[0].shape[:2], settings["size"]
    if args.size is None and (height - width) * (h - w) < 0:
        return {**settings, "size": [w, h]}
    return settings


def without_part(weights: Weights, part: str) -> DBSNet:
    """The network with one of `PARTS` taken out.

    Raises:
        UserError: it has none.
    """
    from models.growth import take_out

    try:
        return take_out(weights.net, part)
    except ValueError as error:
        raise UserError(f"--without {part}: {weights.path}: {error}") from None


def run(
    args: argparse.Namespace,
    videos: Sequence[Video],
    processes: Processes,
    weights: Weights,
    written: Callable[[Path], None] | None = None,
) -> int:
    """``--tools test``: the maps that are missing, of the videos that are this process's; returns how many.

    A video all of whose maps are there, made with the same weights and settings and not older than its frames and
    flow, is kept, unless ``--overwrite``. A size that is the checkpoint's rather than ``--size``'s is turned for videos
    of the other orientation.

    Args:
        written: called with the place of each map that has been written, ``<dataset>/<video>/<stem>.png``.

    Raises:
        UserError: options out of range. DataError: a frame or flow image that is missing or damaged.
    """
    from models import Predictor
    from utils.distributed import share_out

    settings = settings_from(args, weights)
    save_dir = Path(args.save_dir)

    def pending(index: int) -> Sequence[str]:
        video = videos[index]
        kept = not args.overwrite and is_current(video, save_dir, settings_of(video, settings, args))
        return () if kept else video.stems

    lengths = [len(video.stems) for video in videos]
    todo = [videos[index] for index in share_out(processes, lengths, pending, "test")]
    own = {video.place: settings_of(video, settings, args) for video in todo}
    total = sum(len(video.stems) for video in todo)
    shares = processes.gather((total, len(todo)))
    frames, count = (sum(part) for part in zip(*shares))
    if processes.is_main:
        kept = f"; {len(videos) - count} of {len(videos)} videos are there already" if count < len(videos) else ""
        others = f", {total} of them here" if processes.world_size > 1 else ""
        size = "×".join(map(str, settings["size"]))
        print(f"test: {weights.path} at {size}, {frames} frames to do{others}{kept}", flush=True)
    predictor = Predictor(
        without_part(weights, args.without) if args.without in PARTS else weights.net,
        device=processes.device,
        size=tuple(settings["size"]),
        batch_size=args.batch_size,
        amp=args.amp,
        clip_len=args.clip_len,
        flip=args.flip,
        mirror_flow=mirror_flow,
        scales=args.scales,
    )
    waiting: deque[tuple[Future, Path]] = deque()

    def finish_next() -> None:
        writing, place = waiting.popleft()
        writing.result()
        if written is not None:
            written(place)

    began = time.monotonic()
    with (
        # miniters 0: drawn anew as time passes, also while frames are encoded and none is finished.
        progress_bar(total=total, desc="test", unit="frame", disable=not processes.is_main, miniters=0) as progress,
        ThreadPoolExecutor(WRITERS) as writers,
    ):
        for video in todo:
            predictor.size = tuple(own[video.place]["size"])
            progress.set_postfix_str(video.place.name, refresh=False)
            predictor.on_encoded = show_encoded(progress, video.place.name)
            inputs = {"frames": video.frames, "flow": video.flows}
            if args.without in BLANKS:
                inputs[args.without] = Blank(inputs[args.without], BLANKS[args.without])
            for index, probability in predictor(inputs["frames"], inputs["flow"]):
                stem = video.stems[index]
                writing = writers.submit(write_maps, video, save_dir, stem, probability, own[video.place])
                waiting.append((writing, video.place / f"{stem}.png"))
                if len(waiting) > WAITING:
                    finish_next()
                progress.update()
        while waiting:
            finish_next()
    processes.wait()
    seconds = time.monotonic() - began
    if processes.is_main and (frames or not is_recorded(save_dir, weights, settings)):
        write_json(save_dir / RECORD, describe(weights, settings, processes, frames, seconds))
    return total


def show_encoded(progress: tqdm, name: str) -> Callable[[int], None]:
    """What tells beside the bar how many frames of a video have been encoded: of a long one, minutes pass before the
    first map. It is called with the number of each batch; flipped and scaled passes count, too.
    """
    encoded = 0

    def show(count: int) -> None:
        nonlocal encoded
        encoded += count
        progress.set_postfix_str(f"{name}, {encoded} encoded", refresh=False)
        progress.update(0)

    return show


def mirror_flow(image: np.ndarray) -> np.ndarray:
    """The flow image (H, W, 3) uint8 of the mirrored scene: pixels flipped, and the colours those of -u."""
    import torch

    from datasets.flow_colour import mirror_colours

    colours = mirror_colours(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None])  # (H, W, 3) -> (1, 3, H, W)
    return colours[0].permute(1, 2, 0).numpy()[:, ::-1]


def write_maps(video: Video, save_dir: Path, stem: str, probability: np.ndarray, settings: dict[str, Any]) -> None:
    """Writes both maps of one frame. The grey one, which says what it was made with, comes last: it vouches for both.

    What the CRF made of an older map is removed: it would be scored beside the new ones.

    Args:
        probability: (H, W) float in [0, 1].
    """
    from PIL import Image, PngImagePlugin

    (save_dir / "crf" / video.place / f"{stem}.png").unlink(missing_ok=True)
    grey = np.rint(np.clip(probability, 0, 1) * 255).astype(np.uint8)
    text = PngImagePlugin.PngInfo()
    text.add_text(FIELD, json.dumps(settings))
    for path, picture, info in (
        (video.binary(save_dir, stem), (grey > THRESHOLD) * np.uint8(255), None),
        (video.probability(save_dir, stem), grey, text),
    ):
        buffer = io.BytesIO()
        # Level 1: on maps the files are hardly larger, and writing them takes a third of the time.
        Image.fromarray(picture).save(buffer, format="PNG", pnginfo=info, compress_level=1)
        write_bytes(path, buffer.getvalue())


def is_current(video: Video, save_dir: Path, settings: dict[str, Any]) -> bool:
    """Whether all maps of a video are there, were made with these settings, and of the frames and flow of now."""
    newest = max((path.stat().st_mtime_ns for path in video.sources if path.exists()), default=0)

    def current(stem: str) -> bool:
        path = video.probability(save_dir, stem)
        return (
            video.binary(save_dir, stem).is_file()
            and path.is_file()
            and path.stat().st_mtime_ns >= newest
            and made_with(path) == settings
        )

    return all(current(stem) for stem in video.stems)


def made_with(path: Path) -> dict[str, Any] | None:
    """The settings that a probability map was made with; None where there is no such file, or it does not say."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return json.loads(image.info[FIELD])
    except (OSError, SyntaxError, ValueError, KeyError):
        return None


def is_recorded(save_dir: Path, weights: Weights, settings: dict[str, Any]) -> bool:
    """Whether `RECORD` tells of these weights and settings already."""
    try:
        record = json.loads((save_dir / RECORD).read_text(encoding="utf-8"))
        return record["sha256"] == weights.sha256 and record["settings"] == settings
    except (OSError, ValueError, KeyError, TypeError):
        return False


def describe(
    weights: Weights, settings: dict[str, Any], processes: Processes, frames: int, seconds: float
) -> dict[str, Any]:
    """What `RECORD` holds."""
    import torch

    device = "CPU"
    if processes.device.type == "cuda":
        device = torch.cuda.get_device_name(processes.device)
    return {
        "checkpoint": str(weights.path),
        "sha256": weights.sha256,
        "notes": weights.notes,
        "network": weights.net.config,
        "parameters": sum(parameter.numel() for parameter in weights.net.parameters()),
        "settings": settings,
        "device": f"{processes.world_size} × {device}",
        "torch": torch.__version__,
        "frames": frames,
        "frames_per_second": round(frames / seconds, 2) if frames else None,
        "date": time.strftime("%Y-%m-%d %H:%M"),
    }


# ---------------------------------------------------------------------------------------------------------------------
# A user's own video
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OwnVideo:
    """A video file or a folder of frames; the name is that of the file without suffix, or of the folder."""

    name: str
    frames: LazyFrames

    def flow_dir(self, save_dir: Path) -> Path:
        return save_dir / "flow" / self.name

    def sequence(self, save_dir: Path) -> VideoSequence:
        """The same for tools that read frames from files (crf).

        Raises:
            UserError: a video file, whose frames are no files.
        """
        files = self.frames.files
        if len(files) != len(self.frames) or files[0].suffix.lower() not in FRAME_SUFFIXES:
            raise UserError(
                f"{files[0]}: the CRF reads frames from image files; extract them, and give --frames FOLDER instead of "
                "--video: ffmpeg -i VIDEO -start_number 0 FOLDER/%05d.png"
            )
        return VideoSequence(self.name, "", files, {}, {}, "nonzero", self.flow_dir(save_dir))


def open_own(video: str | None, frames: str | None) -> OwnVideo:
    """The user's video, opened.

    Raises:
        UserError: a video that is not there or cannot be decoded. DataError: a folder without frames.
    """
    from utils.video import open_folder, open_video

    if video is not None:
        return OwnVideo(Path(video).stem, open_video(video))
    return OwnVideo(Path(frames).resolve().name, open_folder(frames))


def run_own_flow(args: argparse.Namespace, own: OwnVideo, device: Any) -> LazyFrames:
    """Makes the flow of a user's video that is missing, in ``<save_dir>/flow/<name>``; returns its images.

    Raises:
        As `utils.flow.prepare.video_flows`.
    """
    from utils.flow.prepare import video_flows

    hint = "; --flow_method raft is better and slower, and downloads its weights" if args.flow_method == "dis" else ""
    print(f"flow: {len(own.frames)} frames, by {args.flow_method}{hint}", flush=True)
    return video_flows(args, own.frames, own.flow_dir(Path(args.save_dir)), device)


def run_own(
    args: argparse.Namespace,
    own: OwnVideo,
    processes: Processes,
    weights: Weights,
    written: Callable[[Path], None] | None = None,
) -> None:
    """``--tools test`` on a user's video: flow, maps, and an overlay video. One process does it all.

    Args:
        written: as in `run`.

    Raises:
        As `run` and `run_own_flow`.
    """
    from utils.crf import load_probability
    from utils.visualise import overlay_video

    if not processes.is_main:
        run(args, [], processes, weights)
        return
    save_dir = Path(args.save_dir)
    flows = run_own_flow(args, own, processes.device)
    if args.clip_len:
        # Clips overlap by half, and each of several passes has a reader of its own, a clip ahead: whoever goes back
        # further than what is kept makes the decoder begin anew.
        several = args.flip or len(args.scales) > 1
        own.frames.window += args.clip_len * (2 if several else 1)
    video = Video(
        place=Path(own.name),
        stems=own.frames.stems,
        frames=SharedFrames(own.frames),
        flows=SharedFrames(flows),
        sources=(*own.frames.files, *flows.files),
    )
    run(args, [video], processes, weights, written)
    path = save_dir / "overlay" / f"{own.name}.mp4"
    maps = (load_probability(video.probability(save_dir, stem)) for stem in video.stems)
    counted = progress_bar(maps, total=len(video.stems), desc="overlay", unit="frame")
    overlay_video(path, video.frames, counted, own.frames.fps)
    print(f"masks: {save_dir / 'binary' / own.name}\noverlay: {path}", flush=True)
