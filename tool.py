"""Everything around training: check the data, make flow, segment, refine, score, report, demonstrate.

    python tool.py --checkpoint model_weight_path --tools test
    python tool.py --checkpoint model_weight_path --tools flow test crf eval report --data_dir data \\
        --datasets DAVIS-2016
    python tool.py --checkpoint model_weight_path --tools test --video clip.mp4
    python tool.py --tools demo
    torchrun --nproc-per-node=2 tool.py --tools test --datasets DAVIS-2016

Several tools run in the order given. Without --datasets: all of DAVIS-2016, FBMS, DAVSOD and MCL that --data_dir has;
check alone also looks at the sets there that are only trained on.
Results: <save_dir>/probability, binary, crf and crf_binary/<dataset>/<video>/<frame>.png, evaluation.json, report.html.
For a video of your own these paths have no <dataset>; its flow is in <save_dir>/flow, an overlay in <save_dir>/overlay.
Exit codes: 0; 1 where check finds problems; 2 for an error; 130 after Ctrl-C, 143 after SIGTERM.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

# What the tools need is imported where they use it: the worker processes of flow, crf and eval read this file again,
# and would otherwise each import PyTorch, also those that need nothing but NumPy.
if TYPE_CHECKING:
    from datasets.sequences import VideoSequence
    from utils.distributed import Processes
    from utils.flow.beside import FlowBeside
    from utils.inference.own_video import OwnVideo

DEFAULT_DATASETS = ("DAVIS-2016", "FBMS", "DAVSOD", "MCL")
NUM_FRAMES = 5  # as in training


# ------------------------------------------------------------------------------------------------------ command line


class _Unsaid(str):
    """A default value that can be told from the same word given by the user."""


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; each tool's own options come from its module."""
    from utils import crf, demo, export, parallel, report
    from utils.benchmark import bench
    from utils.errors import CommandLine, UserError, unknown_argument
    from utils.evaluation import evaluate
    from utils.flow import prepare
    from utils.inference import segment
    from utils.inference.weights import PUBLISHED_WEIGHTS

    parser = CommandLine(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument(
        "--tools", nargs="+", choices=TOOLS, metavar="TOOL", help=f"one or several of {', '.join(TOOLS)}"
    )
    parser.add_argument(
        "--checkpoint",
        metavar="FILE",
        help="weights: .pt or .safetensors of a training run, or published ones. Default of test: "
        f"{PUBLISHED_WEIGHTS.parent.name}/{PUBLISHED_WEIGHTS.name} where it is there; export needs one",
    )
    parser.add_argument(
        "--save_dir", default="results", metavar="DIR", help="folder of all results; default: %(default)s"
    )
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="auto: CUDA if there is one")

    data = parser.add_argument_group("data")
    data.add_argument("--data_dir", default="data", metavar="DIR", help="holds the data sets, or is one; default: data")
    data.add_argument(
        "--flow_dir",
        metavar="DIR",
        help="read and make flow in DIR/<data set>/… instead of beside the data, which may be read-only or have flow "
        "of another kind; default: beside the data",
    )
    data.add_argument(
        "--datasets",
        nargs="+",
        metavar="NAME",
        help=f"data sets to use; default: those of {', '.join(DEFAULT_DATASETS)} that are there",
    )
    data.add_argument(
        "--split",
        metavar="NAME",
        help="split to use: val, train, trainval or test (YouTube-VOS: its own; else val); of DAVIS-2017 also test-dev "
        "and test-challenge, of DAVSOD validation; default: val (check: train and val, as far as they are there)",
    )
    data.add_argument("--sequences", nargs="+", metavar="NAME", help="only these videos; default: all")
    data.add_argument(
        "--num_frames",
        type=int,
        metavar="N",
        help="use every N-th frame of YouTube-VOS's train split (flow: all frames); default: 5, check: all frames",
    )
    data.add_argument("--video", metavar="FILE", help="a video of your own, instead of data sets (flow, test, crf)")
    data.add_argument("--frames", metavar="DIR", help="a folder of frames of your own (flow, test, crf)")

    network = parser.add_argument_group("network (test, bench)")
    network.add_argument(
        "--size",
        type=int,
        nargs=2,
        metavar=("H", "W"),
        help="size of the network's input; default: the checkpoint's, or 384 640 (bench: --bench_sizes), and videos "
        "of another shape then have one with about as many pixels in their own",
    )
    network.add_argument("--batch_size", type=int, metavar="N", help="frames at once; default: 4 on a CPU, 16 on a GPU")
    network.add_argument(
        "--amp", choices=("none", "bf16", "fp16"), default="none", help="mixed precision; default: none"
    )
    network.add_argument(
        "--cuda_graphs",
        action=argparse.BooleanOptionalAction,
        help="record the work of a batch once and launch it as a whole; default: on a GPU",
    )

    parallel.add_arguments(parser)
    for module in (prepare, segment, crf, evaluate, report, demo, bench, export):
        module.add_arguments(parser)
    parser.set_defaults(flow_method=_Unsaid(parser.get_default("flow_method")), own=None)
    # For launchers that pass it; newer ones set LOCAL_RANK.
    local_rank = os.environ.get("LOCAL_RANK", "0")
    parser.add_argument("--local_rank", "--local-rank", type=int, default=local_rank, help=argparse.SUPPRESS)
    args, unknown = parser.parse_known_args(arguments)
    if unknown:
        if unknown[0].startswith("-"):
            raise UserError(unknown_argument(unknown[0], sorted(set(vars(args)) - {"local_rank", "own"})))
        raise UserError(
            f"unexpected word {unknown[0]!r}; options are given as --name value, what to do as --tools TOOL"
        )
    if args.tools is None:
        raise UserError(
            f"--tools is missing; give one or several of {', '.join(TOOLS)} (python tool.py --tools demo needs no data)"
        )
    if set(args.tools) == {"demo"}:
        _refuse_without_effect(args, parser)
    _check(args)
    return args


