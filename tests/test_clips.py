"""Clips of videos: which frames, which labels, the same whatever the cache, worker or order; and what bad files do."""

from __future__ import annotations

import multiprocessing
import shutil
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from datasets import flow_colour
from datasets.clip_frames import _load_reduced, cache_bytes
from datasets.clips import FaultyClips, MixedClips, VideoClips
from datasets.errors import DataError
from datasets.faults import Fault, apply_faults, draw_faults
from datasets.images import load_frame
from datasets.scenes import SceneOptions
from datasets.sequences import VideoSequence, read_dataset
from datasets.synthetic import SyntheticClips, write_dataset
from datasets.transforms import Augment
from utils.training.loading import ClipOrder, build_loader, rescale, stop_workers, to_device, to_floats

SIZE = (48, 64)
TENSORS = ("frames", "flows", "masks", "valid")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_dataset(root, "DAVIS-2016", videos=4, frames=7, size=(90, 150), seed=1)
    return root


@pytest.fixture
def sequences(written: Path) -> list[VideoSequence]:
    return read_dataset("DAVIS-2016", written, "train")


def counting_video(folder: Path, count: int, labelled: list[int] | None = None, name: str = "count") -> VideoSequence:
    """A video whose frame i is grey of level 10 * i, its flow picture 10 * i + 3; labels on some frames."""
    stems = [f"{i:05d}" for i in range(count)]
    for part in ("frames", "flows", "masks"):
        (folder / name / part).mkdir(parents=True)
    paths = {part: {s: folder / name / part / f"{s}.png" for s in stems} for part in ("frames", "flows", "masks")}
    for i, stem in enumerate(stems):
        Image.fromarray(np.full((24, 32, 3), 10 * i, np.uint8)).save(paths["frames"][stem])
        Image.fromarray(np.full((24, 32, 3), 10 * i + 3, np.uint8)).save(paths["flows"][stem])
        Image.fromarray(np.full((24, 32), 255, np.uint8)).save(paths["masks"][stem])
    masks = paths["masks"] if labelled is None else {stems[i]: paths["masks"][stems[i]] for i in labelled}
    frames = tuple(paths["frames"].values())
    return VideoSequence(name, "counting", frames, paths["flows"], masks, "nonzero", folder / name / "flows")


def numbers(item: dict) -> list[int]:
    """Frame numbers of a clip of the counting video."""
    return [round(v / 10) for v in item["frames"].float().mean(dim=(1, 2, 3)).tolist()]


def same(a: dict, b: dict) -> bool:
    return all(torch.equal(a[k], b[k]) for k in TENSORS) and a["sequence"] == b["sequence"]


def test_items_are_as_promised_and_batch(sequences: list[VideoSequence]) -> None:
    clips = VideoClips(sequences, 4, SIZE, Augment(), samples_per_epoch=4)
    batch = next(iter(DataLoader(clips, batch_size=3)))
    assert {k: (tuple(batch[k].shape), batch[k].dtype) for k in TENSORS} == {
        "frames": ((3, 4, 3, *SIZE), torch.uint8),
        "flows": ((3, 4, 3, *SIZE), torch.uint8),
        "masks": ((3, 4, 1, *SIZE), torch.uint8),
        "valid": ((3, 4), torch.bool),
    }
    assert batch["masks"].max() == 1 and batch["valid"].all()
    assert batch["dataset"] == ["DAVIS-2016"] * 3
    assert sorted(batch["sequence"]) == [s.name for s in sequences]  # a round holds each sequence once


@pytest.mark.parametrize("augment", [None, Augment()])
def test_the_cache_changes_nothing(sequences: list[VideoSequence], augment: Augment | None) -> None:
    plain, cached = (VideoClips(sequences, 3, SIZE, augment, cache, seed=3) for cache in ("none", "ram"))
    assert plain._store is None and cached._store is not None
    assert all(same(plain[i], cached[i]) for i in range(len(plain)))


