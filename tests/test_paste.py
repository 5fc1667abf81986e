"""Copy-paste between clips: what a pasted object shows and hides, how fast it is, and which clips get one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from datasets.clips import ClipDataset, MixedClips, VideoClips
from datasets.flow_colour import flow_to_image, image_to_flow
from datasets.paste import LARGEST, SPEEDS, Paste, PastedClip, PastedClips, draw_paste, paste
from datasets.sequences import VideoSequence, read_dataset
from datasets.synthetic import SyntheticClips, write_dataset
from datasets.transforms import Augment
from tests.test_clips import Waits
from utils.training.loading import ClipOrder, build_loader, to_device

SIZE = (48, 64)
PICTURES = ("frames", "flows", "masks")


@pytest.fixture(scope="module")
def sequences(tmp_path_factory: pytest.TempPathFactory) -> list[VideoSequence]:
    root = tmp_path_factory.mktemp("data")
    write_dataset(root, "DAVIS-2016", videos=5, frames=6, size=(90, 150), seed=1)
    return read_dataset("DAVIS-2016", root, "train")


def box(top: int, left: int, bottom: int, right: int) -> np.ndarray:
    mask = np.zeros(SIZE, bool)
    mask[top:bottom, left:right] = True
    return mask


def clip(colour: int, inside: np.ndarray, speed: tuple[float, float], around: tuple[float, float]) -> tuple:
    """Two frames of one colour, with an object that moves so, in a world that moves so."""
    flow = np.where(inside[..., None], np.float32(speed), np.float32(around))
    picture = torch.from_numpy(flow_to_image(flow)).permute(2, 0, 1)
    frames = torch.full((2, 3, *SIZE), colour, dtype=torch.uint8)
    masks = torch.from_numpy(inside.astype(np.uint8))[None, None].repeat(2, 1, 1, 1)
    return frames, picture[None].repeat(2, 1, 1, 1), masks


def test_an_object_hides_what_is_behind_it_and_brings_its_motion() -> None:
    own, new = box(4, 4, 24, 24), box(14, 14, 34, 40)
    scene = clip(40, own, (0, 4), (-2, 0))  # half as fast as its object
    other = clip(200, new, (3, 0), (0, 1))
    before = [x.clone() for x in (*scene, *other)]
    frames, flows, masks = paste(scene, other, Paste(object_speed=1.0, scene_speed=0.5, softness=0.0))
    assert all(torch.equal(x, y) for x, y in zip(before, (*scene, *other)))
    assert np.array_equal(masks[1, 0].numpy(), own | new)
    inner = box(15, 15, 33, 39)  # but for the outline, which is soft
    assert (frames[:, :, inner] == 200).all() and (frames[:, :, ~box(13, 13, 35, 41)] == 40).all()
    edge = frames[:, :, 14, 20]
    assert (40 < edge).all() and (edge < 200).all()
    shown = image_to_flow(flows[0].permute(1, 2, 0).numpy())
    np.testing.assert_allclose(
        shown[new], np.broadcast_to((1, 0), shown[new].shape), atol=0.01
    )  # the fastest of its own
    np.testing.assert_allclose(shown[own & ~new], np.broadcast_to((0, 0.5), shown[own & ~new].shape), atol=0.01)
    rest = shown[~own & ~new]
    np.testing.assert_allclose(rest, np.broadcast_to((-0.25, 0), rest.shape), atol=0.01)


def test_motion_is_softer_than_pictures() -> None:
    new = box(10, 10, 40, 50)
    scene, other = clip(40, box(0, 0, 4, 4), (1, 0), (1, 0)), clip(40, new, (-1, 0), (-1, 0))
    hard, soft = (paste(scene, other, Paste(1, 1, softness))[1] for softness in (0.0, 4 / SIZE[0]))
    assert len(hard[0, 0].unique()) == 2
    changed = (soft != hard).any(1)[0].numpy()
    assert changed.any() and not changed[box(14, 14, 36, 46) | ~box(6, 6, 44, 54)].any()


def test_what_leaves_no_scene_is_not_pasted() -> None:
    most = int(LARGEST * SIZE[0])
    scene = clip(40, box(0, 0, most - 4, SIZE[1]), (0, 1), (1, 0))
    small, large = (clip(200, box(most - 4, 0, bottom, SIZE[1]), (1, 0), (0, 0)) for bottom in (most, most + 1))
    drawn = Paste(0.5, 0.5, 0.0)
    assert (paste(scene, small, drawn)[2].sum(dim=(1, 2, 3)) == most * SIZE[1]).all()
    assert all(torch.equal(x, y) for x, y in zip(paste(scene, large, drawn), scene))


def test_one_of_the_two_keeps_its_speed() -> None:
    drawn = [draw_paste(np.random.default_rng(seed)) for seed in range(80)]
    kept = [paste.object_speed == 1 for paste in drawn]
    assert 20 < sum(kept) < 60
    assert all(paste.scene_speed == 1 for paste, object_kept in zip(drawn, kept) if not object_kept)
    slow = [min(paste.object_speed, paste.scene_speed) for paste in drawn]
    assert SPEEDS[0] <= min(slow) < 0.4 and 0.9 < max(slow) < SPEEDS[1]


def parts(sequences: list[VideoSequence], **options: float) -> ClipDataset:
    videos = VideoClips(sequences, 2, SIZE, Augment(), samples_per_epoch=24, seed=3, defer=True, **options)
    return MixedClips([(videos, 3.0), (SyntheticClips(None, 24, 2, SIZE, seed=3, defer=True), 1.0)], 24, 3)


def same(a: dict, b: dict) -> bool:
    return all(torch.equal(a[key], b[key]) for key in (*PICTURES, "valid"))


def test_some_clips_have_an_object_more(sequences: list[VideoSequence]) -> None:
    part = parts(sequences)
    pasted, all_pasted, plain = (PastedClips(part, probability) for probability in (0.4, 1.0, 0.0))
    items = [pasted[i] for i in range(24)]
    assert all(same(item, pasted[i]) for i, item in enumerate(items))  # of the index alone
    finished = [plain[i] for i in range(24)]
    for i, item in enumerate(finished):
        assert all(torch.equal(item[key], x) for key, x in zip(PICTURES, part[i]["raw"].finish()))
    grown = [item["masks"].sum() > before["masks"].sum() for item, before in zip(items, finished)]
    assert 2 <= sum(grown) <= 14
    for item, before in zip(items, finished):
        more = item["masks"] > before["masks"]
        assert not (before["masks"] > item["masks"]).any() and torch.equal(item["valid"], before["valid"])
        assert (item["sequence"], item["dataset"]) == (before["sequence"], before["dataset"])
        if more.any():  # what is new there is another clip's
            assert (item["frames"] != before["frames"])[more.expand(-1, 3, -1, -1)].float().mean() > 0.8
        elif not torch.equal(item["frames"], before["frames"]):  # it lies before an object of the scene
            assert (item["masks"] * (item["frames"] != before["frames"]).any(1, keepdim=True)).any()
    assert sum(not same(all_pasted[i], finished[i]) for i in range(24)) > 8
    pasted.set_epoch(1)
    assert part.epoch == 1 and not all(same(pasted[i], item) for i, item in enumerate(items))
    with pytest.raises(ValueError, match="probability"):
        PastedClips(part, -0.1)


def test_who_cannot_be_pasted(sequences: list[VideoSequence]) -> None:
    unlabelled = [replace(s, masks=dict(list(s.masks.items())[:1])) for s in sequences]
    for videos, options in ((sequences[:1], {}), (unlabelled, {}), (sequences, {"flow_drop": 1.0}),
                            (sequences, {"frame_drop": 1.0})):  # fmt: skip
        part = VideoClips(videos, 2, SIZE, samples_per_epoch=12, defer=True, **options)
        pasted, plain = PastedClips(part, 1.0), PastedClips(part, 0.0)
        assert all(same(pasted[i], plain[i]) for i in range(12))


@pytest.mark.parametrize("workers", [0, 1])
def test_pasted_on_the_training_device_they_are_those_of_the_loader(
    workers: int, sequences: list[VideoSequence]
) -> None:
    batches = []
    for defer in (False, True):
        order = ClipOrder(batch=4, accumulate=1, steps=6, rank=0, world_size=1, seed=0)
        clips = PastedClips(parts(sequences), 0.7, defer=defer)
        loaded = list(build_loader(clips, order, workers=workers, pin_memory=False))
        assert all(("items" in batch) == defer for batch in loaded)
        batches.append([to_device(batch, torch.device("cpu")) for batch in loaded])
    assert all(same(a, b) for a, b in zip(*batches, strict=True))


def test_on_a_gpu_nothing_waits(sequences: list[VideoSequence]) -> None:
    """On one that need not be there, as in tests/test_clips.py, which has what its parts ask for."""
    level = Augment(flip=0.0, rotation=0.0)  # without the tables of colours, which are made once
    clips = VideoClips(sequences, 2, SIZE, level, samples_per_epoch=2, defer=True)
    pasted = PastedClip(clips[0]["raw"], clips[1]["raw"], Paste(0.5, 1.0, 0.02))
    with FakeTensorMode(allow_non_fake_inputs=True), Waits() as waits:
        for pictures in pasted.finish("cuda"):
            assert pictures.device.type == "cuda" and pictures.dtype == torch.uint8
    assert waits.copies >= 4 and not waits.waiting
