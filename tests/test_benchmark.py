"""The benchmark: what it measures is what it says, its options, its JSON; and the memory of long videos."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from models import Predictor, build_dbsnet, save_weights
from models.frame_store import FrameStore
from utils.benchmark import bench, network, propagation, training
from utils.benchmark.network import (
    LazyPictures,
    bench_against_encoders,
    bench_long,
    feature_bytes_per_frame,
    profile_clip,
    run_video,
    warm_up_frames,
)
from utils.benchmark.pipeline import FlowAhead, flow_of
from utils.benchmark.propagation import arithmetic_rates, bench_propagation
from utils.benchmark.timing import PeakMemory, describe_machine, release, resident_memory, time_calls
from utils.errors import UserError

CPU = torch.device("cpu")
SMALL = {"dilations": (1,), "depth": 1, "rounds": 1}


def parse(*words: str, folder: Path) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    args = parser.parse_args(words)
    shared = {"device": "cpu", "size": None, "checkpoint": None, "amp": "none", "batch_size": 2, "workers": 1,
              "cuda_graphs": False, "save_dir": str(folder)}  # fmt: skip
    for name, value in shared.items():
        setattr(args, name, value)
    return args


def test_calls_are_timed_in_turns_after_the_warm_up() -> None:
    order: list[str] = []

    def call(name: str, seconds: float) -> None:
        order.append(name)
        time.sleep(seconds)

    calls = {"a": lambda: call("a", 0.02), "b": lambda: call("b", 0.0)}
    times = time_calls(calls, CPU, repeats=3, warmup=2)
    assert order == ["a", "b"] * 5
    assert times["a"].repeats == 3
    assert 0.02 <= times["a"].least <= times["a"].median
    assert times["a"].processor < 0.02  # it slept
    assert times["a"].describe(frames=2)["milliseconds"] == pytest.approx(500 * times["a"].median)
    with pytest.raises(ValueError, match="at least one"):
        time_calls(calls, CPU, repeats=0)


def test_peak_memory_sees_what_came_and_went() -> None:
    with PeakMemory(CPU) as memory:
        block = np.ones(64 << 20, np.uint8)
        time.sleep(0.3)
        del block
    assert 50 << 20 < memory.host < 120 << 20
    assert memory.device == 0
    assert resident_memory() > 10 << 20


def test_peak_memory_sees_what_takes_the_place_of_what_was_freed(repository: Path) -> None:
    script = """
import torch
from utils.benchmark.timing import PeakMemory
from utils.memory import keep_freed_memory

keep_freed_memory()
torch.ones(96 << 18)
with PeakMemory(torch.device("cpu")) as memory:
    torch.ones(64 << 18)
print(memory.host)
"""
    run = subprocess.run([sys.executable, "-c", script], cwd=repository, capture_output=True, text=True, check=True)
    assert 50 << 20 < int(run.stdout) < 120 << 20


def test_memory_of_a_gpu_is_given_back_before_the_next_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    done = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: done.append("released"))
    release(CPU)
    assert not done
    release(torch.device("cuda"))
    assert done == ["released"]
    monkeypatch.setattr(network, "release", lambda device: done.append("released"))
    monkeypatch.setattr(network, "run_video", lambda *_: done.append("video"))
    net = build_dbsnet("xxs", **SMALL)
    network.bench_video(net, CPU, (32, 64), length=2, amp="none", batch_size=2, repeats=1)
    assert done[1:] == 4 * ["released", "video", "video"]  # with consensus, zoom, smoothing, the network alone


def test_what_is_prepared_in_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU a recurrence's graph is recorded at its fourth piece: pieces of 16 frames, in batches of 16."""
    for device, expected in (("cpu", 16), ("cuda", 80)):
        there = SimpleNamespace(device=torch.device(device), batch_size=16, piece=16)
        assert warm_up_frames(there, 1000) == expected and warm_up_frames(there, 10) == 10
    predictor, lengths = Predictor(build_dbsnet("xxs", **SMALL), size=(32, 64)), []
    monkeypatch.setattr(Predictor, "__call__", lambda self, frames, flows: lengths.append(len(frames)) or iter(()))
    monkeypatch.setattr(network, "run_video", lambda predictor, length, size: lengths.append(length) or 1.0)
    bench_long(predictor.net, CPU, (32, 64), length=50, amp="none", batch_size=4)
    assert lengths == [16, 5, 50]


def test_the_machine_is_described() -> None:
    facts = describe_machine(CPU)
    assert facts["torch"] == torch.__version__
    assert facts["threads"] == torch.get_num_threads()
    assert facts["processor"]
    rates = arithmetic_rates(CPU, repeats=1)
    assert list(rates) == ["matrix product", "convolution"] and min(rates.values()) > 1e8


