"""Co-operative direction-aware graph attention (Co-DGA): fuses appearance and motion, frame by frame.

The abstract: "co-operative direction-aware graph attention" that gives "attentional weights to neighboring points
along the coordinate axis"; no formula is public. Our reading: every position of every stream is a node, joined to the
nodes of its row and of its column, within its stream and in the other one. Edge weights are direction-aware (rows and
columns have their own queries, keys and distance biases, and left differs from right, up from down), normalised
jointly over row and column of one source, so that the node itself counts once (criss-cross attention,
arXiv:1811.11721). A gate decides how much of both messages a node takes; the read-out fuses the streams under
coordinate attention (arXiv:2103.02907) in its residual form. Two rounds reach every position.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.mobilevit import ConvNormAct


class CoordinateGate(nn.Module):
    """Coordinate attention as a residual gate: ``x * (1 + a_row * a_column)``, each in (0, 1), from axis-wise means.

    Without the original's batch norm, whose statistics would mix row and column descriptors and change with the
    aspect ratio.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        middle = max(8, channels // 32)
        self.squeeze = nn.Sequential(nn.Conv1d(channels, middle, 1), nn.SiLU())
        self.row = nn.Conv1d(middle, channels, 1)
        self.column = nn.Conv1d(middle, channels, 1)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C, H, W)
        rows = self.row(self.squeeze(x.mean(3))).sigmoid().unsqueeze(3)  # (B, C, H) -> (B, C, H, 1)
        columns = self.column(self.squeeze(x.mean(2))).sigmoid().unsqueeze(2)  # (B, C, W) -> (B, C, 1, W)
        return x * (1 + rows * columns)


