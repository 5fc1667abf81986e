"""Reading flow pictures, for tests of what they show."""

from __future__ import annotations

import math

import numpy as np

from datasets.flow_colour import _COLUMNS, _decode


def image_to_flow(image: np.ndarray) -> np.ndarray:
    """Flow that a colour picture shows, in units of the frame's largest speed (which the picture does not hold).

    image: (..., 3) uint8 RGB. Returns (..., 2) float32 with speeds in [0, 1]. Colours off the wheel (JPEG, resizing)
    are read by their hue and by the spread between their largest and smallest channel.
    """
    position, spread, _ = _decode(np.asarray(image, dtype=np.float32))
    angle = (position / (_COLUMNS - 1) * 2 - 1) * math.pi
    return np.stack([-np.cos(angle), -np.sin(angle)], axis=-1).astype(np.float32) * (spread / 255)[..., None]
