"""J, F and their statistics against brute force, hand-made cases, and DAVIS's own published figures."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from utils.evaluation import metrics
from utils.evaluation.metrics import (
    boundary_f,
    boundary_map,
    boundary_radius,
    jaccard,
    jaccard_and_boundary_f,
    sequence_statistics,
)
from utils.evaluation.published import DAVIS_SEQUENCES, PUBLISHED, on_sequences

SHAPE = (480, 854)


def box(top: int, bottom: int, left: int, right: int) -> np.ndarray:
    mask = np.zeros(SHAPE, dtype=bool)
    mask[top:bottom, left:right] = True
    return mask


GT = box(100, 300, 200, 500)
EMPTY, FULL = np.zeros(SHAPE, dtype=bool), np.ones(SHAPE, dtype=bool)


@pytest.mark.parametrize(
    ("pred", "gt", "j", "f"),
    [
        pytest.param(GT, GT, 1.0, 1.0, id="identical"),
        pytest.param(EMPTY, EMPTY, 1.0, 1.0, id="both-empty"),
        pytest.param(GT, EMPTY, 0.0, 0.0, id="gt-empty"),
        pytest.param(EMPTY, GT, 0.0, 0.0, id="pred-empty"),
        pytest.param(FULL, GT, 0.146370, 0.0, id="full"),
        pytest.param(FULL, EMPTY, 0.0, 1.0, id="full-against-empty"),  # the frame of the image is no contour
        pytest.param(box(108, 308, 208, 508), GT, 0.876877, 0.985000, id="shift-8"),
        pytest.param(box(109, 309, 209, 509), GT, 0.862804, 0.034000, id="shift-9"),
        pytest.param(box(100, 300, 200, 350), GT, 0.5, 0.608235, id="left-half"),
    ],
)
def test_hand_made_cases(pred, gt, j, f):
    assert jaccard(pred, gt) == pytest.approx(j, abs=1e-6)
    assert boundary_f(pred, gt) == pytest.approx(f, abs=1e-6)
    assert jaccard_and_boundary_f(pred, gt) == (jaccard(pred, gt), boundary_f(pred, gt))


def test_boundary_map_of_a_small_box():
    mask = np.zeros((4, 5), dtype=bool)
    mask[1:3, 1:4] = True
    expected = [[1, 1, 1, 1, 0], [1, 0, 0, 1, 0], [1, 1, 1, 1, 0], [0, 0, 0, 0, 0]]
    np.testing.assert_array_equal(boundary_map(mask), np.array(expected, dtype=bool))
    assert not boundary_map(np.ones((4, 5), dtype=bool)).any()


def brute_boundary(mask: np.ndarray) -> np.ndarray:
    """Pixel by pixel, as the definition reads: the three neighbours, and the three exceptions at the frame."""
    height, width = mask.shape
    boundary = np.zeros_like(mask)
    for y in range(height):
        for x in range(width):
            last_row, last_column = y == height - 1, x == width - 1
            neighbours = []
            if not last_column:
                neighbours.append(mask[y, x + 1])
            if not last_row:
                neighbours.append(mask[y + 1, x])
            if not last_row and not last_column:
                neighbours.append(mask[y + 1, x + 1])
            boundary[y, x] = any(n != mask[y, x] for n in neighbours)
    return boundary


def brute_f(pred: np.ndarray, gt: np.ndarray, radius: int) -> float:
    """Every contour pixel against every other one."""
    a, b = np.argwhere(brute_boundary(pred)), np.argwhere(brute_boundary(gt))
    if len(a) == 0 or len(b) == 0:
        return float(len(a) == len(b))
    near = ((a[:, None] - b[None]) ** 2).sum(axis=2) <= radius**2  # (len(a), len(b))
    precision, recall = near.any(axis=1).mean(), near.any(axis=0).mean()
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def random_mask(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """A few boxes, often cut off by the frame of the image, with some noise; sometimes nothing at all."""
    mask = np.zeros(shape, dtype=bool)
    for _ in range(rng.integers(0, 4)):
        y, x = rng.integers(-5, shape[0]), rng.integers(-5, shape[1])
        mask[max(y, 0) : y + rng.integers(1, 15), max(x, 0) : x + rng.integers(1, 15)] = True
    return mask ^ (rng.random(shape) < rng.choice([0, 0, 0.01]))


def test_f_is_the_brute_force_value_also_at_the_frame_of_the_image(monkeypatch):
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(150):
        shape = (int(rng.integers(1, 32)), int(rng.integers(1, 40)))
        pred, gt = random_mask(rng, shape), random_mask(rng, shape)
        radius = int(rng.integers(1, 5))
        expected = brute_f(pred, gt, radius)
        monkeypatch.setattr(metrics, "boundary_radius", lambda _, radius=radius: radius)
        assert boundary_f(pred, gt) == pytest.approx(expected, abs=1e-12)
        assert boundary_f(gt, pred) == pytest.approx(expected, abs=1e-12)  # F is symmetric
        seen.add(round(expected, 3))
    assert len(seen) > 50  # the cases are not trivial


def test_tolerance_is_a_fraction_of_the_diagonal_rounded_up(monkeypatch):
    shapes = (GT.shape, (600, 800), (601, 800), (3, 4))
    assert [boundary_radius(shape) for shape in shapes] == [8, 8, 9, 1]  # the first is ceil(0.008 * 979.68)
    pred = box(108, 308, 208, 508)
    found = boundary_f(pred, GT)
    monkeypatch.setattr(metrics, "boundary_radius", lambda _: 8)
    assert boundary_f(pred, GT) == found
    monkeypatch.setattr(metrics, "boundary_radius", lambda _: 7)
    assert boundary_f(pred, GT) < 0.1 < found


def test_masks_of_any_kind_of_number():
    for dtype in (np.uint8, np.int32, np.float32):
        pred, gt = box(108, 308, 208, 508).astype(dtype), GT.astype(dtype)
        assert jaccard_and_boundary_f(pred * 255, gt) == jaccard_and_boundary_f(pred > 0, GT)
    # Read-only and strided masks are left alone.
    pred = np.asfortranarray(GT)
    pred.flags.writeable = False
    assert jaccard_and_boundary_f(pred[::-1, ::-1][::-1, ::-1], GT) == (1.0, 1.0)


def test_masks_of_two_sizes_are_refused():
    for function in (jaccard, boundary_f):
        with pytest.raises(ValueError, match=r"\(480, 854\).*\(480, 853\)"):
            function(GT, GT[:, :-1])
        with pytest.raises(ValueError, match="size"):
            function(GT[None], GT[None])


def test_statistics_of_a_ramp():
    statistics = sequence_statistics(np.linspace(0, 1, 38))
    assert statistics["mean"] == pytest.approx(0.5)
    assert statistics["recall"] == 0.5
    assert statistics["decay"] == pytest.approx(-0.7567567567567568, abs=1e-15)


def test_recall_is_strictly_above_one_half():
    assert sequence_statistics([0.5, 0.5, 0.5, 0.5 + 1e-9])["recall"] == 0.25


def reference_decay(values: np.ndarray, dtype: type) -> float:
    """The four quarters as the Python ports of DAVIS's code write them; `np.uint8` shows their bug."""
    ids = (np.round(np.linspace(1, len(values), 5) + 1e-10) - 1).astype(dtype)
    quarters = [values[ids[k] : ids[k + 1] + 1] for k in range(4)]
    with np.errstate(all="ignore"):
        return float(np.mean(quarters[0]) - np.mean(quarters[3])) if len(quarters[3]) else float("nan")


