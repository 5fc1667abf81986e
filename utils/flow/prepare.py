"""Flow of data sets and of a user's own videos, as files: what is missing is made, and the command ``--tools flow``.

`estimation` computes flow, `files` stores it.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Collection, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from datasets.check import is_stretched
from datasets.images import image_size, require_file
from datasets.video_sequence import FLOW_SUFFIXES, FRAME_SUFFIXES, list_files
from utils.errors import UserError, number_of
from utils.flow.beside import FlowBeside
from utils.flow.estimation import (
    METHODS,
    FlowEstimator,
    FlowSettings,
    check_batch_size,
    compute_flows,
    dis_flow,
    frame_pairs,
)
from utils.flow.files import (
    FORMATS,
    FRAME_BYTES,
    RAW_FORMATS,
    RETRY,
    FlowFiles,
    begin_flow,
    check_record,
    outdated_flow,
    supplied_flow,
)
from utils.flow.raft import DEFAULT_WEIGHTS
from utils.parallel import NICENESS, count_of_workers, parallel_map, share_of_workers
from utils.progress import progress_bar
from utils.video import FolderFlow, FolderFrames, LazyFrames

if TYPE_CHECKING:
    import torch

    from datasets.sequences import VideoSequence
    from utils.distributed import Processes


@dataclass(frozen=True)
class FlowTask:
    """The flow to make of one video.

    Attributes:
        frames: a sequence of (H, W, 3) uint8 RGB arrays, such as `utils.video.LazyFrames`.
        stems: one name per frame.
        flow_dir: where the files go.
        pending: indices of the frames whose flow is to be made, ascending; `pending_frames` finds them.
        source: what tells this video from another one of the same name, for its record; or `FRAME_BYTES`.
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
    workers: int = 1,
) -> list[int]:
    """Indices of the frames that have no readable flow yet; all of them if ``overwrite``.

    Args:
        workers: threads that read what is there. Decoding releases the interpreter's lock, and one core needs half an
            hour for the flow of YouTube-VOS.

    Raises:
        UserError: ``flow_dir`` holds flow made with other settings or of another source, or images from elsewhere that
            the making of raw flow would replace, and ``overwrite`` is False.
    """
    if overwrite:
        return list(range(len(stems)))
    check_record(flow_dir, settings.record() | (source or {}))
    with ThreadPoolExecutor(max(1, workers)) as pool:
        complete = list(pool.map(partial(files.complete, flow_dir), stems))
    pending = [t for t, there in enumerate(complete) if not there]
    if files.raw_format is not None:
        images, supplied = FlowFiles(files.image_format), set(supplied_flow(flow_dir))
        count = sum(stems[t] in supplied and images.complete(flow_dir, stems[t]) for t in pending)
        if count:
            raise UserError(
                f"--flow_raw {files.raw_format}: {count} flow images in {flow_dir} came from elsewhere, and raw flow "
                f"cannot be had of images; leave it out, make all flow elsewhere (--flow_dir DIR), or {RETRY}"
            )
    return pending


def write_flows(
    videos: Iterable[FlowTask],
    settings: FlowSettings,
    files: FlowFiles | None = None,
    *,
    device: str | torch.device = "cpu",
    batch_size: int = 4,
    workers: int | None = None,
    niceness: int = 0,
) -> Generator[tuple[Path, str], None, None]:
    """Makes the flow files that `FlowTask.pending` names, and yields (flow_dir, stem) after each.

    DIS runs on ``workers`` processes; with RAFT these colour and write while the next pairs are computed. Frames are
    read here, in order, so a video of any length is never in memory.

    Args:
        niceness: of the processes, where a network computes beside them.

    Raises:
        As `compute_flows`, before anything is written if the weights are missing or the batch size is wrong.
    """
    check_batch_size(batch_size)
    files = files or FlowFiles()
    estimator = FlowEstimator(settings, device)

    def tasks() -> Iterator[tuple]:
        for video in videos:
            if not video.pending:
                continue
            if settings.method != "dis":
                estimator.load()
            stems = [video.stems[t] for t in video.pending]
            begin_flow(video.flow_dir, stems, settings.record() | (video.source or {}))
            pairs: Iterator[tuple]
            if settings.method == "dis":
                pairs = frame_pairs(video.frames, settings.size, video.pending)
            else:
                pairs = compute_flows(video.frames, estimator, batch_size, video.pending)
            for t, *arrays in pairs:
                yield video.flow_dir, video.stems[t], files, *arrays

    yield from parallel_map(_dis_job if settings.method == "dis" else _write_job, tasks(), workers, niceness)


