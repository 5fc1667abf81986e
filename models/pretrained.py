"""Public MobileViT checkpoints: three formats, recognised by their keys, loaded strictly.

wilile26811249/MobileViT ``.pth.tar`` (flavour ``wilile``), Apple cvnets ``.pt`` and timm ``.pth``/``.safetensors``
(flavour ``reference``). Every trunk tensor of the file must be consumed and every tensor of ours filled; only the
classifier is dropped. What each was trained on decides the normalisation that is kept with the weights: wilile RGB
with ImageNet mean and std; cvnets BGR in [0, 1] (the first convolution is flipped here, so that callers always pass
RGB); timm RGB in [0, 1].
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from models.errors import CheckpointError
from models.mobilevit import DEPTHS, FLAVOURS, VARIANTS, MobileViT
from models.state_dicts import describe_mismatch, read_state

FORMATS = {"wilile": "wilile", "cvnets": "reference", "timm": "reference"}  # format -> flavour
_CLASSIFIER = {"wilile": "fc.", "cvnets": "classifier.", "timm": "head."}


def recognise(state: dict[str, Tensor]) -> str:
    """Name the format of a state dict by keys that only it has; raises CheckpointError when it is none of the three."""
    for name, key in (
        ("wilile", "stem.0.weight"),
        ("cvnets", "conv_1.block.conv.weight"),
        ("timm", "stem.conv.weight"),
    ):
        if key in state:
            return name
    some, advice = ", ".join(sorted(state)[:3]), ""
    if "decoder.aux_heads.0.bias" in state:
        advice = "; it is a whole network of main.py's, which --finetune takes"
    elif "encoder.conv_1.block.conv.weight" in state:
        advice = "; it is a segmentation or detection network of cvnets: take the classification file of its backbone"
    raise CheckpointError(
        f"not a MobileViT checkpoint of a known format ({', '.join(FORMATS)}): {len(state)} tensors, "
        f"the first keys are {some}{advice}"
    )


def _first(key: str, rules: list[tuple[str, str | Callable[[re.Match[str]], str]]]) -> str:
    """The key rewritten by the first of `rules` whose pattern it begins with; unchanged where none does."""
    for pattern, replacement in rules:
        new, count = re.subn("^" + pattern, replacement, key)
        if count:
            return new
    return key


def _tail(key: str, tails: dict[str, str]) -> str:
    for ours, theirs in tails.items():
        if ours in key:
            return key.replace(ours, theirs, 1)
    return key


def foreign_key(key: str, format: str) -> str:
    """The name that our tensor `key` has in a checkpoint of `format` (facts: the key map of the three public codes)."""
    if format == "timm":
        key = _first(
            key, [(r"final\.", "final_conv."), (r"stages\.(\d)\.(\d)\.layers\.", r"stages.\1.\2.transformer.")]
        )
        key = _tail(key, {
            ".expand.": ".conv1_1x1.", ".depthwise.": ".conv2_kxk.", ".project.": ".conv3_1x1.",
            ".local.": ".conv_kxk.", ".embed.": ".conv_1x1.", ".fuse.": ".conv_fusion.",
            ".attention.qkv.": ".attn.qkv.", ".attention.out.": ".attn.proj.",
            ".mlp.0.": ".mlp.fc1.", ".mlp.2.": ".mlp.fc2.",
        })  # fmt: skip
        # `project` names two things of ours: the inverted residual's (block 0, or anywhere in stages 0, 1) and the
        # transformer's
        key = re.sub(r"^(stages\.[234]\.1)\.conv3_1x1\.", r"\1.conv_proj.", key)
        return re.sub(r"\.norm\.(?=weight|bias|running|num)", ".bn.", key) if not _is_layer_norm(key) else key
    if format == "cvnets":
        key = _first(key, [(r"stem\.", "conv_1.block."), (r"final\.", "conv_1x1_exp.block."),
                           (r"stages\.(\d)\.", lambda m: f"layer_{int(m[1]) + 1}.")])  # fmt: skip
        transformer = re.match(r"layer_([345])\.1\.", key)
        if transformer:
            final = DEPTHS[int(transformer[1]) - 3]
            key = re.sub(r"(layer_[345]\.1)\.norm\.", rf"\1.global_rep.{final}.", key)
            key = _tail(key, {
                ".local.": ".local_rep.conv_3x3.block.", ".embed.": ".local_rep.conv_1x1.block.conv.",
                ".project.": ".conv_proj.block.", ".fuse.": ".fusion.block.", ".layers.": ".global_rep.",
            })  # fmt: skip
            return _tail(key, {
                ".norm1.": ".pre_norm_mha.0.", ".attention.qkv.": ".pre_norm_mha.1.qkv_proj.",
                ".attention.out.": ".pre_norm_mha.1.out_proj.",
                ".norm2.": ".pre_norm_ffn.0.", ".mlp.0.": ".pre_norm_ffn.1.", ".mlp.2.": ".pre_norm_ffn.4.",
            })  # fmt: skip
        return _tail(key, {
            ".expand.": ".block.exp_1x1.block.", ".depthwise.": ".block.conv_3x3.block.",
            ".project.": ".block.red_1x1.block.",
        })  # fmt: skip
    if format == "wilile":
        key = _first(key, [(r"stem\.conv\.", "stem.0."), (r"final\.conv\.", "stage4.2."),
                           (r"stages\.0\.0\.", "stem.1."),
                           (r"stages\.(\d)\.", lambda m: f"stage{m[1]}.")])  # fmt: skip
        if re.match(r"stage[234]\.1\.", key):
            key = _tail(key, {
                ".local.": ".local_representation.0.", ".embed.": ".local_representation.1.",
                ".project.conv.": ".fusion_block1.", ".fuse.conv.": ".fusion_block2.",
                ".layers.": ".transformer.layers.",
            })  # fmt: skip
            key = _tail(key, {
                ".norm1.": ".0.norm.", ".attention.qkv.": ".0.fn.to_qvk.", ".attention.out.": ".0.fn.w_out.",
                ".norm2.": ".1.norm.", ".mlp.0.": ".1.fn.net.0.", ".mlp.2.": ".1.fn.net.3.",
            })  # fmt: skip
            return re.sub(r"(local_representation\.\d)\.norm\.", r"\1.norm_layer.", key)
        key = _tail(
            key,
            {
                ".project.conv.": ".conv.2.",
                ".project.norm.": ".conv.3.",
                ".expand.": ".conv.0.",
                ".depthwise.": ".conv.1.",
            },
        )
        return re.sub(r"(\.conv\.[01])\.norm\.", r"\1.norm_layer.", key)
    raise ValueError(f"unknown checkpoint format {format!r}: expected one of {', '.join(FORMATS)}")


def _is_layer_norm(timm_key: str) -> bool:
    """timm calls the LayerNorm after the transformer `norm`, as we call every batch norm: only the latter are
    renamed.
    """
    return re.match(r"^stages\.[234]\.1\.norm\.", timm_key) is not None


def load_pretrained(backbone: MobileViT, path: str | Path) -> str:
    """Fill a backbone from a public checkpoint and keep the checkpoint's normalisation with it.

    Returns the format's name. Raises CheckpointError when the file cannot be read, is of the other flavour or another
    size, or has a tensor that is missing, left over or of another shape.
    """
    state = read_state(path)
    try:
        format = recognise(state)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    if FORMATS[format] != backbone.flavour:
        raise CheckpointError(
            f"{path}: a {format} checkpoint belongs to the MobileViT flavour {FORMATS[format]!r}, but this network's "
            f"is {backbone.flavour!r}: build it with flavour={FORMATS[format]!r} (of {', '.join(FLAVOURS)}; "
            f"main.py --flavour {FORMATS[format]})"
        )
    ours = {key: tensor for key, tensor in backbone.state_dict().items() if key not in ("mean", "std")}
    names = {key: foreign_key(key, format) for key in ours}
    given = {key: tensor for key, tensor in state.items() if not key.startswith(_CLASSIFIER[format])}
    problem = describe_mismatch({names[key]: tensor.shape for key, tensor in ours.items()},
                                {key: tensor.shape for key, tensor in given.items()})  # fmt: skip
    if problem:
        last = given.get(names["final.conv.weight"])  # of as many channels as no other size has
        size = next((name for name, variant in VARIANTS.items() if last is not None and len(last) == variant.final), "")
        if size not in ("", backbone.variant):
            problem = f"it is of a MobileViT-{size.upper()} (main.py --variant {size}), {problem}"
        raise CheckpointError(f"{path} ({format} format) does not fit MobileViT-{backbone.variant.upper()}: {problem}")
    new = {key: given[name].clone() for key, name in names.items()}
    if format == "cvnets":
        new["stem.conv.weight"] = new["stem.conv.weight"].flip(1)  # trained on BGR: flip the input channels once, here
    new["mean"], new["std"] = backbone.mean, backbone.std
    backbone.load_state_dict(new)
    if format == "wilile":
        backbone.set_normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    else:
        backbone.set_normalisation((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    return format


def build_backbone(
    name: str = "mobilevit_s", flavour: str = "reference", checkpoint: str | Path | None = None, dropout: float = 0.0
) -> MobileViT:
    """Build a MobileViT by name (``mobilevit_s``, ``mobilevit_xs``, ``mobilevit_xxs``), with a public checkpoint if
    given.
    """
    variant = name.removeprefix("mobilevit_")
    backbone = MobileViT(variant, flavour, dropout=dropout)
    if checkpoint is not None:
        load_pretrained(backbone, checkpoint)
    return backbone
