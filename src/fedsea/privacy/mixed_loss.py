"""Releases of different kinds composed: every curve laid on one grid, then added."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from fedsea.errors import ConfigError
from fedsea.privacy.distribution import LossDistribution, sampled
from fedsea.privacy.dominance import dominating_mu
from fedsea.privacy.loss import Json, PrivacyLoss, check_times

_TAIL = 1e-10
_BEYOND = 1e12
_POINTS_PER_REACH = 500


@dataclass(frozen=True)
class MixedLoss(PrivacyLoss):
    """Independent losses of symmetric pairs. Made by `losses.compose`.

    Never too small: each curve is replaced by the least one on the grid that dominates it, and
    1e-10 of each loss, or twice what is infinite in it already, counts as infinite.
    """

    kind: ClassVar[str] = "mixed"

    parts: tuple[PrivacyLoss, ...]

    def __post_init__(self) -> None:
        if not self.parts:
            raise ConfigError("a mixed loss needs at least one part")

    @cached_property
    def _total(self) -> LossDistribution:
        reaches = [part.epsilon(_tail(part)) for part in self.parts]
        if math.inf in reaches:
            return LossDistribution(1.0, 0, (0.0,), 1.0)
        step = math.hypot(*reaches) / _POINTS_PER_REACH or 1.0
        total = LossDistribution(step, 0, (1.0,))
        for part, reach in zip(self.parts, reaches, strict=True):
            if reach > 0:
                total = total.plus(sampled(part.delta, step, reach))
        return total

    def delta(self, epsilon: float) -> float:
        return self._total.delta(epsilon)

    def composed(self, times: int) -> MixedLoss:
        check_times(times)
        return MixedLoss(tuple(part.composed(times) for part in self.parts))

    def mu(self) -> float:
        """See `dominance.dominating_mu`: the slack in delta is 1e-8."""
        return dominating_mu(self)

    def to_json(self) -> Json:
        return {"kind": self.kind, "parts": [part.to_json() for part in self.parts]}


def _tail(part: PrivacyLoss) -> float:
    """A delta that the loss falls to: what is infinite in it grows with its releases."""
    return min(0.5, max(_TAIL, 2 * part.delta(_BEYOND)))
