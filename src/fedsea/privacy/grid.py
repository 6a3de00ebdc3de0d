"""Rounding of noised rows to a fixed grid.

The low bits of a floating sum depend on its terms (Mironov, CCS 2012). After noise is added,
every value is rounded to a power of two that depends on public parameters alone. Rounding is
post-processing: it costs no privacy; with a step of about sigma / 256 it costs no utility either.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_STEPS_PER_SIGMA = 256


def grid_step(sigma: float) -> float:
    """The largest power of two that is at most sigma / 256."""
    return 2.0 ** math.floor(math.log2(sigma / _STEPS_PER_SIGMA))


def on_grid(values: Tensor, step: float) -> Tensor:
    """Values rounded to multiples of `step`, fp32. Exact below 2^24 steps, fp32's own grid above."""
    return (torch.round(values / step) * step).to(torch.float32)
