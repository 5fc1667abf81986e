"""CUDA graphs: what a GPU is asked to do for one batch, recorded once and then launched as a whole.

A batch of a small network is some hundred kernels that the GPU finishes sooner than Python and PyTorch can launch them.
A graph of them costs one launch. It works on the memory it was recorded with: inputs are copied into it, and results
are where they were at the recording.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

Work = Callable[..., tuple[Tensor, ...]]  # of tensors on one device


class CudaGraphs:
    """Functions of tensors, each recorded for each shape that comes more than once.

    ``graphs(key, work, *inputs)`` is ``work(*inputs)``. The first call with a key and these shapes runs `work` as it
    is, in which libraries choose their algorithms and caches are filled; the second records it; from then on it is
    replayed. So what comes once costs nothing.

    The same key must mean the same work: what `work` reads beside its inputs (weights, numbers) is what it read when it
    was recorded, and the tensors among it must stay where they are. Use a result before the next call with its key and
    shapes, which overwrites it. Not for `work` that waits for the device, or that makes random numbers.

    Args:
        device: the GPU that all inputs are on.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._recorded: dict[Hashable, Recording | None] = {}  # None: seen once
        self._pool: tuple[int, int] | None = None  # of the memory that all recordings work in
        self._stream: torch.cuda.Stream | None = None

    def __call__(self, key: Hashable, work: Work, *inputs: Tensor) -> tuple[Tensor, ...]:
        signature = (key, *((tuple(x.shape), x.dtype) for x in inputs))
        if signature not in self._recorded:
            self._recorded[signature] = None
            return work(*inputs)
        recording = self._recorded[signature]
        if recording is None:
            recording = self._recorded[signature] = self._record(work, inputs)
        return recording(*inputs)

    def _record(self, work: Work, inputs: tuple[Tensor, ...]) -> Recording:
        if self._pool is None:
            # One pool for all: results are kept for as long as their recording, so that no other gets their memory,
            # and what lies between inputs and results is of no use to anyone once a replay is done.
            self._pool = torch.cuda.graph_pool_handle()
            self._stream = torch.cuda.Stream(self.device)
        return Recording(work, inputs, self._pool, self._stream)


class Recording:
    """One graph, with the inputs and results it works on."""

    def __init__(
        self, work: Work, inputs: tuple[Tensor, ...], pool: tuple[int, int], stream: torch.cuda.Stream
    ) -> None:
        self.inputs = [x.clone() for x in inputs]
        self.graph = torch.cuda.CUDAGraph()
        # thread_local: other threads go on, and what they ask of CUDA (pinned memory for the next frames) must not end
        # the recording.
        with torch.cuda.graph(self.graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            self.results = work(*self.inputs)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        for kept, given in zip(self.inputs, inputs):
            kept.copy_(given)
        self.graph.replay()
        return self.results
