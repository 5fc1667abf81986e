"""CUDA graphs: what a GPU is asked to do for one batch, recorded once and then launched as a whole.

A batch of a small network is hundreds to thousands of kernels that the GPU finishes sooner than Python can launch them.
A graph of them costs one launch. It works on the memory it was recorded with: inputs are copied into it, and results
are where they were at the recording.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

Work = Callable[..., tuple[Tensor, ...]]  # of tensors on one device
Run = Callable[..., tuple[Tensor, ...]]  # run(key, work, *inputs, by_row=…): a `CudaGraphs`, or what does without


class CudaGraphs:
    """Functions of tensors, each recorded for the shapes that come often.

    ``graphs(key, work, *inputs)`` is ``work(*inputs)``. The first two calls with a key and these shapes, counted from
    `begin`, run `work` as it is; the third records it, which costs as much as several calls, and from then on it is
    replayed. So nothing is recorded for the shorter batch at the end of a video; where it is work ``by_row``, what was
    recorded for whole batches is replayed for it, and what comes out for the missing rows is left out. That takes less
    time than launching all of it, and no memory beside that of the recordings.

    `by_row` says that row i of each result depends on row i of the inputs alone, or on inputs that have the same number
    of rows in each call.

    The same key must mean the same work: what `work` reads beside its inputs (weights, numbers) is what it read when it
    was recorded, and the tensors among it must stay where they are. **Use a result before any other call**: recordings
    work in one memory, and a result is safe from the work of others only as long as nothing else is replayed. Not for
    `work` that waits for the device or makes random numbers, and not from several threads at once.

    Args:
        device: the GPU that all inputs are on.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._seen: Counter = Counter()
        self._recorded: dict[Hashable, Recording] = {}
        self._largest: dict[Hashable, Recording] = {}  # of those whose inputs differ in their numbers of rows alone
        self._pool: tuple[int, int] | None = None  # of the memory that all recordings work in
        # One for good: what cuBLAS works in is kept for each stream, and a new stream each time would keep more of it.
        self._stream: torch.cuda.Stream | None = None

    def begin(self) -> None:
        """Another video: count from nought what has not been recorded."""
        self._seen.clear()

    def clear(self) -> None:
        """Forget all recordings, and free their memory. All at once, since they share it."""
        self._seen.clear()
        self._recorded.clear()
        self._largest.clear()
        self._pool = None

    def __call__(self, key: Hashable, work: Work, *inputs: Tensor, by_row: bool = False) -> tuple[Tensor, ...]:
        signature = (key, *((tuple(x.shape), x.dtype) for x in inputs))
        family = (key, *((tuple(x.shape[1:]), x.dtype) for x in inputs)) if by_row else None
        recording, larger = self._recorded.get(signature), self._largest.get(family)
        if recording is None and larger is not None and len(inputs[0]) < larger.rows:
            return tuple(result[: len(inputs[0])] for result in larger(*inputs))
        if recording is None:
            self._seen[signature] += 1
            if self._seen[signature] < 3:
                return work(*inputs)
            recording = self._recorded[signature] = self._record(work, inputs)
            if by_row:  # none is larger, or that would have been replayed
                self._largest[family] = recording
        return recording(*inputs)

    def _record(self, work: Work, inputs: tuple[Tensor, ...]) -> Recording:
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        try:
            return Recording(work, inputs, self._pool, self._stream)
        except BaseException as error:
            self.clear()  # a recording cut short leaves the memory of all in no known state
            if isinstance(error, RuntimeError) and not isinstance(error, torch.cuda.OutOfMemoryError):
                raise RuntimeError(
                    "the work of a batch could not be recorded as a CUDA graph; cuda_graphs=False (--no-cuda_graphs) "
                    f"does without, and is slower: {error}"
                ) from error
            raise


class Recording:
    """One graph, with the inputs and results it works on. Inputs may have fewer rows than those it was made with: the
    rest stays what it was.
    """

    def __init__(
        self, work: Work, inputs: tuple[Tensor, ...], pool: tuple[int, int], stream: torch.cuda.Stream
    ) -> None:
        self.inputs = [x.clone() for x in inputs]
        work(*self.inputs)  # libraries prepare themselves for each thread, which they must not do while recording
        self.graph = torch.cuda.CUDAGraph()
        before = torch.cuda.current_stream(stream.device)
        try:
            # thread_local: other threads go on, and what they ask of CUDA (pinned memory for the next frames) must not
            # end the recording.
            with torch.cuda.graph(self.graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                self.results = work(*self.inputs)
        except BaseException:
            torch.cuda.set_stream(before)  # where the recording fails at its end, PyTorch does not go back by itself
            raise

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        for kept, given in zip(self.inputs, inputs):
            kept[: len(given)].copy_(given)
        self.graph.replay()
        return self.results

    @property
    def rows(self) -> int:
        """Of its first input."""
        return len(self.inputs[0])
