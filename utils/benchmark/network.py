"""The network: clips, whole videos, against two bare encoders, by operator, and videos of any length."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from models import Predictor, build_dbsnet
from models.complexity import count_parameters, macs_per_frame
from models.consensus import can_agree
from models.cuda_graphs import CudaGraphs
from models.dbsnet import DBSNet
from models.fold import inference_copy
from models.frame_store import FrameStore
from models.precision import AMP, autocast
from utils.benchmark.timing import PeakMemory, release, synchronise, time_calls


class LazyPictures(Sequence[np.ndarray]):
    """A video of any length made as it is read: one picture of noise and shapes, rolled a little further each frame."""

    def __init__(self, length: int, size: tuple[int, int], seed: int = 0) -> None:
        coarse = np.random.default_rng(seed).integers(0, 256, (size[0] // 16 + 1, size[1] // 16 + 1, 3), np.uint8)
        self.base = np.ascontiguousarray(coarse.repeat(16, 0).repeat(16, 1)[: size[0], : size[1]])
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> np.ndarray:  # type: ignore[override]
        if not 0 <= index < self.length:
            raise IndexError(f"frame {index} of a video of {self.length} frames")
        return np.roll(self.base, index, 1)


def clip_calls(
    net: DBSNet, frames: torch.Tensor, flows: torch.Tensor, *, amp: str, cuda_graphs: bool
) -> dict[str, Callable[[], None]]:
    """One clip through the network: as it is built, as `Predictor` runs it (folded, channels-last), and recorded as a
    CUDA graph.
    """
    device = frames.device
    net = net.to(device).eval()
    folded = inference_copy(net, AMP[amp])
    first, second = (x[0].contiguous(memory_format=torch.channels_last)[None] for x in (frames, flows))
    graphs = CudaGraphs(device)

    def whole(work: Callable[[], object], keep_casts: bool = True) -> Callable[[], None]:
        def call() -> None:
            with torch.inference_mode(), autocast(device, AMP[amp], keep_casts):
                work()

        return call

    calls = {
        "plain": whole(lambda: net(frames, flows)),
        "folded, channels-last": whole(lambda: folded(first, second)),
    }
    if cuda_graphs:
        replay = whole(lambda: graphs("clip", lambda x, y: (folded(x, y),), first, second), keep_casts=False)
        for _ in range(2):  # the third call records, which is the warm-up of what is timed
            replay()
        calls["CUDA graph"] = replay
    return calls


def bench_clip(
    net: DBSNet,
    device: torch.device,
    size: tuple[int, int],
    *,
    length: int,
    amp: str,
    repeats: int,
    cuda_graphs: bool = False,
) -> dict[str, Any]:
    """One clip through the network alone, in the ways of `clip_calls`."""
    frames, flows = torch.rand(2, 1, length, 3, *size, device=device)
    with PeakMemory(device) as memory:
        times = time_calls(clip_calls(net, frames, flows, amp=amp, cuda_graphs=cuda_graphs), device, repeats)
    macs, _ = macs_per_frame(size, length, **net.config)
    return {
        "frames_of_a_clip": length,
        "GMAC_per_frame": macs / 1e9,
        **{name: timing.describe(length) for name, timing in times.items()},
        "memory": memory.describe(),
    }


def bench_against_encoders(
    net: DBSNet,
    device: torch.device,
    size: tuple[int, int],
    *,
    length: int,
    amp: str,
    repeats: int,
    cuda_graphs: bool = False,
) -> dict[str, Any]:
    """The whole network against timm's encoders of its kind alone, one for each stream, eager, in one run."""
    import timm

    names = [
        f"mobilevit_{net.config['variant']}" if name == "mobilevit" else name for name in net.encoder_names.values()
    ]
    encoders = [timm.create_model(name, features_only=True, pretrained=False).to(device).eval() for name in names]
    frames = torch.rand(1, length, 3, *size, device=device)

    def both() -> None:
        with torch.inference_mode(), autocast(device, AMP[amp]):
            for encoder in encoders:
                encoder(frames[0])

    calls = clip_calls(net, frames, frames, amp=amp, cuda_graphs=cuda_graphs)
    times = time_calls({"encoders": both, **calls}, device, repeats)
    measure = "processor" if device.type == "cpu" else "median"
    base = getattr(times["encoders"], measure)
    return {
        "timm": timm.__version__,
        "timm_encoders": names,
        "frames": length,
        **{name: timing.describe(length) for name, timing in times.items()},
        "ratios": {name: getattr(times[name], measure) / base for name in calls},
    }