def test_long_sequences_where_eight_bits_overflow():
    values = np.concatenate([np.full(225, 0.9), np.full(75, 0.1)])
    statistics = sequence_statistics(values)
    # Quarters of 300 frames meet at 74.75 -> 75, 149.5 -> 150, 224.25 -> 224: the last one begins with one good frame.
    expected = 0.9 - (0.9 + 75 * 0.1) / 76
    assert statistics["decay"] == pytest.approx(expected, abs=1e-12)
    assert reference_decay(values, np.int64) == pytest.approx(expected, abs=1e-12)
    assert not reference_decay(values, np.uint8) == pytest.approx(expected, abs=0.1)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6, 7, 38, 41, 102, 256, 257, 300, 1001])
def test_decay_of_any_length(count):
    values = np.random.default_rng(count).random(count)
    decay = sequence_statistics(values)["decay"]
    assert decay == pytest.approx(reference_decay(values, np.int64), abs=1e-12)
    if count == 1:
        assert decay == 0


@pytest.mark.parametrize("values", [[], [0.5, float("nan")], [[0.5], [0.6]]])
def test_statistics_of_nothing_are_refused(values):
    with pytest.raises(ValueError, match="finite"):
        sequence_statistics(values)


# Published figures. Masks are not ours to distribute, so these tests skip where they are absent.


def read_mask(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image) > 0


@pytest.fixture(scope="session")
def davis16(real_data) -> Path:
    folder = real_data / "known_answers" / "davis16"
    if not folder.is_dir():
        pytest.skip(f"needs the published figures of DAVIS-16 in {folder}")
    return folder


