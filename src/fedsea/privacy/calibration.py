"""What is publicly known of the rows at a cut: their mean, their spread and their norms.

Clipping around a public center costs no privacy and allows a smaller clip norm, which means less
noise. All numbers come from public text; numbers of private text would themselves be releases.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from fedsea import artifacts
from fedsea.errors import ConfigError, FingerprintMismatch

KIND = "calibration"

_POINTS = 1001
"""Quantiles that are kept: of 0, 0.001, ..., 1."""
_MOST_SORTED = 1 << 22
_HEX = re.compile(r"[0-9a-f]{64}")
_TABLES = ("norms", "centered_norms", "coordinates")


@dataclass(frozen=True, slots=True, eq=False)
class Calibration:
    """Statistics of `rows` public rows of one checkpoint at one cut.

    Attributes:
        bottom: blocks before the cut.
        model: fingerprint of the checkpoint.
        projection: fingerprint of the projection whose encoded rows these are; "" for none.
        rows: how many rows were measured.
        mean: (width,) mean row.
        scale: (width,) standard deviation of each coordinate.
        norms: (1001,) quantiles of the rows' norms.
        centered_norms: (1001,) the same after the mean was taken off.
        coordinates: (1001,) quantiles of the coordinates' magnitudes, all together.
    """

    bottom: int
    model: str
    projection: str
    rows: int
    mean: Tensor
    scale: Tensor
    norms: Tensor
    centered_norms: Tensor
    coordinates: Tensor

    @classmethod
    def of(cls, chunks: Sequence[Tensor], bottom: int, model: str, projection: str = "") -> Self:
        """Measure public rows, given as tensors (n, width).

        Raises:
            ConfigError: fewer than two rows, or numbers that are not finite.
        """
        rows = torch.cat([chunk.detach().to("cpu", torch.float64) for chunk in chunks] or [_NONE])
        if len(rows) < 2:
            raise ConfigError("a calibration needs two rows or more; give a longer public text")
        if not bool(torch.isfinite(rows).all()):
            raise ConfigError("a row of the public text is not finite; check the checkpoint")
        mean = rows.mean(0)
        centered = rows - mean
        return cls(
            bottom=bottom,
            model=model,
            projection=projection,
            rows=len(rows),
            mean=mean.float(),
            scale=centered.square().mean(0).sqrt().float(),
            norms=_quantiles(rows.norm(dim=1)),
            centered_norms=_quantiles(centered.norm(dim=1)),
            coordinates=_quantiles(rows.abs().flatten()),
        )

    @property
    def width(self) -> int:
        """Numbers in a row."""
        return len(self.mean)

    def clip_norm(self, share: float = 0.99, centered: bool = True) -> float:
        """The norm that this share of the public rows does not exceed.

        Raises:
            ConfigError: a share outside 0 to 1.
        """
        return _at(self.centered_norms if centered else self.norms, share)

    def clip(self, share: float = 0.999) -> float:
        """The magnitude that this share of all public coordinates does not exceed.

        Raises:
            ConfigError: a share outside 0 to 1.
        """
        return _at(self.coordinates, share)

    def check_fits(self, width: int, bottom: int, model: str, projection: str = "") -> None:
        """Refuse a calibration of something else.

        Raises:
            ConfigError: rows of another width, another cut or another projection.
            FingerprintMismatch: another checkpoint.
        """
        if (width, bottom) != (self.width, self.bottom):
            raise ConfigError(
                f"the calibration is of rows of {self.width} numbers at bottom={self.bottom}, not "
                f"of {width} at bottom={bottom}; calibrate this cut"
            )
        if projection != self.projection:
            raise ConfigError("the calibration is of another projection; calibrate with this one")
        if model != self.model:
            raise FingerprintMismatch(
                f"the calibration is of the checkpoint {self.model[:12]} and this one is "
                f"{model[:12]}; calibrate this checkpoint"
            )

    def save(self, path: str | Path) -> None:
        """Write it to a file.

        Raises:
            ConfigError: the file cannot be written.
        """
        description: dict[str, Any] = {
            "width": self.width,
            "bottom": self.bottom,
            "model": self.model,
            "projection": self.projection,
            "rows": self.rows,
        }
        tensors = {name: getattr(self, name) for name in ("mean", "scale", *_TABLES)}
        artifacts.write(Path(path), KIND, description, tensors)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read it from a file.

        Raises:
            CheckpointError: the file is missing, corrupt, or holds what is not known.
        """
        artifact = artifacts.read(Path(path), KIND)
        artifact.expect_only(
            {"width", "bottom", "model", "projection", "rows"}, {"mean", "scale", *_TABLES}
        )
        width, bottom, rows = (artifact.value(key, int) for key in ("width", "bottom", "rows"))
        model, projection = (artifact.value(key, str) for key in ("model", "projection"))
        if width < 1 or bottom < 0 or rows < 2:
            raise artifact.corrupt(f"it says width={width}, bottom={bottom}, rows={rows}")
        if not _HEX.fullmatch(model) or (projection and not _HEX.fullmatch(projection)):
            raise artifact.corrupt("a fingerprint in it is not 64 hex digits")
        tables = {name: artifact.tensor(name, (_POINTS,)) for name in _TABLES}
        scale = artifact.tensor("scale", (width,))
        if bool((scale < 0).any()) or any(
            bool((table < 0).any() or (table.diff() < 0).any()) for table in tables.values()
        ):
            raise artifact.corrupt("its quantiles do not grow from 0")
        return cls(
            bottom=bottom,
            model=model,
            projection=projection,
            rows=rows,
            mean=artifact.tensor("mean", (width,)),
            scale=scale,
            **tables,
        )


_NONE = torch.empty(0, 1, dtype=torch.float64)


def _quantiles(values: Tensor) -> Tensor:
    """Quantiles with linear interpolation; of very many values, of a random part of them."""
    if len(values) > _MOST_SORTED:
        chance = torch.Generator().manual_seed(0)
        values = values[torch.randint(len(values), (_MOST_SORTED,), generator=chance)]
    ordered = values.sort().values
    places = torch.linspace(0, len(ordered) - 1, _POINTS, dtype=torch.float64)
    low = places.long()
    high = (low + 1).clamp_max(len(ordered) - 1)
    return torch.lerp(ordered[low], ordered[high], places - low).float()


def _at(table: Tensor, share: float) -> float:
    if not 0 <= share <= 1:
        raise ConfigError(f"a share of {share} is no quantile; use 0 to 1")
    # Rounded up: at least this share lies below.
    return float(table[math.ceil(share * (_POINTS - 1))])
