"""`tool.py --tools test`: masks of whole videos.

Each frame gives ``<save_dir>/probability/<dataset>/<video>/<stem>.png``, 8-bit grey at the frame's own size, and
``<save_dir>/binary/…``, 255 where the grey value is above 127. Frames and flow images are decoded when they are needed,
so a video of any length is never in memory.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from utils.errors import UserError, number_of
from utils.files import write_json
from utils.flow.files import kind_of_flow
from utils.inference.maps import fingerprint, is_current, write_maps
from utils.inference.videos import BLANKS, Blank, Video
from utils.inference.weights import PARTS, Weights, check_size, without_part
from utils.progress import progress_bar

if TYPE_CHECKING:
    from tqdm import tqdm

    from models import DBSNet
    from utils.distributed import Processes

DEFAULT_SIZE = (384, 640)
# Beside the maps, the same and more in full, for the report.
RECORD = "test.json"
# Of a frame's work, the part that is done when it has been encoded in all passes: about what it is on a CPU.
ENCODED = 0.7
BAR = "{l_bar}{bar}| {n:.0f}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"  # tqdm's, with whole frames
WRITERS, WAITING = 4, 32  # threads that write maps, and maps that may wait for them


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``test`` alone; ``--size``, ``--batch_size``, ``--amp`` and ``--cuda_graphs`` are shared with
    ``bench``.
    """
    group = parser.add_argument_group("test")
    group.add_argument("--clip_len", type=int, metavar="N", help="overlapping clips of N frames; default: whole video")
    group.add_argument("--flip", action="store_true", help="average with the result on the mirrored video")
    group.add_argument(
        "--scales", type=float, nargs="+", default=[1.0], metavar="S", help="average over these multiples of --size"
    )
    group.add_argument(
        "--zoom",
        action=argparse.BooleanOptionalAction,
        help="look twice: at whole frames at two thirds of --size, then at --size at the part of each frame where the "
        "object is; not part of the paper; default: for whole videos, if the checkpoint asks for it",
    )
    group.add_argument(
        "--consensus",
        action=argparse.BooleanOptionalAction,
        help="let positions of other frames that look alike vote on each frame's mask; not part of the paper; default: "
        "for whole videos, if the network has an appearance stream (and not with --without frames)",
    )
    group.add_argument(
        "--smooth",
        action=argparse.BooleanOptionalAction,
        help="move each frame's mask towards those of the frames before and after, along the motion between them; not "
        "part of the paper; default: yes, except with --without frames",
    )
    group.add_argument(
        "--optional_motion",
        action="store_true",
        help="run the network also on the same frames without motion, and give that result a third of the weight, for "
        "videos whose motion misleads; not part of the paper",
    )
    group.add_argument(
        "--without",
        choices=(*BLANKS, *PARTS),
        help="blind one stream, to see what the other does alone (flow, frames), or take out a part of the network, to "
        "see what it contributes (propagation, refinement, co_dga)",
    )


def check(args: argparse.Namespace) -> None:
    """Raises UserError for an option of ``test`` that is out of range."""
    if args.batch_size is not None and args.batch_size < 1:
        raise UserError(f"--batch_size {args.batch_size}: expected 1 or more")
    if args.clip_len is not None and args.clip_len < 1:
        raise UserError(f"--clip_len {args.clip_len}: expected 1 or more")
    if not all(0 < scale < math.inf for scale in args.scales):
        raise UserError(f"--scales {' '.join(map(str, args.scales))}: expected numbers above 0")
    check_size(args.size)
    if args.zoom and args.clip_len:
        raise UserError(f"--zoom and --clip_len {args.clip_len}: give one of them; it takes a whole video to follow")
    if args.consensus and (args.clip_len or args.without == "frames"):
        other = f"--clip_len {args.clip_len}" if args.clip_len else "--without frames"
        raise UserError(
            f"--consensus and {other}: give one of them; what votes is how the frames of the whole video look"
        )
    if args.smooth and args.without == "frames":
        raise UserError("--smooth and --without frames: give one of them; the motion is that between frames")
    if args.optional_motion and args.without in BLANKS:
        raise UserError(
            f"--optional_motion and --without {args.without}: give one of them; it weighs both streams against looks"
        )


def wants_consensus(args: argparse.Namespace, weights: Weights) -> bool:
    """Whether frames vote on each other: as ``--consensus`` says, and where it says nothing wherever they can.

    Raises:
        UserError: asked for, and the network does not look at frames.
    """
    from models.consensus import can_agree

    looks = can_agree(weights.net.streams)
    if args.consensus and not looks:
        raise UserError(f"--consensus: {weights.path} has no appearance stream, by which frames vote: leave it out")
    if args.consensus is not None:
        return args.consensus
    return looks and not args.clip_len and args.without != "frames"


def needs_flow(args: argparse.Namespace, weights: Weights) -> bool:
    """Whether the network looks at flow, and nobody blinds it."""
    return "motion" in weights.net.streams and args.without != "flow"


