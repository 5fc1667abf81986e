"""Whole-video inference against the network on the whole clip, and what bounds its memory."""

from __future__ import annotations

import copy
import errno
import gc
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

import models.convlstm
import models.predictor
from models import DBSNet, Predictor, build_dbsnet
from models.frame_io import read_ahead
from models.frame_store import FrameStore, Storage
from models.windows import batches_of_windows, refinement_windows

SIZE = (64, 96)


def make_net(**options) -> DBSNet:
    """A tiny network with lively weights: without, all probabilities would be alike and prove nothing."""
    torch.manual_seed(0)
    net = build_dbsnet(
        **{"variant": "xxs", "width": 16, "hidden": 4, "dilations": (1, 2), "depth": 1, "window": 4, **options}
    )
    for name, tensor in [*net.named_parameters(), *net.named_buffers()]:
        with torch.no_grad():
            if name.endswith("running_mean"):
                tensor.normal_(0, 0.1)
            elif name.endswith("running_var"):
                tensor.uniform_(0.7, 1.4)
            elif name.endswith(("scale", "distance")) and "fusion" in name:
                tensor.normal_()
    frames, flows = make_video(3)
    net.eval()
    with torch.inference_mode():
        logits = net(as_clip(frames), as_clip(flows))
    with torch.no_grad():
        net.decoder.head.weight /= logits.std()
        net.decoder.head.bias.sub_(logits.mean()).div_(logits.std())
    return net


