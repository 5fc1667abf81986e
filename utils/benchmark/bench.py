"""``tool.py --tools bench``: how fast the network and the whole way are on this machine, as JSON and as a table.

Times of calls (parts network, encoders, propagation, video) are taken after warm-up, with the device synchronised, as
the median of repeats; things that are compared run in turns, but for the ways of part video. Parts long, pipeline and
training go through their work once after a warm-up, one thing after the other: their ratios hold other work on the
machine, too. See docs/performance.md for what the figures mean.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import math
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.crf import import_densecrf
from utils.errors import UserError, check_output
from utils.files import write_json
from utils.inference.weights import check_size
from utils.parallel import count_of_workers

# PyTorch and the modules that measure are imported by `run`: the command line of other tools needs none of them.
if TYPE_CHECKING:
    import torch

    from models.dbsnet import DBSNet

PARTS = ("network", "video", "encoders", "profile", "propagation", "pipeline", "long", "training")
DEFAULT_PARTS = ("network", "video", "propagation", "pipeline")
SIZES = ((384, 640), (480, 864))
VARIANTS = ("s", "xxs")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the ``--bench_…`` options; ``--size``, ``--batch_size``, ``--amp``, ``--cuda_graphs`` and ``--workers`` are
    shared.
    """
    group = parser.add_argument_group(
        "bench",
        "weights are random unless --checkpoint is given; speed is the same\n"
        "part pipeline takes the frames of the first video of --datasets; without --datasets it draws frames",
    )
    group.add_argument(
        "--bench_parts", nargs="+", choices=PARTS, default=DEFAULT_PARTS, metavar="PART",
        help=f"one or several of {', '.join(PARTS)}; default: {' '.join(DEFAULT_PARTS)}",
    )  # fmt: skip
    group.add_argument(
        "--bench_variants", nargs="+", choices=("s", "xs", "xxs"), default=VARIANTS, metavar="V",
        help="networks to measure without --checkpoint; default: s xxs",
    )  # fmt: skip
    group.add_argument(
        "--bench_sizes", nargs="+", type=_size, default=SIZES, metavar="HxW",
        help="input sizes to measure without --size; default: 384x640 480x864",
    )  # fmt: skip
    group.add_argument("--bench_clip", type=int, default=8, metavar="N", help="frames of a clip; default: 8")
    group.add_argument(
        "--bench_frames", type=int, default=2000, metavar="N",
        help="part long: frames of its video, which is compared with one of a tenth of them; default: 2000",
    )  # fmt: skip
    group.add_argument(
        "--bench_device_memory", type=int, metavar="MiB",
        help="part long: features to keep on a GPU before host memory is used; default: 4096",
    )  # fmt: skip
    group.add_argument(
        "--bench_host_memory", type=int, metavar="MiB",
        help="part long: features to keep in host memory before a file is used; default: 1024",
    )  # fmt: skip
    group.add_argument(
        "--bench_video_frames", type=int, default=32, metavar="N",
        help="parts video and pipeline: frames of the video; default: 32",
    )  # fmt: skip
    group.add_argument("--bench_crf", action="store_true", help="part pipeline with the CRF")
    group.add_argument("--bench_repeats", type=int, default=5, metavar="N", help="how often to time each; default: 5")
    group.add_argument("--bench_threads", type=int, metavar="N", help="threads of PyTorch; default: its own choice")
    group.add_argument(
        "--bench_processes", type=int, default=1, metavar="N", help="part training: time N gloo processes as well"
    )
    group.add_argument("--bench_json", metavar="FILE", help="file to write; default: SAVE_DIR/benchmark.json")


