"""DenseCRF: the unary's published values, an independent lattice filter, the exact CRF, and the tool."""

from __future__ import annotations

import argparse
import errno
import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datasets.errors import DataError
from datasets.video_sequence import VideoSequence
from utils import crf, parallel
from utils.crf import CrfSettings, refine, unary_energy
from utils.errors import UserError

needs_library = pytest.mark.skipif(sys.version_info >= (3, 13), reason="pydensecrf does not build on Python >= 3.13")

# ----------------------------------------------------------------------------------------------- independent reference


def features(image: np.ndarray | None, size: tuple[int, int], sxy: float, srgb: float = 1) -> np.ndarray:
    """(N, 2) or (N, 5): x, y and the colours, each divided by its width."""
    y, x = np.mgrid[: size[0], : size[1]]
    position = np.stack([x, y], -1).reshape(-1, 2) / sxy
    return position if image is None else np.concatenate([position, image.reshape(-1, 3) / srgb], 1)


def exact_kernel(f: np.ndarray):
    """exp(-|f_i - f_j|^2 / 2) as a full matrix, the pixel itself included."""
    squares = (f**2).sum(1)
    kernel = np.exp(-0.5 * np.maximum(squares[:, None] + squares[None] - 2 * f @ f.T, 0))
    return lambda values: kernel @ values


def lattice_kernel(f: np.ndarray):
    """The permutohedral lattice (Adams, Baek & Davis, Eurographics 2010): splat, blur, slice; as plain as can be."""
    n, d = f.shape
    # Elevate to the plane of d + 1 coordinates with sum zero.
    scaled = f * ((d + 1) * np.sqrt(2 / 3) / np.sqrt([(i + 1) * (i + 2) for i in range(d)]))
    elevated = np.zeros((n, d + 1))
    for i in range(d + 1):
        elevated[:, i] = scaled[:, i:].sum(1) - (i * scaled[:, i - 1] if i else 0)
    # The nearest lattice point of remainder 0, and the order of the residuals.
    closest = np.rint(elevated / (d + 1)) * (d + 1)
    residual = elevated - closest
    rank = np.zeros((n, d + 1), int)
    for i, j in itertools.combinations(range(d + 1), 2):
        less = residual[:, i] < residual[:, j]
        rank[:, i] += less
        rank[:, j] += ~less
    excess = np.rint(closest.sum(1) / (d + 1)).astype(int)[:, None]
    rank += excess
    closest += (d + 1) * ((rank < 0).astype(int) - (rank > d))
    rank += (d + 1) * ((rank < 0).astype(int) - (rank > d))
    residual = (elevated - closest) / (d + 1)
    # Barycentric weights: differences of the sorted residuals.
    ordered = np.empty_like(residual)
    np.put_along_axis(ordered, rank, residual, 1)  # descending
    weights = np.empty((n, d + 1))
    weights[:, 0] = 1 - (ordered[:, 0] - ordered[:, d])
    for k in range(1, d + 1):
        weights[:, k] = ordered[:, d - k] - ordered[:, d - k + 1]
    vertices = np.stack([closest + np.where(rank <= d - k, k, k - d - 1) for k in range(d + 1)], 1).astype(int)

    keys: dict[tuple, int] = {}
    index = np.array([[keys.setdefault(tuple(v), len(keys)) for v in point] for point in vertices])  # (N, d + 1)
    points = np.array(list(keys))
    neighbours = []
    for j in range(d + 1):
        step = np.full(d + 1, -1)
        step[j] = d
        nowhere = len(keys)
        neighbours.append([np.array([keys.get(tuple(p), nowhere) for p in points + sign * step]) for sign in (1, -1)])

    def kernel(values: np.ndarray) -> np.ndarray:
        grid = np.zeros((len(keys) + 1, values.shape[1]))  # the last row is where there is no lattice point
        for k in range(d + 1):
            np.add.at(grid, index[:, k], weights[:, k : k + 1] * values)
        for one, other in neighbours:
            grid[:-1] = grid[:-1] + 0.5 * (grid[one] + grid[other])
        return (weights[..., None] * grid[index]).sum(1) / (1 + 2.0**-d)

    return kernel


