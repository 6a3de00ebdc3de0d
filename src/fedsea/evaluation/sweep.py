"""Mechanisms from no protection to full loss, at noise that is comparable between them.

A sweep is made for one cut of one model from public rows there. `ratio` is the standard deviation
of the noise on a coordinate, in units of the root mean square of the rows. With rows of width d,
clip norm C, coordinate clip c, u = 2^bits - 1 and A the amplitude of counts (threats 2.2, 2.5,
2.6), solved for each mechanism's own parameter:

    fedsea                    scale sqrt(pi / 2)               noise
    gaussian                  2 C / mu                         noise
    metric-dp                 sqrt(d) / eta                    noise, before the output is clipped
    stochastic-quantization   4 d c^2 / mu^2 + c^2 / u         noise^2
    ternary                   4 d c^2 / mu^2 + c^2             noise^2

Counts cannot have less noise than their grid: quantization takes more bits where it must, and the
ternary mechanism begins at its least noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from fedsea.errors import ConfigError
from fedsea.evaluation.verdict import PUBLISHED_SCALES
from fedsea.privacy.calibration import Calibration

RATIOS = (0.5, 1.0, 2.0, 4.0, 8.0)
BITS = (4, 8)
SPARSITY = 0.9
_TERNARY_SHARE = 0.95  # a tight clip: its noise is never below the clip
_MARGIN = 1.05  # over the least noise of a grid, where mu would be infinite


def published() -> tuple[str, ...]:
    """FedSEA's noise as the paper has it."""
    return tuple(f"fedsea:scale={scale:g}" for scale in PUBLISHED_SCALES)


def sweep(rows: Sequence[Tensor], ratios: Sequence[float] = RATIOS) -> tuple[str, ...]:
    """Specs of all mechanisms at all ratios for the cut of these public rows (n, width) each.

    Raises:
        ConfigError: a ratio is not positive, or there are too few rows.
    """
    if not all(math.isfinite(ratio) and ratio > 0 for ratio in ratios):
        raise ConfigError("the noise of a sweep is given in positive units of the signal")
    public = _Public.of(rows)
    makers = (public.fedsea, public.gaussian, public.metric, public.quantization, public.ternary)
    return tuple(dict.fromkeys(make(r * public.rms) for make in makers for r in ratios))


@dataclass(frozen=True, slots=True)
class _Public:
    """What is known of the rows at a cut, and specs of mechanisms with a given noise there."""

    width: int
    rms: float
    norm: float
    clip: float
    tight: float

    @classmethod
    def of(cls, rows: Sequence[Tensor]) -> _Public:
        known = Calibration.of(rows, bottom=0, model="")
        squares = sum(float(chunk.double().square().sum()) for chunk in rows)
        numbers = sum(chunk.numel() for chunk in rows)
        return cls(
            width=known.width,
            rms=math.sqrt(squares / numbers),
            norm=known.clip_norm(centered=False),
            clip=known.clip(),
            tight=known.clip(_TERNARY_SHARE),
        )

    def fedsea(self, noise: float) -> str:
        return f"fedsea:scale={_short(noise / math.sqrt(math.pi / 2))}"

    def gaussian(self, noise: float) -> str:
        return f"gaussian:clip_norm={_short(self.norm)},mu={_short(2 * self.norm / noise)}"

    def metric(self, noise: float) -> str:
        eta = _short(math.sqrt(self.width) / noise)
        return f"metric-dp:eta={eta},clip_norm={_short(self.norm)},width={self.width}"

    def quantization(self, noise: float) -> str:
        fitting = (bits for bits in BITS if self._grid(bits) * _MARGIN < noise)
        bits = next(fitting, max(BITS))
        mu = self._mu(noise, self.clip, self._grid(bits))
        return (
            f"stochastic-quantization:bits={bits},clip={_short(self.clip)},mu={_short(mu)},"
            f"width={self.width}"
        )

    def ternary(self, noise: float) -> str:
        least = self.tight / math.sqrt(SPARSITY)  # A > c, with A = sqrt(sparsity) noise
        mu = self._mu(max(noise, _MARGIN * least), self.tight, self.tight)
        return (
            f"ternary:clip={_short(self.tight)},mu={_short(mu)},sparsity={SPARSITY},"
            f"width={self.width}"
        )

    def _grid(self, bits: int) -> float:
        """The noise that rounding to counts makes at the clip, the least there is."""
        return self.clip / math.sqrt(2**bits - 1)

    def _mu(self, noise: float, clip: float, least: float) -> float:
        above = math.sqrt(max(noise, _MARGIN * least) ** 2 - least**2)
        return 2 * clip * math.sqrt(self.width) / above


def _short(value: float) -> str:
    """Three figures, as people would write the parameter."""
    return f"{value:.3g}"
