"""Synthetic video clips with exact optical flow and exact masks, from still images or from nothing at all.

`datasets.scenes` says what is in a scene and how it moves, `datasets.rendering` makes its pictures. A clip is a pure
function of its seed: the same in every process, worker and order of access.
"""

from __future__ import annotations

import io
import os
import secrets
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from datasets.clips import ClipDataset, Deferred, Item, complete
from datasets.errors import DataError
from datasets.rendering import Scene
from datasets.scene_textures import object_share
from datasets.scenes import SceneOptions, Sources, compose
from datasets.stills import StillImage

LEAST_SIDE = 16  # pixels: a side of the frames that can be drawn
DRAWS = 10  # of stills for one clip, until one has an object of `SceneOptions.largest_object` at most


def make_scene(
    seed: int | Sequence[int],
    clip_len: int,
    size: tuple[int, int],
    still: StillImage | None = None,
    others: Sequence[StillImage] = (),
    options: SceneOptions | None = None,
) -> Scene:
    """The scene of `make_clip`, of the same arguments, before its pictures are made. Raises as `make_clip` does."""
    if clip_len < 1:
        raise ValueError(f"clip_len should be at least 1, got {clip_len}")
    if min(size) < LEAST_SIDE:
        raise ValueError(f"size should be at least ({LEAST_SIDE}, {LEAST_SIDE}), got {tuple(size)}")
    rng = np.random.default_rng(seed)
    options = options or SceneOptions()
    # One frame more than is shown where there is only one: its flow needs somewhere to go.
    layers, by_motion = compose(rng, max(clip_len, 2), size, Sources(still, others, size), options)
    return Scene(tuple(layers), by_motion, clip_len, size, options, rng)


def make_clip(
    seed: int | Sequence[int],
    clip_len: int,
    size: tuple[int, int],
    still: StillImage | None = None,
    others: Sequence[StillImage] = (),
    options: SceneOptions | None = None,
) -> dict[str, np.ndarray]:
    """One synthetic clip, a pure function of its arguments.

    seed: non-negative integer, or several. size: (H, W) of the frames. still: the picture whose object moves; drawn
    procedurally where None. others: stills to take other backgrounds, distractors and second objects from (drawn where
    `still` is None).

    Returns frames (T, H, W, 3) uint8 RGB; flow (T, H, W, 2) float32 in pixels, exact, of frame t to t + 1 under t, the
    last one to t - 1; masks (T, H, W) uint8 {0, 1}; flow_images (T, H, W, 3) uint8, coloured from the exact flow or,
    with probability `options.flow_errors`, from one as imperfect as an estimator's.
    Raises DataError where a still cannot be used, ValueError on impossible sizes.
    """
    clip = make_scene(seed, clip_len, size, still, others, options).pictures()
    return {
        "frames": clip["frames"].permute(0, 2, 3, 1).contiguous().numpy(),
        "flow": clip["flow"].permute(0, 2, 3, 1).contiguous().numpy(),
        "masks": clip["masks"].to(torch.uint8).numpy(),
        "flow_images": clip["flow_images"].permute(0, 2, 3, 1).contiguous().numpy(),
    }


class SyntheticClips(ClipDataset):
    """Synthetic clips made on the fly; items as in `datasets.clips`, every frame valid.

    stills: pictures to make them from; drawn procedurally where None. Clip i of epoch e depends on (seed, e, i) only.
    defer: compose the scenes here and leave their pictures to the training device (``raw`` in the items); on the CPU
        the clips are the same.
    Raises DataError where the list of stills is empty or one of them cannot be used.
    """

    def __init__(
        self,
        stills: Sequence[StillImage] | None,
        length: int,
        clip_len: int,
        size: tuple[int, int],
        seed: int = 0,
        options: SceneOptions | None = None,
        defer: bool = False,
    ) -> None:
        if stills is not None and not stills:
            raise DataError("no still images to make synthetic clips from; give some, or None to draw them")
        super().__init__(length, seed)
        self.stills = stills
        self.clip_len = clip_len
        self.size = (int(size[0]), int(size[1]))
        self.options = options or SceneOptions()
        self.defer = defer

    def clip(self, index: int) -> Item:
        still, name = None, f"drawn-{index:06d}"
        if self.stills is not None:
            still = self._draw_still(index)
            name = still.name
        key = (self.seed, self.epoch, index)
        scene = make_scene(key, self.clip_len, self.size, still, self.stills or (), self.options)
        item: Item = {
            "valid": torch.ones(self.clip_len, dtype=torch.bool),
            "dataset": "synthetic",
            "sequence": name,
        }
        return complete(item, scene, self.defer)

    def _draw_still(self, index: int) -> StillImage:
        """The still of a clip; where none of several has an object that is small enough, the last of them."""
        rng, limit = self.rng(index, 1), self.options.largest_object
        for _ in range(DRAWS):
            still = self.stills[int(rng.integers(len(self.stills)))]
            if limit == 1 or object_share(still, self.size) <= limit:
                break
        return still


def write_dataset(
    root: str | Path,
    name: str = "synthetic",
    videos: int = 4,
    frames: int = 24,
    size: tuple[int, int] = (128, 224),
    seed: int = 0,
    flows: bool = True,
    validation: int | None = None,
    options: SceneOptions | None = None,
    stills: Sequence[StillImage] | None = None,
) -> Path:
    """Write synthetic videos as a data set in the layout of DAVIS-2016; returns its folder, `root/name`.

    JPEGImages/480p/<video>/00000.jpg, Annotations/480p/<video>/00000.png (0/255), Flows/480p/<video>/00000.png (where
    `flows`; without, an estimator can make them from the frames), ImageSets/2016/train.txt and val.txt. validation: how
    many of the videos, the last ones, are val; by default a quarter, at least one where there are two videos or more. A
    single video is in both lists. stills: pictures to make them from, as `SyntheticClips` does; drawn where None.
    """
    if videos < 1 or frames < 1:
        raise ValueError(f"videos and frames should be at least 1, got {videos} and {frames}")
    if validation is None:
        validation = max(1, videos // 4)
    if not 0 <= validation <= videos:
        raise ValueError(f"validation should be between 0 and {videos}, got {validation}")
    folder = Path(root) / name
    names = []
    clips = None if stills is None else SyntheticClips(stills, videos, frames, size, seed, options, defer=True)
    for video in range(videos):
        if clips is None:
            scene: Deferred = make_scene((seed, video), frames, size, options=options)
        else:
            scene = clips[video]["raw"]
        names.append(f"video-{video:03d}")
        for index, (frame, flow, mask) in enumerate(zip(*scene.finish())):
            place = Path("480p") / names[-1] / f"{index:05d}"
            _save(folder / "JPEGImages" / place.with_suffix(".jpg"), frame.permute(1, 2, 0).numpy())
            _save(folder / "Annotations" / place.with_suffix(".png"), mask[0].numpy() * 255)
            if flows:
                _save(folder / "Flows" / place.with_suffix(".png"), flow.permute(1, 2, 0).numpy())
    train = names if videos == 1 else names[: videos - validation]
    for split, members in (("train", train), ("val", names[videos - validation :])):
        _write(folder / "ImageSets" / "2016" / f"{split}.txt", "".join(f"{n}\n" for n in members).encode())
    return folder


def _save(path: Path, array: np.ndarray) -> None:
    buffer = io.BytesIO()
    if path.suffix == ".jpg":
        Image.fromarray(array).save(buffer, "JPEG", quality=92)
    else:
        Image.fromarray(array).save(buffer, "PNG", compress_level=3)
    _write(path, buffer.getvalue())


def _write(path: Path, data: bytes) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