@pytest.mark.data
@pytest.mark.parametrize("method", ["osvos", "cut", "matnet", "pdb", "ags"])
def test_official_per_frame_values_of_car_shadow(davis16, method):
    values = []
    for index in range(1, 39):  # first and last frame are not evaluated
        pred = read_mask(davis16 / "Results" / method / "car-shadow" / f"{index:05d}.png")
        gt = read_mask(davis16 / "Annotations" / "480p" / "car-shadow" / f"{index:05d}.png")
        values.append(jaccard_and_boundary_f(pred, gt))
    expected = json.loads((davis16 / "expected_car-shadow.json").read_text())[method]
    for name, ours in zip("JF", np.array(values).T):
        if "per_frame" in expected[name]:  # full precision
            np.testing.assert_allclose(ours, expected[name]["per_frame"], rtol=0, atol=1e-9)
            statistics = sequence_statistics(ours)
            for statistic in ("mean", "recall", "decay"):
                assert statistics[statistic] == pytest.approx(expected[name][statistic], abs=1e-9)
        else:
            np.testing.assert_allclose(ours, expected[name]["per_frame_rounded3"], rtol=0, atol=0.00051)


@pytest.mark.data
@pytest.mark.parametrize("method", ["matnet", "pdb", "ags"])
def test_official_per_frame_values_of_blackswan(davis16, method):
    expected = json.loads((davis16 / "expected_blackswan_frames1-5.json").read_text())[method]
    for index in range(1, 6):
        pred = read_mask(davis16 / "Results" / method / "blackswan_first6" / f"{index:05d}.png")
        gt = read_mask(davis16 / "Annotations" / "480p" / "blackswan_first6" / f"{index:05d}.png")
        j, f = jaccard_and_boundary_f(pred, gt)
        assert j == pytest.approx(expected["J"][index - 1], abs=0.00051)
        assert f == pytest.approx(expected["F"][index - 1], abs=0.00051)


@pytest.mark.data
def test_published_globals_follow_from_the_per_frame_values(davis16):
    published = json.loads((davis16 / "published_val.json").read_text())["methods"]
    files = sorted((davis16 / "per_frame").glob("*.json"))
    checked = 0
    for file in files:
        sequences = json.loads(file.read_text())
        if file.stem not in published or len(sequences) != 20:
            continue
        for name in "JF":
            statistics = [sequence_statistics(frames[name]) for frames in sequences.values()]
            for statistic, tolerance in (("mean", 5.1e-4), ("decay", 5.1e-4), ("recall", 3.5e-3)):
                # Published per-frame values are rounded to 3 digits; a rounded 0.500 changes the recall.
                overall = np.mean([s[statistic] for s in statistics])
                assert overall == pytest.approx(published[file.stem][name + statistic], abs=tolerance), file.stem
                checked += 1
    assert checked >= 20 * 6


@pytest.mark.data
def test_published_globals_follow_from_the_full_precision_sequences(davis16):
    published = json.loads((davis16 / "published_val.json").read_text())["methods"]
    # osvos is semi-supervised and only in the site's own table, a script.
    script = (davis16 / "global_eval_val_2016.js").read_text()
    osvos = re.search(r'"osvos": \{(.*?)\}', script, re.DOTALL)
    published["osvos"] = {key: float(value) for key, value in re.findall(r'"(\w+)": "([-\d.]+)"', osvos[1])}
    methods = json.loads((davis16 / "per_sequence_full_precision.json").read_text())
    assert {"fst", "nlc", "osvos", "cut", "cvos"} <= set(methods)
    for method, values in methods.items():
        for name in "JF":
            assert len(values[name]) == 20
            for statistic in ("mean", "recall", "decay"):
                overall = np.mean([sequence[statistic] for sequence in values[name].values()])
                assert overall == pytest.approx(published[method][name + statistic], abs=0.00051), (method, name)


def test_published_sequences_make_the_published_globals():
    table = {p.method: p.values for p in PUBLISHED if p.dataset == "DAVIS-2016" and p.measures == "uvos"}
    with DAVIS_SEQUENCES.open(newline="") as file:
        val = {row["sequence"] for row in csv.DictReader(file)}
    rows = on_sequences(val)
    assert len(val) == 20 and len(rows) == 22
    assert [row.values["J_mean"] for row in rows] == sorted((row.values["J_mean"] for row in rows), reverse=True)
    for row in rows:
        for key, value in table[row.method].items():
            # Figures of each frame are rounded to 3 digits, those of sequences to 4; a rounded 0.500 changes recall.
            tolerance = 3.6e-3 if key.endswith("recall") else 6e-4
            assert row.values[key] == pytest.approx(value, abs=tolerance), (row.method, key)
    assert on_sequences(["blackswan", "no such sequence"]) == on_sequences([]) == []


@pytest.mark.data
def test_published_sequences_follow_from_the_per_frame_values(davis16):
    frames = json.loads((davis16 / "per_frame" / "matnet.json").read_text())
    for name, values in frames.items():
        row = next(row for row in on_sequences([name]) if row.method == "MATNet")
        for measure in "JF":
            for statistic, expected in sequence_statistics(values[measure]).items():
                assert row.values[f"{measure}_{statistic}"] == pytest.approx(expected, abs=6e-5), (name, statistic)
