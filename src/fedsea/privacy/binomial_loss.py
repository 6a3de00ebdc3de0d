"""The exact privacy loss of stochastic quantization.

Every coordinate sends a count of Binomial(u, p), p in [1 - q, q], q = (A + c) / (2 A). Each pair of
Bernoulli laws in that range is a post-processing of the pair (q, 1 - q), so the opposite corners
+-c of the box are the worst pair; there the sum of all counts is sufficient. With N = width * u
(times the number of releases) and l = log(q / (1 - q)) the loss of a sum j is l (2 j - N):

    delta(epsilon) = sum over j > (epsilon/l + N) / 2 of P[Bin(N, q) = j] (1 - e^(epsilon - l(2j-N)))

which equals P[Bin(N, q) > k] - e^epsilon P[Bin(N, 1-q) > k] without its cancellation. Pure
differential privacy holds with epsilon = N l.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from scipy import special

from fedsea.errors import ConfigError
from fedsea.privacy.dominance import dominating_mu
from fedsea.privacy.loss import Json, PrivacyLoss, check_prior, check_times

_DEVIATIONS = 12  # the mass beyond is under 1e-32 of what is summed
_STIRLING_FROM = 16


@dataclass(frozen=True, slots=True)
class BinomialLoss(PrivacyLoss):
    """Telling Binomial(trials, probability) from Binomial(trials, 1 - probability).

    Args:
        trials: number of Bernoulli draws in all releases together.
        probability: q, between 1/2 and 1.
    """

    kind: ClassVar[str] = "binomial"

    trials: int
    probability: float

    def __post_init__(self) -> None:
        check_times(self.trials)
        if not 0.5 <= self.probability < 1:
            raise ConfigError(f"probability {self.probability} is not in [1/2, 1)")

    @property
    def step(self) -> float:
        """l: the loss of one draw."""
        return math.log(self.probability) - math.log1p(-self.probability)

    @property
    def pure_epsilon(self) -> float:
        """epsilon at delta = 0."""
        return self.trials * self.step

    def delta(self, epsilon: float) -> float:
        if self.trials == 0 or self.step == 0:
            return max(0.0, -math.expm1(epsilon))
        sums = self._sums(math.floor((epsilon / self.step + self.trials) / 2) + 1)
        losses = self.step * (2 * sums - self.trials)
        masses = binomial_masses(sums, self.trials, self.probability)
        return min(1.0, float(masses @ -np.expm1(np.minimum(0.0, epsilon - losses))))

    def _sums(self, first: int) -> NDArray[np.float64]:
        """Sums of counts from `first` that carry the mass."""
        mean = self.trials * self.probability
        reach = _DEVIATIONS * math.sqrt(mean * (1 - self.probability)) + _DEVIATIONS**2
        low = max(first, math.floor(mean - reach), 0)
        high = min(self.trials, max(low, math.ceil(mean)) + math.ceil(reach))
        return np.arange(low, high + 1, dtype=np.float64)

    def composed(self, times: int) -> BinomialLoss:
        """Exact."""
        check_times(times)
        return BinomialLoss(self.trials * times, self.probability)

    def mu(self) -> float:
        """See `dominance.dominating_mu`: the slack in delta is 1e-8."""
        return dominating_mu(self)

    def recovery_bound(self, prior: float) -> float:
        """The power of the best test of level `prior` against the middle of the box (p = 1/2).

        The middle is a reference for every input: all are within the pair (1/2, q).
        """
        check_prior(prior)
        from scipy import stats  # 25 MB, which a client without a mechanism need not pay

        threshold = int(stats.binom.isf(prior, self.trials, 0.5))
        beyond = float(stats.binom.sf(threshold, self.trials, 0.5))
        power = float(stats.binom.sf(threshold, self.trials, self.probability))
        at = float(stats.binom.pmf(threshold, self.trials, 0.5))
        if at > 0:
            share = min(1.0, (prior - beyond) / at)
            power += share * float(stats.binom.pmf(threshold, self.trials, self.probability))
        return min(1.0, max(prior, power))

    def to_json(self) -> Json:
        return {"kind": self.kind, "trials": self.trials, "probability": self.probability}


def binomial_masses(
    counts: NDArray[np.float64], trials: int, probability: float
) -> NDArray[np.float64]:
    """Binomial probabilities of whole numbers 0..trials, also for very many trials.

    Saddle-point form (C. Loader, "Fast and accurate computation of binomial probabilities", 2000).
    """
    rest = trials - counts
    with np.errstate(divide="ignore", invalid="ignore"):
        inner = (
            _stirling(np.full(1, float(trials)))
            - _stirling(counts)
            - _stirling(rest)
            - _deviance(counts, trials * probability)
            - _deviance(rest, trials * (1 - probability))
            + 0.5 * np.log(trials / (2 * math.pi * counts * rest))
        )
    ends = np.where(counts == 0, trials * math.log1p(-probability), trials * math.log(probability))
    return np.asarray(np.exp(np.where((counts == 0) | (rest == 0), ends, inner)))


def _stirling(n: NDArray[np.float64]) -> NDArray[np.float64]:
    """log n! minus Stirling's approximation sqrt(2 pi n) (n/e)^n."""
    small = np.minimum(n, _STIRLING_FROM)
    exact = special.gammaln(small + 1) - (small + 0.5) * np.log(small) + small
    square = n * n
    series = (
        1 / 12
        - (1 / 360 - (1 / 1260 - (1 / 1680 - 1 / (1188 * square)) / square) / square) / square
    ) / n
    return np.where(n < _STIRLING_FROM, exact - 0.5 * math.log(2 * math.pi), series)


def _deviance(n: NDArray[np.float64], mean: float) -> NDArray[np.float64]:
    """n log(n / mean) + mean - n."""
    away = n - mean
    return n * np.log1p(away / mean) - away
