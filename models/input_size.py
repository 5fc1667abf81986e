"""The size that a video is resized to for the network: the video keeps its shape."""

from __future__ import annotations

MOST_STRETCH = 1.1  # a size is used as it is up to this; 384×640, the field's for 16:9, stretches 480×854 by 1.07


def input_size(frame: tuple[int, int], size: tuple[int, int], multiple: int = 32) -> tuple[int, int]:
    """A size for the network's input in the shape of a video's frames, with about as many pixels as `size` has.

    `size` itself where it stretches frames by at most `MOST_STRETCH`, or `size` turned where that is so for an upright
    video; else the one in the frames' shape with the area of `size`, each side rounded to the network's multiple. By
    that rounding frames may still be stretched a little: around 384×640 by no more than `MOST_STRETCH` up to 1:6, and
    narrower strips, of whose short side few multiples are left, by more (1.13 at 1:15).

    Our reading: the paper names one size, and does not say what becomes of videos of other shapes. Networks learn the
    shapes of objects from frames that are not stretched, and the colours of a flow image stand for directions, which
    stretching changes.

    Args:
        frame: (H, W) of the frames.
        size: (H, W) that the network was trained or is meant for.
        multiple: what the network pads its input to (`DBSNet.multiple`).
    """
    (height, width), (h, w) = frame, size
    if (height - width) * (h - w) < 0:
        h, w = w, h
    stretch = (height / width) / (h / w)
    if 1 / MOST_STRETCH <= stretch <= MOST_STRETCH:
        return h, w
    area, shape = h * w, height / width
    sides = ((area * shape) ** 0.5, (area / shape) ** 0.5)
    height, width = (max(multiple, round(side / multiple) * multiple) for side in sides)
    return height, width
