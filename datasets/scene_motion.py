"""How the layers of a synthetic scene move: homographies and waves, whose inverse is known in closed form."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike

from datasets.transfer import send

Wave = tuple[np.ndarray, np.ndarray, float]  # per frame amplitude and phase, and the wave number


@dataclass(frozen=True)
class Ripple:
    """A wave that moves points (x, y) across the way it runs, so that taking it back is exact, too.

    Along (x', y') = (x, y) turned by `angle` (radians), x' += a sin(k y' + p); wave: as those of `Motion`.
    """

    angle: float
    wave: Wave

    def shift(
        self, times: list[int], x: torch.Tensor, y: torch.Tensor, sign: int = 1
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Points moved by the wave as it is at `times`; back with a sign of -1."""
        cos, sin = math.cos(self.angle), math.sin(self.angle)
        sway = _wave(self.wave, times, (y * cos).sub_(x * sin)).mul_(sign)
        return x + cos * sway, y + sin * sway


@dataclass(frozen=True)
class Motion:
    """Where the points of a texture lie in each frame. Coordinates come and go on any device.

    Texture coordinates are pixels from the texture's centre, frame coordinates pixels from the frame's centre. A point
    is moved by the ripples, one after the other, by the two waves and then by the homography.
    """

    matrices: np.ndarray  # (T, 3, 3) float64, texture -> frame
    # Of x += a sin(k y + p), then y += b sin(m x + q)
    wave_x: Wave | None = None
    wave_y: Wave | None = None
    ripples: tuple[Ripple, ...] = ()

    def to_texture(self, times: list[int], x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Texture coordinates, each (T, H, W), of the frame coordinates x (1, 1, W), y (1, H, 1)."""
        x, y = _project(np.linalg.inv(self.matrices)[times], x, y)
        if self.wave_y is not None:
            y = y.sub_(_wave(self.wave_y, times, x))
        if self.wave_x is not None:
            x = x.sub_(_wave(self.wave_x, times, y))
        for ripple in reversed(self.ripples):
            x, y = ripple.shift(times, x, y, -1)
        return x, y

    def to_frame(self, times: list[int], x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Frame coordinates at `times` of texture coordinates; the inverse of `to_texture`."""
        for ripple in self.ripples:
            x, y = ripple.shift(times, x, y)
        if self.wave_x is not None:
            x = x + _wave(self.wave_x, times, y)
        if self.wave_y is not None:
            y = y + _wave(self.wave_y, times, x)
        return _project(self.matrices[times], x, y)

    def move(
        self,
        times: list[int],
        targets: list[int],
        x: torch.Tensor,
        y: torch.Tensor,
        texture_x: torch.Tensor,
        texture_y: torch.Tensor,
    ) -> torch.Tensor:
        """Flow (T, 2, H, W) in pixels from `times` to `targets` at frame coordinates x, y with their texture places."""
        if self.is_static():
            return torch.zeros(len(times), 2, *texture_x.shape[1:], device=x.device)
        if self.wave_x is None and self.wave_y is None and not self.ripples:  # one homography instead of two
            new_x, new_y = _project(self.matrices[targets] @ np.linalg.inv(self.matrices[times]), x, y)
        else:
            new_x, new_y = self.to_frame(targets, texture_x, texture_y)
        return torch.stack([new_x.sub_(x), new_y.sub_(y)], dim=1)

    def box(self, times: list[int], extent: tuple[int, int]) -> np.ndarray:
        """Frame coordinates that hold a texture of `extent` (h, w) at all of `times`: (left, top, right, bottom)."""
        half = np.array([extent[1], extent[0]]) / 2 + sum(np.abs(ripple.wave[0]).max() for ripple in self.ripples)
        for axis, wave in enumerate((self.wave_x, self.wave_y)):
            if wave is not None:
                half[axis] += np.abs(wave[0]).max()
        corners = np.array([[i * half[0], j * half[1], 1.0] for i in (-1, 1) for j in (-1, 1)])
        points = self.matrices[times] @ corners.T  # (T, 3, 4)
        points = points[:, :2] / points[:, 2:]
        return np.concatenate([points.min(axis=(0, 2)), points.max(axis=(0, 2))])

    def is_static(self) -> bool:
        """True where no frame differs from the first, so that the flow is zero and not merely tiny."""
        waves = [w for w in (self.wave_x, self.wave_y, *(r.wave for r in self.ripples)) if w is not None]
        return all(np.all(a == a[:1]) for a in [self.matrices, *(w[0] for w in waves), *(w[1] for w in waves)])


def _project(matrices: np.ndarray, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Points through one homography per frame; matrices (T, 3, 3), x and y broadcast to (T, H, W)."""
    matrices = matrices / matrices[:, 2:, 2:]
    m = send(matrices.astype(np.float32), x.device)[:, :, :, None, None]  # (T, 3, 3, 1, 1)
    new_x = torch.addcmul(m[:, 0, 0] * x, m[:, 0, 1], y).add_(m[:, 0, 2])
    new_y = torch.addcmul(m[:, 1, 0] * x, m[:, 1, 1], y).add_(m[:, 1, 2])
    if np.any(matrices[:, 2, :2]):
        depth = torch.addcmul(m[:, 2, 0] * x, m[:, 2, 1], y).add_(1).reciprocal_()
        new_x, new_y = new_x.mul_(depth), new_y.mul_(depth)
    return new_x, new_y


def _wave(wave: Wave, times: list[int], along: torch.Tensor) -> torch.Tensor:
    amplitude, phase = (send(v[times].astype(np.float32), along.device)[:, None, None] for v in wave[:2])
    return along.mul(wave[2]).add_(phase).sin_().mul_(amplitude)


def smooth_path(rng: np.random.Generator, length: int, speed: float, limit: float) -> np.ndarray:
    """A smooth path through 0 at the first frame that starts at about `speed` a frame and stays within 2 `limit`."""
    if speed == 0:
        return np.zeros(length)
    frequency = max(rng.uniform(0.01, 0.05), abs(speed) / (2 * math.pi * limit))
    phase = rng.uniform(-0.7, 0.7)
    angle = 2 * math.pi * frequency * np.arange(length) + phase
    return speed / (2 * math.pi * frequency) * (np.sin(angle) - math.sin(phase))


def log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return math.exp(rng.uniform(math.log(low), math.log(high)))


def similarity(x: ArrayLike, y: ArrayLike, angle: ArrayLike = 0.0, scale: ArrayLike = 1.0) -> np.ndarray:
    """Matrices (T, 3, 3): scale, turn by `angle` (radians), then shift by (x, y); each (T,), or a number for all T."""
    x, y, angle, scale = np.broadcast_arrays(*(np.atleast_1d(np.asarray(v, float)) for v in (x, y, angle, scale)))
    cos, sin, zero, one = scale * np.cos(angle), scale * np.sin(angle), np.zeros_like(x), np.ones_like(x)
    return np.stack([cos, -sin, x, sin, cos, y, zero, zero, one], axis=-1).reshape(-1, 3, 3)


def keep_in_view(track: np.ndarray, half: np.ndarray) -> np.ndarray:
    """Pull a track of centres (T, 2) smoothly back into the box |x| < half; nearly the identity in its middle."""
    return track / (1 + (np.abs(track) / half) ** 4) ** 0.25
