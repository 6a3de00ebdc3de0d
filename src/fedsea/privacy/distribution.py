"""Privacy losses as masses on a grid: the arithmetic of every numeric accountant.

For a pair of laws P, Q the privacy loss is log P(y)/Q(y) with y drawn from P. A `LossDistribution`
has masses at multiples of one step and a rest at infinity. It belongs to a pair that dominates the
true one: delta is never too small, at any epsilon, before and after composition.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy import fft, special

from fedsea.errors import ConfigError

Floats = NDArray[np.float64]

_LOG_TAIL = math.log(1e-15)
_ROUNDING, _ROUNDING_OF_POWER = 1e-13, 3e-17
"""Mass at infinity for a transform and for each release in it: more than what rounding moved in
comparisons with exact binomial tails (1e-13 at 10^4 releases, 1.3e-9 at 10^8)."""

_TILTS = np.geomspace(1e-3, 1e3, 200)
_MOST_POINTS = 1 << 24
_MOST_SAMPLES = 1 << 16


@dataclass(frozen=True)
class LossDistribution:
    """Mass `masses[i]` at the loss (lowest + i) * step, and the mass `infinite` at infinity."""

    step: float
    lowest: int
    masses: tuple[float, ...]
    infinite: float = 0.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.step) and self.step > 0 and self.masses):
            raise ConfigError("losses on a grid need a positive step and at least one mass")
        total = math.fsum(self.masses) + self.infinite
        if min(*self.masses, self.infinite, 0.0) < 0 or not abs(total - 1) < 1e-6:
            raise ConfigError("the masses of a loss distribution must be a probability law")

    @cached_property
    def _array(self) -> Floats:
        return np.asarray(self.masses, dtype=np.float64)

    @cached_property
    def _losses(self) -> Floats:
        return np.arange(self.lowest, self.lowest + len(self.masses), dtype=np.float64) * self.step

    def delta(self, epsilon: float) -> float:
        """sum of mass (1 - e^(epsilon - loss)) over losses above epsilon, and what is infinite."""
        first = max(0, math.floor(epsilon / self.step) + 1 - self.lowest)
        excess = -np.expm1(np.minimum(0.0, epsilon - self._losses[first:]))
        return min(1.0, float(self._array[first:] @ excess) + self.infinite)

    def power(self, times: int) -> LossDistribution:
        """`times` independent losses added, by a Fourier transform."""
        if times == 1:
            return self
        if times == 0:
            return LossDistribution(self.step, 0, (1.0,))
        low, high = self._reach(times)
        size = _size(high - low + 1)
        spectrum = fft.rfft(self._folded(size)) ** times
        finite = np.roll(fft.irfft(spectrum, size), times * self.lowest - low)
        kept = np.maximum(finite[: high - low + 1], 0.0)
        infinite = _ROUNDING_OF_POWER * times - math.expm1(times * math.log1p(-self.infinite))
        return _normalized(self.step, low, kept, infinite)

    def plus(self, other: LossDistribution) -> LossDistribution:
        """The sum of this loss and an independent other on the same grid."""
        if self.step != other.step:
            raise ConfigError("losses on different grids cannot be added")
        size = len(self.masses) + len(other.masses) - 1
        padded = _size(size)
        spectrum = fft.rfft(self._array, padded) * fft.rfft(other._array, padded)
        masses = np.maximum(fft.irfft(spectrum, padded)[:size], 0.0)
        infinite = 1 - (1 - self.infinite) * (1 - other.infinite)
        return _normalized(self.step, self.lowest + other.lowest, masses, infinite)

    def _folded(self, size: int) -> Floats:
        return np.bincount(
            np.arange(len(self.masses)) % size, weights=self._array, minlength=size
        ).astype(np.float64)

    def _reach(self, times: int) -> tuple[int, int]:
        """Grid points beyond which the sum of `times` losses has next to no mass (Chernoff)."""
        offsets = np.flatnonzero(self._array).astype(np.float64)
        present = self._array[self._array > 0]
        mean = float(offsets @ present)
        spread = math.sqrt(max(float((offsets - mean) ** 2 @ present), 1e-12))
        tilts = _TILTS / (spread * math.sqrt(times))
        logs = np.log(present)
        ends = []
        for sign in (-1.0, 1.0):
            grown = special.logsumexp(sign * tilts[:, None] * (offsets - mean) + logs, axis=1)
            ends.append(float(((times * grown - _LOG_TAIL) / tilts).min()))
        low = max(0, math.floor(times * mean - ends[0]))
        high = min(times * (len(self.masses) - 1), math.ceil(times * mean + ends[1]))
        return low + times * self.lowest, high + times * self.lowest


def _size(points: int) -> int:
    if points > _MOST_POINTS:
        raise ConfigError("these releases are too many and too costly to be composed on a grid")
    return int(fft.next_fast_len(points, real=True))


def _normalized(step: float, lowest: int, masses: Floats, infinite: float) -> LossDistribution:
    """What was cut off or lost to rounding counts as infinite."""
    infinite = min(1.0, max(0.0, infinite) + _ROUNDING)
    finite = float(masses.sum())
    scaled = masses * ((1 - infinite) / finite) if finite > 0 else masses
    return LossDistribution(step, lowest, tuple(scaled.tolist()), infinite)


def dominating(step: float, deltas: Sequence[float]) -> LossDistribution:
    """The least law on the grid that dominates a symmetric curve known at grid points.

    delta is convex in e^epsilon, so the chords between known points lie on or above it; the masses
    are the changes of slope ("connect the dots", Doroshenko et al., arXiv 2207.04380). In a
    symmetric pair the mass at -l is e^-l times the mass at l, which also avoids the differences of
    numbers close to 1 at negative epsilon.

    Args:
        step: distance of the points.
        deltas: falling values of the curve at 0, step, 2 step and so on. What the last one leaves
            counts as infinite.
    """
    values = np.minimum.accumulate(np.clip(np.asarray(deltas, dtype=np.float64), 0.0, 1.0))
    falls = -np.diff(values)
    leaving = np.append(falls[1:] * (math.exp(-step) / -math.expm1(-step)), 0.0)
    above = np.maximum(falls / -math.expm1(-step) - leaving, 0.0)
    below = above * np.exp(-step * np.arange(1, len(above) + 1, dtype=np.float64))
    infinite = float(values[-1])
    middle = max(0.0, 1 - infinite - math.fsum(above) - math.fsum(below))
    masses = np.concatenate([below[::-1], [middle], above])
    masses *= (1 - infinite) / max(masses.sum(), np.finfo(np.float64).tiny)
    return LossDistribution(step, -len(above), tuple(masses.tolist()), infinite)


def sampled(delta: Callable[[float], float], step: float, reach: float) -> LossDistribution:
    """`dominating` for a curve given as a function, up to the epsilon `reach`."""
    count = math.ceil(reach / step)
    if count > _MOST_SAMPLES:
        raise ConfigError("these losses differ too much in size to be composed on one grid")
    return dominating(step, [delta(index * step) for index in range(count + 1)])
