"""A privacy loss known as masses on a grid, and its composition."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from fedsea.privacy.distribution import LossDistribution
from fedsea.privacy.dominance import dominating_mu
from fedsea.privacy.loss import Json, PrivacyLoss, check_prior, check_times, least_line


@dataclass(frozen=True)
class DiscreteLoss(PrivacyLoss):
    """`times` independent losses of one law.

    Args:
        law: one release against a neighbour. The worst pair must be its own mirror image (P, Q
            and Q, P have the same losses), as it is for symmetric noise.
        reference: one release against one law that does not depend on the input; makes
            `recovery_bound` tighter.
        times: how many releases.
    """

    kind: ClassVar[str] = "discrete"

    law: LossDistribution
    reference: LossDistribution | None = None
    times: int = 1

    def __post_init__(self) -> None:
        check_times(self.times)

    @cached_property
    def _total(self) -> LossDistribution:
        return self.law.power(self.times)

    @cached_property
    def _total_reference(self) -> LossDistribution:
        return self._total if self.reference is None else self.reference.power(self.times)

    def delta(self, epsilon: float) -> float:
        return self._total.delta(epsilon)

    def composed(self, times: int) -> DiscreteLoss:
        """Exact but for what is rounded up: 1e-13 + 3e-17 * times is added to delta."""
        check_times(times)
        return DiscreteLoss(self.law, self.reference, self.times * times)

    def mu(self) -> float:
        """See `dominance.dominating_mu`: the slack in delta is 1e-8."""
        return dominating_mu(self)

    def recovery_bound(self, prior: float) -> float:
        check_prior(prior)
        return least_line(self._total_reference.delta, prior)

    def to_json(self) -> Json:
        return {
            "kind": self.kind,
            "law": _written(self.law),
            "reference": None if self.reference is None else _written(self.reference),
            "times": self.times,
        }


def _written(law: LossDistribution) -> Json:
    return {
        "step": law.step,
        "lowest": law.lowest,
        "masses": list(law.masses),
        "infinite": law.infinite,
    }