def make_video(length: int, size: tuple[int, int] = SIZE, seed: int = 0) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Blobs and noise, another picture for every frame."""
    random = np.random.default_rng(seed)
    small = random.random((2, length, 4, 6, 3))
    big = small.repeat(-(-size[0] // 4), 2).repeat(-(-size[1] // 6), 3)[:, :, : size[0], : size[1]]
    video = (255 * (0.8 * big + 0.2 * random.random(big.shape))).astype(np.uint8)
    return list(video[0]), list(video[1])


def as_clip(images: Sequence[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.stack(list(images))).permute(0, 3, 1, 2)[None].float() / 255


def whole(net: DBSNet, frames: Sequence[np.ndarray], flows: Sequence[np.ndarray]) -> np.ndarray:
    with torch.inference_mode():
        return net(as_clip(frames), as_clip(flows)).sigmoid()[0, :, 0].numpy()


def collect(results: Iterator[tuple[int, np.ndarray]]) -> np.ndarray:
    pairs = list(results)
    assert [index for index, _ in pairs] == list(range(len(pairs)))
    assert all(p.dtype == np.float32 and p.ndim == 2 and (p >= 0).all() and (p <= 1).all() for _, p in pairs)
    return np.stack([p for _, p in pairs])


def exact(net: DBSNet, **options) -> Predictor:
    return Predictor(net, **{"store_dtype": torch.float32, **options})


@pytest.fixture(scope="module")
def net() -> DBSNet:
    return make_net()


@pytest.fixture(scope="module")
def video() -> tuple[list[np.ndarray], list[np.ndarray]]:
    return make_video(11)


@pytest.fixture(scope="module")
def truth(net: DBSNet, video: tuple) -> np.ndarray:
    return whole(net, *video)


def test_the_probabilities_vary(truth: np.ndarray) -> None:
    assert truth.std() > 0.1


@pytest.mark.parametrize("large", [0, 1 << 40])  # of propagation: chain by chain, and all at once
@pytest.mark.parametrize("length", [1, 2, 4, 5, 11])  # the window is 4
def test_equals_the_network_on_the_whole_clip(
    net: DBSNet, video: tuple, length: int, large: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames, flows = video[0][:length], video[1][:length]
    monkeypatch.setattr(models.convlstm, "LARGE", large)
    result = collect(exact(net, piece=3)(frames, flows))
    np.testing.assert_allclose(result, whole(net, frames, flows), atol=1e-5)


@pytest.mark.parametrize("options", [
    {"batch_size": 1, "piece": 1}, {"batch_size": 7, "piece": 100}, {"batch_size": 6}, {"host_memory": 0},
    {"host_memory": 400_000, "piece": 5},    {"channels_last": True}, {"fold": False},
])  # fmt: skip
def test_batches_pieces_and_places_do_not_matter(net: DBSNet, video: tuple, truth: np.ndarray, options: dict) -> None:
    np.testing.assert_allclose(collect(exact(net, **options)(*video)), truth, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"host_memory": 0}])
def test_features_in_half_precision_stay_close(net: DBSNet, video: tuple, truth: np.ndarray, options: dict) -> None:
    np.testing.assert_allclose(collect(Predictor(net, **options)(*video)), truth, atol=5e-3)


@pytest.mark.parametrize("options", [
    {"dilations": ()}, {"depth": 0}, {"streams": ("motion",)}, {"flavour": "wilile", "rounds": 0},
])  # fmt: skip
def test_ablations_and_the_other_flavour(video: tuple, options: dict) -> None:
    net = make_net(**options)
    frames, flows = video[0][:6], video[1][:6]
    np.testing.assert_allclose(collect(exact(net)(frames, flows)), whole(net, frames, flows), atol=1e-5)


@pytest.mark.parametrize("length, frames", [(3, 16), (9, 4), (23, 16), (40, 12), (40, 1)])
def test_windows_come_in_batches_of_few_frames_and_lose_none(length: int, frames: int) -> None:
    windows = list(refinement_windows(length, 8))
    batches = list(batches_of_windows(iter(windows), frames))
    assert [window for batch in batches for window in batch] == windows
    kept = [batch[-1][3] - batch[0][2] for batch in batches]
    assert all(count <= frames or len(batch) == 1 for count, batch in zip(kept, batches))
    # as many as go in: no batch could have taken the next one's first window
    assert all(nxt[0][3] - batch[0][2] > frames for batch, nxt in zip(batches, batches[1:]))


def test_sizes_that_are_no_multiple_are_padded(net: DBSNet) -> None:
    frames, flows = make_video(3, (50, 71))
    result = collect(exact(net)(frames, flows))
    assert result.shape == (3, 50, 71)
    np.testing.assert_allclose(result, whole(net, frames, flows), atol=1e-5)


def test_clips_are_the_network_on_overlapping_windows(net: DBSNet, video: tuple) -> None:
    frames, flows = video
    result = collect(exact(net, clip_len=4)(frames, flows))
    # Clips of 4 keep their middle two frames, the first and the last clip also their ends.
    expected = []
    for start, keep, until in ((0, 0, 3), (2, 3, 5), (4, 5, 7), (6, 7, 9), (7, 9, 11)):
        expected.append(whole(net, frames[start : start + 4], flows[start : start + 4])[keep - start : until - start])
    np.testing.assert_allclose(result, np.concatenate(expected), atol=1e-5)
    short = whole(net, frames[:3], flows[:3])
    np.testing.assert_allclose(collect(exact(net, clip_len=4)(frames[:3], flows[:3])), short, atol=1e-5)


def test_flip_averages_with_the_mirrored_video(net: DBSNet, video: tuple) -> None:
    frames, flows = video[0][:3], video[1][:3]
    mirrored = [x[:, ::-1] for x in frames], [x[:, ::-1] for x in flows]
    result = collect(exact(net, flip=True)(frames, flows))
    expected = (whole(net, frames, flows) + whole(net, *mirrored)[..., ::-1]) / 2
    np.testing.assert_allclose(result, expected, atol=1e-5)
    np.testing.assert_allclose(collect(exact(net, flip=True)(*mirrored))[..., ::-1], result, atol=1e-5)
    with pytest.raises(ValueError, match=r"a mirrored flow image has shape \(96, 64, 3\), expected \(64, 96, 3\)"):
        collect(Predictor(net, flip=True, mirror_flow=lambda x: x.transpose(1, 0, 2))(frames, flows))
    # A flow image's mirroring can be given.
    other = collect(exact(net, flip=True, mirror_flow=lambda x: 255 - x[:, ::-1])(frames, flows))
    expected = (whole(net, frames, flows) + whole(net, mirrored[0], [255 - x for x in mirrored[1]])[..., ::-1]) / 2
    np.testing.assert_allclose(other, expected, atol=1e-5)


def test_scales_are_averaged_at_the_frames_own_size(net: DBSNet, video: tuple) -> None:
    frames, flows = video[0][:2], video[1][:2]
    alone = [collect(exact(net, size=size)(frames, flows)) for size in ((64, 96), (96, 128))]
    assert all(result.shape == (2, *SIZE) for result in alone)
    result = collect(exact(net, scales=(1.0, 1.4))(frames, flows))  # 1.4: 90 x 134, rounded to multiples of 32
    np.testing.assert_allclose(result, sum(alone) / 2, atol=1e-5)
    assert np.abs(alone[0] - alone[1]).max() > 0.01
    # A scale that would leave less than the network's smallest size gives that.
    least = collect(exact(net, size=(32, 32))(frames, flows))
    np.testing.assert_allclose(collect(exact(net, scales=(0.1,))(frames, flows)), least, atol=1e-6)


def test_pictures_are_resized_as_pillow_does_and_logits_back(net: DBSNet) -> None:
    """Frames and flow of two sizes, both larger than the network's: smoothed, or thin things would come and go."""
    from PIL import Image

    def resized(plane: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        return np.asarray(Image.fromarray(plane.astype(np.float32)).resize(size[::-1], Image.Resampling.BILINEAR))

    def shrunk(images: list[np.ndarray]) -> list[np.ndarray]:
        return [np.stack([resized(x[..., c], SIZE) for c in range(3)], axis=-1) for x in images]

    frames, flows = make_video(3, (150, 170))[0], make_video(3, (120, 200))[1]
    with torch.inference_mode():
        logits = 5 * net(as_clip(shrunk(frames)), as_clip(shrunk(flows)))[0, :, 0].numpy()
    expected = 1 / (1 + np.exp(-np.stack([resized(x, (150, 170)) for x in logits])))
    sharp = copy.deepcopy(net)  # so that a probability between two is not that of a logit between theirs
    for parameter in sharp.decoder.head.parameters():
        parameter.data.mul_(5)
    np.testing.assert_allclose(collect(exact(sharp, size=SIZE)(frames, flows)), expected, atol=1e-3)


def test_results_come_at_the_frames_own_size_whatever_the_networks(net: DBSNet) -> None:
    frames, _ = make_video(2, (45, 61))
    _, flows = make_video(2, (90, 122))
    result = collect(Predictor(net, size=(64, 96))(frames, flows))
    assert result.shape == (2, 45, 61) and np.isfinite(result).all()


@pytest.mark.parametrize(("options", "passes"), [({}, 1), ({"flip": True, "scales": (1.0, 0.5)}, 4)])
def test_it_tells_how_many_frames_are_encoded_before_the_first_result(
    net: DBSNet, video: tuple, options: dict, passes: int
) -> None:
    counts: list[int] = []
    results = Predictor(net, batch_size=4, on_encoded=counts.append, **options)(*video)
    next(results)
    length = len(video[0])
    assert counts == [min(4, length - start) for start in range(0, length, 4)] * passes
    results.close()


def test_arrays_and_lazy_sequences_will_do_and_no_frame_is_held(net: DBSNet, video: tuple, truth: np.ndarray) -> None:
    np.testing.assert_allclose(collect(exact(net)(np.stack(video[0]), np.stack(video[1]))), truth, atol=1e-5)

    class Lazy:
        def __init__(self, images: list[np.ndarray]) -> None:
            self.images, self.asked = images, []

        def __len__(self) -> int:
            return len(self.images)

        def __getitem__(self, index: int) -> np.ndarray:
            self.asked.append(index)
            return self.images[index].copy()

    frames, flows = Lazy(video[0]), Lazy(video[1])
    np.testing.assert_allclose(collect(exact(net)(frames, flows)), truth, atol=1e-5)
    assert sorted(flows.asked) == list(range(11))  # each is decoded once


class OneAtATime(Sequence):
    """A decoder of one buffer and one position: the next picture overwrites the last, and two askers would mix."""

    def __init__(self, images: list[np.ndarray], asking: threading.Lock) -> None:
        self.images, self.buffer, self.asking = images, np.empty_like(images[0]), asking

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> np.ndarray:  # type: ignore[override]
        if not self.asking.acquire(blocking=False):
            raise RuntimeError("asked for from two threads at once")
        time.sleep(0.02)  # so that passes, which read ahead at the same time, would meet
        self.buffer[...] = self.images[index]
        self.asking.release()
        return self.buffer


@pytest.mark.parametrize(
    "options", [{}, {"flip": True}, {"flip": True, "clip_len": 4}, {"scales": (1.0, 0.5), "clip_len": 3}]
)
def test_a_decoder_with_one_buffer_may_be_given(net: DBSNet, video: tuple, options: dict) -> None:
    expected = collect(exact(net, **options)(*video))
    asking = threading.Lock()  # one for both: frames and flow may come out of one file
    result = collect(exact(net, **options)(*(OneAtATime(images, asking) for images in video)))
    np.testing.assert_array_equal(result, expected)


class SecondAfterThird(Sequence):
    """Images of which the second is there only when the third has been asked for, by another thread."""

    def __init__(self, images: list[np.ndarray]) -> None:
        self.images, self.third = images, threading.Event()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> np.ndarray:  # type: ignore[override]
        if index == 2:
            self.third.set()
        if index == 1 and not self.third.wait(60):
            raise RuntimeError("the third was not asked for meanwhile")
        return self.images[index]


@pytest.mark.parametrize("options", [{}, {"flip": True}, {"zoom": True}, {"clip_len": 4}])
def test_several_readers_change_nothing_but_read_at_once(net: DBSNet, video: tuple, options: dict) -> None:
    expected = collect(exact(net, **options)(*video))
    result = collect(exact(net, **options, readers=2)(SecondAfterThird(video[0]), SecondAfterThird(video[1])))
    np.testing.assert_array_equal(result, expected)


def test_nothing_is_read_any_more_once_a_reader_is_closed() -> None:
    """Whoever closes results may close the video file next."""
    begun, read = threading.Event(), []

    def make(start: int) -> int:
        if start == 1:
            begun.set()
            time.sleep(0.2)
        read.append(start)
        return start

    reader = read_ahead(make, range(9))
    assert next(reader) == 0 and begun.wait(10)
    reader.close()
    assert read == [0, 1]  # what was being read is finished, and no more is begun


@pytest.mark.parametrize("readers", [1, 3])
@pytest.mark.parametrize("batch_size", [1, 3, 4])
@pytest.mark.parametrize(("which", "what"), [(0, "frame"), (1, "flow image")])
def test_a_picture_of_another_size_is_refused_wherever_a_batch_ends(
    net: DBSNet, video: tuple, which: int, what: str, batch_size: int, readers: int
) -> None:
    arguments = [list(images[:6]) for images in video]
    arguments[which][4] = arguments[which][4][:32]
    with pytest.raises(ValueError, match=rf"{what} 4 has shape \(32, 96, 3\), the first one \(64, 96, 3\)"):
        collect(Predictor(net, batch_size=batch_size, readers=readers)(*arguments))


@pytest.mark.parametrize("options", [{}, {"clip_len": 4}, {"readers": 3}])
@pytest.mark.parametrize("which", [0, 1])
def test_an_error_of_a_lazy_sequence_reaches_the_caller(net: DBSNet, video: tuple, options: dict, which: int) -> None:
    class Broken(list):
        def __getitem__(self, index: int) -> np.ndarray:
            if index == 6:
                raise OSError("frame 6 is truncated")
            return super().__getitem__(index)

    arguments = list(video)
    arguments[which] = Broken(arguments[which])
    before = set(threading.enumerate())
    with pytest.raises(OSError, match="frame 6 is truncated"):
        collect(Predictor(net, **options)(*arguments))
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize("options", [{}, {"flip": True}, {"clip_len": 4}, {"readers": 3}])
def test_closing_early_frees_files_and_threads(
    net: DBSNet, video: tuple, monkeypatch: pytest.MonkeyPatch, options: dict
) -> None:
    files, make = [], tempfile.TemporaryFile

    def record(*args, **kwargs):
        files.append(make(*args, **kwargs))
        return files[-1]

    monkeypatch.setattr(tempfile, "TemporaryFile", record)
    before = set(threading.enumerate())
    results = Predictor(net, host_memory=0, batch_size=1, **options)(*video)
    index, _ = next(results)
    assert index == 0
    if "clip_len" not in options:
        assert files and not all(file.closed for file in files)
    results.close()
    gc.collect()
    assert all(file.closed for file in files)
    assert set(threading.enumerate()) <= before


def test_an_error_in_one_pass_frees_the_files_of_the_others(
    net: DBSNet, video: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    class BreaksLater(list):
        asked = 0

        def __getitem__(self, index: int) -> np.ndarray:
            self.asked += index == 9
            if self.asked == 2:  # the first pass is encoded, the second at it
                raise OSError("the disk went away")
            return super().__getitem__(index)

    files, make = [], tempfile.TemporaryFile
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda *a, **k: files.append(make(*a, **k)) or files[-1])
    with pytest.raises(OSError, match="went away") as caught:
        collect(Predictor(net, host_memory=0, flip=True)(BreaksLater(video[0]), video[1]))
    assert caught.value.__traceback__ is not None  # kept, as a notebook keeps the last one
    assert files and all(file.closed for file in files)


def test_all_files_are_closed_at_the_end(net: DBSNet, video: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    files, make = [], tempfile.TemporaryFile
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda *a, **k: files.append(make(*a, **k)) or files[-1])
    collect(Predictor(net, host_memory=0)(video[0][:3], video[1][:3]))
    assert files and all(file.closed for file in files)


def test_clips_are_encoded_and_decoded_in_batches(net: DBSNet, video: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = collect(exact(net, clip_len=7, batch_size=7)(*video))
    sizes = []
    encode, decode = DBSNet.encoder_maps, DBSNet.decode
    monkeypatch.setattr(DBSNet, "encoder_maps", lambda self, x, y: sizes.append(len(x)) or encode(self, x, y))
    monkeypatch.setattr(DBSNet, "decode", lambda self, x, skip: sizes.append(len(skip)) or decode(self, x, skip))
    np.testing.assert_allclose(collect(exact(net, clip_len=7, batch_size=2)(*video)), expected, atol=1e-5)
    assert max(sizes) == 2


def test_bad_arguments(net: DBSNet, video: tuple) -> None:
    with pytest.raises(ValueError, match="11 frames and 10 flow images"):
        next(iter(Predictor(net)(video[0], video[1][:-1])))
    for broken, words in (((8, 9), r"uint8 \(8, 9\)"), ((8, 9, 4), r"uint8 \(8, 9, 4\)")):
        image = np.zeros(broken, np.uint8)
        with pytest.raises(ValueError, match=rf"arrays \(H, W, 3\) of uint8, RGB, got {words}"):
            next(Predictor(net)([image], [image]))
    with pytest.raises(ValueError, match="got float32"):
        next(Predictor(net)(video[0][:1], [video[1][0].astype(np.float32)]))
    with pytest.raises(ValueError, match="without pixels"):
        next(Predictor(net)(*([np.zeros((0, 9, 3), np.uint8)],) * 2))
    for arguments, name in (((iter(video[0]), video[1]), "frames"), ((video[0], (x for x in video[1])), "flows")):
        with pytest.raises(TypeError, match=f"{name} must be a sequence .* make a list"):
            next(Predictor(net)(*arguments))
    with pytest.raises(ValueError, match="amp"):
        Predictor(net, amp="fp8")
    with pytest.raises(ValueError, match="clip_len"):
        Predictor(net, clip_len=0)
    for wrong in ({"clip_len": 2.5}, {"batch_size": 2.5}, {"piece": 1.5}):
        with pytest.raises(TypeError, match="float"):
            Predictor(net, **wrong)
    for dtype in (torch.int8, torch.float64, "float16"):
        with pytest.raises(ValueError, match="store_dtype must be"):
            Predictor(net, store_dtype=dtype)
    for size in (64, (64,), (64.0, 96.0), (0, 96), "64"):
        with pytest.raises(ValueError, match="size must be"):
            Predictor(net, size=size)
    for scales in (1.0, (), (0.0,), (float("nan"),), (float("inf"),), "1.0"):
        with pytest.raises(ValueError, match="scales must be"):
            Predictor(net, scales=scales)
    assert list(Predictor(net)([], [])) == []


def test_networks_that_are_none_or_not_in_single_precision(net: DBSNet) -> None:
    with pytest.raises(TypeError, match="got DataParallel; give what it wraps: net.module"):
        Predictor(torch.nn.DataParallel(net))
    with pytest.raises(TypeError, match="must be a DBSNet, got Conv2d$"):
        Predictor(torch.nn.Conv2d(3, 3, 1))
    for dtype in (torch.float16, torch.float64):
        with pytest.raises(ValueError, match=rf"single precision, got parameters of {dtype}: give net.float\(\)"):
            Predictor(copy.deepcopy(net).to(dtype))


def test_a_compiled_network_will_do(net: DBSNet, video: tuple) -> None:
    frames, flows = video[0][:3], video[1][:3]
    result = collect(exact(torch.compile(net, backend="eager"))(frames, flows))
    np.testing.assert_allclose(result, whole(net, frames, flows), atol=1e-5)


@pytest.mark.parametrize("fold", [True, False])
def test_a_network_put_back_in_training_mode_is_neither_used_nor_changed_in_it(video: tuple, fold: bool) -> None:
    own = make_net(dropout=0.5)  # which is random, where a batch norm folded away is as in evaluation
    frames, flows = video[0][:3], video[1][:3]
    truth, before = whole(own, frames, flows), copy.deepcopy(own.state_dict())
    predictor = exact(own, fold=fold)
    own.train()
    np.testing.assert_allclose(collect(predictor(frames, flows)), truth, atol=1e-5)
    assert all(torch.equal(before[key], value) for key, value in own.state_dict().items())


@pytest.mark.parametrize("options", [{"host_memory": 0}, {"clip_len": 4}])
def test_the_default_device_is_the_users(net: DBSNet, video: tuple, options: dict) -> None:
    expected = collect(Predictor(net, **options)(*video))
    torch.set_default_device("meta")  # stands for a GPU: what is made there without being asked for cannot be read
    try:
        result = collect(Predictor(net, **options)(*video))
    finally:
        torch.set_default_device(None)
    np.testing.assert_array_equal(result, expected)


def test_amp_stays_close(net: DBSNet, video: tuple) -> None:
    frames, flows = video[0][:3], video[1][:3]
    for fold in (True, False):
        result = collect(Predictor(net, amp="bf16", fold=fold)(frames, flows))
        difference = np.abs(result - collect(Predictor(net, fold=fold)(frames, flows))).mean()
        assert 1e-4 < difference < 0.02  # eight bits do not give what 24 do
        assert np.abs(result - whole(net, frames, flows)).mean() < 0.02


MEMORY = """
import resource, sys
import numpy as np, torch
from models import Predictor, build_dbsnet
from utils.memory import keep_freed_memory

keep_freed_memory()  # as tool.py does on a CPU
torch.set_num_threads(1)
length, options = int(sys.argv[1]), dict.fromkeys(sys.argv[2:], True)
picture = np.random.default_rng(0).integers(0, 256, (96, 160, 3), np.uint8)

class Lazy:
    def __len__(self): return length
    def __getitem__(self, index):
        if index >= length: raise IndexError(index)
        return np.roll(picture, index, 1)

net = build_dbsnet("xxs", width=64, hidden=16, dilations=(1,), depth=1, window=4, rounds=1)
count = sum(1 for _ in Predictor(net, host_memory=4 << 20, **options)(Lazy(), Lazy()))
assert count == length
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [(), ("zoom", "consensus", "smooth"), ("optional_motion",), ("flip",)], ids=lambda words: "-".join(words)
)
def test_host_memory_does_not_grow_with_the_video(options: tuple[str, ...], repository: Path) -> None:
    """Features of 540 more frames would be 190 MB, the decoded frames and flow images 50 MB."""

    def peak(length: int) -> int:
        words = [sys.executable, "-c", MEMORY, str(length), *options]
        return int(subprocess.run(words, cwd=repository, capture_output=True, text=True, check=True).stdout)

    short, long = peak(60), peak(600)
    assert long - short < 40, f"{short} MB for 60 frames, {long} MB for 600"


def test_maps_of_one_pixel_go_to_the_file() -> None:
    value = torch.randn(2, 6, 1, 1).contiguous(memory_format=torch.channels_last)
    store = FrameStore(3, (6, 1, 1), torch.float32, None)
    store.write(1, value)
    assert torch.equal(store.read(1, 3, torch.device("cpu")), value)
    store.close()


def test_a_file_is_written_and_read_on_where_one_call_does_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux moves no more than 2 GiB a call, and a nearly full disk or a signal less."""
    write, read = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda file, data, offset: write(file, data[:50], offset))
    monkeypatch.setattr(os, "preadv", lambda file, buffers, offset: read(file, [buffers[0][:70]], offset))
    value = torch.randn(4, 3, 5, 2)
    store = FrameStore(6, (3, 5, 2), torch.float32, None)
    store.write(2, value[2:])
    store.write(0, value[:2])
    assert torch.equal(store.read(0, 4, torch.device("cpu")), value)
    assert torch.equal(store.read(1, 3, torch.device("cpu")), value[1:3])
    with pytest.raises(OSError, match="ended at byte 480, expected 600"):  # frames that nobody wrote
        store.read(3, 5, torch.device("cpu"))
    store.close()


def test_stores_are_kept_in_memory_up_to_the_limit_and_what_is_freed_counts_no_more() -> None:
    cpu, size = torch.device("cpu"), 10 * 4 * 3 * 2  # bytes of ten frames of (4, 3) in half precision

    def in_memory(store: FrameStore) -> bool:
        return store.tensor is not None

    storage = Storage(10, cpu, torch.float16, 0, 2 * size)
    first, second, third = (storage.new((4, 3)) for _ in range(3))
    assert in_memory(first) and in_memory(second) and not in_memory(third)
    assert not in_memory(storage.new(()))  # not the smallest one more
    storage.free(third)
    assert third.file.closed
    storage.free(first)
    assert not in_memory(first)  # its memory is given back
    fourth, fifth = storage.new((4, 3)), storage.new((4, 3))
    assert in_memory(fourth) and not in_memory(fifth)
    storage.close()
    assert fifth.file.closed and not in_memory(second) and not in_memory(fourth)


def test_what_graphs_work_in_is_not_free_for_features(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [
        {"device": 0, "total_size": 800, "allocated_size": 400, "segment_pool_id": (0, 0)},
        {"device": 0, "total_size": 9000, "allocated_size": 0, "segment_pool_id": (0, 7)},  # of a graph
        {"device": 1, "total_size": 5000, "allocated_size": 0, "segment_pool_id": (0, 0)},
    ]
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: parts)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1600, 10000))
    storage = Storage(1, torch.device("cuda", 0), torch.float16, 1 << 30, 1 << 30)
    assert storage.places[0][1] == (1600 + 400) // 4
    # Without a number it is the current one; and the host's limit is its own.
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert Storage(1, gpu, torch.float16, 1 << 30, 70).places == [(gpu, (1600 + 5000) // 4), (cpu, 70)]
    assert Storage(1, gpu, torch.float16, 1000, 70).places == [(gpu, 1000), (cpu, 70)]


def test_passes_share_the_memory_for_features(net: DBSNet, video: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Storage] = []
    asked: list[tuple[int, int]] = []

    class Watched(Storage):
        def __init__(self, *arguments) -> None:
            super().__init__(*arguments)
            made.append(self)
            asked.append(arguments[3:])

    monkeypatch.setattr(models.predictor, "Storage", Watched)
    for options, passes in (({}, 1), ({"flip": True, "scales": (1.0, 0.5)}, 4)):
        made.clear()
        asked.clear()
        results = Predictor(net, device_memory=1 << 22, host_memory=1 << 20, **options)(video[0][:2], video[1][:2])
        next(results)
        assert [[limit for _, limit in storage.places] for storage in made] == [[(1 << 20) // passes]] * passes
        assert asked == [((1 << 22) // passes, (1 << 20) // passes)] * passes
        results.close()


def test_a_full_disk_says_which(net: DBSNet, video: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: open("/dev/full", "wb"))
    with pytest.raises(OSError, match=tempfile.gettempdir()) as caught:
        collect(Predictor(net, host_memory=0)(*video))
    assert caught.value.errno == errno.ENOSPC