@pytest.mark.parametrize(("size", "augment"), [(SIZE, None), (SIZE, Augment()), ((96, 160), Augment())])
def test_what_the_cache_takes_is_known_beforehand(
    sequences: list[VideoSequence], size: tuple[int, int], augment: Augment | None
) -> None:
    decoded: list[int] = []
    clips = VideoClips(sequences, 3, size, augment, "ram", progress=decoded.append)
    assert cache_bytes(sequences, size, augment) == sum(planes.nbytes for planes in clips._store)
    assert decoded == [len(sequence) for sequence in sequences]


@pytest.mark.parametrize(("width", "target"), [(853, 213), (853, 426), (429, 107)])
def test_a_reduced_jpeg_lies_as_a_reduced_png_does(tmp_path: Path, width: int, target: int) -> None:
    """Widths that are no multiple of the reduction: the last reduced pixel holds more than the picture."""
    ramp = np.broadcast_to(np.linspace(0, 255, width).astype(np.uint8)[None, :, None], (96, width, 3))
    found = []
    for name in ("r.png", "r.jpg"):
        Image.fromarray(np.ascontiguousarray(ramp)).save(tmp_path / name, quality=95)
        picture, full = _load_reduced(tmp_path / name, lambda full: (24, target), load_frame)
        assert full == (96, width) and picture.size == (target, 24)
        found.append(np.asarray(picture).astype(float)[..., 1].mean(axis=0))
    step = 255 / target  # grey levels of one reduced pixel
    assert abs((found[0] - found[1])[-12:-2].mean()) < 0.2 * step


def test_a_clip_depends_on_seed_epoch_and_index_only(sequences: list[VideoSequence]) -> None:
    def make(seed: int = 0) -> VideoClips:
        return VideoClips(sequences, 3, SIZE, Augment(), seed=seed, samples_per_epoch=6)

    first, later = make(), make()
    expected = [first[i] for i in range(6)]
    for i in (5, 0, 3):  # another order, another history
        assert same(later[i], expected[i])
    later.set_epoch(1)
    assert not same(later[0], expected[0])
    later.set_epoch(0)
    assert same(later[0], expected[0])
    assert not same(make(seed=1)[0], expected[0])


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere processes are not forked")
def test_workers_share_what_is_cached(sequences: list[VideoSequence]) -> None:
    """Also where Python 3.14 has another default, which hands each of them a copy, with a file open for each video."""

    class Kept(VideoClips):  # of a function, which cannot be sent to another process
        pass

    order = ClipOrder(batch=2, accumulate=1, steps=2, rank=0, world_size=1, seed=0)
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method("forkserver", force=True)
    try:
        clips = Kept(sequences, 3, SIZE, cache="ram", samples_per_epoch=4)
        loader = build_loader(clips, order, workers=1, pin_memory=False)
        assert len(list(loader)) == 2
        stop_workers(loader)
    finally:
        multiprocessing.set_start_method(before, force=True)


def test_workers_that_stay_see_the_next_epoch(sequences: list[VideoSequence]) -> None:
    clips = VideoClips(sequences, 2, SIZE, Augment(), samples_per_epoch=4)
    mixed = MixedClips([(clips, 1.0), (SyntheticClips(None, 4, 2, SIZE), 1.0)], length=4)
    loader = DataLoader(mixed, batch_size=None, num_workers=2, persistent_workers=True)
    for epoch in range(3):
        mixed.set_epoch(epoch)
        seen = list(loader)
        assert all(same(seen[i], mixed[i]) for i in range(4))


def test_frames_are_in_order_at_one_of_the_strides(tmp_path: Path) -> None:
    clips = VideoClips([counting_video(tmp_path, 20)], 4, (24, 32), samples_per_epoch=60, strides=(1, 3))
    seen = Counter()
    for i in range(60):
        item = clips[i]
        steps = set(np.diff(numbers(item)))
        assert len(steps) == 1
        seen.update(steps)
        # the flow is that of the frame
        assert torch.equal(item["flows"], item["frames"] + 3)
    assert set(seen) == {1, 3}