def mean_field(image_rgb: np.ndarray, probability: np.ndarray, make_kernel, settings: CrfSettings) -> np.ndarray:
    """Foreground probability (H, W) by mean field with symmetrically normalised kernels and Potts compatibility."""
    size = probability.shape
    p = probability.astype(np.float64).ravel() / 255
    energy = [-np.log(q + 1e-8) / (settings.scale / (1 + np.exp(-q))) for q in (1 - p, p)]
    unary = np.stack(energy, 1)  # (N, 2): background, foreground
    kernels = []
    for f, weight in (
        (features(None, size, settings.gaussian_sxy), settings.gaussian_compat),
        (
            features(image_rgb[..., ::-1].astype(float), size, settings.bilateral_sxy, settings.bilateral_srgb),
            settings.bilateral_compat,
        ),
    ):
        kernel = make_kernel(f)
        root = 1 / np.sqrt(kernel(np.ones((len(f), 1))) + 1e-20)
        kernels.append(lambda q, kernel=kernel, root=root, weight=weight: weight * root * kernel(root * q))

    def softmax(x: np.ndarray) -> np.ndarray:
        e = np.exp(x - x.max(1, keepdims=True))
        return e / e.sum(1, keepdims=True)

    q = softmax(-unary)
    for _ in range(settings.iters):
        q = softmax(-unary + sum(message(q) for message in kernels))
    return q[:, 1].reshape(size)


