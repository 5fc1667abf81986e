"""Whole-video inference.

The network is bidirectional over all frames, so a video is not cut into independent clips: all frames are encoded in
batches, the recurrences run over the whole video in pieces that carry their state (the forward chain from the first
piece on, the backward chain from the last; `models.video_propagation`), and refinement and decoding stream through it
in windows (`models.windows`). Between these passes the features of all frames are kept (`models.frame_store`), so peak
accelerator memory and host memory do not grow with the video beyond its limits.
"""

from __future__ import annotations

import math
import operator
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext
from numbers import Real
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from models.consensus import agree, can_agree, describe_looks
from models.cuda_graphs import CudaGraphs, Run, Work
from models.dbsnet import STREAMS, DBSNet, pad_to_multiple, upsample_logits
from models.fold import inference_copy
from models.frame_io import Images, checked_picture, hand_out, read_ahead
from models.frame_store import FrameStore, Storage
from models.optional_motion import NO_MOTION, join_both, weigh, weigh_batches
from models.precision import AMP, autocast
from models.smoothing import SmallFrames, smooth
from models.video_propagation import propagate_store
from models.windows import Window, batches_of_windows, refinement_windows, temporal_windows
from models.zoom import FIRST, View, extents, follow, magnify, put_back

Size = tuple[int, int]  # height, width


def directly(key: Hashable, work: Work, *inputs: Tensor, by_row: bool = False) -> tuple[Tensor, ...]:
    """What `CudaGraphs` does, without a graph."""
    return work(*inputs)


class Pass(NamedTuple):
    """One of the passes over a video: at one size, mirrored or not."""

    size: Size  # of the network's input
    flip: bool
    own: Size  # of the frames
    net: DBSNet
    run: Run
    count: int  # of all passes: they share the memory for features


class _Recorded(NamedTuple):
    """The copy of a network that graphs were recorded with, and what it was made for."""

    state: dict[str, Tensor]
    settings: Hashable
    net: DBSNet