def settings_from(args: argparse.Namespace, weights: Weights) -> dict[str, Any]:
    """What the maps depend on. Not the batch size, nor the device, which change them by rounding alone.

    Raises:
        As `wants_consensus`; UserError also for ``--optional_motion`` with a network of one stream.
    """
    if args.optional_motion and len(weights.net.streams) == 1:
        raise UserError(f"--optional_motion: {weights.path} is a network of one stream, and needs none: leave it out")
    return {
        "weights": weights.sha256,
        "size": list(args.size or weights.size or DEFAULT_SIZE),
        "clip_len": args.clip_len,
        "flip": args.flip,
        "scales": list(args.scales),
        "amp": args.amp,
        "without": args.without,
        "zoom": weights.zoom and not args.clip_len if args.zoom is None else args.zoom,
        "consensus": wants_consensus(args, weights),
        "smooth": args.without != "frames" if args.smooth is None else args.smooth,
        **({"optional_motion": True} if args.optional_motion else {}),
        **({"flow_dir": str(Path(args.flow_dir).resolve())} if args.flow_dir else {}),
    }


def size_for(video: Video, settings: dict[str, Any], weights: Weights, args: argparse.Namespace) -> list[int]:
    """The size for one video: ``--size`` as it is, and one that nobody gave in the video's own shape."""
    from models import input_size

    height, width = settings["size"]
    if args.size is None:
        height, width = input_size(video.frames[0].shape[:2], (height, width), weights.net.multiple)
    return [height, width]


def settings_of(video: Video, settings: dict[str, Any], weights: Weights, args: argparse.Namespace) -> dict[str, Any]:
    """The settings for one video: its own size, where that is another, and which files it is of, all of which are
    there; for `eval` and the CRF its frames as copies have them, too. Of one of a data set also how its flow was made:
    scores of two kinds mean nothing together.
    """
    own: dict[str, Any] = {"sources": fingerprint(video.sources)}
    resized = size_for(video, settings, weights, args)
    if resized != settings["size"]:
        own["resized"] = resized
    if video.frame_files:
        own["frames"] = fingerprint(video.frame_files, times=False)
    if video.flow_dir is not None:
        own["flow"] = kind_of_flow(video.flow_dir)
    return {**settings, **own}


def run(
    args: argparse.Namespace,
    videos: Sequence[Video],
    processes: Processes,
    weights: Weights,
    written: Callable[[Path], None] | None = None,
) -> int:
    """``--tools test``: the maps that are missing, of the videos that are this process's; returns how many.

    A video all of whose maps are there, made with the same weights and settings of the same files of frames and
    flow, is kept, unless ``--overwrite``. A size that is the checkpoint's rather than ``--size``'s gives way to one in
    the video's own shape (`models.input_size`).

    Args:
        written: called with the place of each map that has been written, ``<dataset>/<video>/<stem>.png``.

    Raises:
        UserError: options out of range, or a network whose results are not finite. DataError: a frame or flow image
            that is missing or damaged.
    """
    from models import Predictor
    from utils.distributed import share_out

    settings = settings_from(args, weights)
    save_dir = Path(args.save_dir)

    def pending(index: int) -> Sequence[str]:
        video = videos[index]
        if args.overwrite or video.wait is not None:
            return video.stems
        return () if is_current(video, save_dir, settings_of(video, settings, weights, args)) else video.stems

    lengths = [len(video.stems) for video in videos]
    todo = [videos[index] for index in share_out(processes, lengths, pending, "test")]
    total = sum(len(video.stems) for video in todo)
    shares = processes.gather((total, len(todo)))
    everywhere, count = (sum(part) for part in zip(*shares))
    if processes.is_main:
        kept = f"; {len(videos) - count} of {len(videos)} videos are there already" if count < len(videos) else ""
        others = f", {total} of them here" if processes.world_size > 1 else ""
        sizes = dict.fromkeys("×".join(map(str, size_for(video, settings, weights, args))) for video in todo or videos)
        size = ", ".join(sizes) or "×".join(map(str, settings["size"]))
        ours = {
            "zoom": "a closer look at the object",
            "consensus": "frames vote",
            "smooth": "smoothed along motion",
        }
        on = [key for key in ours if settings[key]]
        more = f"; {', '.join(ours[key] for key in on)} ({' '.join(f'--no-{key}' for key in on)}: the network alone)"
        print(
            f"test: {weights.path} at {size}, {number_of(everywhere, 'frame')} to do{others}{kept}{more if on else ''}",
            flush=True,
        )
    net = without_part(weights, args.without) if args.without in PARTS else weights.net
    predictor = Predictor(
        net,
        device=processes.device,
        size=tuple(settings["size"]),
        batch_size=args.batch_size,
        amp=args.amp,
        cuda_graphs=args.cuda_graphs,
        clip_len=args.clip_len,
        flip=args.flip,
        mirror_flow=mirror_flow,
        scales=args.scales,
        zoom=settings["zoom"],
        consensus=settings["consensus"],
        smooth=settings["smooth"],
        optional_motion=args.optional_motion,
    )
    passes = (1 + settings["zoom"]) * (1 + args.flip) * len(args.scales)
    waiting: deque[tuple[Future, Path]] = deque()

    def finish_next() -> None:
        writing, place = waiting.popleft()
        writing.result()
        if written is not None:
            written(place)

    began, waited = time.monotonic(), 0.0
    with (
        # miniters 0: drawn anew as time passes, whatever comes of it.
        progress_bar(
            total=total, desc="test", unit="frame", disable=not processes.is_main, miniters=0, bar_format=BAR
        ) as progress,
        ThreadPoolExecutor(WRITERS) as writers,
    ):
        for video in todo:
            if video.wait is not None:
                progress.set_postfix_str(f"{video.place.name}, waiting for its flow", refresh=False)
                before = time.monotonic()
                video.wait()
                waited += time.monotonic() - before
            own = settings_of(video, settings, weights, args)
            predictor.size, predictor.readers = tuple(own.get("resized", own["size"])), video.readers
            progress.set_postfix_str(video.place.name, refresh=False)
            predictor.on_encoded = show_encoded(progress, video.place.name, passes)
            frames, flows = video.frames, video.flows
            if args.without == "frames":
                frames = Blank(frames, BLANKS["frames"])
            if flows is None:
                flows = [np.full_like(frames[0], BLANKS["flow"])] * len(frames)
            for index, probability in predictor(frames, flows):
                stem = video.stems[index]
                if not np.isfinite(probability).all():
                    raise UserError(not_numbers(weights, video.place / stem, args))
                writing = writers.submit(write_maps, video, save_dir, stem, probability, own)
                waiting.append((writing, video.place / f"{stem}.png"))
                if len(waiting) > WAITING:
                    finish_next()
                advance(progress, 1 if args.clip_len else 1 - ENCODED)
        while waiting:
            finish_next()
    processes.wait()
    seconds = time.monotonic() - began - waited
    if processes.is_main and (everywhere or not is_recorded(save_dir, weights, settings)):
        write_json(save_dir / RECORD, describe(weights, net, settings, processes, everywhere, seconds))
    return total


