"""Metric differential privacy (Split-and-Denoise, arXiv 2310.09130).

y = clip(clip(x) + z), z = r g/|g|: one radius r of Gamma(shape width, rate eta) for each row times a
uniform direction (g normal). Released code draws a radius for every coordinate, or one for a whole
batch; budgets that were measured with it do not carry over.

Two inputs at distance D are told apart with a loss of at most eta D. Inputs clipped to a ball are
at most 2 clip_norm apart, which bounds the loss of every row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedsea.errors import ConfigError
from fedsea.privacy.clipping import checked_rows, clip_rows
from fedsea.privacy.grid import grid_step, on_grid
from fedsea.privacy.losses import DiscreteLoss
from fedsea.privacy.mechanism import Mechanism, checked_width, number_text, positive
from fedsea.privacy.metric_loss import metric_loss
from fedsea.privacy.noise import NoiseSource
from fedsea.privacy.rays import log_ray_mass


@dataclass(frozen=True, eq=False, slots=True)
class MetricDP(Mechanism):
    """Noise whose density falls with its length: eta per unit of distance.

    Args:
        eta: loss per unit of distance.
        clip_norm: radius of the ball of inputs and of outputs. None: neither is clipped, any two
            inputs may be far apart and nothing is guaranteed for replacing one by another.
        width: numbers in a row; needed with clip_norm, because the loss depends on it.
    """

    name: ClassVar[str] = "metric-dp"

    eta: float
    clip_norm: float | None = None
    width: int | None = None

    def __post_init__(self) -> None:
        positive("eta", self.eta)
        if self.clip_norm is not None:
            positive("clip_norm", self.clip_norm)
            if self.width is None:
                raise ConfigError("mechanism metric-dp needs width=NUMBER beside clip_norm")
        if self.width is not None and checked_width(self.width) < 2:
            raise ConfigError("mechanism metric-dp needs rows of two numbers or more")

    @property
    def sensitivity(self) -> float:
        return math.inf if self.clip_norm is None else 2 * self.clip_norm

    def protect(self, rows: Tensor, noise: NoiseSource) -> Tensor:
        """The input is clipped, then the output; then values are rounded to a grid.

        Clipping the output and rounding are post-processing.
        """
        exact = checked_rows(rows)
        count, width = exact.shape
        if self.width is not None:
            self._fits(exact, self.width)
        direction = torch.from_numpy(noise.normal(count, width))
        radius = torch.from_numpy(noise.gamma(width, count)) / self.eta
        drawn = direction * (radius / torch.linalg.vector_norm(direction, dim=1))[:, None]
        return on_grid(self._clipped(self._clipped(exact) + drawn), self._step(width))

    def _clipped(self, rows: Tensor) -> Tensor:
        return rows if self.clip_norm is None else clip_rows(rows, self.clip_norm)

    def _step(self, width: int) -> float:
        """Grid for a coordinate: of its noise, or of the clipped output where that is smaller."""
        spread = math.sqrt(width) / self.eta
        if self.clip_norm is None:
            return grid_step(spread)
        return grid_step(min(spread, self.clip_norm / math.sqrt(width)))

    def loss(self) -> DiscreteLoss | None:
        if self.clip_norm is None or self.width is None:
            return None
        return metric_loss(self.eta, self.clip_norm, self.width)

    def _scores(self, released: Tensor, clean: Tensor) -> Tensor:
        """The density of the release: in the ball, or on its surface.

        Inside the ball the density is exp(-eta |y - x|). An output that was clipped lies on the
        sphere, at direction w; its density there is the mass of the ray beyond it, the integral
        over r >= clip_norm of r^(width-1) exp(-eta |r w - x|). A release within rounding of the
        sphere counts as clipped.
        """
        means = self._clipped(clean)
        norm = float(torch.linalg.vector_norm(released))
        slack = self._step(len(released)) * math.sqrt(len(released))
        if self.clip_norm is None or norm < self.clip_norm - slack:
            distances: Tensor = torch.linalg.vector_norm(released - means, dim=1)
            return -self.eta * distances
        return log_ray_mass(released / norm, means, self.clip_norm, self.eta)

    def parameters(self) -> dict[str, str]:
        text = {"eta": number_text(self.eta)}
        if self.clip_norm is not None:
            text["clip_norm"] = number_text(self.clip_norm)
        if self.width is not None:
            text["width"] = str(self.width)
        return text

    def describe(self) -> str:
        if self.clip_norm is None:
            return (
                "not differentially private: rows are not clipped; a loss of "
                f"{self.eta:.4g} for each unit of distance"
            )
        return (
            f"epsilon = {2 * self.eta * self.clip_norm:.4g} at delta = 0 for each released row, "
            f"clipped to norm {self.clip_norm:.4g}"
        )