class Predictor:
    """Segments videos of any length: ``for index, probability in Predictor(net)(frames, flows): ...``.

    Args:
        net: the network, in single precision; it is put in evaluation mode.
        device: where to run; the network's own device by default.
        size: (H, W) of the network's input; frames and flow images are resized to it, and stretched where they have
            another shape (`models.input_size` gives one that has theirs). None: the frame's own size.
        batch_size: frames encoded or decoded at once; by default 4 on a CPU, and 16 on a GPU, which fewer leave idle.
            Changes speed and memory, not the result.
        amp: ``None``, ``"bf16"`` or ``"fp16"``: autocast.
        clip_len: None propagates over the whole video; N runs the network on overlapping clips of N frames instead.
        flip: average with the result on the mirrored video.
        mirror_flow: what mirrors a flow image (H, W, 3) uint8, colours included; None mirrors the picture alone, as the
            field's codes do.
        scales: average over these multiples of `size`, each rounded to the network's multiple.
        channels_last: memory format of the encoders; it saves their convolutions, on CPUs and on GPUs, from reordering.
        fold: work on a copy of the network made for each video (`models.fold.inference_copy`), its batch norms folded.
        piece: frames that a recurrence processes before it reads on. Changes memory, not the result.
        store_dtype: precision of kept features; float16 ends at 65,504, and results are NaN where one is larger.
        device_memory, host_memory: bytes of features that all passes together (`flip`, `scales`) keep there before the
            next, slower place is used: accelerator, host memory, temporary file.
        cuda_graphs: on a GPU, record what is done for a batch and replay it for the next ones (`models.cuda_graphs`).
            Changes speed and memory, not the result. Recordings are kept from video to video while the weights and the
            sizes stay the same; one predictor's videos come one after the other then (RuntimeError in turns).
        zoom: segment a video twice, first at two thirds of `size`, then what a window around the object shows, at
            `size` (`models.zoom`); not of the paper. Not with `clip_len` (ValueError).
        consensus: let what looks alike in other frames vote on each frame's result (`models.consensus`); not of the
            paper. Not with `clip_len`, nor with a network that has no appearance stream (ValueError).
        optional_motion: the same frames at rest, with flow images without motion, have a third of the say
            (`models.optional_motion`): a frame is encoded once, propagated and decoded twice. Not of the paper, and not
            with a network of one stream (ValueError).
        smooth: let the frames before and after have a say, along the motion between them (`models.smoothing`). Not of
            the paper, and it needs OpenCV. Results come 8 frames late.
        readers: threads that ask for images at once. More than one need `frames` and `flows` that several threads may
            ask in any order, and keep up with a GPU where images are decoded from files. Changes speed, not the result.
        on_encoded: called with a number of frames whenever so many have been encoded: a whole video is, once for each
            pass (twice with `zoom`), before its first result comes. With `clip_len`, results come on the way, and it is
            not called.

    `frames` and `flows` are sequences (``len`` and indexing, lists or lazy) of (H, W, 3) uint8 RGB arrays; flow
    images may have another size than frames, but all frames have one size, and all flow images. Images are asked for
    from other threads, with one of `readers` one at a time, in order but for passes beside each other, and copied
    before the next. Yields (index, probability), float32 (H, W) in
    [0, 1] at the frame's own size, in order. Raises ValueError when the numbers of frames and flow images differ or a
    size does, TypeError for what is no sequence.
    """

    def __init__(self, net: DBSNet, *, device: str | torch.device | None = None, size: tuple[int, int] | None = None,
                 batch_size: int | None = None, amp: str | None = None, clip_len: int | None = None, flip: bool = False,
                 mirror_flow: Callable[[np.ndarray], np.ndarray] | None = None, scales: Sequence[float] = (1.0,),
                 channels_last: bool = True, fold: bool = True, piece: int = 16,
                 store_dtype: torch.dtype = torch.float16, device_memory: int = 4 << 30,
                 host_memory: int = 1 << 30, cuda_graphs: bool = False, zoom: bool = False, consensus: bool = False,
                 optional_motion: bool = False, smooth: bool = False, readers: int = 1,
                 on_encoded: Callable[[int], None] | None = None) -> None:  # fmt: skip
        if amp not in AMP:
            raise ValueError(f"amp must be one of none, bf16 and fp16, got {amp!r}")
        if clip_len is not None and operator.index(clip_len) < 1:
            raise ValueError(f"clip_len must be at least 1, got {clip_len}")
        if store_dtype not in (torch.float16, torch.bfloat16, torch.float32):
            raise ValueError(f"store_dtype must be torch.float16, bfloat16 or float32, got {store_dtype}")
        if not isinstance(getattr(net, "_orig_mod", net), DBSNet):  # what `torch.compile` wraps passes all on
            wrapped = "; give what it wraps: net.module" if hasattr(net, "module") else ""
            raise TypeError(f"net must be a DBSNet, got {type(net).__name__}{wrapped}")
        other = next((p.dtype for p in net.parameters() if p.dtype != torch.float32), None)
        if other is not None:
            raise ValueError(
                f"net must be in single precision, got parameters of {other}: give net.float(), and amp for speed"
            )
        if size is not None:
            size = _checked_size(size)
        self.device = torch.device(device) if device is not None else next(net.parameters()).device
        if batch_size is None:
            batch_size = 4 if self.device.type == "cpu" else 16
        if min(map(operator.index, (batch_size, piece, readers))) < 1:
            raise ValueError(
                f"batch_size, piece and readers must be at least 1, got {batch_size}, {piece} and {readers}"
            )
        if (
            not isinstance(scales, Sequence | np.ndarray)
            or not len(scales)
            or not all(isinstance(s, Real) and 0 < s < math.inf for s in scales)
        ):
            raise ValueError(f"scales must be one or several numbers above 0, got {scales!r}")
        if cuda_graphs and (self.device.type != "cuda" or not fold):
            raise ValueError(f"cuda_graphs needs a GPU and fold=True, got {self.device} and fold={fold}")
        if zoom and clip_len:
            raise ValueError(f"zoom needs whole videos, got clip_len={clip_len}")
        if consensus and (clip_len or not can_agree(net.streams)):
            raise ValueError(
                "consensus needs whole videos and the appearance stream, got "
                + (f"clip_len={clip_len}" if clip_len else f"a network of {net.streams}")
            )
        if optional_motion and set(net.streams) != set(STREAMS):
            raise ValueError(f"optional_motion needs a network of both streams, got one of {net.streams}")
        self.net = net.to(self.device).eval()
        self.size, self.batch_size, self.amp, self.clip_len = size, batch_size, AMP[amp], clip_len
        self.flip, self.mirror_flow, self.scales = flip, mirror_flow, tuple(scales)
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.fold, self.piece, self.store_dtype = fold, piece, store_dtype
        self.device_memory, self.host_memory = device_memory, host_memory
        self.cuda_graphs, self.zoom, self.consensus = cuda_graphs, zoom, consensus
        self.optional_motion, self.smooth = optional_motion, smooth
        self.readers, self.on_encoded = readers, on_encoded
        self._graphs = CudaGraphs(self.device)
        self._recorded: _Recorded | None = None
        self._busy = False

    def __call__(self, frames: Sequence[np.ndarray], flows: Sequence[np.ndarray]) -> Iterator[tuple[int, np.ndarray]]:
        for name, given in (("frames", frames), ("flows", flows)):
            if not hasattr(given, "__len__") or not hasattr(given, "__getitem__"):
                raise TypeError(
                    f"{name} must be a sequence (len and indexing), got {type(given).__name__}: make a list of what "
                    "can only be iterated over"
                )
        if len(frames) != len(flows):
            raise ValueError(
                f"every frame needs its flow image: got {len(frames)} frames and {len(flows)} flow images "
                "(the flow of the last frame is backward, to the frame before it)"
            )
        if not len(frames):
            return
        own = checked_picture(frames[0]).shape[:2]
        sizes = [
            (self._scaled(own, scale), flip)
            for scale in self.scales
            for flip in ([False, True] if self.flip else [False])
        ]
        with (
            self._alone(),
            ThreadPoolExecutor(self.readers) if self.readers > 1 else nullcontext() as pool,
            closing(SmallFrames(len(frames))) if self.smooth else nullcontext() as small,
        ):
            turns = threading.Lock()
            images = (
                Images(frames, "frame", turns, pool, small.show if small else None),
                Images(flows, "flow image", turns, pool),
            )
            net, run = self._prepared((own, *sizes))
            process = self._clips if self.clip_len else self._whole
            runs = [hand_out(process(Pass(size, flip, own, net, run, len(sizes)), *images)) for size, flip in sizes]
            try:
                joined = (sum(results) / len(results) if len(results) > 1 else results[0] for results in zip(*runs))
                if small:
                    joined = smooth(joined, small, 1 if self.device.type == "cpu" else 4)
                yield from enumerate(joined)
            finally:
                # Where one fails, the traceback would keep the others' memory and files for as long as it is kept.
                for each in runs:
                    each.close()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """No other video meanwhile where recordings are used: it would find those of this one, or clear them."""
        if not self.cuda_graphs:
            yield
            return
        if self._busy:
            raise RuntimeError(
                "with cuda_graphs a predictor's videos come one after the other: finish or close the one before, or "
                "use a predictor for each"
            )
        self._busy = True
        try:
            yield
        finally:
            self._busy = False

    def _prepared(self, sizes: Hashable) -> tuple[DBSNet, Run]:
        """The network to use for a video, and how to run its parts."""
        if not self.fold:
            return self.net.eval(), directly  # it may have been trained on since the last video
        # Folded for each video and not once, since the network may be trained on between two.
        if not self.cuda_graphs:
            return inference_copy(self.net, self.amp, self.memory_format), directly
        self._graphs.begin()
        state, kept = self.net.state_dict(), self._recorded
        settings = (sizes, self.amp, self.memory_format, self.zoom, self.consensus, self.optional_motion)
        if kept is None or kept.settings != settings or not _same(kept.state, state):
            self._recorded = None  # their memory first
            self._graphs.clear()
            copied = inference_copy(self.net, self.amp, self.memory_format)
            state = {name: value.clone() for name, value in state.items()}
            kept = self._recorded = _Recorded(state, settings, copied)
        return kept.net, self._graphs

    def _scaled(self, own: tuple[int, int], scale: float) -> tuple[int, int]:
        height, width = self.size or own
        return (height, width) if scale == 1.0 else self._multiple((height, width), scale)

    def _multiple(self, size: Size, scale: float) -> Size:
        m = self.net.multiple
        height, width = (max(m, round(side * scale / m) * m) for side in size)
        return height, width

    def _on_device(self, images: Tensor) -> Tensor:
        return images.to(self.device, non_blocking=True)

    def _input(self, images: Tensor, size: Size, views: Sequence[View] = ()) -> Tensor:
        """uint8 (n, 3, H, W), or what `views` show of each -> float [0, 1] at `size`, padded."""
        x = images.float().div_(255)
        if views:
            x = magnify(x, views, size).clamp_(0, 1)
        elif tuple(x.shape[-2:]) != tuple(size):
            x = F.interpolate(x, size=size, mode="bilinear", align_corners=False, antialias=True).clamp_(0, 1)
        return pad_to_multiple(x, self.net.multiple).contiguous(memory_format=self.memory_format)

    def _batches(
        self, frames: Images, flows: Images, starts: Sequence[tuple[int, int]], flip: bool
    ) -> Iterator[tuple[Tensor, Tensor]]:
        def flip_image(image: np.ndarray) -> np.ndarray:
            return image[:, ::-1]

        mirror = flip_image if flip else None
        mirror_flow = (self.mirror_flow or flip_image) if flip else None
        pinned = self.device.type == "cuda"
        return read_ahead(
            lambda span: (frames.load(*span, mirror, pinned), flows.load(*span, mirror_flow, pinned)),
            starts,
        )

    def _finish(self, logits: Tensor, way: Pass) -> Tensor:
        """Logits (n, 1, H/4, W/4) of the padded input -> probabilities (n, H, W) at the frames' own size."""
        return self._probabilities(self._enlarged(self._unpadded(logits, way), way), way)

    def _unpadded(self, logits: Tensor, way: Pass) -> Tensor:
        """Logits (n, 1, H/4, W/4) of the padded input -> (n, 1, h, w) of the input."""
        padded = (logits.shape[-2] * 4, logits.shape[-1] * 4)
        return upsample_logits(logits.float(), padded, way.size)

    def _enlarged(self, logits: Tensor, way: Pass) -> Tensor:
        """Logits of the input -> of the frames' own size, (n, 1, H, W)."""
        if tuple(way.size) == tuple(way.own):
            return logits
        return F.interpolate(logits, size=way.own, mode="bilinear", align_corners=False)

    def _probabilities(self, logits: Tensor, way: Pass) -> Tensor:
        """Logits (n, 1, H, W) -> probabilities (n, H, W), mirrored back."""
        x = logits.sigmoid()
        return (x.flip(-1) if way.flip else x)[:, 0]

    def _autocast(self) -> torch.autocast:
        return autocast(self.device, self.amp, keep_casts=not self.cuda_graphs)

    def _clips(self, way: Pass, frames: Images, flows: Images) -> Iterator[Tensor]:
        net, size, motionless = way.net, way.size, self._motionless_maps(way)
        windows = list(temporal_windows(len(frames), self.clip_len))
        for (start, _, keep, until), (x, y) in zip(
            windows, self._batches(frames, flows, [w[:2] for w in windows], way.flip)
        ):
            kept = slice(keep - start, until - start)

            def clip(x: Tensor, y: Tensor, *motionless: Tensor, kept: slice = kept) -> tuple[Tensor]:
                opinions = []
                joined = [
                    join_both(net, net.encoder_maps(self._input(frame, size), self._input(flow, size)), motionless)
                    for frame, flow in zip(x.split(self.batch_size), y.split(self.batch_size))
                ]
                for batches in zip(*joined):  # of the clip as it is, then of its frames at rest
                    levels = [torch.cat(maps) for maps in zip(*(levels for levels, _ in batches))]
                    skips = torch.cat([skip for _, skip in batches])[kept]
                    for index, level in enumerate(levels):
                        levels[index] = net.refine(index, net.propagation[index](level[None]))[0, kept]
                    parts = zip(*(x.split(self.batch_size) for x in (skips, *levels)))
                    opinions.append(torch.cat([net.decode(maps, skip) for skip, *maps in parts]))
                logits = weigh(*opinions) if self.optional_motion else opinions[0]
                return (self._finish(logits, way),)

            with torch.inference_mode(), self._autocast():
                key = ("clip", size, way.flip, kept.start, kept.stop)
                (results,) = way.run(key, clip, self._on_device(x), self._on_device(y), *motionless)
            yield results

    def _motionless_maps(self, way: Pass) -> list[Tensor]:
        """The motion encoder's maps of one flow image in which nothing moves, each (1, C, h, w); with
        `optional_motion`, else none.
        """
        if not self.optional_motion:
            return []
        with torch.inference_mode(), self._autocast():
            image = torch.full((1, 3, *way.size), NO_MOTION, dtype=torch.uint8, device=self.device)
            return way.net.encoders["motion"](self._input(image, way.size))

    def _whole(self, way: Pass, frames: Images, flows: Images) -> Iterator[Tensor]:
        length = len(frames)
        storage = Storage(
            length, self.device, self.store_dtype, self.device_memory // way.count, self.host_memory // way.count
        )
        try:
            if self.zoom:
                yield from self._zoomed(way, storage, frames, flows)
            else:
                yield from self._look(way, "", storage, frames, flows, finish=lambda logits: self._finish(logits, way))
        finally:
            storage.close()

    def _zoomed(self, way: Pass, storage: Storage, frames: Images, flows: Images) -> Iterator[Tensor]:
        """Two looks (`models.zoom`), in a mirrored pass at the mirrored video."""
        first = way._replace(size=self._multiple(way.size, FIRST))
        kept: FrameStore | None = None
        found: list[Tensor] = []
        done = 0
        for logits in self._look(first, "first", storage, frames, flows):
            with torch.inference_mode():
                if kept is None:
                    kept = storage.new(tuple(logits.shape[1:]))
                kept.write(done, logits)
                found.append(extents(self._unpadded(logits, first).sigmoid()[:, 0]))
            done += len(logits)
        views = follow(torch.cat(found).cpu().numpy().astype(np.float64))
        closer = self._look(
            way, "closer", storage, frames, flows, views, finish=lambda logits: self._unpadded(logits, way)
        )
        done = 0
        for logits in closer:
            with torch.inference_mode():
                stop = done + len(logits)
                whole = self._enlarged(self._unpadded(kept.read(done, stop, self.device), first), first)
                results = self._probabilities(put_back(whole, logits, views[done:stop]), way)
            yield results
            done = stop

    def _look(
        self,
        way: Pass,
        name: str,
        storage: Storage,
        frames: Images,
        flows: Images,
        views: Sequence[View] = (),
        finish: Callable[[Tensor], Tensor] | None = None,
    ) -> Iterator[Tensor]:
        """A video's logits (n, 1, H/4, W/4) of the padded input, in batches, or what `finish` makes of them.

        Args:
            name: of what is recorded here: the same for the same `finish` and for views or none.
            views: one for each frame: what the network sees of it, the whole frame by default.
        """
        net, size, length, motionless = way.net, way.size, len(frames), self._motionless_maps(way)

        def encode(x: Tensor, y: Tensor, *motionless: Tensor) -> tuple[Tensor, ...]:
            if not views:  # with them, each batch has others
                x, y = self._input(x, size), self._input(y, size)
            maps = net.encoder_maps(x, y)
            made = [each for levels, skip in join_both(net, maps, motionless) for each in (*levels, skip)]
            return *made, *([describe_looks(maps["appearance"][1])] if self.consensus else [])

        features: list[FrameStore] = []
        spans = [(start, min(start + self.batch_size, length)) for start in range(0, length, self.batch_size)]
        for (start, stop), images in zip(spans, self._batches(frames, flows, spans, way.flip)):
            with torch.inference_mode(), self._autocast():
                x, y = (self._on_device(each) for each in images)
                if views:
                    x, y = (self._input(each, size, views[start:stop]) for each in (x, y))
                maps = way.run(("encode", name, size), encode, x, y, *motionless, by_row=True)
                for index, value in enumerate(maps):
                    if start == 0:
                        features.append(storage.new(tuple(value.shape[1:])))
                    features[index].write(start, value)
            if self.on_encoded is not None:
                self.on_encoded(stop - start)
        made = list(features)
        looks = features.pop() if self.consensus else None
        count = len(net.levels) + 1  # laterals and skip: of the video, and then of the same frames at rest
        videos = [features[start : start + count] for start in range(0, len(features), count)]
        for video in videos:
            for index, block in enumerate(net.propagation):
                with torch.inference_mode(), self._autocast():
                    propagate_store(block, video[index], storage, self.piece, self.device, way.run, index)

        if looks is None and not self.optional_motion:
            yield from self._decoded(way, name, features, length, finish)
        else:
            plain = [self._decoded(way, name, video, length) for video in videos]
            batches = weigh_batches(*plain) if self.optional_motion else plain[0]
            if looks is not None:
                batches = agree(batches, looks, length, self.batch_size, self.device, way.run)
            for batch in batches:
                if finish is not None:
                    with torch.inference_mode():
                        key = ("finish", name, size, way.flip)
                        (batch,) = way.run(key, lambda x: (finish(x),), batch, by_row=True)
                yield batch
        for store in made:
            storage.free(store)

    def _decoded(
        self,
        way: Pass,
        name: str,
        features: Sequence[FrameStore],
        length: int,
        finish: Callable[[Tensor], Tensor] | None = None,
    ) -> Iterator[Tensor]:
        """Propagated features, refined in windows and decoded in batches: as `_look`."""

        def decode(skip: Tensor, *levels: Tensor) -> tuple[Tensor]:
            logits = way.net.decode(list(levels), skip)
            return (logits if finish is None else finish(logits),)

        for windows in batches_of_windows(refinement_windows(length, way.net.window), self.batch_size):
            first, last = windows[0][2], windows[-1][3]  # what they keep is without gaps
            with torch.inference_mode(), self._autocast():
                levels = [features[0].read(first, last, self.device)]
                for index in range(1, len(features) - 1):
                    levels.append(self._refine(way, index, features[index], windows))
                skip = features[-1].read(first, last, self.device)
            for start in range(0, last - first, self.batch_size):
                part = slice(start, start + self.batch_size)
                with torch.inference_mode(), self._autocast():
                    key = ("decode", name, way.size, way.flip)
                    (results,) = way.run(key, decode, skip[part], *(level[part] for level in levels), by_row=True)
                yield results

    def _refine(self, way: Pass, level: int, features: FrameStore, windows: Sequence[Window]) -> Tensor:
        """What windows of one length keep of a level's refined maps, joined: (n, S*d, h, w)."""
        x = torch.stack([features.read(start, stop, self.device) for start, stop, _, _ in windows])
        # (windows, T, S*d, h, w)
        (x,) = way.run(("refine", level), lambda maps: (way.net.refine(level, maps),), x, by_row=True)
        return torch.cat([y[keep - start : until - start] for y, (start, _, keep, until) in zip(x, windows)])


def _checked_size(size: Sequence[int]) -> Size:
    try:
        height, width = (operator.index(side) for side in size)
    except (TypeError, ValueError):
        raise ValueError(f"size must be two whole numbers, height and width, got {size!r}") from None
    if height < 1 or width < 1:
        raise ValueError(f"size must be a height and a width above 0, got {size!r}")
    return height, width


def _same(kept: dict[str, Tensor], state: dict[str, Tensor]) -> bool:
    return kept.keys() == state.keys() and all(torch.equal(value, state[name]) for name, value in kept.items())
