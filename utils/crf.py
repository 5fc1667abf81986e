"""DenseCRF on the probability maps, with the image (Krähenbühl & Koltun, NeurIPS 2011, https://arxiv.org/abs/1210.5644).

The defaults, and the unary of `unary_energy`, are those of dss_crf, which DBSNet's README names; all are options.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from datasets.errors import DataError
from datasets.images import load_frame, require_size
from utils.errors import UserError
from utils.evaluation.scoring import THRESHOLD
from utils.files import is_whole_png, short_sha256, write_png
from utils.parallel import Background, count_of_workers, parallel_map, share_of_workers
from utils.progress import progress_bar

if TYPE_CHECKING:
    from datasets.sequences import VideoSequence

EPSILON = 1e-8  # keeps the logarithm finite at probabilities 0 and 1
# Text field of the PNGs written here, holding the settings and which map was refined, so that a later run knows what it
# may keep.
FIELD = "dbsnet-crf"
MAP = "map"  # in it, the probability map, by its bytes
FOLDERS = ("crf", "crf_binary")  # of the refined maps, grey, and of the masks that they give

# Least and most of each kind of setting. The library does not notice others: by a width far below a pixel its table of
# positions overflows and the process is killed, and numbers that float32 cannot hold give black maps.
_WIDTHS, _WEIGHTS = (0.01, 1e6), (0, 1e6)
_LIMITS = {
    "iters": (1, 10_000),
    "gaussian_sxy": _WIDTHS,
    "gaussian_compat": _WEIGHTS,
    "bilateral_sxy": _WIDTHS,
    "bilateral_srgb": _WIDTHS,
    "bilateral_compat": _WEIGHTS,
    "scale": (0.001, 1e6),
}


@dataclass(frozen=True)
class CrfSettings:
    """Settings of the CRF; the defaults are dss_crf's.

    Attributes:
        iters: mean-field iterations; their number matters more than any other setting.
        gaussian_sxy, gaussian_compat: width in pixels, and weight, of the smoothness kernel.
        bilateral_sxy, bilateral_srgb, bilateral_compat: widths in pixels and in grey levels, and weight, of the
            appearance kernel.
        scale: divisor of the unary, together with the sigmoid of the probability.
    """

    iters: int = 1
    gaussian_sxy: float = 3
    gaussian_compat: float = 3
    bilateral_sxy: float = 60
    bilateral_srgb: float = 5
    bilateral_compat: float = 5
    scale: float = 1.05

    def __post_init__(self) -> None:
        for name, (least, most) in _LIMITS.items():
            if not least <= getattr(self, name) <= most:  # so written that NaN fails too
                raise UserError(f"--crf_{name} {getattr(self, name)}: expected {least} to {most:.0f}")


def unary_energy(probability: np.ndarray, scale: float = 1.05) -> np.ndarray:
    """dss_crf's unary, (2, H * W) float32: row 0 background, row 1 foreground.

    U_fg = -ln(p + 1e-8) / (scale * sigmoid(p)) and U_bg the same of 1 - p; the sigmoid is taken of the probability
    itself, so it lies between 0.5 and 0.73.

    Args:
        probability: (H, W), uint8 in 0…255 or float in [0, 1].

    Raises:
        ValueError: another shape, dtype or range.
    """
    probability = np.asarray(probability)
    if probability.ndim != 2 or probability.size == 0:
        raise ValueError(f"expected a probability map (H, W), got shape {probability.shape}")
    if probability.dtype == np.uint8:
        p = probability.astype(np.float64) / 255
    elif np.issubdtype(probability.dtype, np.floating):
        p = probability.astype(np.float64)
        if not (p.min() >= 0 and p.max() <= 1):  # so written that NaN fails too
            raise ValueError(f"expected probabilities in [0, 1], got {p.min()} … {p.max()}")
    else:
        raise ValueError(f"expected a uint8 or float probability map, got {probability.dtype}")

    def energy(q: np.ndarray) -> np.ndarray:
        return -np.log(q + EPSILON) / (scale / (1 + np.exp(-q)))

    return np.stack([energy(1 - p), energy(p)]).reshape(2, -1).astype(np.float32)  # (2, H, W) -> (2, H * W)


def refine(image_rgb: np.ndarray, probability: np.ndarray, settings: CrfSettings | None = None) -> np.ndarray:
    """The probability map after the CRF, still soft: (H, W) uint8, 255 times the foreground's probability, cut off.

    Args:
        image_rgb: the frame, (H, W, 3) uint8 RGB.
        probability: (H, W), uint8 in 0…255 or float in [0, 1].

    Raises:
        UserError: pydensecrf is not installed.
        ValueError: arrays of other shapes, dtypes or ranges. The library itself would not notice all of them.
    """
    densecrf = import_densecrf()
    settings = settings or CrfSettings()
    image_rgb = np.asarray(image_rgb)
    if image_rgb.ndim != 3 or image_rgb.shape[2] != 3 or image_rgb.dtype != np.uint8:
        raise ValueError(f"expected an image (H, W, 3) of uint8, got {image_rgb.dtype} of shape {image_rgb.shape}")
    if image_rgb.shape[:2] != np.shape(probability):
        raise ValueError(
            f"expected a probability map of the image's size {image_rgb.shape[:2]}, got {np.shape(probability)}"
        )
    height, width = image_rgb.shape[:2]
    crf = densecrf.DenseCRF2D(width, height, 2)
    crf.setUnaryEnergy(np.ascontiguousarray(unary_energy(probability, settings.scale)))
    crf.addPairwiseGaussian(sxy=settings.gaussian_sxy, compat=settings.gaussian_compat)
    # BGR, as dss_crf reads its images: the exact CRF would not mind, its fast approximation does a little. The copy
    # makes the array contiguous and writable, which the library insists on.
    bgr = np.array(image_rgb[:, :, ::-1], order="C", copy=True)
    crf.addPairwiseBilateral(
        sxy=settings.bilateral_sxy, srgb=settings.bilateral_srgb, rgbim=bgr, compat=settings.bilateral_compat
    )
    q = np.array(crf.inference(settings.iters), dtype=np.float32).reshape(2, height, width)
    # Rounding of the filters can leave [0, 1] by an ulp, and a negative number would wrap around in uint8.
    return np.clip(q[1] * 255, 0, 255).astype(np.uint8)


def import_densecrf() -> Any:
    """The library that does the work; raises UserError where it is not installed."""
    try:
        import pydensecrf.densecrf as densecrf
    except ImportError as error:
        raise UserError(
            f"the CRF needs pydensecrf, which is not installed here ({error}): pip install pydensecrf2. That needs a "
            "C++ compiler and Python 3.10 to 3.12; it does not build on 3.13 and later. All other tools work without it"
        ) from error
    return densecrf


def load_probability(path: str | Path) -> np.ndarray:
    """A probability map as `test` writes it, (H, W) uint8.

    Raises:
        DataError: a file that is missing or unreadable, or is not an 8-bit grey image.
    """
    try:
        with Image.open(path) as image:
            if image.mode != "L":
                raise DataError(f"{path}: expected an 8-bit grey image, got mode {image.mode}")
            return np.array(image)
    except FileNotFoundError as error:
        raise DataError(
            f"{path}: no such probability map; make it first: python tool.py --checkpoint WEIGHTS --tools test …"
        ) from error
    except (OSError, SyntaxError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: no readable image ({error}); remove it and run --tools test again") from error


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the ``--crf_…`` options; ``--workers`` and ``--overwrite`` come from `utils.parallel.add_arguments`."""
    group = parser.add_argument_group("crf", "DenseCRF; the defaults are dss_crf's")
    helps = {
        "iters": "mean-field iterations",
        "gaussian_sxy": "width of the smoothness kernel, pixels",
        "gaussian_compat": "its weight",
        "bilateral_sxy": "width of the appearance kernel, pixels",
        "bilateral_srgb": "width of the appearance kernel, grey levels",
        "bilateral_compat": "its weight",
        "scale": "divisor of the unary",
    }
    for field in fields(CrfSettings):
        group.add_argument(
            f"--crf_{field.name}",
            type=int if field.name == "iters" else float,
            default=field.default,
            help=f"{helps[field.name]}; default: %(default)s",
        )


