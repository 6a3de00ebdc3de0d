"""What the server would compute with: public rows released through projection and mechanism.

As the client does it: rows of the public prefix are sent without noise where the format allows it,
the others are protected, text by text. Noise of a training is a function of its seed and step, so
that it can be repeated; it protects nothing and need not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsea.model.projection import Projection
from fedsea.privacy.clipping import Clipping
from fedsea.privacy.gaussian import FedSEAGaussian, Gaussian
from fedsea.privacy.mechanism import Mechanism
from fedsea.privacy.metric import MetricDP
from fedsea.privacy.noise import NoiseSource
from fedsea.privacy.quantization import StochasticQuantization, Ternary


@dataclass(frozen=True, slots=True)
class Cut:
    """What stands at the cut, and how many rows of each text are public.

    `projection` and `mechanism` are None where there is none.
    """

    prefix: int
    mechanism: Mechanism | None = None
    projection: Projection | None = None

    def narrow(self, rows: Tensor) -> Tensor:
        """Rows (B, T, hidden) as they enter the mechanism, (B, T, width)."""
        if self.projection is None:
            return rows
        return self.projection.encode(rows.flatten(0, 1)).view(*rows.shape[:2], -1)

    def release(self, rows: Tensor, noise: NoiseSource) -> Tensor:
        """Narrow rows (B, T, width) as the server reads them, the same shape; no gradient."""
        if self.mechanism is None:
            return rows.detach()
        released = rows.detach().clone()
        first = self._first
        for text in released:
            text[first:] = self.mechanism.values(self.mechanism.protect(text[first:], noise))
        return released

    @property
    def clip(self) -> Clip:
        """What the mechanism does to rows besides noise."""
        return Clip.of(self.mechanism)

    def let_through(self, rows: Tensor) -> Tensor:
        """Narrow rows (B, T, width) without noise, as a differentiable function."""
        first = self._first
        return torch.cat([rows[:, :first], self.clip(rows[:, first:])], 1)

    def widen(self, released: Tensor) -> Tensor:
        """Released rows (B, T, width) as they enter the trunk, (B, T, hidden)."""
        if self.projection is None:
            return released
        return self.projection.decode(released.flatten(0, 1)).view(*released.shape[:2], -1)

    @property
    def _first(self) -> int:
        """The first row that is protected: a session whose format is counts sends nothing else."""
        return 0 if self.mechanism is not None and self.mechanism.levels else self.prefix


def seeded_noise(seed: int, step: int) -> NoiseSource:
    """Noise for one step of a training on public text."""
    return NoiseSource(f"training {seed} {step}".encode())


@dataclass(frozen=True, slots=True)
class Clip:
    """What a mechanism lets through without its noise, as a differentiable function.

    Attributes:
        radius: largest magnitude; infinite where nothing is clipped.
        dims: what it is the norm of: () single coordinates, (-1,) rows, (-2, -1) texts.
        center: (width,) what is taken off first; None is the origin.
    """

    radius: float = math.inf
    dims: tuple[int, ...] = (-1,)
    center: Tensor | None = None

    @classmethod
    def of(cls, mechanism: Mechanism | None) -> Clip:
        """The clipping of a mechanism."""
        match mechanism:
            case Gaussian(clip_norm=radius, by=by, center=center):
                return cls(radius, (-1,) if by is Clipping.ROW else (-2, -1), center)
            case FedSEAGaussian(clip_norm=float(radius)) | MetricDP(clip_norm=float(radius)):
                return cls(radius)
            case StochasticQuantization(clip=radius) | Ternary(clip=radius):
                return cls(radius, ())
            case _:
                return cls()

    def magnitudes(self, rows: Tensor) -> Tensor:
        """What is held against the radius, for rows (B, T, width); dimensions of norms are 1."""
        away = rows if self.center is None else rows - self.center.to(rows.dtype)
        return away.norm(dim=self.dims, keepdim=True) if self.dims else away.abs()

    def __call__(self, rows: Tensor) -> Tensor:
        """Rows (B, T, width) clipped."""
        if math.isinf(self.radius):
            return rows
        tiny = torch.finfo(rows.dtype).tiny
        factors = (self.radius / self.magnitudes(rows).clamp_min(tiny)).clamp_max(1.0)
        if self.center is None:
            return rows * factors
        center = self.center.to(rows.dtype)
        return center + (rows - center) * factors