def test_every_frame_can_be_drawn(tmp_path: Path) -> None:
    clips = VideoClips([counting_video(tmp_path, 12)], 3, (24, 32), samples_per_epoch=150)
    assert {n for i in range(150) for n in numbers(clips[i])} == set(range(12))


def test_a_stride_that_does_not_fit_gives_way(tmp_path: Path) -> None:
    clips = VideoClips([counting_video(tmp_path, 6)], 4, (24, 32), samples_per_epoch=20, strides=(4,))
    for i in range(20):
        assert numbers(clips[i]) in ([0, 1, 2, 3], [1, 2, 3, 4], [2, 3, 4, 5])
    longer = VideoClips([counting_video(tmp_path, 8, name="8")], 4, (24, 32), samples_per_epoch=20, strides=(4,))
    for i in range(20):  # to the largest that fits
        assert numbers(longer[i]) in ([0, 2, 4, 6], [1, 3, 5, 7])


def test_every_sequence_comes_once_a_round_in_an_order_of_its_own(tmp_path: Path) -> None:
    videos = [counting_video(tmp_path, 3, name=name) for name in "abcd"]
    clips = VideoClips(videos, 2, (24, 32), samples_per_epoch=40)

    def rounds() -> list[str]:
        names = "".join(clips[i]["sequence"] for i in range(40))
        return [names[i : i + 4] for i in range(0, 40, 4)]

    first = rounds()
    assert all(sorted(names) == list("abcd") for names in first) and len(set(first)) > 5
    clips.set_epoch(1)
    assert rounds() != first


@pytest.mark.parametrize(("count", "clip_len"), [(4, 5), (4, 4), (7, 8), (2, 2), (3, 3)])
@pytest.mark.parametrize("labelled", [[0], [-1], [1]])
def test_clips_of_short_videos_have_a_label(tmp_path: Path, count: int, clip_len: int, labelled: list[int]) -> None:
    labelled = [range(count)[i] for i in labelled]
    clips = VideoClips([counting_video(tmp_path, count, labelled)], clip_len, (24, 32), samples_per_epoch=60)
    found = [clips[i] for i in range(60)]
    assert all(item["valid"].any() for item in found)
    assert all([n in labelled for n in numbers(item)] == item["valid"].tolist() for item in found)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_short_videos_are_read_to_and_fro(tmp_path: Path, count: int) -> None:
    clips = VideoClips([counting_video(tmp_path, count)], 5, (24, 32), samples_per_epoch=12)
    first = set()
    for i in range(12):
        found = numbers(clips[i])
        first.add(found[0])
        assert len(found) == 5 and set(found) == set(range(count))
        assert set(np.abs(np.diff(found))) == ({0} if count == 1 else {1})
    assert first == set(range(count))  # they begin at any frame


def test_sparse_labels_are_marked_and_never_absent(tmp_path: Path) -> None:
    clips = VideoClips([counting_video(tmp_path, 20, labelled=[0, 19, 10])], 4, (24, 32), samples_per_epoch=60)
    labelled, places = set(), set()
    for i in range(60):
        item = clips[i]
        valid = [n for n, v in zip(numbers(item), item["valid"].tolist()) if v]
        places |= {place for place, n in enumerate(numbers(item)) if n == 10}
        assert valid and set(valid) <= {0, 10, 19}
        labelled |= set(valid)
        assert torch.equal(item["masks"].amax(dim=(1, 2, 3)).bool(), item["valid"])
    assert labelled == {0, 10, 19}
    assert places == set(range(4))  # not always at the clip's end, say, which has no frame after it


