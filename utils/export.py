"""`tool.py --tools export`: from a training checkpoint to weights that can be handed out.

The result, of one checkpoint or of the mean of several, is one .safetensors in half precision whose metadata say which
network it is, the input size that it is for, and how it was trained; `models.load_dbsnet` and ``tool.py --checkpoint``
need nothing else.

``--stream_from FILE`` takes one stream's encoder from a network that has that stream alone (`main.py --keep_stream`).
``--without PART`` leaves a part of the network out, as in ``test``; `main.py --finetune` then begins it anew.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from utils.errors import UserError, check_output

if TYPE_CHECKING:
    from models.dbsnet import DBSNet

RESERVED = ("format", "config", "size")  # keys of the metadata that are not notes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``export``; ``--checkpoint`` and ``--size`` are shared ones."""
    group = parser.add_argument_group(
        "export", "in half precision; --size is written into the file, --without leaves a part of the network out"
    )
    group.add_argument("--output", metavar="FILE", help="the .safetensors to write")
    group.add_argument(
        "--average",
        nargs="+",
        default=[],
        metavar="FILE",
        help="write the mean of --checkpoint's weights and those of these checkpoints of the same network",
    )
    group.add_argument(
        "--stream_from",
        metavar="FILE",
        help="write --checkpoint's network with the encoder and lateral convolutions of this one, which has one stream "
        "(and may have an encoder of another kind)",
    )
    group.add_argument(
        "--note",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="facts for its metadata, for instance licence=…; zoom=yes makes --zoom the default of test",
    )


def parse_notes(words: list[str]) -> dict[str, str]:
    """``KEY=VALUE`` words as a dict.

    Raises:
        UserError: a word without =, an empty key, a key given twice, or one of `RESERVED`.
    """
    notes: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise UserError(f"--note {word!r}: expected KEY=VALUE")
        if key in RESERVED:
            raise UserError(f"--note {word!r}: {key} is written by export itself; for the size give --size H W")
        if key in notes:
            raise UserError(f"--note {word!r}: {key} is given twice")
        notes[key] = value
    return notes


def check(args: argparse.Namespace) -> None:
    """Refuses what `run` would refuse before it opens a file, for whoever has much to do before.

    Raises:
        UserError: an option that is missing or wrong.
    """
    from utils.inference.weights import PARTS, check_file, check_size, check_zoom

    if not args.checkpoint:
        raise UserError("--tools export: give --checkpoint FILE, the training checkpoint (best.pt or last.pt)")
    check_output("output", args.output or "", ".safetensors")
    if args.without and args.without not in PARTS:
        raise UserError(f"--without {args.without}: export can leave out {', '.join(PARTS)}")
    for option, paths in (("average", args.average), ("stream_from", [args.stream_from] if args.stream_from else [])):
        for path in paths:
            check_file(option, path)
            _refuse_own_source(args.output, option, path)
    _refuse_own_source(args.output, "checkpoint", args.checkpoint)
    check_size(args.size)
    check_zoom("--note", parse_notes(args.note))


def _refuse_own_source(output: str, option: str, source: str) -> None:
    """Half precision would take the place of weights that may be nowhere else in full."""
    if Path(output).resolve() == Path(source).resolve():
        raise UserError(
            f"--output {output}: the file of --{option}, which half precision would replace; give another name"
        )


def run(args: argparse.Namespace) -> Path:
    """Writes ``--output`` from ``--checkpoint``, after `check`; notes that the checkpoint has already are kept. Returns
    the path.

    Raises:
        UserError: a checkpoint whose input size is not known, or networks that do not fit.
        CheckpointError: a checkpoint that is unreadable or of another network.
    """
    from models.weights import average_into, save_weights
    from utils.inference.weights import load_weights, without_part

    notes = parse_notes(args.note)
    weights = load_weights(args.checkpoint)
    kept = dict(weights.notes)
    if args.average:
        for key in ("step", "J"):  # of one run, not of the mean
            kept.pop(key, None)
        kept["average_of"] = str(1 + len(args.average))
    if args.without:
        kept["without"] = ", ".join(filter(None, (kept.get("without"), args.without)))
        kept.pop("J", None)  # of the whole
    net, *others = (
        without_part(item, args.without) if args.without else item.net
        for item in (weights, *(load_weights(path) for path in args.average))
    )
    try:
        average_into(net, others)
    except ValueError as error:
        raise UserError(f"--average: {error}; expected checkpoints of the network of {weights.path}") from None
    if args.stream_from:
        net = _with_stream(net, args.stream_from)
        for key in ("step", "J"):  # of a network that is another now
            kept.pop(key, None)
    size = tuple(args.size) if args.size else weights.size
    if size is None:
        raise UserError(f"{weights.path}: does not say the input size that it is for; give --size H W")
    metadata = {**kept, **notes, "size": f"{size[0]} {size[1]}"}
    output = Path(args.output)
    save_weights(output, net, half=True, metadata=metadata)
    facts = ", ".join(f"{key} {value}" for key, value in metadata.items())
    print(f"export: {output}, {output.stat().st_size / 2**20:.1f} MiB; {facts}", flush=True)
    return output


def _with_stream(net: DBSNet, path: str) -> DBSNet:
    """`models.growth.put_back` of the network in a file; raises UserError where the two do not fit."""
    from models.growth import put_back
    from utils.inference.weights import load_weights

    one = load_weights(path)
    try:
        return put_back(net, one.net)
    except ValueError as error:
        raise UserError(f"--stream_from {one.path}: {error}") from None
