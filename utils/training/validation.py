"""Validation while training: J of whole videos that are held out."""

from __future__ import annotations

from collections import Counter

import numpy as np

from datasets.images import LazyImages, load_flow_image, load_frame, load_mask, require_size
from models import Predictor, input_size
from utils.distributed import broadcast_buffers
from utils.evaluation.metrics import jaccard
from utils.training.run import Run


def validate(run: Run) -> dict[str, float] | None:
    """Mean J of each sequence by the DAVIS rule (first and last frame dropped, > 127 of uint8); None if stopped.

    The processes share the sequences.
    """
    config, processes = run.config, run.processes
    net = run.tested_net.eval()
    broadcast_buffers(net, processes)  # or batch norms without sync would be each process's own, and rank 0's are saved
    predictor = Predictor(net, device=processes.device, amp=config.amp)
    mine: dict[str, float] | None = {}
    # Two data sets may each have a sequence of one name, DAVIS-2016 and DAVIS-2017 for instance.
    shared = Counter(sequence.name for sequence in run.validation)
    names = {
        id(sequence): f"{sequence.dataset}/{sequence.name}" if shared[sequence.name] > 1 else sequence.name
        for sequence in run.validation
    }
    for sequence in run.validation[processes.rank :: processes.world_size]:
        stems = sequence.stems[: config.val_frames or None]
        frames = LazyImages(sequence.frames[: len(stems)], load_frame)
        flows = LazyImages([sequence.flow_path(stem) for stem in stems], load_flow_image)
        # As a test does: a size that is given is used as it is.
        predictor.size = config.val_size or input_size(frames[0].shape[:2], config.size, net.multiple)
        scores = []
        for index, probability in predictor(frames, flows):
            if run.stop.wanted:
                mine = None
                break
            if 0 < index < len(stems) - 1 and stems[index] in sequence.masks:
                path = sequence.masks[stems[index]]
                truth = load_mask(path, sequence.mask_rule)
                require_size(path, truth.shape, probability.shape, sequence.frames[index])
                scores.append(jaccard(np.rint(probability * 255) > 127, truth > 0))
        if mine is None:
            break
        mine[names[id(sequence)]] = float(np.mean(scores))
    shares = processes.gather(mine)
    if any(share is None for share in shares):
        return None
    # By name, so that the mean is summed in one order, however many processes there are.
    return dict(sorted(item for share in shares for item in share.items()))
