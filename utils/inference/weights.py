"""The network to segment with: which checkpoint a command means, and what the file says about itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.errors import ONLY_IN_CHECKOUT, UserError
from utils.files import short_sha256

if TYPE_CHECKING:
    from models.dbsnet import DBSNet

PUBLISHED_WEIGHTS = Path(__file__).resolve().parents[2] / "weights" / "dbsnet_lite2.safetensors"
"""The weights that come with the project, used where no ``--checkpoint`` is given."""

# Those of `models.growth.take_out`, named here too: the command line is read in processes that do without torch.
PARTS = ("propagation", "refinement", "co_dga")


@dataclass(frozen=True)
class Weights:
    """A network and where it came from.

    Attributes:
        net: in evaluation mode, on the CPU.
        path: of the checkpoint.
        sha256: of the file, the first 16 digits.
        notes: what the file says about itself (metadata of a .safetensors, step and options of a training checkpoint).
        size: (H, W) that the file says its network is for, or None.
        zoom: whether the file says that its network gains by a closer look (note ``zoom``: yes).
    """

    net: DBSNet
    path: Path
    sha256: str
    notes: dict[str, str] = field(default_factory=dict)
    size: tuple[int, int] | None = None

    @property
    def zoom(self) -> bool:
        return self.notes.get("zoom") == "yes"


def find_checkpoint(given: str | Path | None) -> Path:
    """The checkpoint that a command means: the one given, or the published weights.

    Raises:
        UserError: none given, and no published weights in this checkout.
    """
    if given is not None:
        return Path(given)
    if PUBLISHED_WEIGHTS.is_file():
        return PUBLISHED_WEIGHTS
    raise UserError(
        f"no weights: there is no {PUBLISHED_WEIGHTS}, {ONLY_IN_CHECKOUT}. Give --checkpoint "
        "FILE (last.pt, best.pt or weights.safetensors of a training run), or train first: python main.py …; "
        "python tool.py --tools demo needs no weights"
    )


def check_file(option: str, path: str | Path) -> None:
    """Raises UserError where the checkpoint that an option names is not there."""
    if not Path(path).is_file():
        raise UserError(f"--{option} {path}: no such file; give a .safetensors, .pt, .pth or .pth.tar file")


def check_size(size: Sequence[int] | None) -> None:
    """Raises UserError for a ``--size`` (H, W) that no network's input has; None is the checkpoint's own."""
    if size is not None and min(size) < 1:
        raise UserError(f"--size {size[0]} {size[1]}: expected a height and a width above 0")


def check_zoom(where: str, notes: Mapping[str, str]) -> None:
    """Raises UserError for a note ``zoom`` that is neither yes nor no."""
    if notes.get("zoom", "yes") not in ("yes", "no"):
        raise UserError(f"{where} zoom={notes['zoom']}; expected yes or no")


def load_weights(given: str | Path | None) -> Weights:
    """The network of a checkpoint (`find_checkpoint`) with its notes.

    Raises:
        UserError: no checkpoint given and none published. CheckpointError: unreadable, or of another network.
    """
    from models.state_dicts import read_checkpoint
    from models.weights import network_of

    path = find_checkpoint(given)
    # Before it is read, since training may replace it meanwhile: maps of the old would pass for those of the new.
    sha256 = short_sha256(path) if path.is_file() else ""
    content = read_checkpoint(path)
    net = network_of(content, path)
    notes, size = _notes_of(content, path)
    return Weights(net, path, sha256, notes, size)


def _notes_of(content: Mapping[str, Any], path: Path) -> tuple[dict[str, str], tuple[int, int] | None]:
    """What a checkpoint says about itself beside its tensors, and the (H, W) it is for, if it says so.

    A .safetensors has these in its metadata (key ``size``: ``"384 640"``), a training checkpoint in its options.

    Args:
        content: of the file, as `models.state_dicts.read_checkpoint` gives it.
        path: of the file, for errors.

    Raises:
        UserError: a ``size`` that is not two numbers, or a ``zoom`` that is neither yes nor no.
    """
    if "metadata" in content:
        metadata = content["metadata"]
        notes = {key: value for key, value in metadata.items() if key not in ("format", "config")}
        check_zoom(f"{path}: its metadata say", notes)
        if "size" not in metadata:
            return notes, None
        words = metadata["size"].split()
        if len(words) != 2 or not all(word.isdecimal() and int(word) > 0 for word in words):
            raise UserError(f"{path}: its metadata say size {metadata['size']!r}; expected height and width: 384 640")
        return notes, (int(words[0]), int(words[1]))
    options = content.get("config") or {}
    best = content.get("best") or {}
    notes = {"step": str(content.get("step", "unknown"))}
    if "J" in best and best.get("step") == content.get("step"):  # the figure is not that of another step's weights
        notes["J"] = f"{best['J']:.4f}"
    if options.get("datasets"):
        notes["trained_on"] = ", ".join(options["datasets"])
    size = options.get("size")
    return notes, (int(size[0]), int(size[1])) if size else None


def without_part(weights: Weights, part: str) -> DBSNet:
    """The network with one of `PARTS` taken out.

    Raises:
        UserError: it has none.
    """
    from models.growth import take_out

    try:
        return take_out(weights.net, part)
    except ValueError as error:
        raise UserError(f"--without {part}: {weights.path}: {error}") from None
