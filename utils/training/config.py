"""The options of `main.py`: one dataclass, from which the flags, the YAML keys, their checks and their help are made.

Order of precedence: the dataclass's defaults, then the YAML file, then the flags.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import math
import os
import re
import sys
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from datasets.scenes import SceneOptions
from datasets.sequences import canonical_name
from models.dbsnet import MAPS, DBSNet
from utils.distributed import environment_number
from utils.errors import ONLY_IN_CHECKOUT, CommandLine, UserError, nearest, unknown_argument

CONFIGS = Path(__file__).resolve().parents[2] / "configs"

# Their products with each other and with gradients have to stay within float32, or PyTorch stops with its own error.
MOST_LR, MOST_FACTOR, MOST_DECAY, MOST_WEIGHT = 1e30, 1e3, 1e3, 1e6
MOST_WHOLE = 10**9  # of whole numbers without a limit of their own: beyond it there are only slips
MOST_SEED = 2**63 - 1  # of PyTorch's generators

# Keys of the options network (variant and flavour are options of their own) and scene (probabilities alone).
NETWORK_KEYS = tuple(key for key in inspect.signature(DBSNet).parameters if key not in ("variant", "flavour"))
SCENE_KEYS = tuple(item.name for item in dataclasses.fields(SceneOptions) if item.type == "float")


def _option(
    default: Any, text: str, *, choices: Sequence[str | int] = (), low: float = -math.inf, high: float = math.inf
) -> Any:
    """A field with its help, its legal words or numbers or its range, both ends included."""
    metadata = {"help": text, "choices": tuple(choices), "low": low, "high": high}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class TrainConfig:
    """Everything that decides a training run. Every field is a YAML key and a flag of the same name."""

    # Network
    variant: str = _option("s", "size of the MobileViT encoders", choices=("s", "xs", "xxs"))
    flavour: str = _option(
        "reference",
        "which MobileViT: the paper's (cvnets, timm) or that of wilile26811249/MobileViT; their weights do not mix",
        choices=("reference", "wilile"),
    )
    network: dict[str, Any] = _option(
        {}, f"other arguments of build_dbsnet, as key:value, with key one of {', '.join(NETWORK_KEYS)}"
    )
    pretrained: str | None = _option(None, "public checkpoint of the encoders (MobileViT: wilile, cvnets or timm)")
    finetune: str | None = _option(None, "start from the weights of this checkpoint (.pt or .safetensors), step 0")
    keep_stream: str | None = _option(
        None,
        "keep only this stream of --finetune's network, without propagation, refinement and graph attention",
        choices=("appearance", "motion"),
    )
    add_stream: str | None = _option(
        None,
        "checkpoint from which the other stream is added to --finetune's network of one stream; it may hold that "
        "stream alone or both",
    )
    teacher: str | None = _option(
        None,
        "checkpoint of a network of the same width, whose maps are learned besides the masks (distillation), also on "
        "frames without a label",
    )
    teacher_maps: str = _option(
        "decoder",
        "which maps: the decoder's, or those that the encoders give through their lateral convolutions and the skip "
        "(of the streams that the network has)",
        choices=MAPS,
    )
    teacher_weight: float = _option(1.0, "weight of the difference from the teacher's maps", low=0, high=MOST_WEIGHT)

    # Data
    data_dir: str = _option("data", "root folder of the data sets, or the data set itself")
    flow_dir: str | None = _option(None, "folder of the flow, by data set, where it is not beside the data")
    datasets: dict[str, float] = _option(
        {"YouTube-VOS-2018": 1.0, "DAVIS-2016": 1.0, "FBMS": 1.0},
        "data sets and the share of samples that each gives, as NAME:WEIGHT; DUTS-TR is synthetic clips made from its "
        "stills, synthetic is procedural clips, which need no data",
    )
    scene: dict[str, float] = _option(
        {},
        "what happens in synthetic clips, as key:probability, with key one of " + ", ".join(SCENE_KEYS),
        low=0,
        high=1,
    )
    num_frames: int = _option(5, "keep every n-th frame of a YouTube-VOS video", low=1)
    clip_len: int = _option(5, "frames of a clip", low=1)
    size: tuple[int, int] = _option((384, 640), "height and width of a clip in pixels", low=32, high=16384)
    multi_scale: list[float] = _option(
        [], "each step's clips are resized to one of these multiples of size; empty: size alone", low=0.1, high=1
    )
    samples_per_epoch: int = _option(
        0,
        "clips of an epoch, all processes together; 0: (labelled frames / clip_len) clips of videos, one for each "
        "still, 1000 procedural ones",
        low=0,
    )
    cache: str = _option(
        "none",
        "ram: decode all frames of videos once and keep them, about 10 * H * W bytes each; processes of a "
        "machine share them (Linux)",
        choices=("none", "ram"),
    )
    workers: int = _option(4, "loader processes for each training process; 0: load in the training process", low=0)

    # Augmentation, alike for all frames, flows and masks of a clip
    augment: bool = _option(True, "augment clips of videos; without it whole frames are resized")
    augment_on: str = _option(
        "loader",
        "where clips of videos are augmented and synthetic clips are rendered: by the loader's processes or by the "
        "training device",
        choices=("loader", "device"),
    )
    scale: tuple[float, float] = _option((0.6, 1.0), "side of the random crop, relative to the frame", low=0.01, high=1)
    aspect: tuple[float, float] = _option((0.85, 1.18), "aspect of the crop, relative to size's", low=0.1, high=10)
    flip: float = _option(0.5, "probability of a horizontal flip", low=0, high=1)
    rotation: float = _option(10.0, "largest rotation in degrees", low=0, high=180)
    rotation_probability: float = _option(0.5, "probability of a rotation", low=0, high=1)
    rotation_flow: str = _option(
        "exact",
        "exact: the directions that flow's colours stand for turn with the picture; ignore: they stay as they are",
        choices=("exact", "ignore"),
    )
    colour: float = _option(0.3, "largest change of brightness, contrast and saturation, RGB only", low=0, high=1)
    sharpness: float = _option(0.8, "largest change of sharpness, RGB only", low=0, high=1)
    strides: list[int] = _option(
        [1, 2, 3], "steps between the frames of a clip, one drawn for each clip", low=1, high=1000
    )
    flow_drop: float = _option(
        0.0, "probability that the flow of a clip of a video, not of a synthetic one, shows no motion", low=0, high=1
    )
    frame_drop: float = _option(
        0.0, "probability that the frames of a clip of a video, not of a synthetic one, are grey", low=0, high=1
    )
    frame_faults: float = _option(
        0.0,
        "probability that a single frame of a clip (of a video, or synthetic) has no motion, a blurred picture or a "
        "hidden part, which its neighbours have to make good (not with clip_len 1)",
        low=0,
        high=1,
    )

    # Length
    batch_size: int = _option(2, "clips of one process at one time", low=1)
    accumulate: int = _option(1, "batches whose gradients make one step", low=1)
    epochs: int = _option(30, "passes over samples_per_epoch clips", low=1)
    steps_per_epoch: int = _option(0, "optimiser steps of an epoch; 0: as many as samples_per_epoch gives", low=0)
    max_steps: int = _option(0, "total optimiser steps, in place of epochs; 0: epochs decide", low=0)
    stop_after: int = _option(0, "stop with a checkpoint after this many steps of this call; 0: never", low=0)
    max_minutes: float = _option(0.0, "stop with a checkpoint after this wall time of this call; 0: never", low=0)

    # Optimisation
    lr: float = _option(1e-4, "highest learning rate", low=0, high=MOST_LR)
    backbone_lr_factor: float = _option(1.0, "the encoders' learning rate as a multiple of lr", low=0, high=MOST_FACTOR)
    freeze_stride: int = _option(
        0, "encoder layers at this stride or a finer one keep their weights (detectors' FREEZE_AT 2: 4); 0: all train",
        choices=(0, 4, 8, 16, 32),
    )  # fmt: skip
    optimizer: str = _option("adamw", "optimiser", choices=("adamw", "sgd"))
    momentum: float = _option(0.9, "momentum of sgd", low=0, high=1)
    weight_decay: float = _option(
        1e-2, "not applied to 1-d parameters: norms, biases of layers", low=0, high=MOST_DECAY
    )
    schedule: str = _option("cosine", "learning rate over the steps", choices=("cosine", "step", "constant"))
    step_epochs: int = _option(10, "step schedule: epochs between two drops by 10", low=1)
    warmup_steps: int = _option(100, "steps of linear warm-up", low=0)
    grad_clip: float = _option(1.0, "largest norm of the gradient; 0: no clipping", low=0)
    aux_weight: float = _option(0.4, "weight of the auxiliary heads' loss", low=0, high=MOST_WEIGHT)
    edge_weight: float = _option(
        0.0, "how much more pixels beside outlines weigh in the loss (F3Net: 5)", low=0, high=MOST_WEIGHT
    )
    ema: float = _option(0.999, "decay of the running average of weights; 0: none is kept", low=0, high=0.999999)
    bn: str = _option(
        "sync", "batch norm over all processes, over one, or with fixed statistics", choices=("sync", "local", "frozen")
    )

    # Machine
    device: str = _option("auto", "auto takes CUDA where there is one", choices=("auto", "cuda", "cpu"))
    amp: str = _option("none", "mixed precision", choices=("none", "bf16", "fp16"))
    channels_last: bool = _option(False, "channels-last memory format")
    compile: bool = _option(False, "torch.compile the network")
    seed: int = _option(0, "seed of weights, data order and augmentation", low=0, high=MOST_SEED)
    deterministic: bool = _option(False, "deterministic kernels wherever PyTorch has them")

    # Run
    save_dir: str = _option("runs/stage1", "folder of checkpoints and logs")
    resume: str = _option("auto", "auto: the last checkpoint of save_dir if there is one; none: start anew; or a path")
    save_every: int = _option(0, "also write last.pt every so many steps; 0: only at the end of each epoch", low=0)
    log_every: int = _option(20, "steps between two lines of the log", low=1)
    tensorboard: bool = _option(True, "write TensorBoard scalars and pictures")
    panels_every: int = _option(500, "steps between two pictures of frame, flow, mask and prediction; 0: none", low=0)

    # Validation
    val_datasets: list[str] = _option([], "data sets whose train split holds val_sequences; empty: the training sets")
    val_sequences: list[str] = _option([], "sequences kept out of training for validation; empty: no validation")
    val_every: int = _option(
        0, "steps between two validations, the last at the end of training; 0: at the end of each epoch", low=0
    )
    val_size: tuple[int, int] | None = _option(
        None, "height and width that the network sees; none: size, in the video's own shape", low=32, high=16384
    )
    val_frames: int = _option(0, "frames of each validation sequence to use, from its start; 0: all", low=0)

    @property
    def resume_path(self) -> Path:
        """The checkpoint that ``resume`` means."""
        return Path(self.save_dir) / "last.pt" if self.resume == "auto" else Path(self.resume)

    def to_dict(self) -> dict[str, Any]:
        """Plain dict of numbers, strings, lists and dicts, as YAML, JSON and a weights-only checkpoint can hold."""
        return {
            name: list(value) if isinstance(value, tuple) else value for name, value in dataclasses.asdict(self).items()
        }

    def to_yaml(self) -> str:
        """The resolved options as YAML, which `--config` reads back."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, default_flow_style=None, width=120)


