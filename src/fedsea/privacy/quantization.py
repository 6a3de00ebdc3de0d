"""Mechanisms whose output is a few levels: stochastic quantization (DEL) and its ternary kin.

Both clamp every coordinate to [-clip, clip] and draw a count for it; counts are what travels. A
count K of u stands for A (2 K / u - 1), an unbiased estimate of the clamped coordinate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedsea.errors import ConfigError
from fedsea.privacy.clipping import checked_rows
from fedsea.privacy.losses import BinomialLoss, DiscreteLoss, LossDistribution
from fedsea.privacy.mechanism import Mechanism, checked_width, number_text, positive
from fedsea.privacy.noise import NoiseSource

_MOST_BITS = 8
_BERRY_ESSEEN = 0.56


@dataclass(frozen=True, eq=False, slots=True)
class StochasticQuantization(Mechanism):
    """Counts of n bits with a binomial law (DEL, arXiv 2602.11513, definition 4.1).

    K ~ Binomial(u, (A + v) / (2 A)), u = 2^bits - 1. A = clip sqrt(1 + 4 u width / mu^2) is where
    the paper's theorem 4.2 gives `mu`; the accountant uses the exact law instead (`loss`).

    Args:
        bits: 1 to 8.
        clip: bound of every coordinate.
        mu: the paper's figure for one row; the exact guarantee is that of `loss()`.
        width: numbers in a row; more of them need more noise for the same mu.
    """

    name: ClassVar[str] = "stochastic-quantization"

    bits: int
    clip: float
    mu: float
    width: int

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= _MOST_BITS:
            raise ConfigError(f"bits={self.bits}; it must be 1 to {_MOST_BITS}")
        positive("clip", self.clip)
        positive("mu", self.mu)
        checked_width(self.width)
        if not self._top < 1:
            raise ConfigError(f"mu={self.mu} leaves no noise in the counts; lower it")

    @property
    def levels(self) -> int:
        return (1 << self.bits) - 1

    @property
    def scale(self) -> float:
        return self.clip * math.sqrt(1 + 4 * self.levels * self.width / (self.mu * self.mu))

    @property
    def sensitivity(self) -> float:
        return 2 * self.clip * math.sqrt(self.width)

    def protect(self, rows: Tensor, noise: NoiseSource) -> Tensor:
        exact = checked_rows(rows)
        self._fits(exact, self.width)
        return torch.from_numpy(noise.binomial(self.levels, self._chances(exact).numpy()))

    def _chances(self, rows: Tensor) -> Tensor:
        return 0.5 + rows.clamp(-self.clip, self.clip) / (2 * self.scale)

    @property
    def _top(self) -> float:
        """The chance of a coordinate at the clip."""
        return 0.5 + self.clip / (2 * self.scale)

    def loss(self) -> BinomialLoss:
        """Exact, for two rows at opposite corners of the box."""
        return BinomialLoss(self.levels * self.width, self._top)

    def paper_mu(self) -> float:
        """mu of theorem 4.2, which holds only together with `paper_gamma`."""
        spread = math.sqrt(self.scale**2 - self.clip**2)
        return 2 * self.clip * math.sqrt(self.levels * self.width) / spread

    def paper_gamma(self) -> float:
        """gamma of theorem 4.2: f(a) >= G_mu(a + gamma) - gamma; usually far above any delta."""
        ratio = self.clip / self.scale
        moments = (1 - ratio) / 2 * (1 + ratio) ** 3 + (1 + ratio) / 2 * (1 - ratio) ** 3
        spread: float = (1 - ratio**2) ** 1.5 * math.sqrt(self.levels * self.width)
        return _BERRY_ESSEEN * moments / spread

    def _scores(self, released: Tensor, clean: Tensor) -> Tensor:
        """sum over coordinates of K log p + (u - K) log(1 - p)."""
        chances = self._chances(clean)
        return chances.log() @ released + (-chances).log1p() @ (self.levels - released)

    def parameters(self) -> dict[str, str]:
        return {
            "bits": str(self.bits),
            "clip": number_text(self.clip),
            "mu": number_text(self.mu),
            "width": str(self.width),
        }

    def describe(self) -> str:
        return (
            f"epsilon = {self.loss().pure_epsilon:.4g} at delta = 0 for each released row of "
            f"{self.width} counts of {self.bits} bits (about mu = {self.mu:.4g})"
        )


@dataclass(frozen=True, eq=False, slots=True)
class Ternary(Mechanism):
    """Three levels: B with chance (A + v) / 2B, -B with chance (A - v) / 2B, 0 otherwise.

    Jin et al. (arXiv 2302.09624). A B = clip^2 (1 + 4 width / mu^2) and A / B = sparsity, so that
    mu = 2 clip sqrt(width) / sqrt(A B - clip^2). Counts 0, 1, 2 stand for -B, 0, B.

    Args:
        clip: bound of every coordinate.
        mu: the Gaussian figure for one row; the exact guarantee is that of `loss()`.
        sparsity: chance that a coordinate is not 0, at most 1.
        width: numbers in a row.
    """

    name: ClassVar[str] = "ternary"

    clip: float
    mu: float
    sparsity: float
    width: int

    def __post_init__(self) -> None:
        positive("clip", self.clip)
        positive("mu", self.mu)
        checked_width(self.width)
        if not 0 < self.sparsity <= 1:
            raise ConfigError(f"sparsity={self.sparsity}; it must be above 0 and at most 1")
        if not self._top < 1:
            raise ConfigError(
                f"mu={self.mu} with sparsity={self.sparsity} leaves no noise in the signs; "
                "lower mu or raise sparsity"
            )

    @property
    def levels(self) -> int:
        return 2

    @property
    def amplitude(self) -> float:
        """A."""
        return self.clip * math.sqrt(self.sparsity * (1 + 4 * self.width / (self.mu * self.mu)))

    @property
    def scale(self) -> float:
        return self.amplitude / self.sparsity

    @property
    def sensitivity(self) -> float:
        return 2 * self.clip * math.sqrt(self.width)

    def protect(self, rows: Tensor, noise: NoiseSource) -> Tensor:
        exact = checked_rows(rows)
        self._fits(exact, self.width)
        up = noise.bernoulli(self._chances(exact).numpy())
        if self.sparsity == 1:
            return torch.from_numpy(2 * up)
        kept = noise.bernoulli(torch.full_like(exact, self.sparsity).numpy())
        return torch.from_numpy(1 - kept + 2 * kept * up)

    def _chances(self, rows: Tensor) -> Tensor:
        """Of a positive sign, given that the coordinate is not 0."""
        return 0.5 + rows.clamp(-self.clip, self.clip) / (2 * self.amplitude)

    @property
    def _top(self) -> float:
        """The chance of a positive sign at the clip, given that there is a sign."""
        return 0.5 + self.clip / (2 * self.amplitude)

    def loss(self) -> BinomialLoss | DiscreteLoss:
        """Exact, for two rows at opposite corners: losses of -l, 0 and l for each coordinate.

        Without zeros it is the loss of counts of one bit.
        """
        signs = BinomialLoss(self.width, self._top)
        if self.sparsity == 1:
            return signs
        masses = (self.sparsity * (1 - self._top), 1 - self.sparsity, self.sparsity * self._top)
        return DiscreteLoss(LossDistribution(signs.step, -1, masses), times=self.width)

    def _scores(self, released: Tensor, clean: Tensor) -> Tensor:
        """The sum of log chances of the signs that are not 0; a 0 says nothing."""
        chances = self._chances(clean)
        up = (released == 2).to(torch.float64)
        down = (released == 0).to(torch.float64)
        return chances.log() @ up + (-chances).log1p() @ down

    def parameters(self) -> dict[str, str]:
        return {
            "clip": number_text(self.clip),
            "mu": number_text(self.mu),
            "sparsity": number_text(self.sparsity),
            "width": str(self.width),
        }

    def describe(self) -> str:
        signs = BinomialLoss(self.width, self._top)
        return (
            f"epsilon = {signs.pure_epsilon:.4g} at delta = 0 for each released row of {self.width} ternary "
            f"counts (about mu = {self.mu:.4g})"
        )
