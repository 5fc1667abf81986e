"""The videos and clips of a training run, as the options of `main.py` say."""

from __future__ import annotations

import math
from pathlib import Path

from datasets.clip_frames import CacheMemory, OwnMemory, cache_bytes, decoded_by
from datasets.clips import ClipDataset, FaultyClips, MixedClips, VideoClips
from datasets.errors import DataError
from datasets.scenes import SceneOptions
from datasets.sequences import DATASETS, VideoSequence, canonical_name, find_root, read_dataset
from datasets.stills import read_stills
from datasets.synthetic import SyntheticClips
from datasets.transforms import Augment
from utils.distributed import Processes, environment_number
from utils.errors import UserError, nearest
from utils.memory import available_memory
from utils.progress import progress_bar
from utils.training.config import SCENE_KEYS, TrainConfig
from utils.training.shared_memory import MachineMemory

CACHE_SHARE = 0.5  # of the available memory: above it there is a warning, as training takes memory, too
MOST_CLIPS = 10**8  # of an epoch, whose order is a list of as many numbers in every process


def build_sequences(config: TrainConfig) -> tuple[dict[str, list[VideoSequence]], list[VideoSequence]]:
    """Sequences of the video data sets to train on, by data set, and those held out for validation.

    Raises:
        DataError: a data set to train on that is not there.
        UserError: one to validate on that is not there, a validation sequence that no data set has, or nothing left to
            train on.
    """
    data_dir = Path(config.data_dir)
    held_out = set(config.val_sequences)
    training: dict[str, list[VideoSequence]] = {}
    validation: list[VideoSequence] = []
    names = [name for name in config.datasets if canonical_name(name) not in ("DUTS-TR", "synthetic")]
    sources = (config.val_datasets or names) if held_out else []
    known: set[str] = set()
    for name in dict.fromkeys([*names, *sources]):
        try:
            sequences = read_dataset(
                name, data_dir, split="train", num_frames=config.num_frames, flow_root=config.flow_dir
            )
        except DataError as error:
            if name in names:
                if canonical_name(name) in DATASETS:
                    rest = [f"{one}:{share:g}" for one, share in config.datasets.items() if _is_there(config, one)]
                    if _is_there(config, name) or not rest:
                        raise
                    raise DataError(f"{error}. To train without it: --datasets {' '.join(rest)}") from error
                raise DataError(
                    f"{error}. Clips made of stills are DUTS-TR, and those that need no data synthetic"
                ) from error
            # Often a config's and not the user's own wish, who has named other data to train on.
            raise UserError(
                f"val_datasets: {error}. {name} is not trained on; it is read for validation on val_sequences "
                f"({', '.join(config.val_sequences)}). Put it there, give --val_datasets and --val_sequences of data "
                "that is there, or train without validation: --val_sequences none"
            ) from error
        if name in sources:
            known.update(sequence.name for sequence in sequences)
            validation += [sequence for sequence in sequences if sequence.name in held_out]
        if name in names:
            training[name] = [sequence for sequence in sequences if sequence.name not in held_out]
            if not training[name]:
                raise UserError(
                    f"datasets: {name} has no training sequence left beside val_sequences, which hold all of its "
                    f"{len(sequences)} out; name fewer of them, or leave {name} out of datasets"
                )
    for sequence in validation:
        check_validation(config, sequence)
    missing = sorted(held_out - known)
    if missing and not known:
        raise UserError(
            f"val_sequences: {missing[0]!r} cannot be found, since no data set of videos is trained on; say with "
            "--val_datasets which holds it, or train without validation: --val_sequences none"
        )
    if missing:
        where = ", ".join(sources)
        near = nearest(missing[0], sorted(known))
        raise UserError(f"val_sequences: {missing[0]!r} is not in the train split of {where}; {near}")
    return training, validation


def _is_there(config: TrainConfig, name: str) -> bool:
    """Whether a data set to train on has been unpacked, whatever may be wrong with it."""
    try:
        if canonical_name(name) == "DUTS-TR":
            read_stills(Path(config.data_dir), "DUTS-TR")
        elif name != "synthetic":
            find_root(name, config.data_dir)
    except DataError:
        return False
    return True


def check_validation(config: TrainConfig, sequence: VideoSequence) -> None:
    """Says before training what the first validation would stumble over.

    Raises:
        DataError: a frame without flow. UserError: no labelled frame that counts.
    """
    stems = sequence.stems[: config.val_frames or None]
    for stem in stems:
        sequence.flow_path(stem)
    if not any(stem in sequence.masks for stem in stems[1:-1]):
        # The first labelled frame that is neither the first nor the last, and one frame more behind it.
        inner = enumerate(sequence.stems[1:-1], 1)
        enough = next((index + 2 for index, stem in inner if stem in sequence.masks), None)
        raise UserError(
            f"val_sequences: {sequence.name} has no labelled frame between its first and its last"
            + (f" of val_frames {config.val_frames}" if config.val_frames else "")
            + (f"; give val_frames {enough} or more" if enough else "; take another sequence")
        )


