"""Still images with an object mask, as salient-object data sets publish them: material for synthetic clips."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from datasets.errors import DataError
from datasets.images import DECODING_ERRORS
from datasets.video_sequence import Report, by_stem, list_files, raise_problem

STILL_SETS = ("DUTS-TR",)

_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp")


@dataclass(frozen=True)
class StillImage:
    """An image and the file of its object mask (object at least 128, same size)."""

    name: str
    image: Path
    mask: Path


def has_stills(data_dir: str | Path, name: str = "DUTS-TR") -> bool:
    """Whether a set has its folder there, whatever that holds."""
    *own, itself = _candidates(Path(data_dir), name)
    return any(folder.is_dir() for folder in (*own, itself / f"{name}-Image"))


def _candidates(root: Path, name: str) -> list[Path]:
    return [root / name, root / "DUTS" / name, root / name / name, root]


def read_stills(data_dir: str | Path, name: str = "DUTS-TR", report: Report = raise_problem) -> list[StillImage]:
    """Pairs of a still-image set in its native layout: `<name>/<name>-Image/*.jpg`, `<name>/<name>-Mask/*.png`.

    data_dir: a folder that holds `<name>`, or (as the official archive also unpacks) `DUTS/<name>` or `<name>/<name>`,
    or that is the set itself. Pairs by file stem, sorted. Nothing is decoded. Raises DataError where the folders are
    not found or hold no image. `report` is told where images have no mask and where two files share a stem, and raises
    by default; if it returns, the images are left out, and the first of the files is taken.
    """
    candidates = _candidates(Path(data_dir), name)
    folder = next((c for c in candidates if (c / f"{name}-Image").is_dir()), None)
    if folder is None:
        looked = ", ".join(str(c / f"{name}-Image") for c in candidates)
        raise DataError(f"{name}: no image folder; looked for {looked}. Give the folder that holds {name}/.")
    image_dir, mask_dir = folder / f"{name}-Image", folder / f"{name}-Mask"
    if not mask_dir.is_dir():
        raise DataError(f"{name}: {mask_dir} is missing; the masks of {image_dir} are expected there")
    masks = by_stem(list_files(mask_dir, _IMAGE_SUFFIXES), "", report)
    images = sorted(by_stem(list_files(image_dir, _IMAGE_SUFFIXES), "", report).values())
    without = [p for p in images if p.stem not in masks]
    if without:
        message = (
            f"{name}: {len(without)} of {len(images)} images have no mask of the same stem in {mask_dir}; "
            f"the first is {without[0]}"
        )
        report("", DataError(message))
    if not images:
        raise DataError(f"{name}: no images in {image_dir}")
    return [StillImage(p.stem, p, masks[p.stem]) for p in images if p.stem in masks]


def open_mask(still: StillImage) -> Image.Image:
    """The mask of a still as a grey picture, of its own size; what is at least 128 is the object. Raises DataError."""
    try:
        with Image.open(still.mask) as mask:
            return mask.convert("L")
    except DECODING_ERRORS as error:
        raise DataError(f"{still.mask}: cannot be read as an image ({error}); replace or remove it") from error
