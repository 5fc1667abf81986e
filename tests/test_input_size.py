"""The size that a video is resized to keeps the video's shape."""

from __future__ import annotations

import math

import pytest

from models import input_size
from models.input_size import MOST_STRETCH


def stretch(frame: tuple[int, int], size: tuple[int, int]) -> float:
    return math.exp(abs(math.log((frame[0] / frame[1]) / (size[0] / size[1]))))


@pytest.mark.parametrize("size", [(384, 640), (384, 672), (480, 864)])
def test_no_shape_is_stretched_and_none_costs_much_more(size: tuple[int, int]) -> None:
    for width in range(40, 301):  # 1:2.5 to 3:1
        for frame in ((100, width), (width, 100)):
            found = input_size(frame, size)
            assert stretch(frame, found) <= MOST_STRETCH * 1.001
            assert 0.9 < math.prod(found) / math.prod(size) < 1.1
            assert found == size[::-1] or found == size or not any(side % 32 for side in found)
            assert input_size(frame[::-1], size) == found[::-1]


def test_the_field_s_videos_are_seen_at_the_size_that_is_given() -> None:
    for frame in ((480, 854), (360, 640), (540, 960), (720, 1280), (1080, 1920), (384, 672), (480, 910)):
        assert input_size(frame, (384, 672)) == (384, 672)
        assert input_size(frame[::-1], (384, 672)) == (672, 384)
    assert input_size((480, 854), (384, 640)) == (384, 640)
    assert input_size((473, 473), (473, 473)) == (473, 473)  # no multiple of 32: it is used as it is, and padded


def test_sides_are_the_network_s_multiples_and_never_nothing() -> None:
    assert input_size((480, 640), (384, 640), multiple=64) == (448, 576)
    assert input_size((10, 1000), (32, 64)) == (32, 448)
