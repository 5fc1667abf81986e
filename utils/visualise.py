"""Pictures to look at: a mask over its frame, a captioned grid for TensorBoard and the report, an overlay video.

Images are uint8 RGB. Only numpy and Pillow are needed, and PyAV for `overlay_video`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from utils.video import write_video

# Orange: seldom a colour of nature, and told from both red and green by colour-blind eyes.
COLOUR = (255, 120, 0)
_CAPTION_HEIGHT = 14
_GAP = 2
_BACKGROUND, _INK = 255, (40, 40, 40)


def overlay(frame: np.ndarray, probability: np.ndarray, contour: bool = True) -> np.ndarray:
    """The frame, tinted by half the probability, with the mask's outline drawn; (H, W, 3) uint8.

    Args:
        frame: (H, W, 3) uint8 RGB.
        probability: (H, W), bool, uint8 in 0…255, or float in [0, 1]. The outline is of uint8 > 127 or float > 0.5.
        contour: draws the pixels of the mask that touch its outside, about 1/300 of the frame's height thick.

    Raises:
        ValueError: shapes that do not fit.
    """
    frame = np.asarray(frame)
    if frame.ndim != 3 or frame.shape[2] != 3 or frame.dtype != np.uint8:
        raise ValueError(f"expected a frame (H, W, 3) of uint8, got {frame.dtype} of shape {frame.shape}")
    if np.shape(probability) != frame.shape[:2]:
        raise ValueError(f"expected a map of the frame's size {frame.shape[:2]}, got {np.shape(probability)}")
    grey = to_grey(probability)
    result = frame.copy()
    if not grey.any():
        return result
    (top, bottom), (left, right) = (_extent(grey.any(axis)) for axis in (1, 0))
    part = slice(top, bottom), slice(left, right)  # most of a frame lies beyond it, where nothing is drawn
    weight = (0.5 / 255 * grey[part].astype(np.float32))[..., None]  # (h, w, 1)
    result[part] = np.rint(frame[part] * (1 - weight) + np.array(COLOUR, np.float32) * weight).astype(np.uint8)
    if contour:
        inside = np.asarray(probability)[part]
        mask = inside > 127 if inside.dtype == np.uint8 else inside.astype(np.float32) > 0.5
        result[part][outline(mask, max(1, round(frame.shape[0] / 300)))] = COLOUR
    return result


def _extent(marked: np.ndarray) -> tuple[int, int]:
    """First and last place that is marked, with one more on each side that has one, the last not included; some are."""
    places = np.flatnonzero(marked)
    return max(0, int(places[0]) - 1), min(len(marked), int(places[-1]) + 2)


def outline(mask: np.ndarray, thickness: int = 1) -> np.ndarray:
    """Pixels of a mask (H, W) within ``thickness`` steps up, down, left or right of its outside; (H, W) bool.

    The picture's border does not count as outside, so an object that leaves it has no line along it.
    """
    mask = np.asarray(mask, bool)
    inner = mask
    for _ in range(thickness):
        padded = np.pad(inner, 1, mode="edge")
        inner = inner & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask & ~inner


def to_grey(image: np.ndarray) -> np.ndarray:
    """(H, W) as uint8: bool becomes 0 and 255, float in [0, 1] is multiplied by 255, uint8 stays as it is.

    A mask of 0 and 1 is therefore nearly black: give it as bool (``mask > 0``).

    Raises:
        ValueError: another dtype, or floats that are not finite.
    """
    image = np.asarray(image)
    if image.dtype == np.bool_:
        return image.astype(np.uint8) * np.uint8(255)
    if image.dtype == np.uint8:
        return image
    if np.issubdtype(image.dtype, np.floating):
        if not np.isfinite(image).all():
            raise ValueError("an image of floats that are not finite")
        return np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)
    raise ValueError(f"expected bool, uint8 or float, got {image.dtype}")


def panel(rows: Sequence[Mapping[str, np.ndarray | None]], width: int = 224) -> np.ndarray:
    """A grid of pictures: one row per mapping, one column per key, keys as captions on top; (H', W', 3) uint8.

    Args:
        rows: e.g. ``{"frame": …, "flow": …, "mask": …, "prediction": …}``, each (H, W, 3) uint8 RGB or (H, W) as
            `to_grey` reads it; None, or a key that a row lacks, leaves the cell empty.
        width: of a column, in pixels. A row is as high as the tallest of its pictures at that width.

    Raises:
        ValueError: no rows or no pictures.
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    if not columns:
        raise ValueError("a panel of no pictures")

    cells: list[list[Image.Image | None]] = []
    for row in rows:
        cells.append([None if row.get(key) is None else _fit(row[key], width, key) for key in columns])
    heights = [max((cell.height for cell in line if cell is not None), default=_CAPTION_HEIGHT) for line in cells]
    total_width = len(columns) * (width + _GAP) - _GAP
    total_height = _CAPTION_HEIGHT + sum(height + _GAP for height in heights) - _GAP

    sheet = Image.new("RGB", (total_width, total_height), (_BACKGROUND,) * 3)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()

    for column, key in enumerate(columns):
        # Pillow's own font, which is always there, may know ASCII only.
        text = key.encode("ascii", "replace").decode("ascii")
        draw.text((column * (width + _GAP) + 2, 1), text, fill=_INK, font=font)
    y = _CAPTION_HEIGHT
    for line, height in zip(cells, heights):
        for column, cell in enumerate(line):
            if cell is not None:
                sheet.paste(cell, (column * (width + _GAP), y))
        y += height + _GAP
    return np.array(sheet)


