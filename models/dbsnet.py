"""DBSNet: the whole network, assembled.

"Bidirectionally Learning Dense Spatio-temporal Feature Propagation Network for Unsupervised Video Object Segmentation",
ACM Multimedia 2022. The order of the parts is the abstract's: dense bidirectional ConvLSTM, spatio-temporal
Transformer, Co-DGA, mask. What the public record leaves open is marked "our reading" in each part's file.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.co_dga import CoDGA
from models.convlstm import DenseBiConvLSTM
from models.decoder import Decoder
from models.mobilevit import ConvNormAct, MobileViT
from models.pretrained import load_pretrained
from models.refinement import SpatioTemporalTransformer
from models.timm_encoder import TimmEncoder, load_timm

STREAMS = ("appearance", "motion")
MAPS = ("decoder", "encoders")  # that a network can learn from another


class DBSNet(nn.Module):
    """Two MobileViT streams, propagated over all frames, refined, fused and decoded to one mask per frame.

    Args:
        variant: size of both backbones, ``s``, ``xs`` or ``xxs``.
        flavour: of both backbones, ``reference`` or ``wilile``.
        width: feature width d after the lateral convolutions.
        hidden: hidden channels of a ConvLSTM, per direction.
        dilations: one ConvLSTM layer for each; empty: no propagation.
        depth: layers of each spatio-temporal Transformer; 0: no refinement.
        window: frames that a Transformer sees at once.
        pool: at stride 16 the Transformer's keys and values are means over pool x pool positions; at 32 they are not.
        rounds: message-passing rounds of Co-DGA; 0: only its read-out.
        streams: ``("appearance", "motion")``, or one of them in ablations.
        dropout: of the backbones, in training.
        encoder: ``mobilevit``, or the name of a network of timm (`models.timm_encoder`; not of the paper); for streams
            of two kinds a name for each, ``{"appearance": …, "motion": …}``.

    Call: ``net(frames, flows)``, each (B, T, 3, H, W), RGB in [0, 1], gives logits (B, T, 1, H, W); any T >= 1 and
    any size (padded to a multiple of 32, or 64 for ``wilile``, and cropped back).
    """

    levels = (8, 16, 32)  # strides that are propagated and fused

    def __init__(self, *, variant: str = "s", flavour: str = "reference", width: int = 64, hidden: int = 16,
                 dilations: tuple[int, ...] = (1, 2, 4), depth: int = 2, window: int = 8, pool: int = 2,
                 rounds: int = 2, streams: tuple[str, ...] = STREAMS, dropout: float = 0.0,
                 encoder: str | dict[str, str] = "mobilevit") -> None:  # fmt: skip
        super().__init__()
        if isinstance(dilations, (str, int)) or isinstance(streams, str):
            raise ValueError(f"dilations and streams must be lists, got {dilations!r} and {streams!r}")
        dilations, streams = tuple(dilations), tuple(streams)
        sizes = {"width": width, "hidden": hidden, "depth": depth, "window": window, "pool": pool, "rounds": rounds,
                 **{f"dilations[{index}]": dilation for index, dilation in enumerate(dilations)}}  # fmt: skip
        for key, size in sizes.items():
            low = 0 if key in ("depth", "rounds") else 1
            if not isinstance(size, int) or isinstance(size, bool) or size < low:
                raise ValueError(f"{key} must be a whole number of at least {low}, got {size!r}")
        if not streams or any(stream not in STREAMS for stream in streams) or len(set(streams)) != len(streams):
            raise ValueError(f"streams must be one or both of {STREAMS}, got {streams}")
        names = encoder if isinstance(encoder, dict) else dict.fromkeys(streams, encoder)
        if set(names) != set(streams) or not all(isinstance(name, str) for name in names.values()):
            raise ValueError(f"encoder must be one name or one for each of {streams}, got {encoder}")
        if dropout and "mobilevit" not in names.values():
            raise ValueError(f"dropout is MobileViT's, and encoder is {encoder}: leave it out")
        self.config: dict[str, Any] = {
            "variant": variant, "flavour": flavour, "width": width, "hidden": hidden, "dilations": list(dilations),
            "depth": depth, "window": window, "pool": pool, "rounds": rounds, "streams": list(streams),
            "dropout": dropout, "encoder": encoder,
        }  # fmt: skip
        self.streams, self.width, self.window = streams, width, window
        self.encoder_names: dict[str, str] = {stream: names[stream] for stream in streams}
        count = len(streams)
        encoders: dict[str, MobileViT | TimmEncoder] = {
            stream: MobileViT(variant, flavour, dropout=dropout) if name == "mobilevit" else TimmEncoder(name)
            for stream, name in self.encoder_names.items()
        }
        self.encoders = nn.ModuleDict(encoders)
        self.multiple = max(encoder.multiple for encoder in encoders.values())
        self.laterals = nn.ModuleDict(
            {
                stream: nn.ModuleList(ConvNormAct(channels, width) for channels in encoder.channels[1:])
                for stream, encoder in encoders.items()
            }
        )
        self.skip = ConvNormAct(sum(encoder.channels[0] for encoder in encoders.values()), width)
        self.propagation = nn.ModuleList(
            DenseBiConvLSTM(width, hidden, dilations=dilations, streams=count) for _ in self.levels
        )
        self.refinement = nn.ModuleDict(
            {
                stream: nn.ModuleList(
                    SpatioTemporalTransformer(width, depth=depth, window=window, pool=stage_pool)
                    for stage_pool in (pool, 1)
                )
                for stream in streams
            }
        )
        self.fusion = nn.ModuleList(CoDGA(width, streams=count, rounds=rounds) for _ in self.levels)
        self.decoder = Decoder(width)

    # The four stages below are the network; `forward` chains them on a clip, `models.predictor` on a whole video.

    def encode(self, frames: Tensor, flows: Tensor) -> tuple[list[Tensor], Tensor]:
        """Frames and flow images (N, 3, H, W), padded -> laterals (N, S*d, h, w) at strides 8, 16, 32 and the skip
        (N, d, H/4, W/4).
        """
        return self.join(self.encoder_maps(frames, flows))

    def encoder_maps(self, frames: Tensor, flows: Tensor) -> dict[str, list[Tensor]]:
        """The maps of each stream's encoder at strides 4, 8, 16, 32, each (N, C, h, w)."""
        return {s: self.encoders[s](frames if s == "appearance" else flows) for s in self.streams}

    def join(self, maps: dict[str, list[Tensor]]) -> tuple[list[Tensor], Tensor]:
        """What `encode` gives, of `encoder_maps`."""
        laterals = [[lateral(x) for lateral, x in zip(self.laterals[s], maps[s][1:])] for s in self.streams]
        # In planes also after channels-last encoders: recurrence and graph attention cut the maps by channel.
        levels = [torch.cat(level, 1).contiguous() for level in zip(*laterals)]
        return levels, self.skip(torch.cat([maps[s][0] for s in self.streams], 1))

    def refine(self, level: int, x: Tensor) -> Tensor:
        """Spatio-temporal Transformer of one level (0, 1, 2 for strides 8, 16, 32) on (B, T, S*d, h, w); level 0 has
        none.
        """
        if level == 0:
            return x
        parts = x.split(self.width, 2)
        return torch.cat([self.refinement[stream][level - 1](part) for stream, part in zip(self.streams, parts)], 2)

    def fuse(self, levels: list[Tensor], skip: Tensor) -> list[Tensor]:
        """Co-DGA per level and the decoder's path: maps (N, S*d, h, w) and the skip -> maps at strides 32, 16, 8, 4."""
        return self.decoder([fuse(x) for fuse, x in zip(self.fusion, levels)], skip)

    def decode(self, levels: list[Tensor], skip: Tensor) -> Tensor:
        """`fuse` and the decoder's logits (N, 1, H/4, W/4)."""
        return self.decoder.read(self.fuse(levels, skip))[0]

    def forward(
        self, frames: Tensor, flows: Tensor, return_aux: bool = False, return_maps: str | None = None
    ) -> Tensor | tuple[Tensor, list[Tensor]] | tuple[Tensor, list[Tensor], list[Tensor]]:
        """Logits (B, T, 1, H, W); with `return_aux` also the list of logits at strides 8, 16, 32, each (B, T, 1, h,
        w); with `return_maps` these and the maps of one of `MAPS`: ``decoder``, its path at strides 32, 16, 8, 4, each
        (B*T, d, h, w), or ``encoders``, what `encode` gives at strides 8, 16, 32, each (B*T, S*d, h, w), and 4.
        """
        if return_maps is not None and return_maps not in MAPS:
            raise ValueError(f"there are no maps {return_maps!r} to return; those are {', '.join(MAPS)}")
        if frames.ndim != 5 or frames.shape[2] != 3 or frames.shape != flows.shape or not frames.shape[1]:
            raise ValueError(
                "expected frames and flows of one shape (B, T, 3, H, W) with T >= 1, "
                f"got {tuple(frames.shape)} and {tuple(flows.shape)}"
            )
        if not frames.is_floating_point() or not flows.is_floating_point():
            raise TypeError(f"frames and flows must be floating point in [0, 1], got {frames.dtype} and {flows.dtype}")
        b, t, _, height, width = frames.shape
        x, size = pad_to_multiple(frames.flatten(0, 1), self.multiple), (height, width)  # (B, T, …) -> (B*T, …)
        levels, skip = self.encode(x, pad_to_multiple(flows.flatten(0, 1), self.multiple))
        encoded = [*levels, skip]
        for index, level in enumerate(levels):
            y = level.unflatten(0, (b, t))  # (B*T, S*d, h, w) -> (B, T, S*d, h, w)
            y = self.refine(index, self.propagation[index](y))
            levels[index] = y.flatten(0, 1)
        path = self.fuse(levels, skip)
        logits, aux = self.decoder.read(path, return_aux=return_aux or return_maps is not None)
        logits = upsample_logits(logits, x.shape[-2:], size).unflatten(0, (b, t))  # (B*T, 1, H, W) -> (B, T, 1, H, W)
        aux = [y.unflatten(0, (b, t)) for y in aux]
        if return_maps is not None:
            return logits, aux, path if return_maps == "decoder" else encoded
        return (logits, aux) if return_aux else logits

    def encoder_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of both backbones."""
        return self.encoders.parameters()

    def head_parameters(self) -> Iterator[nn.Parameter]:
        """All other parameters."""
        return (parameter for name, parameter in self.named_parameters() if not name.startswith("encoders."))

    def freeze_encoders(self, stride: int) -> None:
        """Encoder layers at this stride (4, 8, 16 or 32) or a finer one train no more: only what they feed does."""
        for encoder in self.encoders.values():
            for parameter in encoder.parameters_to(stride):
                parameter.requires_grad_(False)

    def load_backbones(self, path: str | Path) -> None:
        """Fill both backbones from one public checkpoint of their kind, strictly; raises CheckpointError."""
        for encoder in self.encoders.values():
            (load_timm if isinstance(encoder, TimmEncoder) else load_pretrained)(encoder, path)


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Replicate the border of (N, C, H, W) to the next multiple, on the right and at the bottom."""
    h, w = x.shape[-2:]
    pad = (0, -w % multiple, 0, -h % multiple)
    return F.pad(x, pad, mode="replicate") if any(pad) else x


def upsample_logits(logits: Tensor, padded: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Logits at stride 4 of a padded input, bilinear to its size and cropped to the unpadded one."""
    logits = F.interpolate(logits, size=tuple(padded), mode="bilinear", align_corners=False)
    return logits[..., : size[0], : size[1]]


# What a variant changes beside its backbones: (width, hidden). The budgets of both are kept by tests/test_budget.py.
_WIDTHS = {"s": (64, 16), "xs": (64, 16), "xxs": (48, 8)}


def build_dbsnet(variant: str = "s", flavour: str = "reference", **options: Any) -> DBSNet:
    """Build a network by variant; any argument of `DBSNet` overrides.

    ``build_dbsnet(**net.config)`` rebuilds a network.
    """
    if variant not in _WIDTHS:
        raise ValueError(f"unknown variant {variant!r}: expected one of {', '.join(_WIDTHS)}")
    width, hidden = _WIDTHS[variant]
    return DBSNet(variant=variant, flavour=flavour, **{"width": width, "hidden": hidden, **options})