def _dis_job(
    flow_dir: Path, stem: str, files: FlowFiles, first: np.ndarray, second: np.ndarray | None
) -> tuple[Path, str]:
    flow = np.zeros((*first.shape[:2], 2), np.float32) if second is None else dis_flow(first, second)
    return _write_job(flow_dir, stem, files, flow)


def _write_job(flow_dir: Path, stem: str, files: FlowFiles, flow: np.ndarray) -> tuple[Path, str]:
    files.write(flow_dir, stem, flow)
    return flow_dir, stem


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the ``--flow_…`` options; ``--workers`` and ``--overwrite`` come from `utils.parallel.add_arguments`."""
    group = parser.add_argument_group("flow")
    group.add_argument(
        "--flow_method",
        choices=METHODS,
        default="raft",
        help="default: %(default)s; for a video of your own dis, which has no weights, unless --flow_weights is given",
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
    group.add_argument("--flow_iters", type=int, help=f"updates of RAFT; default: {FlowSettings.iters}")
    group.add_argument("--flow_batch", type=int, default=4, help="pairs RAFT takes at once; default: %(default)s")
    group.add_argument(
        "--flow_format", choices=FORMATS, default="png", help="format of the flow images; default: %(default)s"
    )
    group.add_argument(
        "--flow_raw",
        nargs="?",
        const="npz",
        choices=RAW_FORMATS,
        help="also store the flow itself beside its image: npz (float16, the default) or Middlebury flo (float32)",
    )


def settings_from(args: argparse.Namespace) -> tuple[FlowSettings, FlowFiles]:
    """What the ``--flow_…`` options say: how flow is computed, and how it is stored.

    Raises:
        UserError: an option out of range, or one that the method does not have.
    """
    check_batch_size(args.flow_batch)
    size = tuple(args.flow_size) if args.flow_size else None
    if args.flow_method == "dis" and args.flow_iters is not None:
        raise UserError("--flow_iters is for RAFT: leave it out, or choose --flow_method raft or raft_small")
    iters = FlowSettings.iters if args.flow_iters is None else args.flow_iters
    settings = FlowSettings(args.flow_method, args.flow_weights, size, iters)
    return settings, FlowFiles(args.flow_format, args.flow_raw)


def _plan(
    args: argparse.Namespace, sequences: Sequence[VideoSequence], processes: Processes, niceness: int = 0
) -> tuple[dict[Path, Collection[str]], Generator[tuple[Path, str], None, None]]:
    """Looks for the flow images that are missing, says how many there are and what is wrong with making them. Returns
    the stems of those that this process has to make, by folder, and what makes them, as `write_flows`.
    """
    from utils.distributed import share_out

    settings, files = settings_from(args)
    workers = share_of_workers(args.workers, processes.world_size)
    # By folder, since two data sets can share videos, as DAVIS-2016 and DAVIS-2017 do.
    videos: dict[Path, list[VideoSequence]] = {}
    for sequence in sequences:
        videos.setdefault(sequence.flow_dir, []).append(sequence)
    folders = list(videos)

    def missing(index: int) -> set[str]:
        folder = folders[index]
        pending = {
            sequence.stems[t]
            for sequence in videos[folder]
            for t in pending_frames(sequence.stems, folder, settings, files, args.overwrite, workers=workers)
        }
        return pending | outdated_flow(folder, _frame_bytes(_neighbours(videos[folder][-1])))

    lengths = [max(len(sequence) for sequence in videos[folder]) for folder in folders]
    pending = {folders[index]: stems for index, stems in share_out(processes, lengths, missing, "flow").items()}
    total = sum(map(len, pending.values()))
    everywhere = int(processes.reduce([total])[0])
    if processes.is_main:
        others = f", {total} of them here" if processes.world_size > 1 else ""
        beside = ", while the network is at work" if niceness else ""
        print(f"flow: {number_of(everywhere, 'frame')} to do{others}, by {settings.method}{beside}", flush=True)
    mixed = [(flow_dir, len(supplied_flow(flow_dir, stems))) for flow_dir, stems in pending.items()]
    mixed = [found for part in processes.gather(mixed) for found in part]
    stretched: list[Path] = []
    if settings.size is not None:
        first = (videos[flow_dir][-1].frames[0] for flow_dir in pending)
        stretched = [frame for frame in first if is_stretched(settings.size, image_size(frame))]
    stretched = [frame for part in processes.gather(stretched) for frame in part]
    if processes.is_main:
        warn_of_mixture(mixed, settings.method, "--flow_dir DIR")
        if stretched:
            warn_of_stretching(stretched, settings.size)

    def tasks() -> Iterator[FlowTask]:
        for flow_dir, stems in pending.items():
            sequence = videos[flow_dir][-1]
            neighbours = _neighbours(sequence)
            frames = FolderFrames(list(neighbours.values()))
            todo = [t for t, stem in enumerate(frames.stems) if stem in stems]
            yield FlowTask(frames, frames.stems, flow_dir, todo, {FRAME_BYTES: _frame_bytes(neighbours)})

    written = write_flows(
        tasks(),
        settings,
        files,
        device=processes.device,
        batch_size=args.flow_batch,
        workers=workers,
        niceness=niceness,
    )
    return pending, written


def _neighbours(sequence: VideoSequence) -> dict[str, Path]:
    """The frames in a sequence's folder, by stem, also those that the data set leaves out."""
    neighbours = {path.stem: path for path in list_files(sequence.frames[0].parent, FRAME_SUFFIXES)}
    neighbours.update({path.stem: path for path in sequence.frames})
    return neighbours