def test_dropping_flow_or_frames(sequences: list[VideoSequence]) -> None:
    whole = VideoClips(sequences, 2, SIZE, Augment())[0]
    no_flow = VideoClips(sequences, 2, SIZE, Augment(), flow_drop=1.0)[0]
    no_frames = VideoClips(sequences, 2, SIZE, Augment(), frame_drop=1.0)[0]
    assert (no_flow["flows"] == 255).all() and torch.equal(no_flow["frames"], whole["frames"])
    assert (no_frames["frames"] == 128).all() and torch.equal(no_frames["flows"], whole["flows"])
    both = VideoClips(sequences, 1, SIZE, flow_drop=0.5, frame_drop=0.5, samples_per_epoch=20)
    for i in range(20):
        item = both[i]
        assert (item["flows"] == 255).all() != (item["frames"] == 128).all()


def test_where_faults_are() -> None:
    faults = [draw_faults(4, 1.0, np.random.default_rng(seed)) for seed in range(60)]
    spared = [set(range(4)) - {fault.frame for fault in clip} for clip in faults]
    assert all(len(frames) == 1 for frames in spared) and set.union(*spared) == set(range(4))
    for fault in (fault for clip in faults for fault in clip):
        top, left, bottom, right = fault.box
        assert 0 <= top < bottom <= 1 and 0 <= left < right <= 1
        assert 0.3 <= bottom - top <= 0.7 and 0.3 <= right - left <= 0.7 and 1 / 16 <= fault.amount <= 1 / 4
    assert {fault.kind for clip in faults for fault in clip} == {"still", "blurred", "hidden"}


def test_a_blurred_picture_is_the_mean_of_what_was_there_and_a_hidden_one_grey_in_its_box() -> None:
    frames = torch.zeros(2, 3, 32, 64, dtype=torch.uint8)
    frames[..., ::2] = 200
    flows, before = torch.full_like(frames, 7), frames.clone()
    apply_faults(frames, flows, (Fault(0, "blurred", 1 / 8), Fault(1, "hidden", box=(0.25, 0.5, 0.75, 1.0))))
    assert (frames[0] == 100).all() and (flows[0] == 7).all()
    inside = torch.zeros(32, 64, dtype=torch.bool)
    inside[8:24, 32:] = True
    assert torch.equal(frames[1], torch.where(inside, torch.tensor(128, dtype=torch.uint8), before[1]))
    assert torch.equal(flows[1], torch.where(inside, torch.tensor(255, dtype=torch.uint8), flows[0]))


def test_faults_are_of_single_frames(sequences: list[VideoSequence]) -> None:
    plain = VideoClips(sequences, 4, SIZE, Augment(), samples_per_epoch=40, seed=5)
    faulty = FaultyClips(plain, 0.4)
    seen, count = Counter(), 0
    for index in range(40):
        before, after = plain[index], faulty[index]
        assert same(after, faulty[index])
        assert torch.equal(before["masks"], after["masks"]) and torch.equal(before["valid"], after["valid"])
        sound = 0
        for t in range(4):
            frame, flow = (after[key][t] for key in ("frames", "flows"))
            picture_differs = (frame != before["frames"][t]).any(0)
            flow_differs = (flow != before["flows"][t]).any(0)
            if not picture_differs.any() and not flow_differs.any():
                sound += 1
            elif not picture_differs.any():
                seen["still"] += 1
                assert (flow == 255).all()
            elif not flow_differs.any() and not (frame[:, picture_differs] == 128).all():
                seen["blurred"] += 1
                for axis in (1, 2):  # smooth both ways
                    detail = [x.float().diff(dim=axis).abs().sum() for x in (frame, before["frames"][t])]
                    assert detail[0] < 0.9 * detail[1]
            else:  # what differs lies in one rectangle, which shows nothing
                seen["hidden"] += 1
                rows, columns = torch.nonzero(picture_differs | flow_differs, as_tuple=True)
                box = (..., slice(rows.min(), rows.max() + 1), slice(columns.min(), columns.max() + 1))
                assert (frame[box] == 128).all() and (flow[box] == 255).all()
        assert sound >= 1
        count += 4 - sound
    assert 0.25 < count / 160 < 0.5 and set(seen) == {"still", "blurred", "hidden"} and min(seen.values()) >= 8
    # Another epoch has others; a single frame has no neighbour and no faults; none are asked for.
    first = faulty[0]["frames"]
    faulty.set_epoch(1)
    assert not torch.equal(faulty[0]["frames"], first) and plain.epoch == 1
    single = VideoClips(sequences, 1, SIZE, Augment())
    assert same(FaultyClips(single, 1.0)[0], single[0])
    assert same(FaultyClips(plain, 0.0)[3], plain[3])
    with pytest.raises(ValueError, match="probability"):
        FaultyClips(plain, 1.5)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("augment", [None, Augment(sharpness_probability=0.5)])
