"""A dense bi-ConvLSTM over the kept features of a whole video: what `models.convlstm` does with a clip, in pieces."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import partial

import torch
from torch import Tensor

from models.convlstm import BiConvLSTM, DenseBiConvLSTM
from models.cuda_graphs import Run
from models.frame_store import FrameStore, Storage


def propagate_store(
    block: DenseBiConvLSTM,
    features: FrameStore,
    storage: Storage,
    piece: int,
    device: torch.device,
    run: Run,
    key: Hashable,
) -> None:
    """Run a dense bi-ConvLSTM over all frames of a store and put its output in their place.

    Layer by layer; step k feeds the forward chain frames k*piece … and the backward chain their mirror image from the
    end of the video, in one grouped recurrence, so both chains carry their state over the whole video. `run` is given
    each step, `key` says which block this is.
    """
    if not block.layers:
        return
    length, s = storage.length, block.streams
    height, width = features.shape[-2:]
    # per layer: forward and backward states, each (S*h, H, W) per frame
    hidden: list[tuple[FrameStore, FrameStore]] = []

    def dense(start: int, stop: int) -> list[Tensor]:  # [F, H_1 …], H_l as two; each (1, n, S, C_i, H, W)
        stores = [features, *(store for pair in hidden for store in pair)]
        return [store.read(start, stop, device).unflatten(1, (s, -1))[None] for store in stores]

    for number, layer in enumerate(block.layers):
        count = 1 + 2 * number  # of the maps that it reads, for each direction

        def step(*maps: Tensor, layer: BiConvLSTM = layer, count: int = count) -> tuple[Tensor, ...]:
            first, second, state = layer.chains(maps[:count], maps[count : 2 * count], maps[2 * count :] or None)
            return first, second, *state

        shape = (s * layer.hidden, height, width)
        pair = (storage.new(shape), storage.new(shape))
        state: Sequence[Tensor] = ()
        for start in range(0, length, piece):
            stop = min(start + piece, length)
            maps = (*dense(start, stop), *dense(length - stop, length - start))
            # The last piece is shorter and no `by_row`: with several passes it would come often enough to be recorded,
            # and memory would grow with every other length of a video.
            work = partial(run, ("propagate", key, number), step) if stop - start == piece else step
            first, second, *state = work(*maps, *state)
            pair[0].write(start, first[0].flatten(1, 2))  # (n, S, h, H, W) -> (n, S*h, H, W)
            pair[1].write(length - stop, second[0].flatten(1, 2))
        hidden.append(pair)
    for start in range(0, length, piece):
        stop = min(start + piece, length)
        features.write(start, block.merge(dense(start, stop))[0])
    for pair in hidden:
        for store in pair:
            storage.free(store)