def test_lazy_pictures() -> None:
    pictures = LazyPictures(3, (40, 70))
    assert len(pictures) == 3
    assert pictures[2].shape == (40, 70, 3) and pictures[2].dtype == np.uint8
    assert np.array_equal(pictures[1], np.roll(pictures[0], 1, 1))
    with pytest.raises(IndexError):
        pictures[3]


def test_propagation_benchmark() -> None:
    results = bench_propagation(CPU, channels=8, hidden=4, length=3, repeats=1, sizes=((6, 8),))
    assert [result["pass"] for result in results] == ["forward", "forward and backward"]
    for result in results:
        assert result["difference"] < 1e-5
        assert result["speedup"] > 0 and result["ratio_to_floor"] > 0
    assert results[1]["GMAC"] == pytest.approx(3 * results[0]["GMAC"])


def test_results_are_compared_in_full_precision_and_timed_as_they_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    forward = propagation.PlainPropagation.forward

    def watched(module: propagation.PlainPropagation, x: torch.Tensor) -> torch.Tensor:
        seen.append(torch.backends.cudnn.allow_tf32)
        return forward(module, x)

    usual = torch.backends.cudnn.allow_tf32
    monkeypatch.setattr(propagation.PlainPropagation, "forward", watched)
    bench_propagation(CPU, channels=8, hidden=4, length=2, repeats=1, sizes=((6, 8),))
    assert usual and seen == [False, *[usual] * 4]  # then warm-up and repeat of both passes


