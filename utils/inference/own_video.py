"""``--video`` and ``--frames``: a user's own video, from its frames and flow to masks and an overlay."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets.video_sequence import FRAME_SUFFIXES, VideoSequence
from utils.errors import UserError
from utils.inference import segment
from utils.inference.videos import SharedFrames, Video
from utils.inference.weights import Weights
from utils.progress import progress_bar

if TYPE_CHECKING:
    from utils.distributed import Processes
    from utils.video import LazyFrames


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
        written: as in `segment.run`.

    Raises:
        As `segment.run` and `run_own_flow`.
    """
    from utils.crf import load_probability
    from utils.visualise import overlay_video

    if not processes.is_main:
        segment.run(args, [], processes, weights)
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
    segment.run(args, [video], processes, weights, written)
    path = save_dir / "overlay" / f"{own.name}.mp4"
    maps = (load_probability(video.probability(save_dir, stem)) for stem in video.stems)
    counted = progress_bar(maps, total=len(video.stems), desc="overlay", unit="frame")
    overlay_video(path, video.frames, counted, own.frames.fps)
    print(f"masks: {save_dir / 'binary' / own.name}\noverlay: {path}", flush=True)