def _fit(image: Any, width: int, key: str) -> Image.Image:
    image = np.asarray(image)
    if image.ndim == 2:
        image = np.repeat(to_grey(image)[..., None], 3, axis=2)
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"{key}: expected (H, W) or (H, W, 3) of uint8, got {image.dtype} of shape {image.shape}")
    height = max(1, round(image.shape[0] * width / image.shape[1]))
    return Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)


def clip_panel(
    frames: Any, flows: Any, masks: Any, probabilities: Any, valid: Any = None, max_frames: int = 4, width: int = 224
) -> np.ndarray:
    """`panel` of one clip as the loaders give it: frame, flow, mask and prediction, a row per frame.

    Args:
        frames, flows: (T, 3, H, W) uint8, tensors on the CPU or arrays.
        masks: (T, 1, H, W) of 0 and 1.
        probabilities: (T, 1, H, W) float in [0, 1], the sigmoid of the logits.
        valid: (T,) bool; frames without a label show no mask.
        max_frames: as many frames, spread evenly over the clip.
    """
    frames, flows, masks = (np.asarray(x) for x in (frames, flows, masks))
    probabilities = np.asarray(probabilities, dtype=np.float32)
    count = len(frames)
    chosen = np.unique(np.linspace(0, count - 1, min(count, max_frames)).round().astype(int))
    rows = [
        {
            "frame": frames[t].transpose(1, 2, 0),  # (3, H, W) -> (H, W, 3)
            "flow": flows[t].transpose(1, 2, 0),
            "mask": masks[t, 0] > 0 if valid is None or bool(valid[t]) else None,
            "prediction": probabilities[t, 0],
        }
        for t in chosen
    ]
    return panel(rows, width)


def overlay_video(
    path: str | os.PathLike[str],
    frames: Sequence[np.ndarray],
    probabilities: Iterable[np.ndarray],
    fps: float,
) -> int:
    """Writes a video of the frames with their masks over them, and returns its number of frames.

    Args:
        path: of the video, ending in .mp4.
        frames: (H, W, 3) uint8 RGB each.
        probabilities: one map per frame, in order, as `overlay` takes it; drawn from as the video is written, so it may
            be a generator that segments.

    Raises:
        ValueError: more or fewer maps than frames. Otherwise as `overlay` and `utils.video.write_video`.
    """

    def pictures() -> Iterator[np.ndarray]:
        count = 0
        for count, probability in enumerate(probabilities, start=1):
            if count > len(frames):
                raise ValueError(f"more probability maps than the {len(frames)} frames")
            yield overlay(frames[count - 1], probability)
        if count != len(frames):
            raise ValueError(f"{count} probability maps for {len(frames)} frames")

    return write_video(path, pictures(), fps)