@pytest.mark.parametrize("consensus", [False, True])
@pytest.mark.parametrize("size", [(64, 96), (50, 70)])
def test_bytes_kept_of_a_frame_are_those_of_the_stores(
    size: tuple[int, int], consensus: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, most, kept = 0, 0, []
    start, close = FrameStore.__init__, FrameStore.close

    def counted(store: FrameStore, length: int, *words: object) -> None:
        nonlocal now, most
        start(store, length, *words)
        store.bytes = store.stride
        now += store.bytes
        most = max(most, now)
        kept.append(now)

    def closed(store: FrameStore) -> None:
        nonlocal now
        now -= store.bytes
        store.bytes = 0
        close(store)

    monkeypatch.setattr(FrameStore, "__init__", counted)
    monkeypatch.setattr(FrameStore, "close", closed)
    net = build_dbsnet("xxs", dilations=(1, 2))
    run_video(Predictor(net, host_memory=0, consensus=consensus), 3, size)
    expected = {"features": kept[4 if consensus else 3], "most": most}
    assert feature_bytes_per_frame(net, size, consensus=consensus) == expected


def test_long_video_benchmark() -> None:
    net = build_dbsnet("xxs", **SMALL)
    close = FrameStore.close
    result = bench_long(net, CPU, (32, 64), length=20, amp="none", batch_size=4, host_memory=0)
    assert [part["frames"] for part in result["runs"]] == [2, 20]
    kept = result["kept_per_frame_MiB"]
    assert result["runs"][1]["temporary_file_MiB"] == pytest.approx(20 * kept["most"])
    assert result["ratio_of_time_per_frame"] > 0
    assert FrameStore.close is close
    result = bench_long(net, CPU, (32, 64), length=1, amp="none", batch_size=4)
    assert [part["frames"] for part in result["runs"]] == [1]
    assert result["runs"][0]["temporary_file_MiB"] == 0


def test_flow_ahead_is_flow(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    from utils.files import write_png

    paths = [write_png(tmp_path / f"{i}.png", LazyPictures(3, (40, 48))[i]) for i in range(3)]
    with ThreadPoolExecutor(1) as pool:
        ahead = FlowAhead(paths, pool, 2)
        pictures = list(ahead)
    assert len(pictures) == len(ahead) == 3
    for index, picture in enumerate(pictures):
        assert np.array_equal(picture, flow_of(paths, index))
    assert flow_of(paths[:1], 0).shape == (40, 48, 3)  # a video of one frame


@pytest.mark.slow
def test_all_parts_and_the_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_weights(tmp_path / "w.safetensors", build_dbsnet("xxs", **SMALL))
    words = "--bench_parts network video pipeline profile long training --bench_clip 2 --bench_frames 4 "
    words += "--bench_video_frames 3 --bench_repeats 1"
    args = parse(*words.split(), folder=tmp_path)
    args.checkpoint, args.size = str(tmp_path / "w.safetensors"), [32, 64]
    report = bench.run(args, CPU)
    assert json.loads((tmp_path / "benchmark.json").read_text()) == json.loads(json.dumps(report))
    results = {result["part"]: result for result in report["results"]}
    assert set(results) == {"network", "video", "pipeline", "profile", "long", "training"}
    for result in results.values():
        assert result["size"] == [32, 64]
        assert result["parameters"] == sum(p.numel() for p in build_dbsnet("xxs", **SMALL).parameters())
    for name in ("plain", "folded, channels-last"):
        assert results["network"][name]["frames_per_second"] > 0
    assert results["network"]["GMAC_per_frame"] > 0
    assert results["video"]["frames"] == 3
    assert all(results["video"][way]["frames_per_second"] > 0 for way in ("consensus", "zoom", "smoothing"))
    stages = {"read", "flow", "network and resize", "write", "overlapped"}
    assert set(results["pipeline"]["frames_per_second"]) == stages
    assert sum(entry["share"] for entry in results["profile"]["operators"]) <= 1.001
    assert set(results["training"]["frames_per_second"]) == {"loader", "step", "together"}
    assert set(results["training"]["augment_on_device"]["frames_per_second"]) == {"loader", "together"}
    output = capsys.readouterr().out
    assert "frames_per_second" in output and "benchmark.json" in output


def test_training_is_that_of_the_network_in_its_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Built(Exception):
        pass

    def build(*variant: str, **config: object) -> None:
        raise Built(build_dbsnet(*variant, **config))

    net = build_dbsnet("xxs", **SMALL)
    save_weights(tmp_path / "w.safetensors", net)
    args = parse("--bench_parts", "training", folder=tmp_path)
    args.checkpoint, args.size = str(tmp_path / "w.safetensors"), [32, 64]
    monkeypatch.setattr(training, "build_dbsnet", build)
    with pytest.raises(Built) as caught:
        bench.run(args, CPU)
    assert {k: v.shape for k, v in caught.value.args[0].state_dict().items()} == {
        k: v.shape for k, v in net.state_dict().items()
    }


def test_a_profile_of_a_gpu_has_each_time_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two operators that launch one kernel each; the profiler's events as it lists them after a run on a GPU."""
    gpu, cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
    rows = [("aten::conv2d", cpu, 30.0), ("cutlass_kernel", gpu, 30.0), ("aten::add", cpu, 10.0), ("add", gpu, 10.0)]
    events = [SimpleNamespace(key=k, count=1, device_type=d, self_cpu_time_total=t) for k, d, t in rows]

    class Profile:
        def __init__(self, **_: object) -> None: ...
        def __enter__(self) -> Profile:
            return self

        def __exit__(self, *_: object) -> None: ...
        def key_averages(self) -> list:
            return events

    monkeypatch.setattr(torch.profiler, "profile", Profile)
    operators = profile_clip(build_dbsnet("xxs", **SMALL), CPU, (32, 32), length=1, amp="none")
    assert [(row["operator"], row["share"]) for row in operators] == [("aten::conv2d", 0.75), ("aten::add", 0.25)]


@pytest.mark.parametrize(("workers", "steps", "expected"), [(0, 3, 3), (1, 5, 5), (8, 5, 16), (4, 9, 12)])
def test_batches_that_the_workers_made_ahead_are_not_timed(
    workers: int, steps: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that goes one second further with each batch, of a loader that notes when it was read."""
    seconds, looked, orders = 0, [], []

    class Loader:
        _iterator = None

        def __iter__(self) -> Iterator[dict]:
            nonlocal seconds
            for _ in orders[-1]:
                seconds += 1
                yield {}

    def clock() -> int:
        looked.append(seconds)
        return seconds

    def build(clips: object, order: training.ClipOrder, **_: object) -> Loader:
        nonlocal seconds
        orders.append(order)
        seconds = 0
        return Loader()

    def step(batch: dict) -> None:
        nonlocal seconds
        seconds += 0 if len(orders) > 1 else 1  # alone, it takes one, too

    monkeypatch.setattr(training, "build_loader", build)
    monkeypatch.setattr(training, "Step", lambda *_: step)
    monkeypatch.setattr(training, "time", SimpleNamespace(perf_counter=clock))
    result = training.bench_training({}, CPU, (32, 32), length=5, batch=4, amp="none", workers=workers, steps=steps)
    rates = {**result["frames_per_second"], **result["augment_on_device"]["frames_per_second"]}
    assert set(rates.values()) == {4 * 5}  # what one batch has, in each second
    for order, began, ended in zip(orders, [looked[0], *looked[4::2]], [looked[1], *looked[5::2]]):
        assert ended - began == expected
        assert began >= 2 + 2 * workers and len(order) - ended >= 2 * workers


def test_against_the_encoders_that_the_network_has(monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm")
    net = build_dbsnet("xxs", encoder={"appearance": "tf_efficientnet_lite0", "motion": "mobilevit"}, **SMALL).eval()
    made, make = [], timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **options: made.append(name) or make(name, **options))
    result = bench_against_encoders(net, CPU, (32, 32), length=1, amp="none", repeats=1)
    assert made == result["timm_encoders"] == ["tf_efficientnet_lite0", "mobilevit_xxs"]


def test_against_timm() -> None:
    pytest.importorskip("timm")
    net = build_dbsnet("xxs", **SMALL).eval()
    result = bench_against_encoders(net, CPU, (64, 64), length=2, amp="none", repeats=1)
    assert set(result["ratios"]) == {"plain", "folded, channels-last"} and min(result["ratios"].values()) > 0


@pytest.mark.parametrize(
    "words",
    [
        "--bench_clip 0",
        "--bench_repeats 0",
        "--bench_threads 0",
        "--bench_frames -1",
        "--bench_host_memory -1",
        "--bench_json .",
    ],
)
def test_options_out_of_range(words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words.split()[0]):
        bench.check(parse(*words.split(), folder=tmp_path))


@pytest.mark.parametrize(
    ("words", "size", "message"),
    [
        ("--bench_parts network pipeline --bench_sizes 32x32 8x32", None, "8x32: part pipeline"),
        ("--bench_parts training", [32, 15], "32x15: part training"),
        ("--bench_parts network", [0, 32], "--size 0 32"),
    ],
)
def test_sizes_that_will_not_do_are_told_before_anything_is_measured(
    words: str, size: list[int] | None, message: str, tmp_path: Path
) -> None:
    args = parse(*words.split(), folder=tmp_path)
    args.size = size
    with pytest.raises(UserError, match=message):
        bench.check(args)
        bench.run(args, CPU)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "given", "message"),
    [
        ("--bench_sizes 64x64", {"size": [32, 64]}, "--bench_sizes and --size both"),
        ("--bench_variants xxs", {"checkpoint": "w.safetensors"}, "--bench_variants and --checkpoint both"),
        ("--bench_parts training --bench_clip 1", {"size": [32, 32], "batch_size": 1}, "32x32: part training .* batch"),
    ],
)
def test_options_that_do_not_go_together(words: str, given: dict, message: str, tmp_path: Path) -> None:
    args = parse(*words.split(), folder=tmp_path)
    vars(args).update(given)
    with pytest.raises(UserError, match=message):
        bench.check(args)
        bench.run(args, CPU)
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_to_is_told_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(propagation, "time_calls", lambda *_: pytest.fail("it measures"))
    with pytest.raises(OSError, match="/file"):  # told without a traceback by `utils.errors`
        bench.run(parse("--bench_json", str(tmp_path / "file" / "b.json"), folder=tmp_path), CPU)


def test_without_timm_part_encoders_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    bench.check(parse(folder=tmp_path))
    with pytest.raises(UserError, match="pip install timm"):
        bench.check(parse("--bench_parts", "network", "encoders", folder=tmp_path))


def test_without_pydensecrf_the_pipeline_with_it_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pydensecrf.densecrf", None)
    bench.check(parse("--bench_crf", "--bench_parts", "network", folder=tmp_path))
    with pytest.raises(UserError, match="pip install pydensecrf2"):
        bench.check(parse("--bench_crf", folder=tmp_path))


def test_sizes_are_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert parse("--bench_sizes", "384x640", folder=tmp_path).bench_sizes == [(384, 640)]
    for word in ("384", "axb", "0x4", "1x2x3"):
        with pytest.raises(SystemExit):
            parse("--bench_sizes", word, folder=tmp_path)
    assert "384x640" in capsys.readouterr().err


@pytest.mark.slow
def test_memory_does_not_grow_with_the_video() -> None:
    """Beyond `host_memory` features go to a file: ten times the frames take the same memory."""
    net = build_dbsnet("xxs", **SMALL)
    limit = 8 << 20
    size = (96, 160)
    predictor = Predictor(net, size=size, host_memory=limit, consensus=True, zoom=True)
    run_video(predictor, 60, size)  # libraries allocate once
    peaks = []
    for frames in (60, 600):
        with PeakMemory(CPU) as memory:
            run_video(predictor, frames, size)
        peaks.append(memory.host)
    kept = 600 * feature_bytes_per_frame(net, size)["most"]
    more = limit + (16 << 20)
    assert 0.9 * kept > 3 * more  # so the test would notice if those of the 540 frames more stayed in memory
    assert peaks[1] < peaks[0] + more