class CoDGA(nn.Module):
    """Graph attention along rows and columns, within and across the streams, then one fused map.

    Args:
        channels: feature width of each stream; the fused map has the same.
        streams: 2 (appearance and motion); 1 in ablations.
        rounds: message-passing rounds with shared weights; 0 leaves only the read-out.
        heads: attention heads.

    Input (B, S*C, H, W), output (B, C, H, W). The messages' scale starts at 0, so that `messages` is the identity then.
    """

    def __init__(self, channels: int, *, streams: int = 2, rounds: int = 2, heads: int = 2) -> None:
        super().__init__()
        self.channels, self.streams, self.rounds, self.heads = channels, streams, rounds, heads
        if rounds:
            if channels % heads:
                raise ValueError(
                    f"the feature width must be a multiple of the number of heads, got {channels} and {heads}"
                )
            self.key_dim = max(16, channels // 4) // heads
            keys = heads * self.key_dim
            # Per stream: queries and keys for each direction, (query, key) x (row, column) x heads x key_dim channels.
            self.edges = nn.Conv2d(streams * channels, streams * 4 * keys, 1, groups=streams)
            self.values = nn.Conv2d(streams * channels, streams * channels, 1, groups=streams)
            # Per cell of distance, for (own or other stream, row or column, towards smaller or larger index, head).
            self.distance = nn.Parameter(torch.zeros(2, 2, 2, heads))
            self.gate = nn.Conv2d(streams * (1 + streams) * channels, streams * channels, 1, groups=streams)
            self.mix = nn.Conv2d(streams * streams * channels, streams * channels, 1, groups=streams)
            self.scale = nn.Parameter(torch.zeros(streams * channels, 1, 1))
        self.readout = nn.Sequential(ConvNormAct(streams * channels, channels, 3), CoordinateGate(channels))

    def _bias(self, length: int, direction: int) -> Tensor:
        """Distance bias (S target, S source, heads, length, length) of one direction, [.., p, q] for the edge p <-
        q.
        """
        index = torch.arange(length, device=self.distance.device, dtype=self.distance.dtype)
        # q - p; a sixteenth, so that a step of the optimiser is a gentle slope
        offset = (index[None, :] - index[:, None]) / 16
        parts = torch.stack([(-offset).clamp(min=0), offset.clamp(min=0)])  # (2, length, length)
        # (own or other, heads, length, length)
        slopes = torch.einsum("osh,spq->ohpq", self.distance[:, direction], parts)
        other = ~torch.eye(self.streams, dtype=torch.bool, device=slopes.device)
        return slopes[other.long()]

    def biases(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        """What is added to the edges along rows and along columns, the same in each round: (heads, S source, S target *
        length, length), of the length `width` and `height`.
        """
        rows, columns = (
            self._bias(length, direction).permute(2, 1, 0, 3, 4).flatten(2, 3)  # from (target, source, heads, p, q)
            for direction, length in enumerate((width, height))
        )
        # The node itself is in its row already; the row always remains, so no softmax is empty.
        itself = torch.eye(height, dtype=torch.bool, device=columns.device).repeat(self.streams, 1)  # (S target * H, H)
        return rows, columns.masked_fill(itself, float("-inf"))

    def messages(self, x: Tensor, biases: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """One round: (B, S*C, H, W) -> (B, S*C, H, W). `biases` are those of `biases`, for several rounds.

        Rows and columns are each one batched product in their own memory order; the joint softmax only exchanges its
        maxima and sums between them, so that no map of edges is ever permuted.
        """
        b, _, height, width = x.shape
        s, n, d = self.streams, self.heads, self.key_dim
        # (B, S, query or key, row or column, heads, d, H, W)
        edges = self.edges(x).view(b, s, 2, 2, n, d, height, width)
        values = self.values(x).view(b, s, n, self.channels // n, height, width)

        def along(maps: Tensor, axis: int) -> Tensor:  # (B, S, heads, d, H, W) -> (B, other axis, heads, S, axis, d)
            return maps.permute(0, 4, 2, 1, 5, 3) if axis == 0 else maps.permute(0, 5, 2, 1, 4, 3)

        logits, maxima = [], []
        biases = self.biases(height, width) if biases is None else biases
        for axis, length in enumerate((width, height)):
            # (B, other, heads, 1, S*axis, d)
            query = along(edges[:, :, 0, axis], axis).flatten(3, 4)[:, :, :, None] * d**-0.5
            key = along(edges[:, :, 1, axis], axis).transpose(4, 5)  # (B, other, heads, S source, d, axis)
            # (B, other, heads, S source, S target * axis, axis)
            edge = (query @ key).add_(biases[axis].to(query.dtype))
            logits.append(edge)
            maxima.append(edge.detach().amax(-1).unflatten(-1, (s, length)))  # (B, other, heads, source, target, axis)
        # as rows have it: (B, H, heads, source, target, W)
        highest = torch.maximum(maxima[0], maxima[1].transpose(1, 5))

        message, total = 0, 0
        for axis, length in enumerate((width, height)):
            shift = (highest if axis == 0 else highest.transpose(1, 5)).flatten(4, 5)[..., None]
            weight = logits[axis].sub_(shift).exp_()  # in place: these maps are the largest of the network
            # (B, other, heads, source, target, axis, C/heads)
            part = (weight @ along(values, axis)).unflatten(4, (s, length))
            mass = weight.sum(-1).unflatten(-1, (s, length))  # (B, other, heads, source, target, axis)
            message = message + (part if axis == 0 else part.transpose(1, 5))
            total = total + (mass if axis == 0 else mass.transpose(1, 5))
        message = message / total[..., None]
        # (B, H, heads, source, target, W, C/heads) -> S targets of S sources of (B, heads, C/heads, H, W)
        pairs = [target.unbind(1) for target in message.permute(0, 4, 3, 2, 6, 1, 5).unbind(1)]
        # For each target its own message first, then the other stream's: both targets' weights see the same order.
        # Joined rather than indexed by a list, which would be copied to a GPU, and waited for.
        ordered = [pairs[target][(target + shift) % s] for target in range(s) for shift in range(s)]
        message = torch.stack(ordered, 1).reshape(b, s, s, self.channels, height, width)
        nodes = x.view(b, s, 1, self.channels, height, width)
        # (B, S*(1+S)*C, H, W) -> (B, S*C, H, W)
        gate = self.gate(torch.cat([nodes, message], 2).flatten(1, 3)).sigmoid()
        return x + self.scale * gate * self.mix(message.flatten(1, 3))

    def forward(self, x: Tensor) -> Tensor:
        biases = self.biases(*x.shape[-2:]) if self.rounds else None
        for _ in range(self.rounds):
            x = self.messages(x, biases)
        return self.readout(x)
