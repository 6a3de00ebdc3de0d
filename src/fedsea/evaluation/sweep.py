"""Mechanisms from no protection to full loss, at noise that is comparable between them.

A sweep is made for one cut of one model from public rows there. `ratio` is the standard deviation
of the noise on a coordinate, in units of the root mean square of the rows. With rows of width d,
clip norm C and coordinate clip c, solved for the mechanism's own parameter:

    fedsea                    scale sqrt(pi/2)      = ratio rms
    gaussian                  2 C / mu              = ratio rms
    stochastic-quantization   2 c sqrt(d) / mu      = ratio rms   (threats: Var = (A^2 - v^2) / u)
    ternary                   2 c sqrt(d) / mu      = ratio rms   (Var = A B - v^2)
    metric-dp                 sqrt(d) / eta         = ratio rms   (norm about d / eta)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from fedsea.errors import ConfigError
from fedsea.evaluation.verdict import PUBLISHED_SCALES
from fedsea.privacy.calibration import Calibration

RATIOS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
BITS = 4
SPARSITY = 0.5


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
    calibration = Calibration.of(rows, bottom=0, model="")
    width = calibration.width
    rms = _rms(rows)
    norm, clip = calibration.clip_norm(centered=False), calibration.clip()
    box = 2 * clip * math.sqrt(width)
    found = []
    for ratio in ratios:
        noise = ratio * rms
        found += [
            f"fedsea:scale={_short(noise / math.sqrt(math.pi / 2))}",
            f"gaussian:clip_norm={_short(norm)},mu={_short(2 * norm / noise)}",
            f"stochastic-quantization:bits={BITS},clip={_short(clip)},mu={_short(box / noise)}",
            f"ternary:clip={_short(clip)},mu={_short(box / noise)},sparsity={SPARSITY}",
            f"metric-dp:eta={_short(math.sqrt(width) / noise)}",
        ]
    return tuple(sorted(found, key=lambda spec: spec.partition(":")[0]))


def _rms(rows: Sequence[Tensor]) -> float:
    squares = sum(float(chunk.double().square().sum()) for chunk in rows)
    return math.sqrt(squares / max(1, sum(chunk.numel() for chunk in rows)))


def _short(value: float) -> str:
    """Three figures, as people would write the parameter."""
    return f"{value:.3g}"