def profile_clip(
    net: DBSNet, device: torch.device, size: tuple[int, int], *, length: int, amp: str, rows: int = 15
) -> list[dict[str, Any]]:
    """Operators by their own time in one clip, folded and channels-last; the largest first."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    folded = inference_copy(net.to(device), AMP[amp])
    frames = torch.rand(length, 3, *size, device=device).contiguous(memory_format=torch.channels_last)[None]
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with torch.inference_mode(), autocast(device, AMP[amp]):
        folded(frames, frames)  # warm-up
        synchronise(device)
        with profile(activities=activities) as recorded:
            folded(frames, frames)
            synchronise(device)
    name = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    # Of a GPU the profiler tells each time twice: of the operator and of the kernels that it launched.
    operators = (event for event in recorded.key_averages() if event.device_type == DeviceType.CPU)
    events = sorted(operators, key=lambda event: getattr(event, name), reverse=True)
    total = sum(getattr(event, name) for event in events)
    return [
        {"operator": event.key, "calls": event.count, "share": getattr(event, name) / max(total, 1e-9),
         "milliseconds_per_frame": getattr(event, name) / 1e3 / length}
        for event in events[:rows]
    ]  # fmt: skip


def feature_bytes_per_frame(net: DBSNet, size: tuple[int, int], consensus: bool = False) -> dict[str, int]:
    """Bytes that `Predictor` keeps of each frame of a video, in half precision: of features, and at most (during the
    finest recurrence).

    Beyond its limits of memory (`device_memory`, `host_memory`) they are in a temporary file.
    """
    height, width = (-(-side // net.multiple) * net.multiple for side in size)
    streams, config = len(net.streams), net.config
    levels = [streams * config["width"] * (height // stride) * (width // stride) for stride in net.levels]
    skip = config["width"] * (height // 4) * (width // 4)
    finest = net.levels[0]
    hidden = len(config["dilations"]) * 2 * streams * config["hidden"] * (height // finest) * (width // finest)
    looks = net.encoders["appearance"].channels[1] * (height // 16) * (width // 16) if consensus else 0
    features = 2 * (sum(levels) + skip + looks)
    return {"features": features, "most": features + 2 * hidden}


def run_video(predictor: Predictor, length: int, size: tuple[int, int]) -> float:
    """Seconds to segment a lazily made video, every probability map looked at once."""
    frames, flows = LazyPictures(length, size, 0), LazyPictures(length, size, 1)
    synchronise(predictor.device)
    began = time.perf_counter()
    count = 0
    for _, probability in predictor(frames, flows):
        count += probability.shape[0] > 0
    synchronise(predictor.device)
    if count != length:
        raise RuntimeError(f"{count} of {length} frames came out")
    return time.perf_counter() - began


def warm_up_frames(predictor: Predictor, length: int) -> int:
    """Frames of a video after which the next ones find all prepared: libraries have memory, and on a GPU convolutions
    are planned and graphs recorded, at a recurrence's fourth piece of frames the last.
    """
    return min(length, 16 if predictor.device.type == "cpu" else 5 * max(predictor.batch_size, predictor.piece))


def bench_video(
    net: DBSNet,
    device: torch.device,
    size: tuple[int, int],
    *,
    length: int,
    amp: str,
    batch_size: int | None,
    repeats: int,
    cuda_graphs: bool = False,
) -> dict[str, Any]:
    """Whole videos through `Predictor`: uint8 pictures in host memory in, probability maps in host memory out.

    The network alone, and what `tool.py --tools test` adds to it: consensus where frames can vote, that with zoom, and
    that with smoothing.
    """
    votes = can_agree(net.streams)

    def measure(**options: bool) -> dict[str, Any]:
        release(device)
        predictor = Predictor(net, device=device, size=size, amp=amp, batch_size=batch_size, **options)
        with PeakMemory(device) as memory:
            times = time_calls({"video": lambda: run_video(predictor, length, size)}, device, repeats)
        return {
            "batch_size": predictor.batch_size, **times["video"].describe(length), "memory": memory.describe(),
        }  # fmt: skip

    others = {"CUDA graphs": measure(cuda_graphs=True)} if cuda_graphs else {}
    if votes:
        others["consensus"] = measure(cuda_graphs=cuda_graphs, consensus=True)
    others["zoom"] = measure(cuda_graphs=cuda_graphs, consensus=votes, zoom=True)
    others["smoothing"] = measure(cuda_graphs=cuda_graphs, consensus=votes, zoom=True, smooth=True)
    return {"frames": length, **measure(), **others}


def bench_long(
    net: DBSNet, device: torch.device, size: tuple[int, int], *, length: int, amp: str, batch_size: int | None,
    **options: Any,
) -> dict[str, Any]:  # fmt: skip
    """A long video against one of a tenth of its length: time per frame, memory, and size of the temporary file.

    Args:
        options: of `Predictor`, as `host_memory`.
    """
    consensus = can_agree(net.streams)
    predictor = Predictor(  # as `tool.py --tools test` does by default
        net, device=device, size=size, amp=amp, batch_size=batch_size, consensus=consensus, smooth=True, **options
    )
    run_video(predictor, warm_up_frames(predictor, length), size)
    spilled = _watch_spill()
    parts = []
    try:
        for frames in dict.fromkeys((max(1, length // 10), length)):
            spilled.most = 0
            with PeakMemory(device) as memory:
                worked = time.process_time()
                seconds = run_video(predictor, frames, size)
                worked = time.process_time() - worked
            parts.append(
                {
                    "frames": frames, "milliseconds_per_frame": 1e3 * seconds / frames,
                    "processor_milliseconds_per_frame": 1e3 * worked / frames,
                    **memory.describe(), "temporary_file_MiB": spilled.most / 2**20,
                }
            )  # fmt: skip
    finally:
        spilled.stop()
    key = "processor_milliseconds_per_frame" if device.type == "cpu" else "milliseconds_per_frame"
    return {
        "runs": parts,
        "ratio_of_time_per_frame": parts[-1][key] / parts[0][key],
        "kept_per_frame_MiB": {
            k: v / 2**20 for k, v in feature_bytes_per_frame(net, size, consensus=consensus).items()
        },
    }


class _watch_spill:
    """Counts the bytes of the temporary files that `FrameStore` has open."""

    def __init__(self) -> None:
        self.now = self.most = 0
        self.before = FrameStore.__init__, FrameStore.close
        watch = self

        def start(store: FrameStore, length: int, shape: Any, dtype: Any, device: Any) -> None:
            watch.before[0](store, length, shape, dtype, device)
            if store.file is not None:
                store.watched = length * store.stride
                watch.now += store.watched
                watch.most = max(watch.most, watch.now)

        def close(store: FrameStore) -> None:
            watch.now -= getattr(store, "watched", 0)
            store.watched = 0
            watch.before[1](store)

        FrameStore.__init__, FrameStore.close = start, close

    def stop(self) -> None:
        FrameStore.__init__, FrameStore.close = self.before


def make_net(variant: str) -> DBSNet:
    """A network with random weights: speed does not depend on their values."""
    torch.manual_seed(0)
    return build_dbsnet(variant=variant).eval()


def describe_net(net: DBSNet) -> dict[str, Any]:
    return {
        "variant": net.config["variant"],
        "flavour": net.config["flavour"],
        "encoders": net.encoder_names,
        "parameters": count_parameters(net),
    }
