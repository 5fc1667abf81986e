"""DBSNet's network and its inference."""

from models.dbsnet import DBSNet, build_dbsnet
from models.errors import CheckpointError
from models.input_size import input_size
from models.mobilevit import MobileViT
from models.predictor import Predictor
from models.pretrained import build_backbone, load_pretrained
from models.weights import load_dbsnet, save_weights

__all__ = [
    "CheckpointError",
    "DBSNet",
    "MobileViT",
    "Predictor",
    "build_backbone",
    "build_dbsnet",
    "input_size",
    "load_dbsnet",
    "load_pretrained",
    "save_weights",
]
