"""How fast masks are scored: against a plain implementation, and on two processes against one.

    python -m utils.evaluation.benchmark [--gt DIR] [--metrics uvos vsod] [--repeat N]

`DIR` holds the masks of one sequence (480×854 on DAVIS); the prediction for each frame is the mask of the next one.
Without it, ellipses of the same size move about. Times are of the processor, not of the clock, so that other work on
the machine does not enter; the clock is told beside it for the processes.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from datasets.images import load_mask, require_size
from datasets.sequences import VideoSequence
from utils.errors import UserError, exit_on_user_error
from utils.evaluation.dataset_scores import WORTH_PROCESSES, evaluate
from utils.evaluation.metrics import boundary_map, boundary_radius, jaccard_and_boundary_f
from utils.evaluation.protocol import default_protocol
from utils.evaluation.result_maps import Unit
from utils.files import write_png
from utils.parallel import cpu_seconds

Pair = tuple[np.ndarray, np.ndarray]


def moving_ellipses(frames: int = 40, size: tuple[int, int] = (480, 854)) -> list[np.ndarray]:
    """Masks `(H, W)` of an object of about an eighth of the image with limbs, moving by a few pixels per frame."""
    y, x = np.mgrid[: size[0], : size[1]] / np.array(size).reshape(2, 1, 1)
    masks = []
    for t in range(frames):
        cy, cx = 0.5 + 0.1 * math.sin(t / 9), 0.35 + 0.3 * t / frames
        angle, radius = np.arctan2(y - cy, x - cx), np.hypot((y - cy) / 0.26, (x - cx) / 0.15)
        masks.append(radius < 1 + 0.25 * np.sin(5 * angle + t / 3))
    return masks


def plain_scipy(pred: np.ndarray, gt: np.ndarray) -> tuple[float, float]:
    """J and F of one frame, the contours matched by SciPy's distance transform of the whole image."""
    from scipy.ndimage import distance_transform_edt

    radius = boundary_radius(gt.shape)
    return _plain(pred, gt, lambda boundary: distance_transform_edt(~boundary) <= radius)


def plain_scikit_image(pred: np.ndarray, gt: np.ndarray) -> tuple[float, float]:
    """J and F of one frame, the contours dilated by scikit-image, as DAVIS's first Python code does."""
    from skimage.morphology import dilation, disk

    radius = boundary_radius(gt.shape)
    return _plain(pred, gt, lambda boundary: dilation(boundary, disk(radius)))


def _plain(pred: np.ndarray, gt: np.ndarray, dilate: Callable[[np.ndarray], np.ndarray]) -> tuple[float, float]:
    union = np.logical_or(pred, gt).sum()
    j = np.logical_and(pred, gt).sum() / union if union else 1.0
    a, b = boundary_map(pred), boundary_map(gt)
    if not a.any() or not b.any():
        return float(j), float(a.any() == b.any())
    precision, recall = (a & dilate(b)).sum() / a.sum(), (b & dilate(a)).sum() / b.sum()
    return float(j), float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


def time_frames(masks: list[np.ndarray], repeat: int = 3) -> dict[str, float]:
    """Milliseconds of one core per frame for J and F, decoding not counted: ours, and two plain ways in the same run.

    The ways take turns, and the least of `repeat` rounds counts. Raises `RuntimeError` if they disagree.
    """
    import cv2

    pairs: list[Pair] = list(zip(masks[1:] + masks[:1], masks))
    ways = {"ours": jaccard_and_boundary_f, "scipy": plain_scipy, "scikit_image": plain_scikit_image}
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        best: dict[str, float] = {}
        for _ in range(repeat):
            results = {}
            for name, way in ways.items():
                start = time.process_time()
                results[name] = [way(pred, gt) for pred, gt in pairs]
                elapsed = 1000 * (time.process_time() - start) / len(pairs)
                best[name] = min(elapsed, best.get(name, math.inf))
            for name, values in results.items():
                if not np.allclose(values, results["ours"], rtol=0, atol=1e-12):
                    raise RuntimeError(f"{name} and our J and F differ: {values} and {results['ours']}")
    finally:
        cv2.setNumThreads(threads)
    return best