def test_clips_finished_on_the_training_device_are_those_of_the_loader(
    augment: Augment | None, workers: int, sequences: list[VideoSequence], tmp_path: Path
) -> None:
    # The counting video has another size than the others, so raw clips of one batch cannot be stacked.
    videos = [*sequences, counting_video(tmp_path, 9)]
    batches = []
    for defer in (False, True):
        options = {"flow_drop": 0.2, "frame_drop": 0.2, "samples_per_epoch": 16, "seed": 3, "defer": defer}
        synthetic = SyntheticClips(None, 16, 2, SIZE, seed=0, defer=defer)
        parts = [(VideoClips(videos, 2, SIZE, augment, **options), 3.0), (synthetic, 1.0)]
        order = ClipOrder(batch=4, accumulate=1, steps=4, rank=0, world_size=1, seed=0)
        loader = build_loader(FaultyClips(MixedClips(parts, 16, 0), 0.3), order, workers=workers, pin_memory=False)
        loaded = list(loader)
        assert all(("items" in batch) == defer for batch in loaded)
        batches.append([to_device(batch, torch.device("cpu")) for batch in loaded])
    assert len(batches[0]) == 4
    for by_loader, by_device in zip(*batches):
        for key in TENSORS:
            assert torch.equal(by_loader[key], by_device[key]), key
    floats = to_floats(batches[0][0])
    assert all(torch.equal(floats[key], batches[0][0][key] / 255) for key in ("frames", "flows"))
    assert floats["masks"].max() == 1
    assert floats["valid"].dtype == torch.bool


def test_a_batch_at_another_size_is_what_pillow_makes_of_it() -> None:
    clips = SyntheticClips(None, 2, 3, (64, 128), seed=1)
    batch = {key: torch.stack([clips[0][key], clips[1][key]]) for key in TENSORS}
    assert rescale(batch, (64, 128)) is batch
    small = rescale(batch, (32, 96))
    assert torch.equal(small["valid"], batch["valid"]) and batch["frames"].shape == (2, 3, 3, 64, 128)
    for key in ("frames", "flows", "masks"):
        assert small[key].dtype == torch.uint8 and small[key].shape == (*batch[key].shape[:3], 32, 96)
        for b in range(2):
            for t in range(3):
                for plane, made in zip(batch[key][b, t].numpy(), small[key][b, t].numpy()):
                    if key == "masks":
                        resized = np.asarray(Image.fromarray(plane * 255).resize((96, 32), Image.Resampling.BILINEAR))
                        sure = np.abs(resized.astype(int) - 127) > 2
                        assert np.array_equal(made[sure], resized[sure] > 127) and made.max() <= 1
                    else:
                        resized = np.asarray(Image.fromarray(plane).resize((96, 32), Image.Resampling.BILINEAR))
                        assert np.abs(made.astype(int) - resized).max() <= 1
    assert small["masks"].any()