_WHOLE = re.compile(r"\s*[+-]?\d{1,30}\s*")  # with more digits than any option takes, a string is no number of ours
_TYPES = typing.get_type_hints(TrainConfig)
_FIELDS = {item.name: item for item in dataclasses.fields(TrainConfig)}


def load_config(path: str | os.PathLike[str] | None = None, overrides: dict[str, Any] | None = None) -> TrainConfig:
    """Defaults, then the YAML file, then ``overrides``; all checked.

    Raises:
        UserError: a file that is missing or no YAML mapping, an unknown key, a wrong type or a value out of range.
    """
    values: dict[str, Any] = {}
    if path is not None:
        for key, value in _read_yaml(Path(path)).items():
            if key not in _FIELDS:
                raise UserError(f"{path}: unknown key {key!r}; {nearest(str(key), _FIELDS)}")
            values[key] = _convert(key, value, f"{path}: {key}")
    for key, value in (overrides or {}).items():
        if key not in _FIELDS:
            raise UserError(f"unknown option {key!r}; {nearest(key, _FIELDS)}")
        values[key] = _convert(key, value, f"--{key}")
    config = TrainConfig(**values)
    _check(config)
    return config


def parse_args(arguments: Sequence[str] | None = None, description: str = "") -> tuple[TrainConfig, int]:
    """The command line of `main.py` -> its configuration and the local rank.

    ``--config`` is configs/stage1.yaml where nothing is given, configs/finetune.yaml where ``--finetune`` is.
    The local rank comes as ``--local_rank`` (launchers before PyTorch 2.0), ``--local-rank`` (since) or LOCAL_RANK.
    """
    parser = CommandLine(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--config", metavar="YAML", help="default: configs/stage1.yaml, or configs/finetune.yaml with --finetune"
    )
    parser.add_argument(
        "--local_rank",
        "--local-rank",
        type=int,
        default=argparse.SUPPRESS,
        help="set by the launcher",
    )
    for name, item in _FIELDS.items():
        _add_flag(parser, name, item)
    words = sys.argv[1:] if arguments is None else list(arguments)
    given, unknown = parser.parse_known_args(words)
    if unknown:
        raise UserError(_unknown_argument(unknown[0], words))
    options = vars(given)
    path, local_rank = options.pop("config"), options.pop("local_rank", None)
    if local_rank is None:
        local_rank = environment_number("LOCAL_RANK", 0)
    if path is None:
        finetuned = options.get("finetune", "none").lower() not in ("none", "null")
        path = CONFIGS / ("finetune.yaml" if finetuned else "stage1.yaml")
    config = load_config(path, options)
    if "epochs" in options and "max_steps" not in options and config.max_steps:
        raise UserError(
            f"--epochs {config.epochs} would have no effect, since {path} gives max_steps {config.max_steps}, which "
            "goes first; give --max_steps 0 with it, or another --max_steps in its place"
        )
    return config, local_rank


