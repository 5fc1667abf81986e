"""What is drawn on the host and wanted on the training device."""

from __future__ import annotations

import numpy as np
import torch


def send(array: np.ndarray, device: torch.device | str) -> torch.Tensor:
    """The array as a tensor on a device, without waiting for what a GPU is still at: a clip that it makes needs dozens
    of such arrays. It is safe, since CUDA has read memory that is not page-locked when the call returns.
    """
    return torch.from_numpy(array).to(device, non_blocking=True)
