"""Reading frames, flow images and masks from disk, with an error that names the file whatever is wrong with it.

EXIF orientation is ignored: annotations and flow were made for the pixels as they are stored, and turning the frame
alone would unpair them. Truncated files are errors; they are never filled up with grey.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from datasets.errors import DataError
from datasets.video_sequence import MASK_SUFFIXES, list_files, object_folders

MASK_RULES = ("nonzero", "above_128", "objects", "fbms")

VOID = 255  # palette index

_MARPLE2_BACKGROUND = 102  # 0.4 · 255
_FORMATS = ("JPEG", "PNG", "PPM", "BMP", "WEBP", "TIFF")
_NETPBM_HEADER = re.compile(rb"P([2356])" + 3 * rb"(?:\s+|#[^\n]*\n)+(\d+)" + rb"\s")  # width, height, maximum
# What Pillow raises for files that it cannot decode.
DECODING_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
_DEEP_MODES = ("I", "I;16", "I;16B", "I;16L", "F")

# Grey levels of a picture that shows nothing: no motion in a flow image (white), and nothing to see in a frame.
NO_MOTION, NO_PICTURE = 255, 128


def require_file(path: Path, what: str) -> None:
    """Raise DataError unless there is a file; ``what`` it would be, such as a frame."""
    if not path.is_file():
        link = f", but a link to {os.readlink(path)}, which is not there" if path.is_symlink() else ""
        raise DataError(f"{path}: no such {what}{link}; expected an image file there")


def _open(path: Path | str, what: str) -> Image.Image:
    """The decoded image, in the mode that it is stored in."""
    path = Path(path)
    require_file(path, what)
    try:
        with Image.open(path, formats=_FORMATS) as image:
            image.load()
            return image
    except DECODING_ERRORS as error:
        size = path.stat().st_size if path.is_file() else 0
        raise DataError(
            f"{path}: cannot read this {what} ({size} bytes): {str(error) or type(error).__name__}. "
            "Expected a whole JPEG, PNG, PPM/PGM, BMP, TIFF or WebP file; copy or unpack it again"
        ) from error


def _load_rgb(path: Path | str, what: str) -> np.ndarray:
    image = _open(path, what)
    if image.mode in _DEEP_MODES:
        raise DataError(
            f"{path}: this {what} has more than 8 bits per channel (mode {image.mode}); expected 8-bit RGB or grey. "
            "Save all of the video as 8-bit images"
        )
    if image.mode != "RGB":
        image = image.convert("RGB")
    return np.array(image)


def load_frame(path: Path | str) -> np.ndarray:
    """A video frame as (H, W, 3) uint8 RGB; grey, palette, CMYK and alpha are converted. Raises DataError."""
    return _load_rgb(path, "frame")


def load_flow_image(path: Path | str) -> np.ndarray:
    """A flow image (colour wheel) as (H, W, 3) uint8 RGB, at its own size. Raises DataError."""
    image = _load_rgb(path, "flow image")
    _refuse_16_bits(
        path,
        "flow image, as in KITTI's form of raw flow; expected the colour wheel image of the flow, which --tools flow "
        "makes where there is no file",
    )
    return image


def _refuse_16_bits(path: Path | str, what: str) -> None:
    """Raise DataError for a colour PNG of 16 bits per channel, of which Pillow drops the lower 8 without a word."""
    with open(path, "rb") as file:
        head = file.read(26)  # signature, then length, type, width, height, bits and kind of the first chunk
    if head.startswith(b"\x89PNG") and head[12:16] == b"IHDR" and head[24] == 16 and head[25] != 0:
        raise DataError(f"{path}: 16 bits per channel in this {what}")


def decode_reduced(
    path: Path | str, target_of: Callable[[tuple[int, int]], tuple[int, int]]
) -> tuple[Image.Image, tuple[int, int], tuple[float, float, float, float]]:
    """An image as RGB, a JPEG at half or a quarter of its size where that is enough, which saves most of the time.

    Args:
        target_of: the size (H, W) that is needed, of the image's own.

    Returns the image, its own size (H, W), and the box (left, top, right, bottom) of what was decoded that is the
    image: its last reduced pixels hold more where the sides are no multiples of the reduction.

    Raises one of `DECODING_ERRORS` for a file that cannot be read.
    """
    with Image.open(path) as picture:
        full = (picture.height, picture.width)
        height, width = target_of(full)
        drafted = picture.draft("RGB", (width, height))
        picture = picture.convert("RGB")
    return picture, full, drafted[1] if drafted else (0, 0, *picture.size)


def image_size(path: Path | str) -> tuple[int, int]:
    """(height, width) from the header of an image, without decoding it. Raises DataError."""
    path = Path(path)
    try:
        with Image.open(path, formats=_FORMATS) as image:
            return image.height, image.width
    except FileNotFoundError:
        raise DataError(f"{path}: no such image") from None
    except DECODING_ERRORS as error:
        raise DataError(f"{path}: not a readable image: {str(error) or type(error).__name__}") from error


def require_size(path: Path | str, size: tuple[int, ...], expected: tuple[int, ...], reference: Path | str) -> None:
    """Raise DataError unless an image has the height and width of the image that it belongs to.

    Args:
        path: the image in question.
        size: its shape; the first two numbers are height and width.
        expected: shape of the reference, likewise.
        reference: the image that sets the size, in most cases the frame.
    """
    if tuple(size[:2]) != tuple(expected[:2]):
        raise DataError(
            f"{path}: {size[1]}×{size[0]} pixels (width × height); expected {expected[1]}×{expected[0]}, the size of "
            f"{reference}. Take both from the same release and resolution of the data set"
        )


def load_mask_values(path: Path | str) -> tuple[np.ndarray, str]:
    """The values that an annotation stores, before any rule.

    Returns:
        values: (H, W) or (H, W, 3), uint8, or int32 for 16-bit files; palette indices of indexed images, 0/1 of 1-bit
            ones.
        mode: "1", "P", "L", "RGB" or "I": 1-bit, indexed, grey, colour, more than 8 bits.
    """
    image = _open(path, "mask")
    _refuse_16_bits(path, "mask; expected 1-bit, 8-bit, 16-bit grey or indexed. Save it as 8-bit PNG")
    if image.mode in ("LA", "RGBA"):
        *colours, (faintest, strongest) = image.getextrema()
        if faintest < strongest and all(low == high for low, high in colours):
            raise DataError(
                f"{path}: a mask of one colour, whose object is in the transparency alone; expected values: save the "
                "alpha channel as a grey PNG"
            )
    if image.mode in ("LA", "PA", "La"):
        image = image.convert("L")
    elif image.mode in ("RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "RGBa"):
        image = image.convert("RGB")
    if image.mode == "F":
        raise DataError(f"{path}: a mask of floating-point values; expected 1-bit, 8-bit, 16-bit or indexed")
    if image.mode in _DEEP_MODES:
        return np.array(image).astype(np.int32), "I"
    return np.array(image, dtype=np.uint8), image.mode


def void_pixels(path: Path | str, values: np.ndarray, mode: str) -> np.ndarray | None:
    """Where an annotation says that nobody could tell which object it is, bool (H, W); None where it says nothing such.

    That is index 255 beside other objects in an image of a coloured palette, as in DAVIS-2017's unsupervised
    annotations, whose own evaluation takes these pixels out of the objects, too. Greys are none, and a mask of the
    indices 0 and 255 alone is a binary one.

    Args:
        values, mode: what `load_mask_values` read from `path`.
    """
    if mode != "P" or values.max(initial=0) < VOID or not ((values > 0) & (values < VOID)).any():
        return None
    return values == VOID if is_coloured(palette_colours(path)) else None


def palette_colours(path: Path | str) -> np.ndarray:
    """The colours of an indexed mask, (H, W, 3)."""
    return np.asarray(_open(path, "mask").convert("RGB"))


def is_coloured(colours: np.ndarray) -> bool:
    """Whether any pixel of (H, W, 3) is no grey."""
    return bool((colours != colours[..., :1]).any())


def load_mask(path: Path | str, rule: str = "nonzero") -> np.ndarray:
    """An annotation as (H, W) uint8 in {0, 1}; all objects merged into one foreground.

    Rules:
        "nonzero": DAVIS, YouTube-VOS. Any palette index, grey value or colour other than 0 is foreground, but for
            `void_pixels`, which are background.
        "above_128": binary PNG of the VSOD releases. Grey value > 128, as their evaluation does. Three readings of
            ours, where that would lose the mask: a 1-bit image is taken as it is, an image of a coloured palette by
            its index > 0, and a grey image of only 0 and 1 as a 0/1 mask.
        "objects": the file of one object, in a folder of its own; read as above and merged with the files of this stem
            in the folders of the other objects.
        "fbms": native ground truth of FBMS-59 (.ppm, .pgm), see `_fbms_foreground`.

    Raises:
        DataError: the file is missing or unreadable, or has a form that the rule does not cover.
    """
    if rule not in MASK_RULES:
        raise DataError(f"mask rule {rule!r} is unknown; expected one of {', '.join(MASK_RULES)}")
    path = Path(path)
    if rule == "fbms":
        foreground = _fbms_foreground(path)
    elif rule == "nonzero":
        values, mode = load_mask_values(path)
        foreground = values > 0 if values.ndim == 2 else (values > 0).any(axis=2)
        void = void_pixels(path, values, mode)
        if void is not None:
            foreground &= ~void
    elif rule == "objects":
        foreground = _any_object(path)
    else:
        foreground = _above_128(path)
    return foreground.astype(np.uint8)


def _any_object(path: Path) -> np.ndarray:
    foreground = _above_128(path)
    for folder in object_folders(path.parent.parent):
        for other in list_files(folder, MASK_SUFFIXES):
            if other.stem == path.stem and other != path:  # there is none where the object has no mask of this frame
                mask = _above_128(other)
                require_size(other, mask.shape, foreground.shape, path)
                foreground |= mask
    return foreground


def grey_values(colours: np.ndarray) -> np.ndarray:
    """The grey values (H, W) by which "above_128" reads colours (H, W, 3) uint8."""
    return np.asarray(Image.fromarray(colours).convert("L"))


def _above_128(path: Path) -> np.ndarray:
    values, mode = load_mask_values(path)
    if mode == "I":
        raise DataError(f"{path}: a 16-bit mask; expected 8 bits, foreground above 128")
    if mode == "1":
        return values > 0
    if mode == "P":
        colours = palette_colours(path)  # instead of indices
        return values > 0 if is_coloured(colours) else colours[..., 0] > 128
    if mode == "RGB":
        values = grey_values(values)
    return values > (0 if values.max(initial=0) == 1 else 128)


def _read_netpbm(path: Path) -> np.ndarray:
    """The stored values of a .pgm (H, W) or .ppm (H, W, 3), int32.

    PIL stretches the values to 0 … 255 where the header states another maximum, which would change region colours.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: no such mask, or not to be read: {error}") from error
    header = _NETPBM_HEADER.match(data)
    if header is None:
        raise DataError(f"{path}: not a .pgm or .ppm image; expected FBMS-59's own ground truth. Unpack it again")
    kind, width, height, maximum = (int(header[group]) for group in (1, 2, 3, 4))
    shape = (height, width, 3) if kind in (3, 6) else (height, width)
    body = data[header.end() :]
    if kind in (2, 3):  # as text
        numbers = body.split()
        values = np.array([int(number) for number in numbers if number.isdigit()], dtype=np.int32)
    else:
        depth = 2 if maximum > 255 else 1  # bytes per value
        values = np.frombuffer(body, dtype=f">u{depth}", count=len(body) // depth)
    if len(values) < np.prod(shape):
        raise DataError(f"{path}: truncated: {len(values)} of {np.prod(shape)} values. Copy or unpack it again")
    return values[: np.prod(shape)].astype(np.int32).reshape(shape)


@lru_cache(maxsize=256)
def fbms_regions(definition: Path) -> tuple[int, ...]:
    """Region colours of an FBMS definition file (`<sequence>Def.dat`), R·65536 + G·256 + B, the background's first.

    Raises DataError where the file is not of that form.
    """
    text = definition.read_text(encoding="latin-1")
    count = re.search(r"Total number of regions:\s*(\d+)", text)
    scales = {int(region): int(colour) for region, colour in re.findall(r"Scale of region (\d+):\s*(\d+)", text)}
    regions = range(int(count[1])) if count else range(0)
    if len(regions) < 1 or any(region not in scales for region in regions):
        raise DataError(
            f"{definition}: not an FBMS definition file; expected 'Total number of regions:', the number, and then "
            "'Scale of region 0:' and so on, each with a colour. Unpack the ground truth again"
        )
    return tuple(scales[region] for region in regions)


def _fbms_foreground(path: Path) -> np.ndarray:
    """Foreground of a native FBMS-59 annotation, as bool (H, W).

    With the definition file beside it, what its table lists after the first region is foreground. A colour that the
    table lacks (`cats04_0020_gt.ppm` has one) is background, as in the official evaluation. Without the file,
    foreground is what is not the usual background: white in a .ppm, black in a .pgm. Public
    binarisations of the set take the grey values of marple2 up to 0.4 of white as background, and so does this one, to
    be comparable with them.
    """
    values = _read_netpbm(path)
    definitions = list_files(path.parent, (".dat",))
    if len(definitions) > 1:
        raise DataError(f"{path.parent}: {len(definitions)} definition files (.dat); expected one per sequence")
    if values.ndim == 3:
        values = values @ np.array([65536, 256, 1], dtype=np.int32)  # (H, W, 3) -> (H, W)
        background = 0xFFFFFF
    else:
        background = 0
    if definitions:
        regions = fbms_regions(definitions[0])
        if not np.isin(values, regions).any():
            raise DataError(
                f"{path}: no pixel has a colour of the table in {definitions[0].name} ({', '.join(map(str, regions))}, "
                "as red · 65536 + green · 256 + blue), so the mask would be empty; expected the definition of this "
                "video. Unpack the ground truth again; without the .dat, all but the usual background is foreground"
            )
        foreground = np.isin(values, regions[1:])
    else:
        foreground = values != background
    if path.name.startswith("marple2_"):
        foreground &= values > _MARPLE2_BACKGROUND
    return foreground


class LazyImages(Sequence[np.ndarray]):
    """Images of a video, decoded from their files when asked for; none is kept.

    Args:
        paths: one per frame.
        load: `load_frame` or `load_flow_image`.

    Indexing raises DataError naming the file: missing, damaged, or of another size than the first.
    """

    def __init__(self, paths: Sequence[Path], load: Callable[[Path], np.ndarray]) -> None:
        self.paths, self.load = tuple(paths), load
        self._size: tuple[int, int] | None = None  # of the first, read when the first image is asked for

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> np.ndarray:  # type: ignore[override]
        image = self.load(self.paths[index])
        if self._size is None:
            self._size = image_size(self.paths[0])
        require_size(self.paths[index], image.shape, self._size, self.paths[0])
        return image
