"""Gaussian differential privacy in closed form.

Balle and Wang (arXiv 1805.06530), theorem 8, with mu = sensitivity / sigma:

    delta(epsilon) = Phi(mu/2 - epsilon/mu) - e^epsilon Phi(-mu/2 - epsilon/mu)

Both terms share the factor exp(-x^2/2), x = epsilon/mu - mu/2; with it taken out (erfcx) nothing
overflows or cancels at any epsilon.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from scipy import special

from fedsea.errors import ConfigError
from fedsea.privacy.loss import Json, PrivacyLoss, check_delta, check_prior, check_times

_ROOT_2 = math.sqrt(2)
_LEAST_MU, _MOST_MU = 1e-12, 1e12
_BISECTIONS = 200


@dataclass(frozen=True, slots=True)
class GaussianLoss(PrivacyLoss):
    """Telling N(0, 1) from N(mu, 1); exactly mu-GDP.

    Args:
        mu_total: mu for a pair of neighbours.
        reference_mu: mu between any input and one fixed reference law, at most mu_total. Rows
            clipped to a ball are within half the sensitivity of its centre: mu_total / 2.
            None: no better reference than the neighbour itself.
    """

    kind: ClassVar[str] = "gaussian"

    mu_total: float
    reference_mu: float | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mu_total) and self.mu_total >= 0):
            raise ConfigError(f"mu {self.mu_total}; it must be a finite number, 0 or more")
        reference = self.reference_mu
        if reference is not None and not 0 <= reference <= self.mu_total:
            raise ConfigError(f"reference mu {reference} is not between 0 and {self.mu_total}")

    def mu(self) -> float:
        """Exact."""
        return self.mu_total

    def delta(self, epsilon: float) -> float:
        return gaussian_delta(self.mu_total, epsilon)

    def composed(self, times: int) -> GaussianLoss:
        """mu * sqrt(times), exact (Dong, Roth, Su, corollary 3.3)."""
        check_times(times)
        root = math.sqrt(times)
        reference = None if self.reference_mu is None else self.reference_mu * root
        return GaussianLoss(self.mu_total * root, reference)

    def with_other(self, other: GaussianLoss) -> GaussianLoss:
        """Both released: the root of the sum of the squares, exact."""
        reference = None
        if self.reference_mu is not None and other.reference_mu is not None:
            reference = math.hypot(self.reference_mu, other.reference_mu)
        return GaussianLoss(math.hypot(self.mu_total, other.mu_total), reference)

    def recovery_bound(self, prior: float) -> float:
        """Phi(Phi^-1(prior) + mu), with the reference's mu where there is one.

        Every law within mu_0 of one reference law Q: sum_z prior(z) P_z(guess z) is at most the
        sum of prior(z) (1 - f)(Q(guess z)), and 1 - f is concave and increasing while the Q's sum
        to 1. So Q = the noise around the centre serves, with mu_0 = mu / 2.
        """
        check_prior(prior)
        mu = self.mu_total if self.reference_mu is None else self.reference_mu
        return float(special.ndtr(special.ndtri(prior) + mu))

    def to_json(self) -> Json:
        return {"kind": self.kind, "mu": self.mu_total, "reference_mu": self.reference_mu}


def gaussian_delta(mu: float, epsilon: float) -> float:
    """delta of mu-GDP at epsilon, which may be negative; exact to a few units of rounding."""
    if mu <= 0:
        return max(0.0, -math.expm1(epsilon))
    low, high = epsilon / mu - mu / 2, epsilon / mu + mu / 2
    second = _scaled_tail(low, high)
    if low >= 0:
        first = 0.5 * math.exp(-low * low / 2) * float(special.erfcx(low / _ROOT_2))
    else:
        first = float(special.ndtr(-low))
    return min(1.0, max(0.0, first - second))


def _scaled_tail(low: float, high: float) -> float:
    """e^epsilon Phi(-high) = exp(-low^2/2) erfcx(high/sqrt 2) / 2."""
    if high > 0:
        return 0.5 * math.exp(-low * low / 2) * float(special.erfcx(high / _ROOT_2))
    epsilon = (high * high - low * low) / 2
    return math.exp(epsilon) * float(special.ndtr(-high))


def gaussian_mu(epsilon: float, delta: float) -> float:
    """The largest mu with (epsilon, delta), rounded down: the analytic Gaussian mechanism.

    Raises:
        ConfigError: epsilon is negative or not finite, or delta is outside (0, 1).
    """
    check_delta(delta)
    if not (math.isfinite(epsilon) and epsilon >= 0):
        raise ConfigError(f"epsilon {epsilon}; it must be a number, 0 or more")
    low, high = math.log(_LEAST_MU), math.log(_MOST_MU)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if not low < middle < high:
            break
        if gaussian_delta(math.exp(middle), epsilon) <= delta:
            low = middle
        else:
            high = middle
    return math.exp(low)