def _size(text: str) -> tuple[int, int]:
    try:
        height, width = (int(word) for word in text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a size as 384x640, got {text!r}") from None
    if min(height, width) < 1:
        raise argparse.ArgumentTypeError(f"expected a height and a width above 0, got {text!r}")
    return height, width


def check(args: argparse.Namespace) -> None:
    """Refuses what `run` would refuse before it measures anything, for whoever has much to do before.

    Raises:
        UserError: an option out of range, two that contradict each other, part encoders without timm, or the CRF
            without pydensecrf.
    """
    for name in ("bench_clip", "bench_frames", "bench_video_frames", "bench_repeats", "bench_processes"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: expected 1 or more")
    for name in ("bench_device_memory", "bench_host_memory"):
        if (getattr(args, name) or 0) < 0:
            raise UserError(f"--{name} {getattr(args, name)}: expected 0 or more")
    for name in ("bench_threads", "batch_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: expected 1 or more")
    check_output("bench_json", args.bench_json, ".json")
    check_size(args.size)
    for name, unset, other in (("bench_sizes", SIZES, "size"), ("bench_variants", VARIANTS, "checkpoint")):
        if getattr(args, name) is not unset and getattr(args, other):
            raise UserError(f"--{name} and --{other} both say what to measure: leave one of them out")
    if "encoders" in args.bench_parts and importlib.util.find_spec("timm") is None:
        raise UserError("--bench_parts encoders compares with timm's encoders: pip install timm, or leave it out")
    if args.bench_crf and "pipeline" in args.bench_parts:
        import_densecrf()


def run(args: argparse.Namespace, device: torch.device, frames: Sequence[Path] | None = None) -> dict[str, Any]:
    """Measure what ``--bench_parts`` asks for, after `check`; prints each figure as it comes, writes the JSON, and
    returns it.

    Args:
        frames: those that part pipeline reads; drawn ones by default.

    Raises:
        UserError: sizes too small for a part.
    """
    import torch

    from datasets.synthetic import LEAST_SIDE
    from models import load_dbsnet
    from utils.benchmark.network import describe_net, make_net
    from utils.benchmark.propagation import arithmetic_rates, bench_propagation
    from utils.benchmark.timing import describe_machine
    from utils.training.optimisation import coarsest_positions

    if args.bench_threads is not None:
        torch.set_num_threads(args.bench_threads)
    sizes = [tuple(args.size)] if args.size else list(args.bench_sizes)
    drawing = {"training"} | (set() if frames else {"pipeline"})
    for height, width in sizes:
        if min(height, width) < LEAST_SIDE and drawing & set(args.bench_parts):
            part = min(drawing & set(args.bench_parts))
            raise UserError(
                f"size {height}x{width}: part {part} draws its own frames, {LEAST_SIDE} pixels or more a side; give a "
                "larger size, or leave the part out"
            )
    nets = [load_dbsnet(args.checkpoint)] if args.checkpoint else [make_net(variant) for variant in args.bench_variants]
    if "training" in args.bench_parts:
        for net, (height, width) in itertools.product(nets, sizes):
            if math.prod(_training_clips(args)) * coarsest_positions((height, width), net.multiple) == 1:
                raise UserError(
                    f"size {height}x{width}: part training with one clip of one frame leaves batch norms a single "
                    "value at stride 32, which has no statistics; give a larger size, --bench_clip or --batch_size"
                )

    report: dict[str, Any] = {"date": time.strftime("%Y-%m-%d %H:%M"), "machine": describe_machine(device)}
    report |= {"amp": args.amp, "results": []}
    path = Path(args.bench_json or Path(args.save_dir) / "benchmark.json")
    write_json(path, report)  # where it cannot be written, that is told before anything is measured
    for name, rate in arithmetic_rates(device).items():
        report["machine"][f"GMAC_per_second_of_a_{name.replace(' ', '_')}"] = rate / 1e9
    _print("machine", report["machine"])

    def add(part: str, result: dict[str, Any]) -> None:
        report["results"].append({"part": part, **result})
        _print(part, result)
        write_json(path, report)  # after each figure, so that a run cut short has told what it knew

    parts = set(args.bench_parts)
    if "propagation" in parts:
        for result in bench_propagation(device, repeats=args.bench_repeats):
            add("propagation", result)
    for net in nets:
        for size in sizes:
            head = {**describe_net(net), "size": list(size), "dtype": "float32" if args.amp == "none" else args.amp}
            for part in ("network", "encoders", "profile", "video", "long", "pipeline", "training"):
                if part in parts:
                    add(part, {**head, **_measure(part, args, net, device, size, frames)})
    print(f"bench: {path}", flush=True)
    return report


def _measure(
    part: str,
    args: argparse.Namespace,
    net: DBSNet,
    device: torch.device,
    size: tuple[int, int],
    paths: Sequence[Path] | None = None,
) -> dict[str, Any]:
    """One part for one network and size.

    paths: the frames of part pipeline; synthetic ones by default.
    """
    from models import Predictor
    from models.consensus import can_agree
    from utils.benchmark.network import bench_against_encoders, bench_clip, bench_long, bench_video, profile_clip
    from utils.benchmark.pipeline import bench_pipeline
    from utils.benchmark.timing import release
    from utils.benchmark.training import bench_training

    release(device)
    clip = {"length": args.bench_clip, "amp": args.amp}
    graphs = {"cuda_graphs": args.cuda_graphs}
    if part == "network":
        return bench_clip(net, device, size, repeats=args.bench_repeats, **clip, **graphs)
    if part == "encoders":
        return bench_against_encoders(net, device, size, repeats=args.bench_repeats, **clip, **graphs)
    if part == "profile":
        return {"operators": profile_clip(net, device, size, **clip)}
    common = {"amp": args.amp, "batch_size": args.batch_size, **graphs}
    if part == "video":
        frames = args.bench_video_frames
        return bench_video(net, device, size, length=frames, repeats=args.bench_repeats, **common)
    if part == "long":
        limits = {
            name: getattr(args, f"bench_{name}") << 20
            for name in ("device_memory", "host_memory")
            if getattr(args, f"bench_{name}") is not None
        }
        return bench_long(net, device, size, length=args.bench_frames, **limits, **common)
    workers = count_of_workers(args.workers)
    if part == "pipeline":
        with tempfile.TemporaryDirectory(prefix="dbsnet-bench-") as folder:
            paths = paths or _drawn_frames(Path(folder), args.bench_video_frames, size)
            votes = can_agree(net.streams)
            predictor = Predictor(net, device=device, size=size, consensus=votes, smooth=True, **common)
            return bench_pipeline(predictor, paths, workers=max(1, workers), crf=args.bench_crf)
    batch, length = _training_clips(args)
    return bench_training(
        net.config, device, size, length=length, batch=batch, amp=args.amp, workers=workers,
        steps=max(2, args.bench_repeats), processes=args.bench_processes,
    )  # fmt: skip


def _training_clips(args: argparse.Namespace) -> tuple[int, int]:
    """Clips of a step of part training, and their frames."""
    return args.batch_size or 4, min(args.bench_clip, 5)


def _drawn_frames(folder: Path, count: int, size: tuple[int, int]) -> Sequence[Path]:
    """Files of synthetic frames, written now."""
    from datasets.synthetic import write_dataset

    root = write_dataset(folder, videos=1, frames=count, size=size, flows=False)
    return sorted((root / "JPEGImages").rglob("*.jpg"))


def _print(part: str, result: dict[str, Any]) -> None:
    """A figure as one indented block."""
    print(f"{part}:", flush=True)
    _print_fields(result, 1)


def _print_fields(value: dict[str, Any], depth: int) -> None:
    for name, item in value.items():
        indent = "  " * depth
        if isinstance(item, dict):
            short = all(not isinstance(x, (dict, list)) for x in item.values())
            if short:
                print(f"{indent}{name}: " + ", ".join(f"{k} {_word(v)}" for k, v in item.items()), flush=True)
            else:
                print(f"{indent}{name}:", flush=True)
                _print_fields(item, depth + 1)
        elif isinstance(item, list) and item and isinstance(item[0], dict):
            for entry in item:
                print(f"{indent}" + ", ".join(f"{k} {_word(v)}" for k, v in entry.items()), flush=True)
        else:
            print(f"{indent}{name} {_word(item)}", flush=True)


def _word(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