def settings_from(args: argparse.Namespace) -> CrfSettings:
    """The settings that the ``--crf_…`` options say."""
    return CrfSettings(**{field.name: getattr(args, f"crf_{field.name}") for field in fields(CrfSettings)})


def check(args: argparse.Namespace) -> None:
    """Refuses what `run` would refuse before it looks at a map, for whoever has much to do before.

    Raises:
        UserError: pydensecrf is not installed, or an option is out of range.
    """
    import_densecrf()
    settings_from(args)


@dataclass(frozen=True)
class Refinable:
    """The frames of one video: where its maps are (below ``probability/`` and `FOLDERS`), and the pictures.

    frames: image files, which the processes read; not `in_files` pictures (H, W, 3) uint8 RGB, asked for one by one in
    order, as the decoder of a video file has them.
    """

    place: Path
    stems: Sequence[str]
    frames: Sequence[Path] | Sequence[np.ndarray]
    in_files: bool = True


def refinable(sequence: VideoSequence) -> Refinable:
    """A video of a data set."""
    return Refinable(Path(sequence.dataset, sequence.name), sequence.stems, sequence.frames)


def run(args: argparse.Namespace, videos: Sequence[Refinable], save_dir: str | Path) -> int:
    """``--tools crf``: refines ``<save_dir>/probability/<dataset>/<video>/<stem>.png`` into ``<save_dir>/crf/…``, grey,
    and ``<save_dir>/crf_binary/…``, 255 where that is above 127.

    A result that is newer than its probability map, and was made of that map with the same settings, is kept, unless
    ``--overwrite``. Returns the number of maps made.

    Raises:
        UserError: pydensecrf is not installed.
        DataError: a map or frame that is missing, unreadable, or of another size.
    """
    import_densecrf()  # now rather than in a worker
    settings = settings_from(args)
    save_dir = Path(save_dir)
    todo = []
    for video in videos:
        for index, stem in enumerate(video.stems):
            todo.append((video, index, video.place / f"{stem}.png"))
    sources = [save_dir / "probability" / place for *_, place in todo]
    missing = [source for source in sources if not source.is_file()]
    if missing:
        raise DataError(
            f"{len(missing)} probability maps are missing, the first one {missing[0]}; make them first, with the same "
            "--save_dir: python tool.py --checkpoint WEIGHTS --tools test …"
        )
    if not args.overwrite:
        # All of each map is read, which takes minutes for tens of thousands.
        with progress_bar(todo, desc="crf: what is there", unit="frame", leave=False) as look:
            todo = [task for task in look if not _is_current(save_dir, task[2], settings)]
    # One by one: a frame that is no file is decoded when its turn comes.
    tasks = ((video.frames[index], save_dir, place, settings) for video, index, place in todo)
    done = parallel_map(_refine_file, tasks, args.workers)
    for _ in progress_bar(done, total=len(todo), desc="crf", unit="frame"):
        pass
    return len(todo)