def example(height: int, width: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A disc on a shaded ground, (H, W, 3) uint8, and a map of it that is shifted, soft and noisy, (H, W) uint8."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    disc = (x - width * 0.5) ** 2 + (y - height * 0.5) ** 2 < (height * 0.3) ** 2
    image = np.stack([60 + x, 90 + y, np.full_like(x, 120)], -1) + 80 * disc[..., None] * np.array([1, -0.5, 0.3])
    image = np.clip(image + rng.normal(0, 3, image.shape), 0, 255).astype(np.uint8)
    probability = np.clip(0.15 + 0.7 * np.roll(disc, 2, 1) + rng.normal(0, 0.15, disc.shape), 0, 1)
    return image, (probability * 255).astype(np.uint8)


# ------------------------------------------------------------------------------------------------------------- unary


def test_unary_has_the_published_values():
    energy = unary_energy(np.array([[0.5, 1.0, 0.0]]))
    assert energy.shape == (2, 3) and energy.dtype == np.float32 and energy.flags.c_contiguous
    background, foreground = energy
    np.testing.assert_allclose([background[0], foreground[0]], 1.0605, atol=1e-4)
    np.testing.assert_allclose([foreground[1], background[1]], [0, 35.087], atol=1e-3)
    np.testing.assert_allclose([foreground[2], background[2]], [35.087, 0], atol=1e-3)


def test_unary_alone_gives_the_published_probabilities():
    energy = unary_energy(np.array([[0.1, 0.25, 0.4, 0.6, 0.75, 0.9]]))
    q = np.exp(-energy)
    np.testing.assert_allclose((q / q.sum(0))[1], [0.017, 0.125, 0.331, 0.669, 0.875, 0.983], atol=6e-4)


def test_unary_of_bytes_is_that_of_their_255th():
    grey = np.arange(256, dtype=np.uint8).reshape(8, 32)
    np.testing.assert_array_equal(unary_energy(grey), unary_energy(grey / 255))
    assert np.isfinite(unary_energy(grey)).all()


@pytest.mark.parametrize(
    "probability",
    [
        np.array([[1.1]]),
        np.array([[-0.1]]),
        np.array([[np.nan]]),
        np.zeros((2, 2, 1)),
        np.zeros((2, 2), int),
        np.zeros(4),
    ],
)
def test_unary_refuses_what_is_no_probability_map(probability):
    with pytest.raises(ValueError, match="expected"):
        unary_energy(probability)


# ------------------------------------------------------------------------------------------------------------- refine


@needs_library
@pytest.mark.parametrize("iters", [1, 5])
@pytest.mark.parametrize(
    "changes", [{}, {"bilateral_sxy": 20, "bilateral_srgb": 8, "gaussian_sxy": 2, "scale": 1.3}], ids=["dss", "other"]
)
def test_refine_equals_an_independent_lattice(iters: int, changes: dict):
    image, probability = example(48, 64)
    settings = CrfSettings(iters=iters, **changes)
    expected = mean_field(image, probability, lattice_kernel, settings)
    result = refine(image, probability, settings)
    assert result.shape == (48, 64) and result.dtype == np.uint8
    # truncated to bytes, so the exact value lies at most one above, but for float32 rounding
    difference = expected * 255 - result
    assert difference.min() > -0.02 and difference.max() < 1.02


@needs_library
def test_refine_is_close_to_the_exact_crf():
    image, probability = example(30, 40)
    expected = mean_field(image, probability, exact_kernel, CrfSettings())
    result = refine(image, probability) / 255
    assert np.abs(result - expected).mean() < 5e-3 + 0.5 / 255
    assert ((result > 0.5) != (expected > 0.5)).mean() < 0.01


@needs_library
def test_refine_moves_the_map_towards_the_image():
    image, probability = example(60, 80)
    y, x = np.mgrid[:60, :80]
    disc = (x - 40) ** 2 + (y - 30) ** 2 < 18**2
    before = ((probability > 127) != disc).sum()
    after = ((refine(image, probability) > 127) != disc).sum()
    assert after < 0.7 * before


@needs_library
def test_refine_takes_arrays_as_they_come():
    image, probability = example(24, 40)
    expected = refine(image, probability)
    read_only = np.asarray(Image.fromarray(image))
    read_only.setflags(write=False)
    variants = [
        (read_only, probability),
        (np.asfortranarray(image), np.asfortranarray(probability)),
        (image[:, ::-1][:, ::-1], probability[::-1][::-1]),
        (image, probability / 255),
        (image, (probability / 255.0).astype(np.float64)),
    ]
    for picture, map_ in variants:
        np.testing.assert_array_equal(refine(picture, map_), expected)
    np.testing.assert_allclose(refine(image, (probability / 255).astype(np.float32)).astype(int), expected, atol=1)


@needs_library
@pytest.mark.parametrize("value, expected", [(0, 0), (255, 255)])
def test_certain_maps_stay_certain(value: int, expected: int):
    image, _ = example(20, 30)
    result = refine(image, np.full((20, 30), value, np.uint8))
    assert np.abs(result.astype(int) - expected).max() <= 1


@needs_library
def test_refine_refuses_shapes_that_do_not_fit():
    image, probability = example(24, 40)
    with pytest.raises(ValueError, match="image's size"):
        refine(image, probability.T)
    with pytest.raises(ValueError, match=r"image \(H, W, 3\)"):
        refine(image[..., 0], probability)
    with pytest.raises(ValueError, match="uint8"):
        refine(image.astype(float), probability)


def test_without_the_library_there_is_an_error_that_says_so(tmp_path: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pydensecrf.densecrf", None)
    image, probability = example(8, 8)
    with pytest.raises(UserError, match="pip install pydensecrf2"):
        refine(image, probability)
    with pytest.raises(UserError, match="3.10 to 3.12"):
        crf.run(arguments(), [], tmp_path)


def test_settings_are_checked_and_default_to_dss_crf():
    assert crf.settings_from(arguments()) == CrfSettings(1, 3, 3, 60, 5, 5, 1.05)
    options = "--crf_iters 5 --crf_gaussian_sxy 1 --crf_gaussian_compat 2 --crf_bilateral_sxy 30 --crf_bilateral_srgb 4"
    options += " --crf_bilateral_compat 9 --crf_scale 1"
    assert crf.settings_from(arguments(*options.split())) == CrfSettings(5, 1, 2, 30, 4, 9, 1)
    for wrong in ({"iters": 0}, {"gaussian_sxy": 0}, {"bilateral_srgb": float("nan")}, {"bilateral_compat": -1}):
        with pytest.raises(UserError, match="--crf_" + next(iter(wrong))):
            CrfSettings(**wrong)


@pytest.mark.parametrize(
    ("name", "most", "beyond"),
    [
        ("iters", 10_000, 2**31),  # an OverflowError
        ("gaussian_sxy", 0.01, 1e-6),  # a segmentation fault
        ("bilateral_sxy", 0.01, 1e-5),  # the same
        ("bilateral_srgb", 0.01, 1e-30),
        ("bilateral_compat", 1e6, 1e300),  # a black map
        ("gaussian_compat", 1e6, 1e300),
        ("scale", 0.001, 1e-40),  # a black map
        ("scale", 1e6, float("inf")),
    ],
)
@needs_library
def test_settings_end_where_the_library_does(name: str, most: float, beyond: float):
    with pytest.raises(UserError, match=f"--crf_{name} .*: expected"):
        CrfSettings(**{name: beyond})
    image, probability = example(24, 40)
    if name != "iters":
        made = refine(image, probability, CrfSettings(**{name: most}))
        assert made.min() < 100 and made.max() > 155 or name == "scale" and most > 1  # which levels all of it


# --------------------------------------------------------------------------------------------------------------- tool


def arguments(*options: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    crf.add_arguments(parser)
    parallel.add_arguments(parser)
    return parser.parse_args(["--workers", "0", *options])


def make_results(root: Path, count: int = 3) -> tuple[VideoSequence, Path]:
    """A video of small frames, and the probability maps that a test run would have left in ``results``."""
    frames = root / "JPEGImages" / "clip"
    maps = root / "results" / "probability" / "made" / "clip"
    frames.mkdir(parents=True)
    maps.mkdir(parents=True)
    for t in range(count):
        image, probability = example(24, 40, seed=t)
        Image.fromarray(image).save(frames / f"{t:05d}.png")
        Image.fromarray(probability).save(maps / f"{t:05d}.png")
    sequence = VideoSequence("clip", "made", tuple(sorted(frames.iterdir())), {}, {}, "nonzero", root / "Flows")
    return sequence, root / "results"


def outputs(results: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted((results / "crf" / "made" / "clip").iterdir())}


@needs_library
def test_run_refines_every_frame_softly_and_two_processes_change_nothing(tmp_path: Path):
    sequence, results = make_results(tmp_path)
    assert crf.run(arguments(), [crf.refinable(sequence)], results) == 3
    one = outputs(results)
    assert list(one) == ["00000.png", "00001.png", "00002.png"]
    for t, name in enumerate(one):
        made = np.array(Image.open(results / "crf" / "made" / "clip" / name))
        np.testing.assert_array_equal(made, refine(*example(24, 40, seed=t)))
        mask = np.array(Image.open(results / "crf_binary" / "made" / "clip" / name))
        np.testing.assert_array_equal(mask, np.where(made > 127, 255, 0))
        assert 0 < (mask > 0).mean() < 1
    assert len(np.unique(made)) > 10
    assert crf.run(arguments("--workers", "2", "--overwrite"), [crf.refinable(sequence)], results) == 3
    assert outputs(results) == one


@needs_library
def test_run_goes_on_where_it_stopped_and_redoes_what_is_out_of_date(tmp_path: Path):
    import os

    sequence, results = make_results(tmp_path)
    crf.run(arguments(), [crf.refinable(sequence)], results)
    before = outputs(results)
    assert crf.run(arguments(), [crf.refinable(sequence)], results) == 0
    folder = results / "crf" / "made" / "clip"
    (folder / "00000.png").unlink()
    (folder / "00001.png").write_bytes(before["00001.png"][:100])
    assert crf.run(arguments(), [crf.refinable(sequence)], results) == 2
    assert outputs(results) == before
    # a probability map made later, as by a test with other weights
    newer = folder.stat().st_mtime + 100
    os.utime(results / "probability" / "made" / "clip" / "00002.png", (newer, newer))
    assert crf.run(arguments(), [crf.refinable(sequence)], results) == 1
    os.utime(folder / "00002.png", (newer, newer))
    # other maps, put there with the times that they had, as mv, cp -a and rsync -a do
    source = results / "probability" / "made" / "clip" / "00000.png"
    older = source.stat().st_mtime_ns
    Image.fromarray(255 - np.array(Image.open(source))).save(source)
    os.utime(source, ns=(older, older))
    assert crf.run(arguments(), [crf.refinable(sequence)], results) == 1
    # other settings
    assert crf.run(arguments("--crf_iters", "5"), [crf.refinable(sequence)], results) == 3
    assert outputs(results) != before


@needs_library
def test_a_new_mask_has_no_old_map_beside_it_that_would_vouch_for_it(tmp_path: Path, monkeypatch):
    """The disk is full between the two: the settings of before, run again, would keep the mask as theirs."""
    sequence, results = make_results(tmp_path, count=1)
    mask = results / "crf_binary" / "made" / "clip" / "00000.png"
    crf.run(arguments(), [crf.refinable(sequence)], results)
    before = mask.read_bytes()
    write_png = crf.write_png

    def fill_up(path: Path, *what):
        if path.parts[-4] == "crf":
            raise OSError(errno.ENOSPC, "No space left on device")
        write_png(path, *what)

    monkeypatch.setattr(crf, "write_png", fill_up)
    with pytest.raises(OSError, match="No space"):
        crf.run(
            arguments("--crf_gaussian_compat", "0", "--crf_bilateral_compat", "0"), [crf.refinable(sequence)], results
        )
    assert mask.read_bytes() != before
    monkeypatch.undo()
    assert crf.run(arguments(), [crf.refinable(sequence)], results) == 1
    assert mask.read_bytes() == before


@needs_library
def test_a_map_that_is_replaced_while_it_is_refined_is_refined_again(tmp_path: Path, monkeypatch):
    """As by a `test` with other weights, which runs at the same time."""
    sequence, results = make_results(tmp_path, count=1)
    source = results / "probability" / "made" / "clip" / "00000.png"
    other = 255 - example(24, 40)[1]

    def refine_meanwhile(*what):
        made = refine(*what)
        Image.fromarray(other).save(source)
        return made

    monkeypatch.setattr(crf, "refine", refine_meanwhile)
    assert crf.run(arguments(), [crf.refinable(sequence)], results) == 1
    monkeypatch.undo()
    assert crf.run(arguments(), [crf.refinable(sequence)], results) == 1
    made = np.array(Image.open(results / "crf" / "made" / "clip" / "00000.png"))
    np.testing.assert_array_equal(made, refine(example(24, 40)[0], other))


@needs_library
def test_looking_at_what_is_there_has_a_bar_and_comes_after_what_is_missing(tmp_path: Path, monkeypatch):
    """Both are read to their end for each frame: of a whole test set that is silence for a long while."""
    sequence, results = make_results(tmp_path)
    make, bars = crf.progress_bar, []
    monkeypatch.setattr(crf, "progress_bar", lambda *what, **options: bars.append(make(*what, **options)) or bars[-1])
    crf.run(arguments(), [crf.refinable(sequence)], results)
    assert crf.run(arguments(), [crf.refinable(sequence)], results) == 0
    assert [(bar.desc, bar.n, bar.total) for bar in bars[2:]] == [("crf: what is there", 3, 3), ("crf", 0, 0)]
    (results / "probability" / "made" / "clip" / "00002.png").unlink()
    monkeypatch.setattr(crf, "_is_current", lambda *_: pytest.fail("a map was read"))
    with pytest.raises(DataError, match="1 probability maps are missing"):
        crf.run(arguments(), [crf.refinable(sequence)], results)


@needs_library
def test_run_names_what_is_missing_or_does_not_fit(tmp_path: Path):
    sequence, results = make_results(tmp_path)
    target = results / "probability" / "made" / "clip" / "00001.png"
    data = target.read_bytes()
    target.unlink()
    with pytest.raises(DataError, match=r"1 probability maps are missing.*00001.png.*--tools test"):
        crf.run(arguments(), [crf.refinable(sequence)], results)
    assert not (results / "crf").exists()
    target.write_bytes(data[:60])
    with pytest.raises(DataError, match="00001.png"):
        crf.run(arguments(), [crf.refinable(sequence)], results)
    Image.fromarray(example(20, 40)[1]).save(target)
    with pytest.raises(DataError, match="00001.png"):
        crf.run(arguments(), [crf.refinable(sequence)], results)
    Image.fromarray(example(24, 40)[0]).save(target)
    with pytest.raises(DataError, match="8-bit grey"):
        crf.run(arguments(), [crf.refinable(sequence)], results)


@needs_library
def test_beside_the_test_the_maps_become_what_they_become_after_it(tmp_path: Path):
    sequence, results = make_results(tmp_path)
    crf.run(arguments(), [crf.refinable(sequence)], results)
    expected = outputs(results)
    (results / "crf_binary" / "made" / "clip" / "00001.png").unlink()
    assert crf.run(arguments(), [crf.refinable(sequence)], results) == 1  # a mask that is missing is made again
    assert (results / "crf_binary" / "made" / "clip" / "00001.png").is_file() and outputs(results) == expected
    for name in expected:
        (results / "crf" / "made" / "clip" / name).unlink()
    with crf.run_beside_test(arguments("--workers", "2"), [crf.refinable(sequence)], results) as written:
        for name in expected:
            written(Path("made", "clip", name))
    assert outputs(results) == expected
    assert crf.run(arguments(), [crf.refinable(sequence)], results) == 0  # nothing is left to do
    with crf.run_beside_test(arguments(), [crf.refinable(sequence)], results) as written:
        assert written is None  # no other process is allowed