def not_numbers(weights: Weights, place: Path, args: argparse.Namespace) -> str:
    """What is wrong where the network's result for a frame is NaN: its map would be black, and look like a mask."""
    if any(not tensor.isfinite().all() for tensor in weights.net.state_dict().values()):
        return f"{weights.path}: has weights that are not numbers (NaN or infinite): its training diverged; take others"
    said = f"{place}: the result of {weights.path} is not a number: its features are too large"
    if args.amp == "fp16":
        return f"{said} for --amp fp16, which ends at 65,504: give --amp bf16 or none"
    if not args.clip_len:
        return f"{said}, at least for half precision, in which those of a whole video are kept: try --clip_len N"
    return f"{said}: its training may have diverged; take other weights"


def show_encoded(progress: tqdm, name: str, passes: int) -> Callable[[int], None]:
    """What moves the bar on, and tells beside it how many frames of a video have been encoded: of a long one, minutes
    pass before the first map. It is called with the number of each batch, in each of `passes`.
    """
    encoded = 0

    def show(count: int) -> None:
        nonlocal encoded
        encoded += count
        progress.set_postfix_str(f"{name}, {encoded} encoded", refresh=False)
        advance(progress, count * ENCODED / passes)

    return show


def advance(progress: tqdm, frames: float) -> None:
    """Moves the bar on by parts of frames, whose sum may be off in its last digit: never beyond its end."""
    progress.update(min(frames, progress.total - progress.n))


def mirror_flow(image: np.ndarray) -> np.ndarray:
    """The flow image (H, W, 3) uint8 of the mirrored scene: pixels flipped, and the colours those of -u."""
    import torch

    from datasets.flow_colour import mirror_colours

    colours = mirror_colours(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None])  # (H, W, 3) -> (1, 3, H, W)
    return colours[0].permute(1, 2, 0).numpy()[:, ::-1]


def is_recorded(save_dir: Path, weights: Weights, settings: dict[str, Any]) -> bool:
    """Whether `RECORD` tells of these weights and settings already."""
    try:
        record = json.loads((save_dir / RECORD).read_text(encoding="utf-8"))
        return record["sha256"] == weights.sha256 and record["settings"] == settings
    except (OSError, ValueError, KeyError, TypeError):
        return False


def describe(
    weights: Weights, net: DBSNet, settings: dict[str, Any], processes: Processes, frames: int, seconds: float
) -> dict[str, Any]:
    """What `RECORD` holds. `net` is the one that ran, which ``--without`` makes smaller than that of the weights."""
    import torch

    device = "CPU"
    if processes.device.type == "cuda":
        device = torch.cuda.get_device_name(processes.device)
    return {
        "checkpoint": str(weights.path),
        "sha256": weights.sha256,
        "notes": weights.notes,
        "network": net.config,
        "parameters": sum(parameter.numel() for parameter in net.parameters()),
        "settings": settings,
        "device": f"{processes.world_size} × {device}",
        "torch": torch.__version__,
        "frames": frames,
        "frames_per_second": round(frames / seconds, 2) if frames else None,
        "date": time.strftime("%Y-%m-%d %H:%M"),
    }
