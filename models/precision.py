"""Mixed precision, as ``--amp`` and ``amp`` name it."""

from __future__ import annotations

import torch

AMP = {None: None, "none": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, dtype: torch.dtype | None, keep_casts: bool = True) -> torch.autocast:
    """Autocast to one of `AMP`; None: full precision.

    keep_casts: weights that were cast are kept until the block ends, which a CUDA graph must not read.
    """
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None, cache_enabled=keep_casts)