def _unknown_argument(word: str, words: Sequence[str]) -> str:
    """What to tell of a word of the command line that no option takes."""
    before = words[words.index(word) - 1] if word in words and words.index(word) else ""
    flag = before.removeprefix("--").removeprefix("no-")
    if not word.startswith("-") and before.startswith("--") and _TYPES.get(flag) is bool:
        return f"--{flag} takes no value, got {word!r}; --{flag} alone turns it on and --no-{flag} off"
    if not word.startswith("-"):
        flags = [flag for flag in words[: words.index(word)] if flag.startswith("--")] if words.count(word) == 1 else []
        after = f" after {flags[-1].split('=')[0]}, which takes one value" if flags else ""
        return f"unexpected word {word!r}{after}; options are given as --name value, their file as --config FILE"
    flag = word.split("=")[0]
    name = flag.lstrip("-").replace("-", "_").removeprefix("no_")
    if _TYPES.get(name) is bool:
        return f"unknown argument {flag!r}; did you mean --no-{name}?"
    return unknown_argument(word, ["config", *_FIELDS])


def _add_flag(parser: argparse.ArgumentParser, name: str, item: dataclasses.Field) -> None:
    """One flag; what is not given stays out of the namespace, so that the YAML file's value holds."""
    kind, default = _TYPES[name], _default(item)
    shown = " ".join(f"{k}:{v:g}" for k, v in default.items()) if isinstance(default, dict) else default
    shown = " ".join(str(part) for part in shown) if isinstance(shown, (tuple, list)) else shown
    text = f"{item.metadata['help']} (default: {'none' if shown in (None, '') else shown})".replace("%", "%%")
    if kind is bool:
        parser.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
        return
    several = typing.get_origin(_required(kind)) in (list, tuple, dict)
    metavar = "{" + ",".join(map(str, item.metadata["choices"])) + "}" if item.metadata["choices"] else name.upper()
    parser.add_argument(
        f"--{name}", nargs="*" if several else None, default=argparse.SUPPRESS, metavar=metavar, help=text
    )


