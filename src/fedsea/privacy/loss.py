"""What a release costs: the trade-off between two neighbouring inputs, as a value.

For laws P and Q of what is released, delta(epsilon) = max_E P(E) - e^epsilon Q(E), for the worst
pair of neighbours and the worse of its two orders. Everything else is read from that curve:

    epsilon(delta)         the least epsilon >= 0 that the curve allows
    mu()                   the Gaussian curve that dominates it (Dong, Roth, Su: arXiv 1905.02383)
    recovery_bound(prior)  1 - f(prior), f the trade-off function (Hayes et al.: arXiv 2302.07225)
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

from fedsea.errors import ConfigError

Json = dict[str, object]

_STEPS = 200
_LARGEST_EPSILON = 1e12
_LEAST_EXPONENT = -40.0  # below it the bound is within 1e-17 of 1
_GOLDEN = (math.sqrt(5) - 1) / 2


class PrivacyLoss(ABC):
    """The cost of one or more releases against one changed unit. Immutable."""

    kind: ClassVar[str]

    @abstractmethod
    def delta(self, epsilon: float) -> float:
        """max_E P(E) - e^epsilon Q(E); epsilon may be negative."""

    @abstractmethod
    def composed(self, times: int) -> PrivacyLoss:
        """The cost of `times` independent releases; `times` may be 0."""

    @abstractmethod
    def mu(self) -> float:
        """The mu of Gaussian differential privacy; each kind says how exact it is."""

    @abstractmethod
    def to_json(self) -> Json:
        """What `losses.from_json` reads; it holds parameters, never data."""

    def epsilon(self, delta: float) -> float:
        """The least epsilon >= 0 with delta(epsilon) <= delta, rounded up; infinite if none.

        Raises:
            ConfigError: delta is outside (0, 1).
        """
        check_delta(delta)
        if self.delta(0.0) <= delta:
            return 0.0
        low, high = 0.0, 1.0
        while self.delta(high) > delta:
            low, high = high, 2 * high
            if high > _LARGEST_EPSILON:
                return math.inf
        for _ in range(_STEPS):
            middle = (low + high) / 2
            if not low < middle < high:
                break
            if self.delta(middle) > delta:
                low = middle
            else:
                high = middle
        return high

    def recovery_bound(self, prior: float) -> float:
        """No attacker recovers the unit with a greater probability.

        Args:
            prior: the probability of its best guess before seeing the release.

        1 - f(prior) = min over epsilon of e^epsilon * prior + delta(epsilon): the most that an
        event can have under one law when it has probability `prior` under the other.
        """
        check_prior(prior)
        return least_line(self.delta, prior)


def least_line(delta: Callable[[float], float], prior: float) -> float:
    """min over epsilon of e^epsilon * prior + delta(epsilon), by golden section.

    Any epsilon gives a valid bound, so the search may end anywhere.
    """

    def line(epsilon: float) -> float:
        return math.exp(epsilon) * prior + delta(epsilon)

    low, high = _LEAST_EXPONENT, math.log(1 / prior)
    for _ in range(_STEPS):
        left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
        if not left < right:
            break
        if line(left) <= line(right):
            high = right
        else:
            low = left
    return min(1.0, line((low + high) / 2))


def check_delta(delta: float) -> None:
    """A delta of (epsilon, delta) differential privacy."""
    if not 0 < delta < 1:
        raise ConfigError(f"delta {delta} is not between 0 and 1; 1e-5 is usual")


def check_prior(prior: float) -> None:
    """A probability of guessing."""
    if not 0 < prior <= 1:
        raise ConfigError(f"a prior of {prior}; it must be a probability above 0")


def check_times(times: int) -> None:
    """A number of releases."""
    if times < 0:
        raise ConfigError(f"{times} releases; the number cannot be negative")
