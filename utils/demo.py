"""`tool.py --tools demo`: the whole way in a few minutes, without data, download or GPU.

It draws synthetic videos, computes their flow, trains a small network on them (from the published weights where they
are there, else from random ones), segments videos that the network has not seen, refines, scores, and writes a page
about it. Every step but the drawing is one of the ordinary commands, which are printed as they run.
"""

from __future__ import annotations

import argparse
import importlib.util
import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from datasets.scenes import SceneOptions
from datasets.sequences import read_dataset
from datasets.synthetic import write_dataset
from utils.errors import UserError, number_of
from utils.evaluation.reading import read_written
from utils.inference import weights
from utils.parallel import cpu_seconds
from utils.report import write_report
from utils.stopping import INTERRUPTED, Terminated
from utils.training.config import CONFIGS, load_config

Command = Callable[[Sequence[str]], int]

TRAIN, VAL = "demo-train", "demo-val"
TRAIN_VIDEOS, VAL_VIDEOS = {"videos": 80, "frames": 5, "seed": 0}, {"videos": 6, "frames": 16, "seed": 7}
VIDEO_SIZE = (192, 288)
INPUT_SIZE = ("96", "144")  # as configs/demo.yaml trains
# In place of that file's, where training begins with weights that know real video already.
FINETUNE_STEPS, FINETUNE_LR = 150, "1e-3"
# One object that moves before a camera at rest, in steady light: what a network can learn in a minute. Objects at rest,
# moving cameras, noise, look-alikes, occlusion and second objects are for real training.
SCENES = SceneOptions(
    camera_static=1.0,
    object_static=0.0,
    object_parallax=0.0,
    object_tracked=0.0,
    object_speed=(0.015, 0.04),
    other_background=0.0,
    second_object=0.0,
    distractor=0.0,
    occluder=0.0,
).clean()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``demo``; ``--overwrite`` and ``--device`` are shared ones."""
    group = parser.add_argument_group("demo")
    group.add_argument("--demo_dir", default="demo", metavar="DIR", help="folder of all it makes; default: %(default)s")
    group.add_argument("--demo_scratch", action="store_true", help="train from random weights in any case")
    group.add_argument(
        "--demo_steps",
        type=int,
        metavar="N",
        help=f"training steps; default: {FINETUNE_STEPS} from the published weights, else as configs/demo.yaml",
    )


def run(args: argparse.Namespace, train: Command, tool: Command) -> dict[str, Any]:
    """``--tools demo``; a demo that was interrupted goes on where it stopped, unless ``--overwrite``.

    Args:
        train, tool: what main.py and tool.py run, called with a list of arguments; they return the exit code.

    Returns:
        ``J`` and ``F`` on the videos that were not trained on, ``J_crf`` (None without pydensecrf), ``seconds``,
        ``cpu_seconds`` and ``page``.

    Raises:
        UserError: OpenCV is not installed, ``--demo_steps`` is wrong or not that of the demo there, a command failed.
        SystemExit: Ctrl-C or SIGTERM stopped a command, which has said so; its exit code.
    """
    if importlib.util.find_spec("cv2") is None:
        raise UserError(
            "the demo's flow is computed by OpenCV, which is not installed: pip install opencv-python-headless"
        )
    has_crf = importlib.util.find_spec("pydensecrf") is not None
    began, used = time.monotonic(), sum(cpu_seconds())
    folder = Path(args.demo_dir)
    published = weights.PUBLISHED_WEIGHTS.is_file() and not args.demo_scratch
    data, trained, results = folder / "data", folder / ("finetuned" if published else "trained"), folder / "results"
    steps = args.demo_steps
    if steps is not None and steps < 1:
        raise UserError(f"--demo_steps {steps}: expected 1 or more")
    if published and steps is None:
        steps = FINETUNE_STEPS
    if not args.overwrite:
        _check_steps(folder, trained, steps)

    # 1. Videos: many short ones to learn from, and a few longer ones, drawn with another seed, to test on.
    count = TRAIN_VIDEOS["videos"] + VAL_VIDEOS["videos"]
    print(f"demo: drawing {count} videos into {data}", flush=True)
    write_dataset(data, TRAIN, size=VIDEO_SIZE, validation=0, flows=False, options=SCENES, **TRAIN_VIDEOS)
    write_dataset(
        data, VAL, size=VIDEO_SIZE, validation=VAL_VIDEOS["videos"], flows=False, options=SCENES, **VAL_VIDEOS
    )

    # 2. The ordinary commands. One worker: to start a process takes longer than what it would do here.
    again = ["--overwrite"] if args.overwrite else []
    shared = ["--data_dir", str(data), "--workers", "1", "--device", args.device, *again]
    for name, split in ((TRAIN, "train"), (VAL, "val")):
        options = ["--tools", "flow", "--flow_method", "dis", "--datasets", name, "--split", split]
        _run("tool.py", tool, [*options, *shared])
    options = ["--config", str(CONFIGS / "demo.yaml"), "--datasets", TRAIN, "--data_dir", str(data)]
    options += ["--save_dir", str(trained), "--device", args.device, "--resume", "none" if args.overwrite else "auto"]
    if published:
        options += ["--finetune", str(weights.PUBLISHED_WEIGHTS), "--lr", FINETUNE_LR]
    if steps is not None:
        options += ["--max_steps", str(steps), "--steps_per_epoch", str(steps)]
    _run("main.py", train, options)
    tools = ["test", "crf", "eval"] if has_crf else ["test", "eval"]
    options = ["--checkpoint", str(trained / "weights.safetensors"), "--tools", *tools, "--datasets", VAL]
    options += ["--size", *INPUT_SIZE, "--metrics", "uvos", "--save_dir", str(results)]
    _run("tool.py", tool, [*options, *shared])

    # 3. The page.
    scores = _scores(results)
    seconds, used = time.monotonic() - began, sum(cpu_seconds()) - used
    start = "the published weights" if published else "random weights"
    introduction = [
        f"{TRAIN_VIDEOS['videos']} synthetic videos were drawn: one object that moves before a camera at rest, in "
        f"steady light. Their flow was computed by DIS, and the network was trained on them from {start}. The figures "
        f"below are of {VAL_VIDEOS['videos']} other videos, which it had not seen. This shows that the pieces work "
        "together; it says nothing about real video.",
        f"This run of it took {seconds:.0f} s.",
    ]
    if not has_crf:
        introduction.append("The CRF was left out, since pydensecrf is not installed here.")
    page = write_report(
        folder / "report.html",
        results,
        {VAL: read_dataset(VAL, data, "val")},
        title="DBSNet: demo",
        introduction=introduction,
        log=trained / "log.jsonl",
    )
    crf = f", after the CRF {scores['J_crf']:.3f}" if has_crf else "; no CRF, since pydensecrf is not installed"
    print(
        f"demo: J {scores['J']:.3f}, F {scores['F']:.3f} on {VAL_VIDEOS['videos']} videos not trained on{crf}; "
        f"trained from {start}; "
        f"{seconds:.0f} s, {used:.0f} s of processor time\ndemo: see {page}",
        flush=True,
    )
    return {**scores, "seconds": seconds, "cpu_seconds": used, "page": page}


def _check_steps(folder: Path, trained: Path, steps: int | None) -> None:
    """A training run goes on only over the steps that it began with; it would say so itself, but by its own options."""
    from models.state_dicts import read_checkpoint

    if not (trained / "last.pt").is_file():
        return
    before = read_checkpoint(trained / "last.pt")["scheduler"]["steps_per_epoch"]
    now = load_config(CONFIGS / "demo.yaml").steps_per_epoch if steps is None else steps
    if before != now:
        raise UserError(
            f"--demo_dir {folder}: the demo there trains for {number_of(before, 'step')}, this one for {now}. "
            f"Give --demo_steps {before} to go on with it, another --demo_dir DIR for a new "
            "one, or --overwrite to make this one anew"
        )


def _run(program: str, command: Command, arguments: list[str]) -> None:
    """One command, as a user would type it."""
    line = shlex.join(["python", program, *arguments])
    print(f"\n$ {line}", flush=True)
    code = command(arguments)
    if code in (INTERRUPTED, Terminated.exit_code):
        raise SystemExit(code)  # whoever was stopped has said so, and how to go on
    if code:
        raise UserError(f"the demo stops: exit code {code} of {line}")


def _scores(results: Path) -> dict[str, float | None]:
    document = read_written(results / "evaluation.json", "eval")
    overall = document["overall"]
    crf = document["crf"]["overall"]["J_mean"] if "crf" in document else None
    return {"J": overall["J_mean"], "F": overall["F_mean"], "J_crf": crf}