def _frame_bytes(frames: dict[str, Path]) -> dict[str, int]:
    """Sizes rather than times, so that a data set that was copied is not gone through again; uncompressed frames are
    alike in them.
    """
    return {stem: path.stat().st_size if path.exists() else 0 for stem, path in frames.items()}


def run(args: argparse.Namespace, sequences: Sequence[VideoSequence], processes: Processes) -> int:
    """``--tools flow``: makes the flow images that are missing, in each sequence's ``flow_dir``; returns how many of
    them this process made.

    The partner of a frame is its neighbour in the folder, also where the data set is thinned out (``--num_frames``), so
    that stored flow does not depend on that option (our reading).

    Args:
        sequences: the same in all processes, which share out what is missing, and the workers.

    Raises:
        UserError, CheckpointError, DataError: see `pending_frames` and `write_flows`.
    """
    pending, written = _plan(args, sequences, processes)
    total = sum(map(len, pending.values()))
    with progress_bar(
        total=total, desc=f"flow ({args.flow_method})", unit="frame", disable=not processes.is_main
    ) as progress:
        for flow_dir, _ in written:
            progress.set_postfix_str(flow_dir.name, refresh=False)
            progress.update()
    return total


def can_run_beside(args: argparse.Namespace, world_size: int) -> bool:
    """Whether flow can be made while the network is at work: by DIS, on processes of its own. RAFT would only take
    turns with the network on the same device; and several processes do not know of each other's flow.
    """
    return args.flow_method == "dis" and count_of_workers(args.workers) > 1 and world_size == 1


def run_beside_test(args: argparse.Namespace, sequences: Sequence[VideoSequence], processes: Processes) -> FlowBeside:
    """``--tools flow test``: as `run`, in the ``with`` block of what it returns, where each video's flow can be waited
    for. Only where `can_run_beside`.
    """
    pending, written = _plan(args, sequences, processes, NICENESS)
    return FlowBeside(written, pending, settings_from(args)[1])


