"""What an account has spent, what its budget is, and how many releases still fit.

Nothing here touches a file: `fedsea.privacy.ledger` keeps the numbers, this module composes them.

Composition is exact: mu of Gaussian releases adds in squares (Dong, Roth and Su, "Gaussian
differential privacy", corollary 2), every other law is convolved. Releases of one account compose
sequentially, whatever session they belong to; accounts of different records do not add up, because
a record is in one of them only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from fedsea.errors import ConfigError
from fedsea.privacy.losses import PrivacyLoss, compose
from fedsea.privacy.mechanism import Unit

DEFAULT_DELTA = 1e-5
# Sums of many small floats: a budget that is met exactly on paper is met.
_ROUNDING = 1e-9
_COUNTLESS = 2**40


@dataclass(frozen=True, slots=True)
class Budget:
    """The most that may be spent: either (epsilon, delta) or mu.

    With mu, `delta` only says at which delta epsilon is shown.

    Raises:
        ConfigError: neither or both are given, or a number is out of range.
    """

    epsilon: float | None = None
    delta: float = DEFAULT_DELTA
    mu: float | None = None

    def __post_init__(self) -> None:
        if (self.epsilon is None) == (self.mu is None):
            raise ConfigError("a budget is either epsilon at a delta, or mu: give one of the two")
        limit = self.mu if self.epsilon is None else self.epsilon
        if limit is None or not 0 < limit < math.inf:
            raise ConfigError(f"a budget of {limit} cannot be kept: give a number above 0")
        if not 0 < self.delta < 1:
            raise ConfigError(f"delta {self.delta} is no probability: give one between 0 and 1")

    def allows(self, spent: Spending) -> bool:
        """Whether so much may be spent."""
        if spent.is_unbounded:
            return False
        if spent.loss is None:
            return True
        if self.epsilon is not None:
            return spent.loss.delta(self.epsilon) <= self.delta * (1 + _ROUNDING)
        assert self.mu is not None
        return spent.loss.mu() <= self.mu * (1 + _ROUNDING)

    def __str__(self) -> str:
        if self.epsilon is not None:
            return f"epsilon {self.epsilon:g} at delta {self.delta:g}"
        return f"mu {self.mu:g}"


@dataclass(frozen=True, slots=True)
class Charge:
    """Releases of one mechanism. `loss` is that of one release; None: not differentially private.

    `held` of the releases belong to reservations that were never settled: sessions that are open,
    or whose process ended without settling.
    """

    spec: str
    loss: PrivacyLoss | None
    releases: int
    held: int = 0
    last: str = ""


@dataclass(frozen=True, slots=True)
class Spending:
    """Charges composed. `loss` is None while nothing that costs anything was released."""

    loss: PrivacyLoss | None = None
    is_unbounded: bool = False

    @classmethod
    def of(cls, charges: Iterable[Charge]) -> Spending:
        """All releases of all mechanisms, one after the other."""
        paid = [charge for charge in charges if charge.releases]
        bounded = [c.loss.composed(c.releases) for c in paid if c.loss is not None]
        if len(bounded) < len(paid):
            return cls(is_unbounded=True)
        if not bounded:
            return cls()
        return cls(bounded[0] if len(bounded) == 1 else compose(bounded))

    def mu(self) -> float:
        """The mu of Gaussian differential privacy, as `PrivacyLoss.mu` defines it for the law."""
        return self._value(lambda loss: loss.mu())

    def epsilon(self, delta: float) -> float:
        """The least epsilon that holds at `delta`."""
        return self._value(lambda loss: loss.epsilon(delta))

    def recovery(self, prior: float) -> float:
        """The most likely recovery of what is protected, by whoever guesses it with `prior`."""
        if self.is_unbounded:
            return 1.0
        return prior if self.loss is None else self.loss.recovery_bound(prior)

    def _value(self, of: Callable[[PrivacyLoss], float]) -> float:
        if self.is_unbounded:
            return math.inf
        return 0.0 if self.loss is None else of(self.loss)


@dataclass(frozen=True, slots=True)
class Statement:
    """One account as it stands."""

    tenant: str
    unit: Unit
    record: str
    budget: Budget | None
    charges: tuple[Charge, ...]
    opened: str = ""

    @property
    def releases(self) -> int:
        """Charged releases of all mechanisms."""
        return sum(charge.releases for charge in self.charges)

    def spending(self) -> Spending:
        """What was spent in all."""
        return Spending.of(self.charges)

    def left(self, spec: str) -> int | None:
        """How many more releases of a mechanism that was charged fit; None: no budget."""
        if self.budget is None:
            return None
        charge = next(charge for charge in self.charges if charge.spec == spec)
        if charge.loss is None:
            return 0
        others = tuple(other for other in self.charges if other is not charge)
        most = Frontier(self.budget, others, charge.loss).most()
        return max(0, most - charge.releases)


@dataclass(slots=True)
class Frontier:
    """How many releases of one mechanism fit into a budget beside fixed other charges.

    Composing a discrete law takes a while, so what is found out is kept: every number of releases up
    to `_good` fits, none from `_bad` on does.
    """

    budget: Budget
    others: tuple[Charge, ...]
    loss: PrivacyLoss
    _good: int = field(default=0, init=False)
    _bad: int = field(default=_COUNTLESS, init=False)

    def allows(self, releases: int) -> bool:
        """Whether so many fit."""
        probe = 2 * releases
        while self._good < releases < self._bad:
            probe = min(probe, self._bad - 1)
            if self._fits(probe):
                self._good = probe
            else:
                self._bad = probe
                probe = (releases + probe) // 2
        return releases <= self._good

    def most(self) -> int:
        """The largest number that fits."""
        reach = 1
        while self.allows(reach) and reach < _COUNTLESS:
            reach *= 2
        while self._bad - self._good > 1:
            middle = (self._good + self._bad) // 2
            if self._fits(middle):
                self._good = middle
            else:
                self._bad = middle
        return self._good

    def _fits(self, releases: int) -> bool:
        """Whether the budget allows so many; so many that they cannot be composed do not fit."""
        mine = Charge("", self.loss, releases)
        try:
            return self.budget.allows(Spending.of((*self.others, mine)))
        except ConfigError:
            return False
