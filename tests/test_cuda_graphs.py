"""CUDA graphs: which work is recorded and when, that a video comes out the same, and that nothing in it waits for the
GPU.

A recording is emulated on the CPU: it computes what a replay would, in the memory where a replay would. The tests
marked `gpu` record real graphs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import models.convlstm
import models.cuda_graphs
import models.predictor
from models import Predictor, build_dbsnet
from models.consensus import correct
from models.cuda_graphs import CudaGraphs
from models.dbsnet import DBSNet
from models.refinement import time_encoding
from tests.test_predictor import make_net as make_lively_net
from tests.test_speed_paths import make_net, predict, video

made: Counter = Counter()  # recordings and replays of the emulation
alive: list[Emulated] = []


class Emulated:
    """What `models.cuda_graphs.Recording` does with a GPU, where the memory is as unkind as it may be: a replay spoils
    the results of all others, and rows that are not given hold what no row should see.
    """

    def __init__(self, work: Callable[..., tuple[Tensor, ...]], inputs: tuple[Tensor, ...]) -> None:
        made["recordings"] += 1
        self.work, self.inputs = work, [x.clone() for x in inputs]
        self.results = [torch.full_like(x, float("nan")) for x in work(*self.inputs)]
        alive.append(self)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        made["replays"] += 1
        for kept, given in zip(self.inputs, inputs, strict=True):
            kept[: len(given)].copy_(given)
            kept[len(given) :].fill_(float("nan") if kept.is_floating_point() else 255)
        for recording in alive:
            for result in recording.results:
                result.fill_(float("nan"))
        for kept, result in zip(self.results, self.work(*self.inputs), strict=True):
            kept.copy_(result)
        return tuple(self.results)

    @property
    def rows(self) -> int:
        return len(self.inputs[0])


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter]:
    def copied(batches: Iterator[Tensor]) -> Iterator[np.ndarray]:  # as from a GPU: before anything else is done
        for batch in batches:
            yield from batch.numpy().copy()

    monkeypatch.setattr(CudaGraphs, "_record", lambda self, work, inputs: Emulated(work, inputs))
    monkeypatch.setattr(models.predictor, "hand_out", copied)
    made.clear()
    alive.clear()
    yield made


def with_graphs(net: DBSNet, **options: Any) -> Predictor:
    predictor = Predictor(net, **options)
    predictor.cuda_graphs = True
    return predictor


def run(predictor: Predictor, length: int) -> np.ndarray:
    return np.stack([probability for _, probability in predictor(*video(length))])


# Half precision would make rounding in the fifth digit one in the third; and every part comes often.
FINE = {"store_dtype": torch.float32, "piece": 4}


def check_same(ours: np.ndarray, plain: np.ndarray, tolerance: float = 1e-5) -> None:
    assert np.abs(plain - plain.mean()).max() > 100 * tolerance
    np.testing.assert_allclose(ours, plain, rtol=0, atol=tolerance)


def test_the_third_call_is_recorded(emulated: Counter) -> None:
    graphs, calls = CudaGraphs(torch.device("cpu")), []

    def double(x: Tensor) -> tuple[Tensor]:
        calls.append(tuple(x.shape))
        return (2 * x,)

    for shape in ((3,), (4,), (3,), (4,), (3,)):
        value = torch.rand(shape)
        assert torch.equal(graphs("double", double, value)[0], 2 * value)
    assert emulated == {"recordings": 1, "replays": 1}
    first = graphs("double", double, torch.ones(3))[0]
    second = graphs("double", double, torch.zeros(3))[0]
    assert first is second and not second.any()  # its memory is the recording's
    graphs("other", double, torch.ones(3))
    graphs("double", double, torch.ones(3).double())
    assert emulated == {"recordings": 1, "replays": 3}
    graphs.begin()
    graphs("double", double, torch.ones(4))  # the third call, but the first since then
    graphs("double", double, torch.ones(3))
    assert emulated == {"recordings": 1, "replays": 4}
    graphs.clear()
    graphs("double", double, torch.ones(3))
    assert emulated == {"recordings": 1, "replays": 4}


def test_a_shorter_batch_replays_what_was_recorded_for_a_whole_one(emulated: Counter) -> None:
    graphs, calls = CudaGraphs(torch.device("cpu")), []

    def add(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(len(x))
        return x + y, x - y

    def check(rows: int, by_row: bool = True, key: str = "add") -> None:
        x, y = torch.rand(rows, 2), torch.rand(1, 2)  # y has one row each time
        total, difference = graphs(key, add, x, y, by_row=by_row)
        assert torch.equal(total, x + y) and torch.equal(difference, x - y)

    for rows in (4, 4, 4):
        check(rows)
    calls.clear()
    for rows in (3, 1, 4):
        check(rows)
    assert calls == [4, 4, 4] and emulated == {"recordings": 1, "replays": 4}  # all of the recording
    calls.clear()
    check(3, by_row=False)
    check(5)
    check(3, key="other")
    assert calls == [3, 5, 3] and emulated["replays"] == 4
    check(5)
    check(5)  # recorded, too, and from now on the one for what is shorter
    calls.clear()
    for rows in (4, 2):
        check(rows)
    assert calls == [4, 5]
    graphs.clear()
    check(2)
    assert calls == [4, 5, 2]


@pytest.mark.parametrize(
    "options",
    [{}, {"flip": True}, {"scales": (1.0, 2.0), "flip": True}, {"clip_len": 4}, {"clip_len": 4, "flip": True},
     {"batch_size": 2, "piece": 3}, {"host_memory": 200_000}, {"size": (32, 64)},
     {"consensus": True}, {"consensus": True, "flip": True, "batch_size": 1},
     {"zoom": True}, {"zoom": True, "consensus": True, "flip": True, "size": (96, 160)},
     {"optional_motion": True}, {"optional_motion": True, "consensus": True, "zoom": True},
     {"optional_motion": True, "clip_len": 4}],
)  # fmt: skip
def test_a_video_comes_out_the_same(options: dict[str, Any], emulated: Counter) -> None:
    options = {**FINE, **options}
    net, predictor = make_net(), with_graphs(make_net(), **options)
    for length in (23, 15, 2):
        check_same(run(predictor, length), predict(net, length, **options))
    assert emulated["replays"] > 2 * emulated["recordings"] > 0


def test_recordings_stay_from_video_to_video(emulated: Counter) -> None:
    predictor = with_graphs(make_net())
    run(predictor, 67)
    recordings, copied = emulated["recordings"], predictor._recorded.net
    assert recordings
    for length in (67, 66, 34, 35, 36):  # whose last batches and pieces are shorter
        run(predictor, length)
    assert emulated["recordings"] == recordings and predictor._recorded.net is copied


@pytest.mark.parametrize("options", [{}, {"zoom": True, "size": (64, 96)}, {"optional_motion": True}])
def test_what_is_left_of_a_video_is_replayed_too(options: dict[str, Any], emulated: Counter) -> None:
    options = {"batch_size": 4, **options, **FINE}
    net, predictor = make_net(), with_graphs(make_net(), **options)
    run(predictor, 27)
    for length in (27, 18, 1):
        check_same(run(predictor, length), predict(net, length, **options))
        directly = {signature[0][0] for signature in predictor._graphs._seen}
        # A recurrence needs the rows before; windows of less than a whole one have another shape.
        assert directly <= {"propagate"} | ({"refine"} if length < net.window else set())


def test_videos_of_other_lengths_add_no_recordings(emulated: Counter) -> None:
    """Of several passes together the last piece of a recurrence comes four times in a video."""
    predictor = with_graphs(make_net(), flip=True, optional_motion=True, batch_size=4, piece=4)
    run(predictor, 27)
    known = {signature[0][0] for signature in predictor._graphs._recorded}
    assert "propagate" in known
    before = sum(signature[0][0] == "propagate" for signature in predictor._graphs._recorded)
    for length in (25, 26, 28, 3):
        run(predictor, length)
    assert sum(signature[0][0] == "propagate" for signature in predictor._graphs._recorded) == before


def test_two_videos_in_turns_are_refused(emulated: Counter) -> None:
    predictor = with_graphs(make_net())
    first = predictor(*video(3))
    next(first)
    with pytest.raises(RuntimeError, match="one after the other"):
        next(predictor(*video(3)))
    first.close()
    assert len(list(predictor(*video(3)))) == 3


def test_frames_of_another_size_at_the_same_size_of_the_network(emulated: Counter) -> None:
    predictor = with_graphs(make_net(), size=(64, 96), **FINE)
    run(predictor, 27)
    run(predictor, 27)
    frames, flows = ([image[:40, :60] for image in images] for images in video(27))
    plain = [probability for _, probability in Predictor(make_net(), size=(64, 96), **FINE)(frames, flows)]
    check_same(np.stack([probability for _, probability in predictor(frames, flows)]), np.stack(plain))


@pytest.mark.parametrize("how", ["in place", "through .data", "buffer", "size", "precision"])
def test_what_changed_is_recorded_anew(how: str, emulated: Counter) -> None:
    net, predictor = make_net(), with_graphs(make_net(), **FINE)
    before = run(predictor, 27)
    run(predictor, 27)
    with torch.no_grad():
        for one in (net, predictor.net):
            if how == "in place":
                one.decoder.head.bias.add_(1)
            elif how == "through .data":
                one.decoder.head.bias.data.add_(1)
            elif how == "buffer":
                one.skip.norm.running_mean.add_(1)
    options = {"size": {"size": (32, 64)}, "precision": {"amp": "bf16"}}.get(how, {})
    predictor.size, predictor.amp = options.get("size"), models.predictor.AMP[options.get("amp")]
    after = run(predictor, 27)
    check_same(after, predict(net, 27, **options, **FINE))
    assert np.abs(after - before).max() > 1e-4


@pytest.mark.parametrize("option", ["consensus", "optional_motion"])
def test_what_is_asked_for_between_two_videos_is_recorded_anew(option: str, emulated: Counter) -> None:
    net, predictor = make_lively_net(), with_graphs(make_lively_net(), **FINE)
    before = run(predictor, 27)
    setattr(predictor, option, True)
    after = run(predictor, 27)
    check_same(after, predict(net, 27, **{option: True}, **FINE), 2e-5)
    assert np.abs(after - before).max() > 0.01


def test_it_needs_a_gpu() -> None:
    with pytest.raises(ValueError, match="cuda_graphs needs a GPU"):
        Predictor(make_net(), device="cpu", cuda_graphs=True)


def test_what_cannot_be_recorded_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def cut_short(*_: Any) -> None:
        raise error

    graphs = CudaGraphs(torch.device("cpu"))
    graphs._stream, graphs._pool = object(), (0, 0)  # which only a GPU has
    monkeypatch.setattr(models.cuda_graphs, "Recording", cut_short)
    for error, said in (
        (RuntimeError("operation not permitted"), "--no-cuda_graphs.*: operation not permitted"),
        (torch.cuda.OutOfMemoryError("CUDA out of memory"), "^CUDA out of memory$"),  # told by `utils.errors`
    ):
        graphs._recorded["other"] = object()
        with pytest.raises(type(error), match=said):
            graphs._record(lambda x: (x,), (torch.ones(1),))
        assert not graphs._recorded and graphs._pool is None
        graphs._pool = (0, 0)


# ------------------------------------------------------------------------------------------ what a graph cannot record


class Watch(TorchDispatchMode):
    """Notes operators that read or write host memory, or that hand a number to Python, while the rest is on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.waiting = 0, []

    def __torch_dispatch__(self, operator: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)]
        self.count += 1
        if any(x.device.type == "cpu" for x in tensors) or "_local_scalar_dense" in str(operator):
            self.waiting.append(str(operator))
        return result


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tensors without numbers, on a GPU that need not be there."""

    def cell(inputs: Tensor, recurrent: Tensor | None, cell: Tensor | None) -> tuple[Tensor, Tensor]:
        shape = inputs.shape[0] * inputs.shape[1] * 2, inputs[0, 0, 0].numel() // 4
        return inputs.new_empty(shape), inputs.new_empty(shape)

    monkeypatch.setattr(models.convlstm, "_fused_cell", cell)  # which has no shapes without a GPU
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with FakeTensorMode(), torch.device("cuda"):
        try:
            torch.empty(1).uniform_()
        except RuntimeError as error:  # PyTorch 2.4 built for CUDA
            if "CUDA driver" not in str(error):
                raise
            pytest.skip("this PyTorch fills no tensors without numbers where there is no CUDA driver")
        yield


@pytest.mark.usefixtures("fake_gpu")
@pytest.mark.parametrize("encoder", ["mobilevit", {"appearance": "tf_efficientnet_lite2", "motion": "mobilevit"}])
def test_nothing_in_the_network_waits_for_the_gpu(encoder: Any) -> None:
    if encoder != "mobilevit":
        pytest.importorskip("timm")
    net = build_dbsnet("xxs", encoder=encoder).eval()
    net.to = lambda device: net  # it is there, and tensors without numbers cannot be moved
    predictor = Predictor(net)
    way = models.predictor.Pass((90, 150), True, (48, 85), net, models.predictor.directly, 1)
    images = torch.zeros(2, 3, 48, 85, dtype=torch.uint8)
    with torch.inference_mode(), Watch() as watch:
        x = predictor._input(images, way.size)
        levels, skip = net.encode(x, x)
        clips = [net.refine(index, level[None]) for index, level in enumerate(levels)]
        predictor._finish(net.decode([clip[0] for clip in clips], skip), way)
        layer = net.propagation[0].layers[1]
        maps = [torch.rand(1, 5, 2, channels, 12, 20) for channels in (net.width, layer.hidden, layer.hidden)]
        *_, state = layer.chains(maps, list(maps))
        layer.chains(maps, list(maps), state)
    assert watch.count > 500 and not watch.waiting


@pytest.mark.usefixtures("fake_gpu")
def test_nothing_in_the_vote_of_frames_waits_for_the_gpu() -> None:
    frames, voters, channels = 4, 5, 48
    looks, others = torch.rand(frames, channels, 6, 10), torch.rand(frames, voters, channels, 6, 10)
    with torch.inference_mode(), Watch() as watch:
        result = correct(
            torch.rand(frames, 1, 24, 40), looks, torch.rand(frames, 6, 10), others, torch.rand(frames, voters, 6, 10)
        )
    assert result.is_cuda and result.dtype == torch.float32 and result.shape == (frames, 1, 24, 40)
    assert watch.count > 20 and not watch.waiting


@pytest.mark.usefixtures("fake_gpu")
def test_what_waits_is_noticed() -> None:
    x = torch.rand(4, 4)
    with torch.inference_mode(), Watch() as watch:
        x[:, [1, 0]]  # the list goes to the GPU first
    assert watch.waiting


@pytest.mark.usefixtures("fake_gpu")
def test_what_compiles_is_not_asked_about_a_recording(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose answer is of a kind that torch.compile would leave its graph for, in each layer."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: pytest.fail("it is asked"))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert time_encoding(3, 8, torch.empty(1)).is_cuda


# ---------------------------------------------------------------------------------------------------------- real graphs


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("amp", "options"),
    [(None, {}), ("bf16", {}), ("fp16", {}), ("bf16", {"clip_len": 4}), ("bf16", {"device_memory": 0}),
     ("fp16", {"flip": True}), (None, {"scales": (0.5, 1.0)}), (None, {"consensus": True}),
     ("bf16", {"consensus": True}), (None, {"zoom": True}), ("bf16", {"zoom": True, "consensus": True}),
     ("bf16", {"optional_motion": True, "zoom": True, "consensus": True})],
)  # fmt: skip
def test_a_video_comes_out_the_same_on_a_gpu(amp: str | None, options: dict[str, Any]) -> None:
    options = {"device": "cuda", "amp": amp, "batch_size": 4, "piece": 4, **options}
    plain, predictor = Predictor(make_net(), **options), Predictor(make_net(), cuda_graphs=True, **options)
    tolerance = 1e-3 if amp is None else 2e-2
    for length in (27, 27, 18, 2):
        np.testing.assert_allclose(run(predictor, length), run(plain, length), rtol=0, atol=tolerance)
    for one in (plain, predictor):
        with torch.no_grad():
            one.net.decoder.head.bias.add_(1)
    np.testing.assert_allclose(run(predictor, 27), run(plain, 27), rtol=0, atol=tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"zoom": True, "consensus": True}, {"cuda_graphs": False}])
def test_a_longer_video_takes_no_more_memory_on_a_gpu(options: dict[str, Any]) -> None:
    """Where no features of a video may stay there, of which each frame has 0.06 MiB at this size."""
    options = {"cuda_graphs": True, **options}
    predictor = Predictor(make_net(), device="cuda", amp="bf16", batch_size=4, piece=4, device_memory=0, **options)
    peaks = []
    for length in (40, 40, 400):  # the first prepares libraries, and records
        torch.cuda.reset_peak_memory_stats()
        run(predictor, length)
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[2] < peaks[1] + 2**20