def warn_of_stretching(frames: Sequence[Path], size: tuple[int, int]) -> None:
    """Says that flow at this size (H, W) shows other directions than the frames do, the first of each of some videos,
    and what size would not: training refuses such flow, and so does check.
    """
    height, width = image_size(frames[0])
    others = f" and of {len(frames) - 1} more videos" if len(frames) > 1 else ""
    print(
        f"warning: --flow_size {size[0]} {size[1]}: another aspect than {height} × {width} (height × width) of "
        f"{frames[0].parent}{others}, so all directions are stretched: test takes such flow, check does not, nor "
        f"does training beyond 5 %. --flow_size {max(1, round(size[1] * height / width))} {size[1]} keeps the aspect"
        f"{' of the first, and no --flow_size that of each' if len(frames) > 1 else ''}",
        flush=True,
    )


def warn_of_mixture(supplied: Iterable[tuple[Path, int]], method: str, elsewhere: str) -> None:
    """Says where flow of two kinds comes to lie in one folder, since a network takes them for one.

    Args:
        supplied: folders in which flow is made, and how many images of unknown making each one has.
        elsewhere: the option that puts all flow into another place.
    """
    mixed = [(flow_dir, count) for flow_dir, count in supplied if count]
    if not mixed:
        return
    others = f" and {len(mixed) - 1} more folders" if len(mixed) > 1 else ""
    print(
        f"warning: {mixed[0][0]}{others}: {sum(count for _, count in mixed)} flow images there are of unknown making "
        f"(supplied, not made here), and those that are missing are made by {method}: two kinds of flow in one video. "
        f"For one kind, {elsewhere} makes all flow in another place, --overwrite makes it again here",
        flush=True,
    )


def _content(files: Iterable[Path]) -> str:
    """What tells a video from another one of its name and length: neither sizes, which are alike for uncompressed
    frames, nor times, which a copy does not keep.

    Raises:
        DataError: a file that is not there.
    """
    known = hashlib.sha256()
    for path in files:
        require_file(path, "frame")
        with path.open("rb") as file:
            while part := file.read(1 << 20):
                known.update(part)
    return known.hexdigest()[:16]


def video_flows(
    args: argparse.Namespace, frames: LazyFrames, flow_dir: str | Path, device: str | torch.device = "cpu"
) -> FolderFlow:
    """Flow images of a user's own video: makes what is missing in ``flow_dir``, and returns all of them, read lazily.

    Args:
        frames: from `utils.video`.
        args: the ``--flow_…`` options, ``workers`` and ``overwrite``.

    Raises:
        UserError: ``flow_dir`` belongs to another video, or as `write_flows`. DataError, CheckpointError: likewise;
            DataError also for images there that are no flow images.
    """
    settings, files = settings_from(args)
    flow_dir = Path(flow_dir)
    first = frames.files[0].resolve()
    source = {
        "video": first.name if len(frames.files) == 1 else first.parent.name,
        "frames": len(frames),
        "content": _content(frames.files),
    }
    workers = count_of_workers(args.workers)
    pending = pending_frames(frames.stems, flow_dir, settings, files, args.overwrite, source, workers)
    if pending:
        supplied = supplied_flow(flow_dir, [frames.stems[t] for t in pending])
        warn_of_mixture([(flow_dir, len(supplied))], settings.method, "--save_dir DIR")
    task = FlowTask(frames, frames.stems, flow_dir, pending, source)
    written = write_flows([task], settings, files, device=device, batch_size=args.flow_batch, workers=args.workers)
    for _ in progress_bar(written, total=len(pending), desc=f"flow ({settings.method})", unit="frame"):
        pass
    images = {path.stem: path for path in list_files(flow_dir, FLOW_SUFFIXES)}
    return FolderFlow([images[stem] for stem in frames.stems])