def _default(item: dataclasses.Field) -> Any:
    return item.default_factory() if item.default_factory is not dataclasses.MISSING else item.default


def _required(kind: Any) -> Any:
    """``X | None`` -> ``X``."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return next(part for part in typing.get_args(kind) if part is not type(None))
    return kind


def _convert(key: str, value: Any, where: str) -> Any:
    """A YAML value or the words of a flag -> the field's type, with its range and choices checked."""
    kind, metadata = _TYPES[key], _FIELDS[key].metadata
    if isinstance(value, list) and [str(part).lower() for part in value] in (["none"], ["null"]):
        value = None
    if value is None or (isinstance(value, str) and value.lower() in ("none", "null") and kind is not str):
        if _required(kind) is not kind:
            return None
        if typing.get_origin(kind) in (list, dict):
            return typing.get_origin(kind)()
        if kind is not str or not metadata["choices"] and key != "resume":
            raise UserError(f"{where}: expected {_name(kind)}, got nothing")
        value = "none"
    if isinstance(value, bool) and kind is str and metadata["choices"]:  # YAML's off, no, yes …
        raise UserError(f"{where}: expected one of {', '.join(map(str, metadata['choices']))}, got {value}")
    result = _cast(_required(kind), value, where)
    parts = result.values() if isinstance(result, dict) else result if isinstance(result, (list, tuple)) else [result]
    for part in parts:
        if metadata["choices"] and part not in metadata["choices"]:
            raise UserError(f"{where}: expected one of {', '.join(map(str, metadata['choices']))}, got {part!r}")
        number = isinstance(part, (int, float)) and not isinstance(part, bool)
        low, high = metadata["low"], metadata["high"]
        if isinstance(part, int) and high == math.inf and part > MOST_WHOLE:
            raise UserError(f"{where}: expected at most {MOST_WHOLE:g}, got {part}")
        if number and not low <= part <= high:
            limits = f"at least {low:g}" if high == math.inf else f"{low:g} to {high:g}"
            raise UserError(f"{where}: expected {limits}, got {part if isinstance(part, int) else f'{part:g}'}")
    return result