class Waits(TorchDispatchMode):
    """Notes copies to the GPU that wait for what it is still at, and numbers that are read from it."""

    def __init__(self) -> None:
        super().__init__()
        self.copies, self.waiting = 0, []

    def __torch_dispatch__(self, operator: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        if "_to_copy" in str(operator) and args[0].device != result.device:
            self.copies += 1
            if not kwargs.get("non_blocking"):
                self.waiting.append(f"copy of {tuple(args[0].shape)}")
        elif "_local_scalar_dense" in str(operator):
            self.waiting.append("a number")
        return result


@pytest.mark.parametrize("synthetic", [False, True])
def test_clips_are_finished_on_a_gpu_without_waiting_for_it(
    synthetic: bool, sequences: list[VideoSequence], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On one that need not be there: tensors without numbers."""
    options = SceneOptions(
        turbulence=1, water=1, motion_blur=1, light=1, noise=1, occluder=1, second_object=1, flow_errors=1
    )
    if synthetic:
        clips = SyntheticClips(None, 4, 3, SIZE, seed=3, options=options, defer=True)
    else:
        strong = Augment(sharpness_probability=1, rotation_probability=1, flip=1)
        clips = VideoClips(sequences, 3, SIZE, strong, samples_per_epoch=2, flow_drop=0.5, defer=True)
    made = [clips[index]["raw"] for index in range(len(clips))]
    tables = (flow_colour._wheel_tables, flow_colour._mirror_table, flow_colour._position_table)  # made once
    for table in tables:
        monkeypatch.setattr(flow_colour, table.__name__, table.__wrapped__)
    for raw in made:
        with FakeTensorMode(allow_non_fake_inputs=True), Waits() as waits:
            for pictures in raw.finish("cuda"):
                assert pictures.device.type == "cuda" and pictures.dtype == torch.uint8
        assert waits.copies >= 4
        assert set(waits.waiting) <= {"copy of (55, 3)", "copy of (2097152,)"}, waits.waiting  # the tables


@pytest.mark.gpu
@pytest.mark.parametrize("synthetic", [False, True])
def test_clips_finished_on_a_gpu_are_those_of_the_loader(synthetic: bool, sequences: list[VideoSequence]) -> None:
    if synthetic:
        clips = SyntheticClips(None, 24, 3, SIZE, seed=3, defer=True)
    else:
        clips = VideoClips(sequences, 3, SIZE, Augment(sharpness_probability=0.5), samples_per_epoch=8, defer=True)
    for index in range(len(clips)):
        raw = clips[index]["raw"]
        for plain, made in zip(raw.finish(), raw.pin_memory().finish("cuda")):
            assert made.device.type == "cuda" and made.dtype == torch.uint8
            difference = (plain.int() - made.cpu().int()).abs()
            # Rounding may tip a value to the next one, and a mask's pixel on its outline to the other side.
            assert difference.float().mean() < 0.05 and difference.float().quantile(0.99) <= 1


def test_without_augmentation_the_whole_frame_is_resized(sequences: list[VideoSequence]) -> None:
    video = sequences[0]
    item = VideoClips([video], 7, SIZE, strides=(1,))[0]
    for t, stem in enumerate(video.stems):
        for key, path in (("frames", video.frames[t]), ("flows", video.flows[stem])):
            picture = Image.open(path).convert("RGB").resize(SIZE[::-1], Image.Resampling.BILINEAR)
            difference = np.abs(item[key][t].permute(1, 2, 0).numpy().astype(int) - np.asarray(picture))
            assert difference.mean() < 3  # a JPEG may be decoded at a reduced size
        mask = Image.open(video.masks[stem]).convert("L").resize(SIZE[::-1], Image.Resampling.NEAREST)
        assert (item["masks"][t, 0].numpy() == np.asarray(mask) // 255).mean() > 0.97


def test_videos_are_read_with_room_for_crops_and_never_enlarged(sequences: list[VideoSequence], tmp_path: Path) -> None:
    """Their flow may be of another size. 24 x 32 of 90 x 150: the height is the narrower side, 24 * 1.2 = 29 of 90."""
    video = sequences[0]
    flows = {stem: tmp_path / f"{stem}.png" for stem in video.flows}
    for stem, path in flows.items():
        Image.open(video.flows[stem]).resize((75, 45), Image.Resampling.BILINEAR).save(path)
    video = replace(video, flows=flows)
    for size, kept in (((24, 32), (29, 48)), ((16, 64), (46, 77)), ((90, 150), (90, 150)), ((200, 300), (90, 150))):
        raw = VideoClips([video], 7, size, Augment(), strides=(1,), defer=True)[0]["raw"]
        assert raw.planes.shape == (7, 7, *kept)
        for t, stem in enumerate(video.stems):
            for planes, path in ((raw.planes[t, :3], video.frames[t]), (raw.planes[t, 3:6], flows[stem])):
                picture = Image.open(path).convert("RGB").resize(kept[::-1], Image.Resampling.BILINEAR)
                assert np.abs(planes.permute(1, 2, 0).numpy().astype(int) - np.asarray(picture)).mean() < 3
            share = (np.asarray(Image.open(video.masks[stem])) > 0).mean()
            assert raw.planes[t, 6].float().mean() == pytest.approx(share, abs=0.02)


def test_crops_are_aimed_at_the_object_in_whichever_frame_it_is_annotated(tmp_path: Path) -> None:
    """A crop of a part of the frame, drawn blindly, would miss so small an object in a corner most of the time."""
    video = counting_video(tmp_path, 3, labelled=[2])
    mask = np.zeros((24, 32), np.uint8)
    mask[1:4, 1:4] = 255
    Image.fromarray(mask).save(video.masks["00002"])
    clips = VideoClips([video], 3, (24, 32), Augment(scale=(0.4, 0.4), flip=0, rotation_probability=0), strides=(1,))
    assert sum(bool(clips.clip(i)["masks"].any()) for i in range(40)) >= 38


def test_a_mixture_keeps_its_weights_and_repeats_nothing(sequences: list[VideoSequence]) -> None:
    videos = replace(sequences[0], name="a"), sequences[1]
    one, two = (VideoClips([video], 2, (24, 32), Augment(), "ram", 3) for video in videos)
    mixed = MixedClips([(one, 3.0), (two, 1.0)], length=200)
    items = [mixed[i] for i in range(200)]
    count = Counter(i["sequence"] for i in items)
    assert 120 < count["a"] < 180
    assert len({i["frames"].numpy().tobytes() for i in items}) == 200
    again = MixedClips([(one, 3.0), (two, 1.0)], length=200)
    assert all(same(again[i], items[i]) for i in (199, 0, 77))
    # Another epoch is another order, and the same for whoever begins with it: a run that was resumed.
    fresh = MixedClips([(one, 3.0), (two, 1.0)], length=200)
    for mixture in (again, fresh):
        mixture.set_epoch(1)
    names = [[mixture[i]["sequence"] for i in range(40)] for mixture in (again, fresh)]
    assert names[0] == names[1] != [i["sequence"] for i in items[:40]]
    # Of other clips, too: each part numbers them from 0 again.
    seen = {i["frames"].numpy().tobytes() for i in items}
    assert not any(again[i]["frames"].numpy().tobytes() in seen for i in range(40))


def test_impossible_options_are_refused(sequences: list[VideoSequence]) -> None:
    for wrong in ({"clip_len": 0}, {"cache": "disk"}, {"strides": ()}, {"flow_drop": 0.7, "frame_drop": 0.7}):
        with pytest.raises(ValueError):
            VideoClips(sequences, **{"clip_len": 2, "size": SIZE, **wrong})
    with pytest.raises(DataError, match="no video"):
        VideoClips([], 2, SIZE)
    with pytest.raises(ValueError, match="weights"):
        MixedClips([(VideoClips(sequences, 2, SIZE), 0.0)], 4)


# --- bad files: each error names the file -----------------------------------------------------------------------------


@pytest.fixture
def broken(sequences: list[VideoSequence], tmp_path: Path) -> VideoSequence:
    """A copy of a video, to be broken."""
    video = sequences[0]

    def move(path: Path, part: str) -> Path:
        (tmp_path / part).mkdir(exist_ok=True)
        return Path(shutil.copy(path, tmp_path / part / path.name))

    return replace(
        video,
        frames=tuple(move(p, "frames") for p in video.frames),
        flows={s: move(p, "flows") for s, p in video.flows.items()},
        masks={s: move(p, "masks") for s, p in video.masks.items()},
    )


@pytest.mark.parametrize("cache", ["none", "ram"])
def test_truncated_frame(broken: VideoSequence, cache: str) -> None:
    path = broken.frames[3]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=r"frames/00003\.jpg"):
        VideoClips([broken], 7, SIZE, strides=(1,), cache=cache)[0]


def test_a_frame_that_pillow_takes_for_an_attack(broken: VideoSequence, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DataError, match=r"frames/0000\d\.jpg: cannot be read"):
        VideoClips([broken], 2, SIZE)[0]


def test_missing_flow(broken: VideoSequence) -> None:
    flows = {s: p for s, p in broken.flows.items() if s != "00002"}
    with pytest.raises(DataError, match=r"00002.*--tools flow"):
        VideoClips([replace(broken, flows=flows)], 2, SIZE)


def test_flow_of_another_shape_names_the_command_that_makes_it(broken: VideoSequence) -> None:
    wrong = broken.flows["00002"]
    Image.new("RGB", (31, 64)).save(wrong)
    broken = replace(broken, flow_command="python tool.py --tools flow --split train")
    with pytest.raises(DataError, match=r"00002.*remove it and make it again: python tool\.py.* --split train$"):
        VideoClips([broken], 7, SIZE, strides=(1,))[0]


def test_no_masks(broken: VideoSequence) -> None:
    with pytest.raises(DataError, match="no masks"):
        VideoClips([replace(broken, masks={})], 2, SIZE)


def test_mask_of_another_size(broken: VideoSequence) -> None:
    Image.fromarray(np.zeros((10, 10), np.uint8)).save(broken.masks["00001"])
    with pytest.raises(DataError, match=r"masks/00001\.png.*10.10"):
        VideoClips([broken], 7, SIZE, strides=(1,))[0]


def test_flow_of_another_shape(broken: VideoSequence) -> None:
    Image.fromarray(np.zeros((50, 50, 3), np.uint8)).save(broken.flows["00001"])
    with pytest.raises(DataError, match=r"flows/00001\.png.*50x50"):
        VideoClips([broken], 7, SIZE, strides=(1,))[0]
    # 5 % of the aspect, for sizes that were rounded: frames are 90 x 150.
    Image.fromarray(np.zeros((90, 160, 3), np.uint8)).save(broken.flows["00001"])
    with pytest.raises(DataError, match="160x90"):
        VideoClips([broken], 7, SIZE, strides=(1,))[0]
    Image.fromarray(np.zeros((90, 155, 3), np.uint8)).save(broken.flows["00001"])
    VideoClips([broken], 7, SIZE, strides=(1,))[0]


def test_frames_of_two_sizes(broken: VideoSequence) -> None:
    for path in (broken.frames[2], broken.flows["00002"], broken.masks["00002"]):
        Image.open(path).convert("RGB").resize((180, 90)).save(path)
    with pytest.raises(DataError, match=r"frames/00002\.jpg: not of the size"):
        VideoClips([broken], 7, SIZE, Augment(), strides=(1,))[0]


@pytest.mark.data
def test_clips_of_davis(real_data: Path) -> None:
    videos = read_dataset("DAVIS-2016", real_data, "train")
    clips = VideoClips(videos, 4, (96, 160), Augment(), samples_per_epoch=len(videos))
    items = [clips[i] for i in range(5)]
    assert len({i["sequence"] for i in items}) == 5
    assert all(0.001 < i["masks"].float().mean() < 0.8 for i in items)
