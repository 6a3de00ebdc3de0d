"""Bounding what one release can hold: clipping around a public centre.

Clipping to a ball of radius C makes any two inputs at most 2 C apart (replace-one sensitivity).
The centre must be public: a mean of public text, never of the rows that are protected.
"""

from __future__ import annotations

import math
from enum import StrEnum

import torch
from torch import Tensor

from fedsea.errors import ConfigError, UnsafeRows


class Clipping(StrEnum):
    """What is bounded: every row by itself, or all rows of a chunk together (Frobenius norm)."""

    ROW = "row"
    FROBENIUS = "frobenius"


def checked_rows(rows: Tensor) -> Tensor:
    """Rows as float64, shape [n, width].

    Raises:
        UnsafeRows: a value is NaN or infinite; clipping would turn it into a harmless number or
            spread it, and either leaks.
        ConfigError: not a floating matrix.
    """
    if rows.dim() != 2 or rows.shape[1] == 0 or not rows.is_floating_point():
        raise ConfigError(
            f"rows of shape {list(rows.shape)} and {rows.dtype} cannot be protected; "
            "pass a floating tensor of shape [n, width]"
        )
    exact = rows.detach().to(device="cpu", dtype=torch.float64)
    if not bool(torch.isfinite(exact.sum())) and not bool(torch.isfinite(exact).all()):
        raise UnsafeRows("activations hold NaN or infinity; nothing was sent; check the model")
    return exact


def clip_rows(rows: Tensor, radius: float) -> Tensor:
    """Each row scaled to a Euclidean norm of at most `radius`; float64, direction kept."""
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return rows * _factors(norms, radius)


def clip_matrix(rows: Tensor, radius: float) -> Tensor:
    """All rows scaled together to a Frobenius norm of at most `radius`; float64."""
    return rows * _factors(torch.linalg.vector_norm(rows), radius)


def clip(rows: Tensor, radius: float, by: Clipping) -> Tensor:
    """Clip by row or by the norm of the whole matrix."""
    if math.isinf(radius):
        return rows
    return clip_rows(rows, radius) if by is Clipping.ROW else clip_matrix(rows, radius)


def _factors(norms: Tensor, radius: float) -> Tensor:
    return (radius / norms.clamp_min(torch.finfo(torch.float64).tiny)).clamp_max(1.0)