def _cast(kind: Any, value: Any, where: str) -> Any:
    wrong = UserError(f"{where}: expected {_name(kind)}, got {value!r}")
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is dict:
        if isinstance(value, list) and all(isinstance(word, str) for word in value):
            pairs = [_pair(word, inner[1], where) for word in value]
            value = dict(pairs)
            for name in value:
                if [other for other, _ in pairs].count(name) > 1:
                    raise UserError(f"{where}: {name!r} is given twice; give it once")
        if not isinstance(value, dict):
            raise wrong
        return {str(key): _cast(inner[1], part, f"{where}: {key}") for key, part in value.items()}
    if origin in (list, tuple):
        if isinstance(value, str) and origin is list:
            value = [value]
        if not isinstance(value, (list, tuple)) or (origin is tuple and len(value) != len(inner)):
            raise wrong
        kinds = inner if origin is tuple else inner * len(value)
        return origin(_cast(kind, part, where) for kind, part in zip(kinds, value))
    if kind is Any:
        return value
    if kind is bool:
        if isinstance(value, bool):
            return value
        raise wrong
    if kind is str:
        # A YAML path such as 2018 is a number to the parser; a list or mapping is a slip.
        if isinstance(value, (str, int, float)) and not isinstance(value, bool) and value != "":
            return str(value)
        raise wrong
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise wrong
    if kind is int and (isinstance(value, int) or isinstance(value, str) and _WHOLE.fullmatch(value)):
        return int(value)  # as it is: a float has no room for the last digits of a long seed
    try:
        # YAML 1.1 reads 1e-4 as a string, since it has no point: such strings are numbers too.
        number = float(value)
    except (ValueError, OverflowError):
        raise wrong from None
    if math.isnan(number) or (kind is int and not number.is_integer()):
        raise wrong
    return int(number) if kind is int else number


