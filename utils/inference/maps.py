"""The maps of `--tools test`, with what they were made with inside, so that a later run knows which to keep."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from datasets.images import DECODING_ERRORS
from utils.crf import FOLDERS as REFINED
from utils.crf import MAP
from utils.evaluation.scoring import THRESHOLD
from utils.files import is_whole_png, write_png
from utils.inference.videos import Video

# Text field of the probability maps: what they were made with, so that a later run knows which of them it may keep.
FIELD = "dbsnet-test"
# What differs from video to video of one run, or from frame to frame.
OF_A_VIDEO = ("frames", "resized", "sources", MAP)
# What `shape_seen` gives.
IN_OWN_SHAPE, STRETCHED = "in their own", "stretched, by --size or an older version"


def write_maps(video: Video, save_dir: Path, stem: str, probability: np.ndarray, settings: dict[str, Any]) -> None:
    """Writes both maps of one frame. The grey one, which says what it was made with, comes last: it vouches for both.

    An older one goes first: after a stop between the two it would vouch for the new mask. What the CRF made of it is
    removed as well: it would be scored beside the new ones.

    Args:
        probability: (H, W) float in [0, 1].
    """
    for kind in (*REFINED, "probability"):
        (save_dir / kind / video.place / f"{stem}.png").unlink(missing_ok=True)
    grey = np.rint(np.clip(probability, 0, 1) * 255).astype(np.uint8)
    # Level 1: on maps the files are hardly larger, and writing them takes a third of the time.
    write_png(video.binary(save_dir, stem), (grey > THRESHOLD) * np.uint8(255), compress_level=1)
    write_png(video.probability(save_dir, stem), grey, (FIELD, settings), compress_level=1)


def remove_others(video: Video, save_dir: Path) -> int:
    """Removes the maps that `write_maps` made of frames which the video does not have, with what the CRF made of them;
    returns of how many frames. A video file may be replaced by a shorter one of the same name.
    """
    there, known = sorted((save_dir / "probability" / video.place).glob("*.png")), set(video.stems)
    gone = [path.stem for path in there if path.stem not in known and made_with(path) is not None]
    for stem in gone:
        for kind in (*REFINED, "binary", "probability"):  # what says who made them comes last
            (save_dir / kind / video.place / f"{stem}.png").unlink(missing_ok=True)
    return len(gone)


def is_current(video: Video, save_dir: Path, settings: dict[str, Any]) -> bool:
    """Whether all maps of a video are there, whole, and were made with these settings, the files of frames and flow
    (`fingerprint`) among them, which say as much as what older maps do not hold.
    """
    implied = {key: settings[key] for key in ("frames", "flow") if key in settings}

    def current(stem: str) -> bool:
        path = video.probability(save_dir, stem)
        made = made_with(path) if is_whole_png(video.binary(save_dir, stem)) and is_whole_png(path) else None
        return made is not None and implied | made == settings

    return all(current(stem) for stem in video.stems)


def are_of_others(folder: Path, stems: Sequence[str], frames: Sequence[Path]) -> bool:
    """Whether probability maps in a folder were made of other frames than these files, by their names and sizes; older
    maps do not tell. Each is looked at: a run that was stopped has made the first ones anew and left the others.
    """
    now = fingerprint(frames, times=False)
    return any((made_with(folder / f"{stem}.png") or {}).get("frames", now) != now for stem in stems)


def fingerprint(paths: Sequence[Path], times: bool = True) -> str:
    """Of files, by their names, sizes and times: another file under the same name gives another, older or newer.
    Without times, copies have the same.
    """
    known = hashlib.sha256()
    for path in paths:
        if path.exists():
            status = path.stat()
            known.update(f"{path.name} {status.st_size}{f' {status.st_mtime_ns}' if times else ''}\n".encode())
    return known.hexdigest()[:16]


def made_with(path: Path, field: str = FIELD) -> dict[str, Any] | None:
    """The settings that a map was made with; None where there is no such file, or it does not say."""
    return notes(path, field)[0].get(field)


def notes(path: Path, *fields: str) -> tuple[dict[str, Any], tuple[int, int]]:
    """What a map says of how it was made, by field, without those that it does not have; and its (H, W), (0, 0) where
    there is no such image.
    """
    try:
        with Image.open(path) as image:
            return {field: json.loads(image.info[field]) for field in fields if field in image.info}, image.size[::-1]
    except DECODING_ERRORS:
        return {}, (0, 0)


def shape_seen(made: dict[str, Any], frame: tuple[int, int]) -> str | None:
    """How the network saw a video that has another shape than the size, in words for a user; None for a video that has
    the shape of the size, or where the map does not say.

    Args:
        made: as `made_with` gives it.
        frame: (H, W) of the map.
    """
    if "resized" in made:
        return IN_OWN_SHAPE
    from models import input_size

    size = made.get("size")
    return STRETCHED if size is not None and input_size(frame, tuple(size)) != tuple(size) else None


def of_run(made: dict[str, Any]) -> dict[str, Any]:
    """What `made_with` gives, as far as it is alike for all maps of a run: without which files a video is made of, the
    size that its own shape asked for, and which map of a frame the CRF refined.
    """
    return {key: value for key, value in made.items() if key not in OF_A_VIDEO}
