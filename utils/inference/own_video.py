"""``--video`` and ``--frames``: a user's own video, from its frames and flow to masks and an overlay."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets.video_sequence import FRAME_SUFFIXES
from utils import crf
from utils.errors import UserError, number_of
from utils.inference import segment
from utils.inference.maps import are_of_others, remove_others
from utils.inference.videos import READERS, SharedFrames, Video
from utils.inference.weights import Weights
from utils.progress import progress_bar

if TYPE_CHECKING:
    from utils.distributed import Processes
    from utils.video import LazyFrames


@dataclass
class OwnVideo:
    """A video file or a folder of frames; the name is that of the file without suffix, or of the folder."""

    name: str
    frames: LazyFrames
    flows: LazyFrames | None = None  # once `run_own_flow` has made what was missing

    def flow_dir(self, save_dir: Path) -> Path:
        return save_dir / "flow" / self.name

    @property
    def place(self) -> Path:
        """Below each kind of result."""
        return Path(self.name)

    def for_crf(self) -> crf.Refinable:
        """Its frames by their files where each has one, so that processes read them; else decoded in order."""
        files = self.frames.files
        in_files = len(files) == len(self.frames) and files[0].suffix.lower() in FRAME_SUFFIXES
        return crf.Refinable(self.place, self.frames.stems, files if in_files else self.frames, in_files)


def open_own(video: str | None, frames: str | None) -> OwnVideo:
    """The user's video, opened; a line of warning where its end is missing.

    Raises:
        UserError: a video that is not there or cannot be decoded. DataError: a folder without frames.
    """
    from utils.video import VideoFrames, open_folder

    if video is not None:
        opened = VideoFrames(video)
        if opened.promised is not None:
            print(
                f"warning: {video}: its header promises about {opened.promised} frames, and {len(opened)} can be "
                "decoded. Where a player shows more, it is damaged or cut short: copy or record it again; else its "
                "sound is longer than its pictures, or an editor hid some of them",
                flush=True,
            )
        return OwnVideo(Path(video).stem, opened)
    return OwnVideo(Path(frames).resolve().name, open_folder(frames))


def check_place(option: str, source: str, save_dir: str) -> None:
    """Raises UserError for a video or folder that lies where the results of it, or of another, are written."""
    for kind in ("flow", "probability", "binary", *crf.FOLDERS, "overlay"):
        if (Path(save_dir) / kind).resolve() in Path(source).resolve().parents:
            raise UserError(
                f"--{option} {source}: this is among the results of --save_dir {save_dir}, which would be written over "
                "it; give another --save_dir"
            )


def run_own_flow(args: argparse.Namespace, own: OwnVideo, device: Any) -> LazyFrames:
    """Makes the flow of a user's video that is missing, in ``<save_dir>/flow/<name>``; returns its images, which the
    video keeps.

    Raises:
        As `utils.flow.prepare.video_flows`.
    """
    from utils.flow.prepare import video_flows

    hint = "; --flow_method raft is better and slower, and downloads its weights" if args.flow_method == "dis" else ""
    print(f"flow: {number_of(len(own.frames), 'frame')}, by {args.flow_method}{hint}", flush=True)
    own.flows = video_flows(args, own.frames, own.flow_dir(Path(args.save_dir)), device)
    return own.flows


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
    if not processes.is_main:
        segment.run(args, [], processes, weights)
        return
    import av  # noqa: F401  # for the overlay: where it is missing, this is to be said before the long part

    save_dir = Path(args.save_dir)
    flows = None
    if segment.needs_flow(args, weights):
        flows = own.flows or run_own_flow(args, own, processes.device)  # of the tool before, perhaps
    if args.clip_len:
        # Clips overlap by half, and each of several passes has a reader of its own, a clip ahead: whoever goes back
        # further than what is kept makes the decoder begin anew.
        several = args.flip or len(args.scales) > 1
        own.frames.window += args.clip_len * (2 if several else 1)
    pictures = [SharedFrames(each) for each in (own.frames, flows) if each is not None]
    video = Video(
        place=own.place,
        stems=own.frames.stems,
        frames=pictures[0],
        flows=pictures[1] if flows is not None else None,
        readers=READERS if all(each.in_files for each in pictures) else 1,
        sources=(*own.frames.files, *(() if flows is None else flows.files)),
        frame_files=own.frames.files,
    )
    others = remove_others(video, save_dir)
    if others:
        print(f"test: maps of {number_of(others, 'frame')} removed, which {own.name} no longer has", flush=True)

    def renewed(place: Path) -> None:
        # With the first map, as the refined maps that it shows: this call may be ended before the last.
        refined_overlay(own, save_dir).unlink(missing_ok=True)
        if written is not None:
            written(place)

    segment.run(args, [video], processes, weights, renewed)
    path = write_overlay(own, save_dir, "probability", save_dir / "overlay" / f"{own.name}.mp4")
    print(f"masks: {save_dir / 'binary' / own.name}\noverlay: {path}", flush=True)


def run_own_crf(args: argparse.Namespace, own: OwnVideo) -> None:
    """``--tools crf`` on a user's video: the refined maps, and an overlay video of them.

    Raises:
        As `utils.crf.run`; UserError also for maps of another video.
    """
    import av  # noqa: F401  # as in `run_own`

    save_dir = Path(args.save_dir)
    maps = save_dir / "probability" / own.place
    if are_of_others(maps, own.frames.stems, own.frames.files):
        raise UserError(
            f"{maps}: maps of another video than {own.name} is now (by the names and sizes of its files); --tools test "
            "crf --overwrite makes those of this one, another --save_dir keeps them beside each other"
        )
    crf.run(args, [own.for_crf()], save_dir)
    path = write_overlay(own, save_dir, "crf", refined_overlay(own, save_dir))
    print(f"masks after the CRF: {save_dir / 'crf_binary' / own.name}\noverlay: {path}", flush=True)


def refined_overlay(own: OwnVideo, save_dir: Path) -> Path:
    return save_dir / "overlay" / f"{own.name}_crf.mp4"


def write_overlay(own: OwnVideo, save_dir: Path, kind: str, path: Path) -> Path:
    """Writes the video with its maps of one kind (``probability``, ``crf``) drawn over the frames; returns its path."""
    from utils.visualise import overlay_video

    maps = (crf.load_probability(save_dir / kind / own.place / f"{stem}.png") for stem in own.frames.stems)
    with progress_bar(maps, total=len(own.frames), desc="overlay", unit="frame") as counted:
        overlay_video(path, own.frames, counted, own.frames.fps)
    return path
