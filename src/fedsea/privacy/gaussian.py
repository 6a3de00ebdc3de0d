"""Gaussian noise: the calibrated mechanism, and FedSEA's noise for parity with the paper."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from fedsea.errors import ConfigError
from fedsea.privacy.clipping import Clipping, checked_rows, clip
from fedsea.privacy.gaussian_loss import GaussianLoss, gaussian_mu
from fedsea.privacy.grid import grid_step, on_grid
from fedsea.privacy.mechanism import Mechanism, number_text, positive
from fedsea.privacy.noise import NoiseSource


@dataclass(frozen=True, eq=False, slots=True)
class Gaussian(Mechanism):
    """Clipping and Gaussian noise: exactly mu-GDP for each release.

    y = centre + clip(x - centre) + N(0, sigma^2), sigma = 2 clip_norm / mu (Balle and Wang, arXiv
    1805.06530; the sensitivity is that of replacing one release by any other).

    Args:
        clip_norm: radius C of the ball around the centre.
        mu: what one release costs.
        by: what one release is: a row, or all rows of a chunk under one Frobenius norm.
        center: [width], public; None is the origin.
    """

    name: ClassVar[str] = "gaussian"

    clip_norm: float
    mu: float
    by: Clipping = Clipping.ROW
    center: Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        positive("clip_norm", self.clip_norm)
        positive("mu", self.mu)
        object.__setattr__(self, "by", checked_clipping(self.by))
        if self.center is not None:
            object.__setattr__(self, "center", checked_center(self.center))

    @classmethod
    def calibrated(
        cls,
        epsilon: float,
        delta: float,
        clip_norm: float,
        by: Clipping = Clipping.ROW,
        center: Tensor | None = None,
    ) -> Gaussian:
        """The least noise with which one release is (epsilon, delta) differentially private."""
        return cls(clip_norm, gaussian_mu(epsilon, delta), by, center)

    @property
    def sensitivity(self) -> float:
        return 2 * self.clip_norm

    @property
    def sigma(self) -> float:
        """Standard deviation of the noise of each coordinate."""
        return self.sensitivity / self.mu

    def protect(self, rows: Tensor, noise: NoiseSource) -> Tensor:
        clipped = self._clipped(checked_rows(rows), self.by)
        return _noised(clipped, self.sigma, noise)

    def _clipped(self, rows: Tensor, by: Clipping) -> Tensor:
        if self.center is None:
            return clip(rows, self.clip_norm, by)
        if len(self.center) != rows.shape[1]:
            raise ConfigError(
                f"rows of width {rows.shape[1]} do not fit a centre of width {len(self.center)}"
            )
        return self.center + clip(rows - self.center, self.clip_norm, by)

    def loss(self) -> GaussianLoss:
        return GaussianLoss(self.mu, self.mu / 2)

    def releases(self, rows: int) -> int:
        return rows if self.by is Clipping.ROW else min(rows, 1)

    def _scores(self, released: Tensor, clean: Tensor) -> Tensor:
        """-|y - clipped candidate|^2 / 2 sigma^2.

        Under the Frobenius norm the factor of a row depends on all rows of its chunk, which one
        row does not show. There each candidate is scored with the factor in (0, 1] that explains
        the release best: a profile likelihood, exact where the chunk was not clipped.
        """
        if self.by is Clipping.ROW:
            return _score(released, self._clipped(clean, Clipping.ROW), self.sigma)
        origin = torch.zeros((), dtype=torch.float64) if self.center is None else self.center
        away, seen = clean - origin, released - origin
        squares = away.square().sum(1).clamp_min(torch.finfo(torch.float64).tiny)
        factors = ((away @ seen) / squares).clamp(0.0, 1.0)
        return _score(seen, away * factors[:, None], self.sigma)

    def parameters(self) -> dict[str, str]:
        text = {"clip_norm": number_text(self.clip_norm), "mu": number_text(self.mu)}
        text["by"] = self.by.value
        if self.center is not None:
            text["center"] = center_fingerprint(self.center)
        return text

    def describe(self) -> str:
        what = "row" if self.by is Clipping.ROW else "chunk of rows"
        return f"mu = {self.mu:.4g} for each released {what}, clipped to norm {self.clip_norm:.4g}"


@dataclass(frozen=True, eq=False, slots=True)
class FedSEAGaussian(Mechanism):
    """The noise of FedSEA (sigma = scale sqrt(pi/2)), at inference as in training.

    Without a clip norm nothing bounds what a row can hold: not differentially private, whatever
    the scale. With one it is accounted as `Gaussian` is.
    """

    name: ClassVar[str] = "fedsea"

    noise_scale: float
    clip_norm: float | None = None

    def __post_init__(self) -> None:
        positive("scale", self.noise_scale)
        if self.clip_norm is not None:
            positive("clip_norm", self.clip_norm)

    @property
    def sensitivity(self) -> float:
        return math.inf if self.clip_norm is None else 2 * self.clip_norm

    @property
    def sigma(self) -> float:
        """Standard deviation of the noise of each coordinate."""
        return self.noise_scale * math.sqrt(math.pi / 2)

    def protect(self, rows: Tensor, noise: NoiseSource) -> Tensor:
        return _noised(self._clipped(checked_rows(rows)), self.sigma, noise)

    def _clipped(self, rows: Tensor) -> Tensor:
        return clip(rows, self.sensitivity / 2, Clipping.ROW)

    def loss(self) -> GaussianLoss | None:
        if self.clip_norm is None:
            return None
        mu = self.sensitivity / self.sigma
        return GaussianLoss(mu, mu / 2)

    def _scores(self, released: Tensor, clean: Tensor) -> Tensor:
        return _score(released, self._clipped(clean), self.sigma)

    def parameters(self) -> dict[str, str]:
        text = {"scale": number_text(self.noise_scale)}
        if self.clip_norm is not None:
            text["clip_norm"] = number_text(self.clip_norm)
        return text

    def describe(self) -> str:
        loss = self.loss()
        if loss is None:
            return f"not differentially private: noise of scale {self.noise_scale:.4g}, no clipping"
        return f"mu = {loss.mu():.4g} for each released row, clipped to norm {self.clip_norm:.4g}"


def checked_clipping(by: Clipping | str) -> Clipping:
    """`row` or `frobenius`.

    Raises:
        ConfigError: another word.
    """
    try:
        return Clipping(by)
    except ValueError:
        raise ConfigError(f"by={by}; it must be row or frobenius") from None


def checked_center(center: Tensor) -> Tensor:
    """A private float64 copy of a public centre.

    Raises:
        ConfigError: not a finite vector.
    """
    if center.dim() != 1 or len(center) == 0 or not center.is_floating_point():
        raise ConfigError("a centre must be a floating vector of the width of the rows")
    exact = center.detach().to(device="cpu", dtype=torch.float64, copy=True)
    if not bool(torch.isfinite(exact).all()):
        raise ConfigError("a centre holds NaN or infinity; compute it again from public text")
    return exact


def center_fingerprint(center: Tensor) -> str:
    """Sixteen hexadecimal digits that stand for a centre in specs."""
    return hashlib.sha256(center.numpy().astype("<f8").tobytes()).hexdigest()[:16]


def _noised(clipped: Tensor, sigma: float, noise: NoiseSource) -> Tensor:
    drawn = torch.from_numpy(noise.normal(*clipped.shape))
    return on_grid(clipped + sigma * drawn, grid_step(sigma))


def _score(released: Tensor, means: Tensor, sigma: float) -> Tensor:
    return (released - means).square().sum(1) / (-2 * sigma * sigma)
