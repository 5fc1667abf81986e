"""Measures of salient objects against their definitions, pysodmetrics' known answers, and the DAVSOD tool's tables."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("py_sod_metrics")

from utils.evaluation.vsod import SaliencyScores, mean_scores, saliency_scores, stretch

EPS = np.spacing(1)


def example(seed: int, shape: tuple[int, int] = (24, 31)) -> tuple[np.ndarray, np.ndarray]:
    """A noisy map around a box, using the whole range from 0 to 255."""
    rng = np.random.default_rng(seed)
    gt = np.zeros(shape, dtype=bool)
    y, x = rng.integers(0, 12), rng.integers(0, 15)
    gt[y : y + rng.integers(2, 12), x : x + rng.integers(2, 14)] = True
    saliency = np.clip(gt * rng.integers(80, 256) + rng.integers(-60, 90, shape), 0, 255).astype(np.uint8)
    saliency.flat[:2] = 0, 255
    return saliency, gt


def f_measure(binary: np.ndarray, gt: np.ndarray) -> float:
    hits = np.count_nonzero(binary & gt)
    if hits == 0:
        return 0.0
    precision, recall = hits / np.count_nonzero(binary), hits / np.count_nonzero(gt)
    return 1.3 * precision * recall / (0.3 * precision + recall)


def e_measure(binary: np.ndarray, gt: np.ndarray) -> float:
    a, b = binary.astype(float), gt.astype(float)
    if not gt.any():
        enhanced = 1 - a
    elif gt.all():
        enhanced = a
    else:
        a, b = a - a.mean(), b - b.mean()
        enhanced = (2 * a * b / (a * a + b * b + EPS) + 1) ** 2 / 4
    return enhanced.sum() / (gt.size - 1 + EPS)


def s_measure(values: np.ndarray, gt: np.ndarray) -> float:
    """Of a map in [0, 1] and a mask with both foreground and background; blocks of no pixel have no weight."""

    def object_score(x: np.ndarray) -> float:
        deviation = x.std(ddof=1) if x.size > 1 else 0
        return 2 * x.mean() / (x.mean() ** 2 + 1 + deviation + EPS)

    def region_score(a: np.ndarray, b: np.ndarray) -> float:
        x, y, n = a.mean(), b.mean(), a.size - 1 + EPS
        product = 4 * x * y * ((a - x) * (b - y)).sum() / n
        scale = (x * x + y * y) * (((a - x) ** 2).sum() + ((b - y) ** 2).sum()) / n
        return product / (scale + EPS) if product else float(scale == 0)

    share = gt.mean()
    objects = share * object_score(values[gt]) + (1 - share) * object_score(1 - values[~gt])
    row, column = (int(round(centre)) + 1 for centre in np.argwhere(gt).mean(axis=0))
    regions = 0.0
    for rows in (slice(row), slice(row, None)):
        for columns in (slice(column), slice(column, None)):
            a, b = values[rows, columns], gt[rows, columns].astype(float)
            regions += region_score(a, b) * a.size / gt.size if a.size else 0
    return max(0.0, 0.5 * objects + 0.5 * regions)


@pytest.mark.parametrize("seed", range(4))
def test_measures_are_what_their_definitions_say(seed):
    saliency, gt = example(seed)
    scores = saliency_scores(saliency, gt)
    values = saliency / 255
    assert scores.mae == pytest.approx(np.abs(values - gt).mean(), abs=1e-12)
    assert scores.s == pytest.approx(s_measure(values, gt), abs=1e-12)
    for threshold in range(256):
        binary = saliency >= threshold
        assert scores.f_curve[255 - threshold] == pytest.approx(f_measure(binary, gt), abs=1e-12)
        assert scores.e_curve[255 - threshold] == pytest.approx(e_measure(binary, gt), abs=1e-9)
    adaptive = values >= min(2 * values.mean(), 1)
    assert scores.adaptive_f == pytest.approx(f_measure(adaptive, gt), abs=1e-12)
    assert scores.adaptive_e == pytest.approx(e_measure(adaptive, gt), abs=1e-9)
    summary = scores.summary()
    assert summary["max_F"] == scores.f_curve.max() and summary["mean_E"] == pytest.approx(scores.e_curve.mean())
    assert all(-1e-9 <= value <= 1.01 for value in summary.values())


def test_a_perfect_map():
    _, gt = example(0)
    summary = saliency_scores(gt.astype(np.uint8) * 255, gt).summary()
    assert summary["MAE"] == 0
    for key in ("S", "max_F", "adp_F", "wF"):
        assert summary[key] == pytest.approx(1, abs=1e-6)
    assert summary["max_E"] == pytest.approx(gt.size / (gt.size - 1))  # the published formula divides by N - 1


def test_empty_and_full_ground_truth():
    saliency, gt = example(1)
    empty = saliency_scores(saliency, np.zeros_like(gt))
    assert empty.s == pytest.approx(1 - saliency.mean() / 255)
    assert empty.f_curve.max() == empty.adaptive_f == empty.weighted_f == 0
    nothing = saliency_scores(np.zeros_like(saliency), np.zeros_like(gt))
    assert nothing.mae == 0 and nothing.s == 1 and nothing.f_curve.max() == 0
    assert saliency_scores(saliency, np.ones_like(gt)).s == pytest.approx(saliency.mean() / 255)


@pytest.mark.parametrize(
    "place", [np.s_[-1, 4:9], np.s_[5:9, -1], np.s_[-1, -1], np.s_[0, 0], np.s_[7, 7], np.s_[1:, :]], ids=str
)
def test_objects_at_the_border_and_of_one_pixel(place):
    """An object that is just coming into view on the right or from below had no S, and its data set no figures."""
    saliency, gt = example(3)
    gt[:] = False
    gt[place] = True
    scores = saliency_scores(saliency, gt)
    assert scores.s == pytest.approx(s_measure(saliency / 255, gt), abs=1e-12)
    assert np.isfinite(list(scores.summary().values())).all()
    assert saliency_scores(gt * np.uint8(255), gt).s == pytest.approx(1)


def test_maps_are_stretched_one_by_one():
    saliency, gt = example(2)
    low = (saliency // 3 + 40).astype(np.uint8)
    values = stretch(low)
    assert values.min() == 0 and values.max() == 1
    assert saliency_scores(low, gt).mae == pytest.approx(np.abs(values - gt).mean())
    np.testing.assert_array_equal(stretch(np.full((3, 4), 51, np.uint8)), np.full((3, 4), 0.2))


def test_what_is_no_grey_map_is_refused():
    saliency, gt = example(0)
    with pytest.raises(ValueError, match="uint8"):
        saliency_scores(saliency / 255, gt)
    with pytest.raises(ValueError, match="differ"):
        saliency_scores(saliency[:, :-1], gt)
    with pytest.raises(ValueError, match="no scores"):
        mean_scores([])


def curve_at(peak: int) -> SaliencyScores:
    curve = np.zeros(256)
    curve[peak] = 0.9
    return SaliencyScores(0.1, 0.5, 0.4, 0.3, 0.2, curve, curve)


def test_the_maximum_is_of_the_mean_curve():
    mean = mean_scores([curve_at(10), curve_at(200)])
    assert mean.summary()["max_F"] == pytest.approx(0.45)  # and not 0.9, the mean of the maxima
    assert mean.summary()["mean_F"] == pytest.approx(0.9 / 256)
    assert mean.mae == pytest.approx(0.1)


def test_means_are_of_each_measure():
    rng = np.random.default_rng(0)
    numbers, curves = rng.random((2, 5)), rng.random((2, 2, 256))
    mean = mean_scores([SaliencyScores(*row, *pair) for row, pair in zip(numbers, curves)])
    found = [mean.mae, mean.s, mean.weighted_f, mean.adaptive_f, mean.adaptive_e]
    np.testing.assert_allclose(found, numbers.mean(0))
    np.testing.assert_allclose([mean.f_curve, mean.e_curve], curves.mean(0))
    summary = mean.summary()
    assert [summary[key] for key in ("MAE", "S", "wF", "adp_F", "adp_E")] == found
    curves = curves.mean(0)
    assert [summary["max_F"], summary["max_E"]] == pytest.approx(curves.max(1).tolist())
    assert [summary["mean_F"], summary["mean_E"]] == pytest.approx(curves.mean(1).tolist())


@pytest.fixture(scope="session")
def sod(real_data) -> Path:
    folder = real_data / "known_answers" / "sod"
    if not folder.is_dir():
        pytest.skip(f"needs the known answers of salient-object measures in {folder}")
    return folder


@pytest.mark.data
def test_known_answers_of_pysodmetrics(sod):
    scores = []
    for path in sorted((sod / "test_data" / "preds").glob("*.png")):
        with Image.open(path) as pred, Image.open(sod / "test_data" / "masks" / path.name) as mask:
            scores.append(saliency_scores(np.array(pred.convert("L")), np.array(mask.convert("L")) > 128))
    assert len(scores) == 3
    expected = json.loads((sod / "expected.json").read_text())
    names = {
        "MAE": "MAE",
        "S": "Smeasure",
        "wF": "wFmeasure",
        "adp_E": "adpEm",
        "mean_E": "meanEm",
        "max_E": "maxEm",
        "adp_F": "adpFm",
        "mean_F": "meanFm",
        "max_F": "maxFm",
    }
    summary = mean_scores(scores).summary()
    assert set(summary) == set(names)
    for ours, theirs in names.items():
        assert summary[ours] == pytest.approx(expected[theirs], abs=1e-9)


@pytest.mark.data
@pytest.mark.parametrize("dataset", ["DAVIS", "DAVSOD"])
def test_tables_of_the_davsod_tool(sod, dataset):
    """Its per-sequence table gives every figure of the data set but the maximum F, which needs the curves."""
    rows, overall = [], None
    for line in (sod / f"SSAV_{dataset}_result.txt").read_text().splitlines():
        figures = {key: float(value) for key, value in re.findall(r"(\w+):([\d.]+)", line)}
        if " Seq " in line:
            rows.append(figures)
        elif figures:
            overall = figures
    assert overall is not None and len(rows) == {"DAVIS": 20, "DAVSOD": 35}[dataset]

    scores = []
    for row in rows:
        # A flat curve has the sequence's mean; one raised threshold, elsewhere for each, has its maximum.
        curve = np.full(256, (256 * row["meanF"] - row["maxF"]) / 255)
        curve[len(scores)] = row["maxF"]
        scores.append(
            dataclasses.replace(
                curve_at(0), mae=row["MAE"], s=row["Smeasure"], adaptive_f=row["adpFmeasure"], f_curve=curve
            )
        )
    summary = mean_scores(scores).summary()
    for ours, theirs in {"MAE": "MAE", "S": "Smeasure", "adp_F": "adpFmeasure", "mean_F": "meanF"}.items():
        assert summary[ours] == pytest.approx(overall[theirs], abs=0.00051)
    # The rule that would need no curves, the mean of the maxima, is not the tool's.
    naive = np.mean([row["maxF"] for row in rows])
    assert naive == pytest.approx({"DAVIS": 0.868, "DAVSOD": 0.667}[dataset], abs=0.0006)
    assert summary["max_F"] < naive and overall["maxF"] < naive - 0.005
    assert overall["meanF"] < overall["maxF"]