@contextmanager
def run_beside_test(
    args: argparse.Namespace, videos: Sequence[Refinable], save_dir: str | Path, world_size: int = 1
) -> Iterator[Callable[[Path], None] | None]:
    """``--tools test crf``: refines maps on other processes while the network makes the next ones.

    Gives what is to be called with the place of each map that has been written, ``<dataset>/<video>/<stem>.png``; None
    where ``--workers`` allows no process beside this one, or frames are not in files, since a decoder has one position
    and the network reads from it. `run`, afterwards, makes what is still missing.

    Args:
        world_size: processes of `test`, which share out the workers.

    Raises:
        As `run`, also from the call that it gives.
    """
    workers = count_of_workers(args.workers)
    if workers <= 1 or not all(video.in_files for video in videos):
        yield None
        return
    import_densecrf()
    settings, save_dir = settings_from(args), Path(save_dir)
    frames = {v.place / f"{stem}.png": frame for v in videos for stem, frame in zip(v.stems, v.frames)}
    with Background(_refine_file, share_of_workers(workers, world_size), "crf") as background:

        def written(place: Path) -> None:
            background.submit(frames[place], save_dir, place, settings)

        yield written


def _refine_file(frame: Path | np.ndarray, save_dir: Path, place: Path, settings: CrfSettings) -> None:
    source = save_dir / "probability" / place
    image, name = (load_frame(frame), frame) if isinstance(frame, Path) else (frame, "its frame")
    making = _making(source, settings)  # before the map is read: one that comes after it would vouch for this one's
    probability = load_probability(source)
    require_size(source, probability.shape, image.shape, name)
    refined = refine(image, probability, settings)
    grey, binary = (save_dir / folder / place for folder in FOLDERS)
    grey.unlink(missing_ok=True)  # an older one, after a stop between the two, would vouch for the new mask
    write_png(binary, (refined > THRESHOLD) * np.uint8(255))
    write_png(grey, refined, (FIELD, making))  # last: it vouches for both


def _is_current(save_dir: Path, place: Path, settings: CrfSettings) -> bool:
    source = save_dir / "probability" / place
    grey, binary = (save_dir / folder / place for folder in FOLDERS)
    if not grey.is_file() or grey.stat().st_mtime_ns < source.stat().st_mtime_ns or not is_whole_png(binary):
        return False
    try:
        with Image.open(grey) as image:
            image.load()
            return json.loads(image.info[FIELD]) == _making(source, settings)
    except (OSError, SyntaxError, ValueError, KeyError):
        return False  # damaged, or of unknown making: it is made again


def _making(source: Path, settings: CrfSettings) -> dict[str, Any]:
    """What a refined map depends on. Times alone do not tell: a map copied or moved to its place keeps its own."""
    numbers = {name: float(value) for name, value in asdict(settings).items()}
    return {**numbers, MAP: short_sha256(source)}