def check_cache(
    config: TrainConfig, training: dict[str, list[VideoSequence]], processes: Processes, memory: MachineMemory
) -> None:
    """Says before anything is decoded that ``cache: ram`` does not fit: the system would end the run, after many
    minutes and without a word. All of YouTube-VOS at 384×640 are 50 GB. Warns where it leaves little.

    Raises:
        UserError: that. DataError: the first frame of a video cannot be read.
    """
    if config.cache != "ram" or not training:
        return
    augment = build_augment(config)
    needed = sum(cache_bytes(sequences, config.size, augment) for sequences in training.values())
    copies = math.ceil(environment_number("LOCAL_WORLD_SIZE", 1) / memory.count)  # on this machine
    available = available_memory()
    processes.wait()  # until all have looked, before the first begins to fill it
    total = needed * copies
    if available is None or total <= CACHE_SHARE * available:
        return
    frames = _count_frames(training)
    each = f" in each of {copies} processes" if copies > 1 else ""
    what = (
        f"cache: ram takes {needed / 1e9:.1f} GB for {frames} frames{each}, and {available / 1e9:.1f} GB of memory are "
        "available on this machine"
    )
    if total > available:
        raise UserError(
            f"{what}; give --cache none, which reads the files of each clip, a smaller --size, or fewer --datasets"
        )
    # What training itself takes is not known beforehand. Where it does not fit, the system may come to a standstill
    # long before it ends a process.
    if processes.is_main:
        print(
            f"warning: {what}. On a CPU training takes several GB more; if it comes to a standstill, give --cache none",
            flush=True,
        )


def _count_frames(training: dict[str, list[VideoSequence]]) -> int:
    return sum(len(sequence) for sequences in training.values() for sequence in sequences)


def build_clips(
    config: TrainConfig,
    training: dict[str, list[VideoSequence]],
    step_clips: int,
    memory: CacheMemory | None = None,
    show: bool = False,
) -> tuple[ClipDataset, int]:
    """The clips of an epoch, a whole number of steps, and that number.

    Args:
        step_clips: clips of one optimiser step, over all processes.
        memory: where ``cache: ram`` keeps frames; by default this process's own.
        show: draw a progress bar where ``cache: ram`` decodes videos, of this process's part of them.
    """
    with_stills = "DUTS-TR" in map(canonical_name, config.datasets)
    stills = read_stills(Path(config.data_dir), "DUTS-TR") if with_stills else []
    samples = config.samples_per_epoch or max(step_clips, sum(
        len(stills) if canonical_name(name) == "DUTS-TR"
        else 1000 if name == "synthetic"
        else sum(len(sequence.masks) for sequence in training[name]) // config.clip_len
        for name in config.datasets
    ))  # fmt: skip
    steps = config.steps_per_epoch or samples // step_clips
    if steps == 0:
        raise UserError(f"samples_per_epoch: {samples} clips are less than the {step_clips} of one step; give more")
    length = steps * step_clips
    if length > MOST_CLIPS:
        raise UserError(
            f"an epoch of {length:.3g} clips ({steps} steps of {step_clips}): expected at most {MOST_CLIPS:.0e}, whose "
            "order is drawn as a whole; give fewer steps_per_epoch or samples_per_epoch, and more epochs"
        )
    augment, scene, defer = build_augment(config), build_scene(config), config.augment_on == "device"
    parts: list[tuple[ClipDataset, float]] = []
    memory = memory or OwnMemory()
    own = {name: [videos[i] for i in decoded_by(memory, len(videos))] for name, videos in training.items()}
    frames = _count_frames(own)
    cached = config.cache == "ram" and frames > 0
    with progress_bar(total=frames, desc="cache: ram", unit="frame", disable=not (show and cached)) as bar:
        for name, weight in config.datasets.items():
            part: ClipDataset
            if canonical_name(name) in ("DUTS-TR", "synthetic"):
                images = None if name == "synthetic" else stills
                part = SyntheticClips(images, length, config.clip_len, config.size, config.seed, scene, defer)
            else:
                part = VideoClips(
                    training[name],
                    config.clip_len,
                    config.size,
                    augment=augment,
                    cache=config.cache,
                    samples_per_epoch=length,
                    seed=config.seed,
                    strides=config.strides,
                    flow_drop=config.flow_drop,
                    frame_drop=config.frame_drop,
                    defer=defer,
                    memory=memory,
                    progress=bar.update,
                )
            parts.append((part, weight))
    clips = parts[0][0] if len(parts) == 1 else MixedClips(parts, length, config.seed)
    return (FaultyClips(clips, config.frame_faults) if config.frame_faults else clips), steps


def build_scene(config: TrainConfig) -> SceneOptions:
    """The scenes of synthetic clips; raises UserError for a key that is no probability of `SceneOptions`."""
    for key in config.scene:
        if key not in SCENE_KEYS:
            raise UserError(f"scene: unknown key {key!r}; {nearest(key, SCENE_KEYS)}")
    return SceneOptions(**config.scene)


def build_augment(config: TrainConfig) -> Augment | None:
    """The augmentation of videos at the strength asked for."""
    if not config.augment:
        return None
    return Augment(
        scale=config.scale,
        aspect=config.aspect,
        flip=config.flip,
        rotation=config.rotation,
        rotation_probability=config.rotation_probability,
        rotation_flow=config.rotation_flow,
        brightness=config.colour,
        contrast=config.colour,
        saturation=config.colour,
        sharpness=config.sharpness,
    )