def _pair(word: str, kind: Any, where: str) -> tuple[str, Any]:
    """``NAME`` or ``NAME:VALUE`` of a flag."""
    if kind is Any:
        name, colon, value = word.partition(":")  # the value may be a mapping itself
        if not colon:
            raise UserError(f"{where}: expected key:value, got {word!r}")
        try:
            return name, yaml.safe_load(value)
        except (yaml.YAMLError, ValueError):  # as in a file
            raise UserError(f"{where} {name}: {value!r} is not YAML; lists are [1,2] and mappings {{a: b}}") from None
    name, colon, value = word.rpartition(":")
    return (name, value) if colon else (word, 1.0)


def _name(kind: Any) -> str:
    """A type in the words of a user."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is dict:
        return "a mapping of names to numbers" if inner[1] is float else "a mapping"
    if origin is list:
        return f"a list, each {_name(inner[0])}"
    if origin is tuple:
        return f"{len(inner)} values, each {_name(inner[0])}"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}
    return names.get(kind, str(kind))


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, of which YAML would keep the last without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":  # <<: what it brings may be given anew
                continue
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    None, None, "expected the name of an option, got a list or mapping", key_node.start_mark
                )
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        names = ", ".join(sorted(f"configs/{item.name}" for item in CONFIGS.glob("*.yaml")))
        there = (
            f"{CONFIGS.parent} has {names}"
            if names
            else f"there is no {CONFIGS}, {ONLY_IN_CHECKOUT}; give --config FILE"
        )
        raise UserError(f"{path}: no such file; {there}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text ({error})") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that there is not, a number of 5000 digits
        raise UserError(f"{path}: not valid YAML: {error}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a mapping of options (lr: 1e-4), got {type(content).__name__}")
    return content


def _check(config: TrainConfig) -> None:
    """What one field alone cannot tell."""
    if not config.datasets:
        raise UserError("datasets: no training data named; give for instance --datasets DAVIS-2016 (or synthetic)")
    bad = {name: weight for name, weight in config.datasets.items() if not 0 < weight <= MOST_WEIGHT}
    if bad:
        raise UserError(
            f"datasets: expected weights above 0 and up to {MOST_WEIGHT:g}, got {bad}; leave out what is not wanted"
        )
    for key in ("datasets", "val_datasets"):
        first: dict[str, str] = {}
        for name in getattr(config, key):
            other = first.setdefault(canonical_name(name), name)
            if other != name:
                raise UserError(f"{key}: {other} and {name} are two names of one data set; give one of them")
    for name in ("scale", "aspect"):
        low, high = getattr(config, name)
        if low > high:
            raise UserError(f"{name}: expected the smaller number first, got {low:g} {high:g}")
    if config.flow_drop + config.frame_drop > 1:
        raise UserError("flow_drop and frame_drop: expected at most 1 together, since no clip loses both")
    if not config.strides:
        raise UserError("strides: expected at least one step, for instance 1")
    if config.steps_per_epoch and config.samples_per_epoch:
        raise UserError(
            "steps_per_epoch and samples_per_epoch both give the length of an epoch; give one of them (0 takes back "
            "what a configuration file gives)"
        )
    if config.pretrained and config.finetune:
        raise UserError("pretrained and finetune both give the encoders' weights; give one of them")
    if config.add_stream and not config.finetune:
        raise UserError("add_stream: there is no network for it to join; give that of the first stream with --finetune")
    if config.keep_stream and not config.finetune:
        raise UserError("keep_stream: there is no network to keep it of; give one of both streams with --finetune")