def time_processes(
    masks: list[np.ndarray], measures: tuple[str, ...] = ("uvos",), frames: int = 1200
) -> dict[str, float]:
    """Seconds to score `frames` maps from disk on one process and on two, everything included, and their ratios.

    `wall_ratio` is by the clock. `cpu_ratio` is what it would be with a core for each process: the processor time of
    the one, over that of the parent plus half of that of the two children, start-up included.
    """
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for index, mask in enumerate(masks):
            write_png(root / "gt" / f"{index:05d}.png", mask * np.uint8(255))
            write_png(root / "maps" / "v" / f"{index:05d}.png", masks[(index + 1) % len(masks)] * np.uint8(255))
        paths = tuple(sorted((root / "gt").iterdir()))
        sequence = VideoSequence("v", "DAVIS-2016", paths, {}, {p.stem: p for p in paths}, "nonzero", root)
        copies = math.ceil(frames / (len(masks) - 2))

        result: dict[str, float] = {"frames": copies * (len(masks) - 2)}
        for workers in (1, 2):
            units = [
                Unit(
                    name=str(copy),
                    results=root / "maps",
                    label="",
                    dataset="DAVIS-2016",
                    sequences=[sequence],
                    folders={m: root / "maps" for m in measures},
                    protocols={m: default_protocol("DAVIS-2016", m) for m in measures},
                )
                for copy in range(copies)
            ]
            clock, (own, children) = time.perf_counter(), cpu_seconds()
            evaluate(units, workers=workers)
            own_after, children_after = cpu_seconds()
            result[f"wall_s_{workers}"] = time.perf_counter() - clock
            result[f"cpu_s_{workers}"] = own_after - own + (children_after - children) / workers
    result["wall_ratio"] = result["wall_s_1"] / result["wall_s_2"]
    result["cpu_ratio"] = result["cpu_s_1"] / result["cpu_s_2"]
    return result


def read_masks(folder: Path) -> list[np.ndarray]:
    """The masks `(H, W)` of one sequence.

    Raises:
        UserError: fewer than three, of which the first and the last are not scored. DataError: one that is unreadable,
            or of another size than the first.
    """
    paths = sorted(folder.glob("*.png"))
    if len(paths) < 3:
        raise UserError(f"--gt {folder}: {len(paths)} .png there; expected 3 masks or more, of one sequence")
    masks = [load_mask(path).astype(bool) for path in paths]
    for path, mask in zip(paths, masks):
        require_size(path, mask.shape, masks[0].shape, paths[0])
    return masks


def main() -> None:
    """Print both."""
    parser = argparse.ArgumentParser(description="Speed of scoring masks.")
    parser.add_argument("--gt", type=Path, default=None, help="folder of masks of one sequence; default: made ones")
    parser.add_argument("--metrics", nargs="+", choices=("uvos", "vsod"), default=("uvos",), help="for the processes")
    parser.add_argument("--frames", type=int, default=1200, help="maps to score for the processes")
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    with exit_on_user_error():
        for name in ("frames", "repeat"):
            if getattr(args, name) < 1:
                raise UserError(f"--{name} {getattr(args, name)}: expected 1 or more")
        least = min(WORTH_PROCESSES[measures] for measures in args.metrics)
        if args.frames < least:
            raise UserError(
                f"--frames {args.frames}: fewer than {least} are scored in one process, whatever is asked for; "
                f"expected {least} or more"
            )
        masks = moving_ellipses() if args.gt is None else read_masks(args.gt)
        times = time_frames(masks, args.repeat)
        print(f"{len(masks)} frames of {masks[0].shape[1]}×{masks[0].shape[0]}, J and F, ms of one core per frame:")
        for name, value in times.items():
            print(f"  {name:13} {value:7.2f}   {value / times['ours']:5.1f} × ours")
        result = time_processes(masks, tuple(args.metrics), args.frames)
        print(f"{result['frames']:.0f} maps from disk, {' and '.join(args.metrics)}:")
        for workers in (1, 2):
            wall, cpu = result[f"wall_s_{workers}"], result[f"cpu_s_{workers}"]
            print(f"  on {workers}: {wall:7.2f} s by the clock, {cpu:7.2f} s of each core")
        print(f"  ratio {result['wall_ratio']:6.2f}                 {result['cpu_ratio']:7.2f}")


if __name__ == "__main__":
    main()
