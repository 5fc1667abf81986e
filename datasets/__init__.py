"""Data: finding and reading videos, still images and synthetic clips, and making training clips of them."""

from datasets.errors import DataError
from datasets.images import load_flow_image, load_frame, load_mask
from datasets.sequences import DATASETS, VideoSequence, read_dataset

__all__ = [
    "DATASETS",
    "DataError",
    "VideoSequence",
    "load_flow_image",
    "load_frame",
    "load_mask",
    "read_dataset",
]
