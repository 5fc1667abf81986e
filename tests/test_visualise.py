"""Overlays, outlines, panels and overlay videos, against loops over pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from utils.video import VideoFrames
from utils.visualise import COLOUR, clip_panel, outline, overlay, overlay_video, panel, to_grey


@pytest.fixture()
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_overlay_tints_every_pixel_by_its_probability(rng):
    frame = rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)
    probability = rng.integers(0, 256, (5, 7), dtype=np.uint8)
    result = overlay(frame, probability, contour=False)
    assert result.dtype == np.uint8 and result.shape == frame.shape
    for y in range(5):
        for x in range(7):
            w = 0.5 * probability[y, x] / 255
            expected = [(1 - w) * frame[y, x, c] + w * COLOUR[c] for c in range(3)]
            assert np.abs(result[y, x] - np.array(expected)).max() <= 0.51


def test_overlay_of_nothing_is_the_frame(rng):
    frame = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    before = frame.copy()
    np.testing.assert_array_equal(overlay(frame, np.zeros((6, 8), bool)), frame)
    overlay(frame, np.ones((6, 8)))
    np.testing.assert_array_equal(frame, before)


def test_overlay_draws_the_outline_of_the_thresholded_mask():
    frame = np.zeros((9, 9, 3), np.uint8)
    grey = np.full((9, 9), 127, np.uint8)
    grey[2:7, 2:7] = 128
    result = overlay(frame, grey)
    ring = np.zeros((9, 9), bool)
    ring[2:7, 2:7] = True
    ring[3:6, 3:6] = False
    np.testing.assert_array_equal((result == COLOUR).all(2), ring)
    np.testing.assert_array_equal(result[~ring], overlay(frame, grey, contour=False)[~ring])
    half = np.where(grey > 127, 0.51, 0.5).astype(np.float32)
    np.testing.assert_array_equal((overlay(frame, half) == COLOUR).all(2), ring)


@pytest.mark.parametrize("thickness", [1, 2])
def test_outline_is_the_mask_within_reach_of_its_outside(rng, thickness: int):
    mask = rng.random((12, 15)) > 0.25
    expected = np.zeros_like(mask)
    for y, x in zip(*np.nonzero(mask)):
        for v, u in zip(*np.nonzero(~mask)):
            expected[y, x] |= abs(int(y) - int(v)) + abs(int(x) - int(u)) <= thickness
    np.testing.assert_array_equal(outline(mask, thickness), expected)
    assert not outline(np.ones((4, 4), bool)).any()  # the picture's border is no outline


def test_grey_follows_the_dtype():
    np.testing.assert_array_equal(to_grey(np.array([[True, False]])), [[255, 0]])
    np.testing.assert_array_equal(to_grey(np.array([[0.0, 0.5, 1.0, 1.5]])), [[0, 128, 255, 255]])
    np.testing.assert_array_equal(to_grey(np.array([[0, 1]], np.uint8)), [[0, 1]])
    for wrong in (np.array([[1]]), np.array([[np.nan]])):
        with pytest.raises(ValueError):
            to_grey(wrong)


def test_overlay_refuses_what_does_not_fit():
    frame = np.zeros((4, 6, 3), np.uint8)
    for arguments in (
        (frame, np.zeros((6, 4))),
        (frame / 255, np.zeros((4, 6))),
    ):
        with pytest.raises(ValueError):
            overlay(*arguments)


def test_panel_puts_pictures_in_rows_and_columns_under_their_captions():
    red, green = (np.full((20, 40, 3), c, np.uint8) for c in ((255, 0, 0), (0, 255, 0)))
    mask = np.ones((10, 20), bool)
    sheet = panel([{"frame": red, "vidéo 視頻": mask}, {"frame": green, "vidéo 視頻": None}], width=40)
    assert sheet.dtype == np.uint8 and sheet.ndim == 3
    height, width = sheet.shape[:2]
    assert width == 2 * 40 + 2
    caption = height - 2 * 20 - 2  # what two rows and the gap between them leave
    assert 8 <= caption <= 24
    assert (sheet[caption : caption + 20, :40] == (255, 0, 0)).all()
    assert (sheet[caption : caption + 20, 42:] == 255).all()
    assert (sheet[caption + 22 :, :40] == (0, 255, 0)).all()
    assert (sheet[caption + 22 :, 42:] == 255).all()  # the empty cell
    for column in (slice(0, 40), slice(42, 82)):
        assert (sheet[:caption, column] < 128).any(), "no caption"


def test_panel_needs_pictures():
    for rows in ([], [{}]):
        with pytest.raises(ValueError, match="no pictures"):
            panel(rows)


def test_clip_panel_takes_a_loaders_item(rng):
    frames = torch.from_numpy(rng.integers(0, 256, (5, 3, 16, 24), dtype=np.uint8))
    masks = torch.ones(5, 1, 16, 24, dtype=torch.uint8)
    valid = torch.tensor([True, True, False, True, True])
    sheet = clip_panel(frames, frames, masks, torch.zeros(5, 1, 16, 24), valid, max_frames=3, width=24)
    assert sheet.shape[1] == 4 * 24 + 3 * 2
    top = sheet.shape[0] - 3 * 16 - 2 * 2
    for row, t in enumerate((0, 2, 4)):
        cells = sheet[top + row * 18 :][:16]
        np.testing.assert_array_equal(cells[:, :24], frames[t].permute(1, 2, 0).numpy())
        np.testing.assert_array_equal(cells[:, 26:50], frames[t].permute(1, 2, 0).numpy())
        assert (cells[:, 52:76] == 255).all()  # all mask, or no label: white either way
        assert (cells[:, 78:] == 0).all()


def test_overlay_video_draws_every_frame_lazily(tmp_path: Path):
    pytest.importorskip("cv2")
    frames = [np.full((32, 48, 3), 60 + 5 * t, np.uint8) for t in range(6)]
    asked = []

    def maps():
        for t in range(6):
            asked.append(t)
            yield np.full((32, 48), 255 * (t % 2), np.uint8)

    path = tmp_path / "overlay.mp4"
    assert overlay_video(path, frames, maps(), fps=8) == 6
    assert asked == list(range(6))
    for t, frame in enumerate(VideoFrames(path)):
        grey = (60 + 5 * t,) * 3
        expected = np.add(grey, COLOUR) / 2 if t % 2 else grey
        assert np.abs(frame.mean((0, 1)) - expected).max() < 8


@pytest.mark.parametrize("count", [2, 4])
def test_overlay_video_needs_one_map_per_frame(tmp_path: Path, count: int):
    pytest.importorskip("cv2")
    frames = [np.zeros((16, 16, 3), np.uint8)] * 3
    with pytest.raises(ValueError, match="3 frames"):
        overlay_video(tmp_path / "a.mp4", frames, [np.zeros((16, 16))] * count, fps=8)
    assert list(tmp_path.iterdir()) == []