def _refuse_without_effect(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """What would be passed over by the demo alone, which makes its own data and weights and has a folder of its own."""
    from utils.errors import UserError

    for name in ("save_dir", "checkpoint", "data_dir", "flow_dir", "datasets", "size"):
        if getattr(args, name) != parser.get_default(name):
            raise UserError(
                f"--{name} has no effect on --tools demo, which makes its own data and weights: leave it out; "
                "--demo_dir DIR says where all of it goes"
            )


def _check(args: argparse.Namespace) -> None:
    """What one option alone cannot tell, and what is cheaper to say now than after an hour of the first tool."""
    from utils import crf, export, report
    from utils.benchmark import bench
    from utils.errors import UserError
    from utils.evaluation import evaluate
    from utils.flow import prepare
    from utils.inference import segment
    from utils.inference.own_video import check_place
    from utils.inference.weights import check_file, find_checkpoint

    for name, what in (
        ("save_dir", "folder"), ("flow_dir", "folder"), ("table_dir", "folder"), ("demo_dir", "folder"),
        ("checkpoint", "file"), ("video", "file"), ("frames", "folder"),
    ):  # fmt: skip
        # Of a variable that is not set; results would go beside the program, and no video would mean the data sets.
        if getattr(args, name) == "":
            raise UserError(f"--{name} '': expected the name of a {what}")
    if args.workers is not None and args.workers < 0:
        raise UserError(f"--workers {args.workers}: expected 0 (no extra process) or more")
    own = args.video or args.frames
    if args.video and args.frames:
        raise UserError("--video and --frames: give one of them")
    if own:
        for name in ("datasets", "split", "sequences", "num_frames"):
            if getattr(args, name) is not None:
                raise UserError(f"--{name} is of data sets, and --video and --frames are of no data set: leave it out")
        unable = [tool for tool in args.tools if tool not in ("flow", "test", "crf")]
        if unable:
            raise UserError(
                f"--tools {unable[0]} does not work on a video of your own (--video, --frames): flow, test and crf do"
            )
        if args.flow_dir:
            raise UserError("--flow_dir is of data sets; flow of a video of your own goes below --save_dir")
        check_place("video" if args.video else "frames", own, args.save_dir)
        # The user of a single video has most likely no weights of RAFT, and a download must not come unasked.
        if isinstance(args.flow_method, _Unsaid) and args.flow_weights is None:
            args.flow_method = "dis"
    if args.num_frames is not None and args.num_frames < 1:
        raise UserError(f"--num_frames {args.num_frames}: expected 1 or more")
    if "flow" in args.tools or (own and "test" in args.tools):
        prepare.settings_from(args)
    if "test" in args.tools:
        segment.check(args)
    if "crf" in args.tools:
        crf.check(args)
    if "eval" in args.tools:
        evaluate.check(args, _dataset_names(args))
    if "report" in args.tools:
        report.check(args)
    if "bench" in args.tools:
        bench.check(args)
    if "export" in args.tools:
        export.check(args)
    for tool in ("test", "bench", "export"):
        # The demo makes a checkpoint, and bench can do without one.
        if tool not in args.tools or _follows(args, tool, "demo") or (tool != "test" and not args.checkpoint):
            continue
        check_file("checkpoint", find_checkpoint(args.checkpoint))


def _check_device(args: argparse.Namespace, processes: Processes) -> None:
    """What an option or a tool wants of a device and of the number of processes, which are known only now, and the
    default that follows from the device.
    """
    from utils.errors import UserError

    if "demo" in args.tools and processes.world_size > 1:
        raise UserError("--tools demo runs in one process: python tool.py --tools demo")
    if args.cuda_graphs and processes.device.type != "cuda" and {"test", "bench"} & set(args.tools):
        raise UserError(f"--cuda_graphs needs a GPU, and the device is {processes.device}: leave it out")
    if args.cuda_graphs is None:
        args.cuda_graphs = processes.device.type == "cuda"


# ------------------------------------------------------------------------------------------------------------- tools


def run_check(args: argparse.Namespace, processes: Processes) -> int:
    from datasets import check
    from utils.parallel import count_of_workers
    from utils.progress import progress_bar

    problems = 0
    if processes.is_main:
        problems = check.run(
            args.data_dir,
            _datasets_to_check(args),
            splits=[args.split] if args.split else None,
            num_frames=args.num_frames or 1,  # flow is made of all of them
            flow_root=args.flow_dir,
            require_flow="flow" not in args.tools,  # it is about to be made
            workers=max(1, count_of_workers(args.workers)),
            only=args.sequences,
            bar=progress_bar,
        )
    # Or the others would begin the next tool on data that the first has just found wrong.
    return int(processes.reduce([problems], "max")[0] > 0)


def run_flow(args: argparse.Namespace, processes: Processes) -> int:
    from utils.flow import prepare
    from utils.inference.own_video import run_own_flow

    if args.video or args.frames:
        if processes.is_main:
            run_own_flow(args, _own(args), processes.device)
        return 0
    if _flow_beside_test(args, processes):
        return 0
    prepare.run(args, _read_for_flow(args), processes)
    processes.wait()
    return 0


def _read_for_flow(args: argparse.Namespace) -> list[VideoSequence]:
    # One frame in num_frames is a matter of training; stored flow is of neighbours, and of every frame.
    return [sequence for part in _read(args, num_frames=1).values() for sequence in part]


def _flow_beside_test(args: argparse.Namespace, processes: Processes) -> bool:
    """Whether `test`, which comes next, makes the flow of the later videos while it segments the first."""
    from utils.flow import prepare

    following = dict(zip(args.tools, args.tools[1:]))
    next_is_test = following.get("flow") == "test" and not (args.video or args.frames)
    return next_is_test and prepare.can_run_beside(args, processes.world_size)


def run_test(args: argparse.Namespace, processes: Processes) -> int:
    from utils.flow import prepare
    from utils.inference import own_video, segment, videos
    from utils.inference.weights import load_weights

    weights = load_weights(args.checkpoint)
    own = _own(args) if args.video or args.frames else None
    sequences = [] if own else [sequence for part in _read(args).values() for sequence in part]
    beside: AbstractContextManager[Callable[[Path], None] | None] = nullcontext()
    if _follows(args, "crf", "test") and (own is None or processes.is_main):
        from utils import crf

        refined = [own.for_crf()] if own else [crf.refinable(sequence) for sequence in sequences]
        beside = crf.run_beside_test(args, refined, args.save_dir, 1 if own else processes.world_size)
    making: AbstractContextManager[FlowBeside | None] = nullcontext()
    if _flow_beside_test(args, processes):
        making = prepare.run_beside_test(args, _read_for_flow(args), processes)
    with beside as written, making as flow:
        if own is None:
            with_flow = segment.needs_flow(args, weights)
            segment.run(args, [videos.video_of(s, with_flow, flow) for s in sequences], processes, weights, written)
        else:
            own_video.run_own(args, own, processes, weights, written)
    processes.wait()  # or the first would refine what the others' processes are still at
    return 0


def run_crf(args: argparse.Namespace, processes: Processes) -> int:
    from utils import crf
    from utils.inference.own_video import run_own_crf

    if processes.is_main:
        if _follows(args, "crf", "test"):
            # What `test` has just made anew was refined beside it, and older maps are out of date without a word.
            args = argparse.Namespace(**{**vars(args), "overwrite": False})
        if args.video or args.frames:
            run_own_crf(args, _own(args))
        else:
            crf.run(args, [crf.refinable(s) for part in _read(args).values() for s in part], args.save_dir)
    return 0


def run_eval(args: argparse.Namespace, processes: Processes) -> int:
    from utils.evaluation import evaluate

    if processes.is_main:
        evaluate.run(args, _read(args), args.results or [Path(args.save_dir)])
    return 0


def run_report(args: argparse.Namespace, processes: Processes) -> int:
    from utils import report

    if processes.is_main:
        report.run(args, _read(args))
    return 0


def run_demo(args: argparse.Namespace, processes: Processes) -> int:
    from main import main as train
    from utils import demo

    demo.run(args, train, main)
    return 0


def run_bench(args: argparse.Namespace, processes: Processes) -> int:
    from utils.benchmark import bench

    if processes.is_main:
        frames = None
        if args.datasets and "pipeline" in args.bench_parts:
            first = next(iter(_read(args).values()))[0]
            frames = first.frames[: args.bench_video_frames]
        try:
            bench.run(args, processes.device, frames)
        except KeyboardInterrupt as stop:
            stop.args = ("the figures so far are in its JSON, and the same command measures all anew",)
            raise
    return 0


def run_export(args: argparse.Namespace, processes: Processes) -> int:
    from utils import export

    if processes.is_main:
        export.run(args)
    return 0


# A tool returns the exit code; anything but 0 ends the row of tools.
TOOLS: dict[str, Callable[[argparse.Namespace, Any], int]] = {
    "check": run_check,
    "flow": run_flow,
    "test": run_test,
    "crf": run_crf,
    "eval": run_eval,
    "report": run_report,
    "demo": run_demo,
    "bench": run_bench,
    "export": run_export,
}


# -------------------------------------------------------------------------------------------------------------- data


def _dataset_names(args: argparse.Namespace) -> list[str]:
    """The data sets given, or those of `DEFAULT_DATASETS` that are there."""
    from datasets.sequences import canonical_name
    from utils.errors import UserError

    if args.datasets:
        return list(dict.fromkeys(canonical_name(name) for name in args.datasets))
    found = _default_datasets(args.data_dir)
    if not found:
        raise UserError(
            f"--data_dir {args.data_dir}: none of {', '.join(DEFAULT_DATASETS)} is there. Put the unpacked data set "
            "there (its folder, for instance DAVIS), give --data_dir DIR or --datasets NAME; for a video of your own "
            "give --video FILE or --frames DIR; python tool.py --tools demo needs no data"
        )
    return found


def _default_datasets(data_dir: str) -> list[str]:
    """Those of `DEFAULT_DATASETS` that are there."""
    from datasets.errors import DataError
    from datasets.sequences import find_root
    from utils.errors import UserError

    found = {}
    for name in DEFAULT_DATASETS:
        try:
            found[name] = find_root(name, data_dir)
        except DataError:
            continue
    for root in found.values():
        names = [name for name in found if found[name] == root]
        if len(names) > 1:  # which only a folder can be that is the set itself and is called otherwise
            raise UserError(
                f"--data_dir {data_dir}: {root} has the form of {' and of '.join(names)}; say which one it is: "
                f"--datasets {names[0]}"
            )
    return list(found)


def _datasets_to_check(args: argparse.Namespace) -> list[str]:
    """The data sets given, or all that are there, those that are only trained on among them; before other tools, and of
    one split that is for tests, those that these take.
    """
    from datasets.sequences import find_datasets

    if args.datasets or set(args.tools) != {"check"} or args.split not in (None, "train"):
        return _dataset_names(args)
    _default_datasets(args.data_dir)  # says where a folder may be either of two sets
    return find_datasets(args.data_dir) or _dataset_names(args)


def _read(args: argparse.Namespace, num_frames: int | None = None) -> dict[str, list[VideoSequence]]:
    """The videos of each data set, those of --sequences if given."""
    from datasets.sequences import read_dataset
    from utils.errors import UserError, nearest

    if num_frames is None:
        num_frames = args.num_frames or NUM_FRAMES
    found = {
        name: read_dataset(name, args.data_dir, args.split or "val", num_frames, flow_root=args.flow_dir)
        for name in _dataset_names(args)
    }
    if args.sequences:
        known = [sequence.name for part in found.values() for sequence in part]
        unknown = [name for name in args.sequences if name not in known]
        if unknown:
            raise UserError(f"--sequences {unknown[0]}: not in {', '.join(found)}; {nearest(unknown[0], known)}")
        found = {name: [s for s in part if s.name in args.sequences] for name, part in found.items()}
        found = {name: part for name, part in found.items() if part}
    return found


def _follows(args: argparse.Namespace, tool: str, other: str) -> bool:
    """Whether a tool comes after another in the row asked for."""
    return tool in args.tools and other in args.tools[: args.tools.index(tool)]


def _own(args: argparse.Namespace) -> OwnVideo:
    """The user's video, opened by the first tool that needs it: counting the frames of a file decodes all of it."""
    from utils.inference.own_video import open_own

    if args.own is None:
        args.own = open_own(args.video, args.frames)
    return args.own


# -------------------------------------------------------------------------------------------------------------- main


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the tools; returns the exit code."""
    try:
        # Within the try, as all that is imported first: it takes seconds, in which people think better of it.
        from utils.errors import exit_on_user_error

        with exit_on_user_error():
            return _run_tools(arguments)
    except KeyboardInterrupt as stop:
        from utils.stopping import INTERRUPTED, Terminated

        if __name__ == "__main__":
            # All that is left is to wait for processes that have been told to end: Ctrl-C again would not hasten it,
            # and Python would tell of it by tracebacks.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        terminated = isinstance(stop, Terminated)
        following = stop.args[0] if stop.args else "the same command goes on from here"
        print(f"{'ended by SIGTERM' if terminated else 'interrupted'}; {following}", file=sys.stderr)
        return Terminated.exit_code if terminated else INTERRUPTED


def _run_tools(arguments: Sequence[str] | None) -> int:
    from utils.distributed import start_processes, stop_processes
    from utils.parallel import end_workers
    from utils.stopping import end_by_ctrl_c, sigterm_raises

    end_by_ctrl_c(at_once=False)
    args = parse_args(arguments)
    processes = start_processes(args.device, args.local_rank)
    try:
        _check_device(args, processes)
        with sigterm_raises():
            for tool in args.tools:
                code = TOOLS[tool](args, processes)
                if code:
                    return code
        return 0
    except KeyboardInterrupt as stop:
        end_workers()  # first: what they hold may keep the process group from ending
        if args.overwrite and not stop.args:
            stop.args = ("the same command begins anew, and without --overwrite it keeps what is there, old or new",)
        raise
    finally:
        stop_processes()


if __name__ == "__main__":
    from utils.stopping import end_by_ctrl_c

    end_by_ctrl_c(at_once=True)  # until NumPy and PyTorch have been imported
    sys.exit(main())
