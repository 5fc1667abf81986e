"""How flow is stored: a colour image for each frame, raw flow beside it where it is wanted, and what made them."""

from __future__ import annotations

import io
import json
import tokenize
import zipfile
import zlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from datasets.errors import DataError
from datasets.flow_colour import flow_to_image
from datasets.images import load_frame
from datasets.video_sequence import FLOW_SUFFIXES, list_files
from utils.errors import UserError
from utils.files import write_bytes, write_json

FORMATS = ("png", "jpg")
RAW_FORMATS = ("npz", "flo")
JPEG_QUALITY = 95
# Beside the images, what they were made with: going on with other settings would mix two kinds of flow in one video.
RECORD = "flow.json"
SUPPLIED = "supplied"  # in it, the stems of the images that it does not tell of
FRAME_BYTES = "frame_bytes"  # in it, the size of the file of each frame, in order: other frames need other flow
RETRY = "--overwrite makes the flow again"
_DAMAGED = (zipfile.BadZipFile, zlib.error, tokenize.TokenError)  # what a damaged .npz raises, by where it is damaged
# Readers take files of any case.
_SPELLINGS = tuple(spelling for suffix in FLOW_SUFFIXES for spelling in (suffix, suffix.upper()))


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

    def path(self, flow_dir: Path, stem: str) -> Path:
        """Where the image goes."""
        return flow_dir / f"{stem}.{self.image_format}"

    def write(self, flow_dir: Path, stem: str, flow: np.ndarray) -> None:
        """Stores one flow (H, W, 2) under ``stem``; an image of that stem in the other format is replaced."""
        for raw_format in RAW_FORMATS:  # one that is there already goes with the image, as well
            path = flow_dir / f"{stem}.{raw_format}"
            if raw_format == self.raw_format or path.is_file():
                write_raw_flow(path, flow)
        image = flow_to_image(flow)
        path = self.path(flow_dir, stem)
        # Two images of one stem would be ambiguous to a reader, hence first away with the other one.
        for suffix in _SPELLINGS:
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
            image = next((p for p in (flow_dir / f"{stem}{s}" for s in _SPELLINGS) if p.is_file()), None)
            if image is None:
                return False
            load_frame(image)  # of whatever form: raw flow of KITTI is for readers to refuse, not to be written over
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
    except (*_DAMAGED, OSError, ValueError, KeyError, EOFError) as error:
        raise DataError(f"{path}: cannot be read as raw flow ({error})") from error
    if flow.ndim != 3 or flow.shape[2] != 2:
        raise DataError(f"{path}: expected flow of shape (H, W, 2), got {flow.shape}")
    return flow


def begin_flow(flow_dir: Path, stems: Sequence[str], record: dict[str, Any]) -> None:
    """Says in `RECORD` how the flow of these frames is being made, and which images beside it were supplied. Flow that
    was made otherwise, of other frames, or supplied (``--overwrite``) goes first: after an interruption it would pass
    for the new.
    """
    path = flow_dir / RECORD
    supplied = supplied_flow(flow_dir, stems)
    before = _read_record(flow_dir)  # None: flow of unknown making
    alike = before is not None and not _differing(before, record)
    outdated = outdated_flow(flow_dir, record.get(FRAME_BYTES, {}))
    wrong = set(before.get(SUPPLIED, ())) | outdated if alike else set(stems)
    for stem in wrong & set(stems):
        for suffix in (*_SPELLINGS, *(f".{raw}" for raw in RAW_FORMATS)):
            (flow_dir / f"{stem}{suffix}").unlink(missing_ok=True)
    write_json(path, {**record, SUPPLIED: supplied} if supplied else record)


def supplied_flow(flow_dir: Path, stems: Collection[str] = ()) -> list[str]:
    """The flow images in a folder, by stem, that came from elsewhere and are of unknown making; without those of
    ``stems``, which are to be made.
    """
    there, record = _flow_stems(flow_dir), _read_record(flow_dir)
    return sorted((there if record is None else there & set(record.get(SUPPLIED, ()))) - set(stems))


def outdated_flow(flow_dir: Path, frame_bytes: dict[str, int]) -> set[str]:
    """The stems whose flow here was made of other frames than there are now, as far as `RECORD` can tell.

    Args:
        frame_bytes: the size of the file of each frame of the video, in order.
    """
    record = _read_record(flow_dir) or {}
    before, supplied = record.get(FRAME_BYTES), set(record.get(SUPPLIED, ()))
    if not isinstance(before, dict):
        return set()
    then, now = (_pairs(sizes) for sizes in (before, frame_bytes))
    return {stem for stem in then.keys() & now.keys() - supplied if then[stem] != now[stem]}


def _pairs(frame_bytes: dict[str, int]) -> dict[str, tuple]:
    """What the flow of each frame is made of: its file's size, and name and size of its partner's."""
    sizes = list(frame_bytes.items())
    partners = [*sizes[1:], *sizes[-2:-1]]  # of the last frame, the one before; a single frame has none
    return {stem: (size, *map(tuple, partners[place : place + 1])) for place, (stem, size) in enumerate(sizes)}


def kind_of_flow(flow_dir: Path) -> str:
    """How the flow in a folder was made, in a few words: alike for videos that the same options made flow of."""
    record = _read_record(flow_dir)
    if record is None:
        return "supplied"
    # Not the content of the weights, which older records do not have.
    made = [record.get(key) for key in ("method", "weights", "size", "iters")]
    words = " ".join(str(value) for value in made if value is not None)
    return f"{words} and supplied" if record.get(SUPPLIED) else words


def check_record(flow_dir: Path, wanted: dict[str, Any]) -> None:
    """Refuses a folder whose flow was made otherwise.

    Raises:
        UserError: `RECORD` says so of flow that is there and was not supplied, or cannot be read.
    """
    path, there = flow_dir / RECORD, _flow_stems(flow_dir)
    if not path.is_file() or not there:
        return  # a run that failed before its first flow leaves its record alone
    made = _read_record(flow_dir)
    if made is None:
        raise UserError(f"{path}: not a record of flow in JSON; remove it, or {RETRY}")
    differing = _differing(made, wanted)
    if differing and there - set(made.get(SUPPLIED, ())):
        raise UserError(
            f"{flow_dir}: holds flow made with other settings or of another video ("
            + ", ".join(f"{key} {made.get(key)}, now {wanted[key]}" for key in differing)
            + "); give the same options to go on with it, another place (--flow_dir, for a video of your own "
            f"--save_dir), or {RETRY}"
        )


def _differing(made: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Where a record says otherwise than is wanted. Older ones do not have the content of the weights; which frames
    there are is for `outdated_flow`.
    """
    return [
        key
        for key in wanted
        if made.get(key) != wanted[key] and key != FRAME_BYTES and (key in made or key != "weights_sha256")
    ]


def _flow_stems(flow_dir: Path) -> set[str]:
    return {path.stem for path in list_files(flow_dir, FLOW_SUFFIXES)}


def _read_record(flow_dir: Path) -> dict[str, Any] | None:
    """None where there is none, or none that can be read."""
    try:
        record = json.loads((flow_dir / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None
