"""Which noise a goal needs, mechanism by mechanism, and what that noise looks like.

A goal is a bound on everything that is released: epsilon at a delta, mu, or the chance that what is
protected is recovered by somebody who guesses it with a given prior. For each mechanism the least
noise that keeps the goal is searched, by composing its own privacy loss over all releases.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from fedsea.errors import ConfigError
from fedsea.privacy.accounts import DEFAULT_DELTA, Budget, Charge, Spending
from fedsea.privacy.gaussian import FedSEAGaussian, Gaussian
from fedsea.privacy.mechanism import Mechanism, Unit
from fedsea.privacy.metric import MetricDP
from fedsea.privacy.quantization import StochasticQuantization, Ternary

QUANTIZATION_BITS = (1, 2, 4, 8)
TERNARY_SPARSITY = 0.5

_LEAST, _MOST = 1e-9, 1e9
_PRECISION = 1e-4
_DIGITS = 4


@dataclass(frozen=True, slots=True)
class Goal:
    """What all releases together may cost: one of a budget and a bound on recovery.

    Args:
        budget: epsilon at delta, or mu.
        recovery: the most likely recovery, together with `prior`.
        prior: the chance of guessing without seeing anything.
    """

    budget: Budget | None = None
    recovery: float | None = None
    prior: float | None = None

    def __post_init__(self) -> None:
        if (self.budget is None) == (self.recovery is None):
            raise ConfigError("a goal is one of epsilon, mu and a bound on recovery: give one")
        if self.recovery is not None:
            if self.prior is None:
                raise ConfigError("a bound on recovery needs the prior that is guessed with")
            if not 0 < self.prior < self.recovery < 1:
                raise ConfigError(
                    f"a recovery of {self.recovery:g} at a prior of {self.prior:g} cannot be "
                    "kept: the bound must be above the prior and below 1"
                )

    @property
    def delta(self) -> float:
        """At which delta epsilon is shown."""
        return DEFAULT_DELTA if self.budget is None else self.budget.delta

    def allows(self, spent: Spending) -> bool:
        """Whether so much keeps the goal."""
        if self.budget is not None:
            return self.budget.allows(spent)
        assert self.recovery is not None
        assert self.prior is not None
        return spent.recovery(self.prior) <= self.recovery

    def __str__(self) -> str:
        if self.budget is not None:
            return str(self.budget)
        return f"recovery {self.recovery:g} at prior {self.prior:g}"


@dataclass(frozen=True, slots=True)
class Load:
    """What is released, and how it is counted.

    Args:
        unit: what is protected.
        tokens: tokens of one session, prompt and answer.
        sessions: sessions that compose, because the same text may come again.
        width: numbers in a row.
        clip_norm: largest norm of a row after centring.
    """

    unit: Unit
    tokens: int
    width: int
    clip_norm: float
    sessions: int = 1

    def __post_init__(self) -> None:
        for name, value in (("tokens", self.tokens), ("sessions", self.sessions)):
            if value < 1:
                raise ConfigError(f"{value} {name} release nothing: give 1 or more")
        if self.width < 2:
            raise ConfigError(f"rows of width {self.width} cannot be planned for: give 2 or more")
        if not 0 < self.clip_norm < math.inf:
            raise ConfigError(f"a clip norm of {self.clip_norm} is none: give a number above 0")

    @classmethod
    def training(cls, examples: int, tokens: int, width: int, clip_norm: float) -> Load:
        """Steps over so many examples, each counted as often as it is used, as one record.

        Rows and gradients of an example are released once in every step that uses it. Noise is
        planned for releases of single rows. A Gaussian that clips a whole example to clip_norm
        sqrt(tokens) and costs mu sqrt(tokens) has the same noise and the same total.

        Raises:
            ConfigError: a number is out of range.
        """
        if examples < 1:
            raise ConfigError(f"{examples} examples release nothing: give 1 or more")
        return cls(Unit.RECORD, tokens, width, clip_norm, 2 * examples)

    @property
    def releases(self) -> int:
        """Releases that compose: of one position for unit token, else of all."""
        return self.sessions * (1 if self.unit is Unit.TOKEN else self.tokens)


@dataclass(frozen=True, slots=True)
class Plan:
    """One mechanism with the least noise that keeps the goal.

    Attributes:
        mechanism: ready to be used.
        noise: what is large when there is much noise: sigma, A, or the mean radius.
        noise_name: which of them.
        noise_ratio: norm of the noise of a row over the clip norm.
        releases: how many compose.
        epsilon_each: of one release, at the goal's delta.
        epsilon: of all.
        mu: of all.
    """

    mechanism: Mechanism
    noise: float
    noise_name: str
    noise_ratio: float
    releases: int
    epsilon_each: float
    epsilon: float
    mu: float

    def recovery(self, prior: float) -> float:
        """The bound on recovery by all releases together."""
        return _spent(self.mechanism, self.releases).recovery(prior)


@dataclass(frozen=True, slots=True)
class _Family:
    """Mechanisms of one kind by their strength: what grows as noise falls."""

    name: str
    make: Callable[[float], Mechanism]


def plan(
    goal: Goal,
    load: Load,
    names: Sequence[str] = (),
    on_family: Callable[[str], None] = lambda _name: None,
) -> Iterator[Plan]:
    """The least noise for each mechanism; those that cannot keep the goal are left out.

    Args:
        goal: what is to be kept.
        load: what is released.
        names: mechanisms by name; empty for all.
        on_family: told which mechanism is searched now.

    Raises:
        ConfigError: an unknown name.
    """
    families = _families(load)
    known = dict.fromkeys(family.name for family in families)
    for name in names:
        if name not in known:
            raise ConfigError(f"no mechanism {name!r} to plan; known: {', '.join(known)}")
    for family in families:
        if not names or family.name in names:
            on_family(family.name)
            if (made := _least_noise(family, goal, load)) is not None:
                yield _planned(made, goal, load)


def _families(load: Load) -> list[_Family]:
    """All kinds; a clamp of clip_norm / sqrt(width) allows the same norm at most."""
    clip_norm, width = load.clip_norm, load.width
    clip = clip_norm / math.sqrt(width)

    def quantization(bits: int) -> _Family:
        return _Family(
            StochasticQuantization.name,
            lambda mu: StochasticQuantization(bits, _rounded(clip, up=True), mu, width),
        )

    return [
        _Family(Gaussian.name, lambda mu: Gaussian(clip_norm, mu)),
        *map(quantization, QUANTIZATION_BITS),
        _Family(
            Ternary.name, lambda mu: Ternary(_rounded(clip, up=True), mu, TERNARY_SPARSITY, width)
        ),
        _Family(MetricDP.name, lambda eta: MetricDP(eta, clip_norm, width)),
        _Family(
            FedSEAGaussian.name,
            lambda strength: FedSEAGaussian(_rounded(1 / strength, up=True), clip_norm),
        ),
    ]


def _least_noise(family: _Family, goal: Goal, load: Load) -> Mechanism | None:
    """The strongest member that keeps the goal, with its strength rounded down to a few digits."""

    def keeps(strength: float) -> bool:
        made = _made(family, strength)
        return made is not None and goal.allows(_spent(made, load.releases))

    low, high = 1.0, 1.0
    while not keeps(low):
        low /= 4
        if low < _LEAST:
            return None
    while high < _MOST and keeps(high):
        low, high = high, high * 4
    while high / low > 1 + _PRECISION:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if keeps(middle) else (low, middle)
    return _made(family, _rounded(low))


def _made(family: _Family, strength: float) -> Mechanism | None:
    """The member of this strength; None where the mechanism has none."""
    try:
        return family.make(strength)
    except ConfigError:
        return None


def _planned(mechanism: Mechanism, goal: Goal, load: Load) -> Plan:
    noise, name, norm = _noise(mechanism, load.width)
    total = _spent(mechanism, load.releases)
    return Plan(
        mechanism=mechanism,
        noise=noise,
        noise_name=name,
        noise_ratio=norm / load.clip_norm,
        releases=load.releases,
        epsilon_each=_spent(mechanism, 1).epsilon(goal.delta),
        epsilon=total.epsilon(goal.delta),
        mu=total.mu(),
    )


def _noise(mechanism: Mechanism, width: int) -> tuple[float, str, float]:
    """A figure of the noise, what it is called, and the norm of the noise of a row of zeros."""
    match mechanism:
        case Gaussian() | FedSEAGaussian():
            return mechanism.sigma, "sigma", mechanism.sigma * math.sqrt(width)
        case StochasticQuantization():
            spread = mechanism.scale / math.sqrt(mechanism.levels)
            return mechanism.scale, "A", spread * math.sqrt(width)
        case Ternary():
            spread = math.sqrt(mechanism.amplitude * mechanism.scale)
            return mechanism.scale, "B", spread * math.sqrt(width)
        case MetricDP():
            return width / mechanism.eta, "radius", width / mechanism.eta
    raise ConfigError(f"{mechanism.name} has no noise that is known here")


def _spent(mechanism: Mechanism, releases: int) -> Spending:
    return Spending.of([Charge(mechanism.name, mechanism.loss(), releases)])


def _rounded(value: float, *, up: bool = False) -> float:
    """A number of few digits that is not above `value`, or not below it."""
    unit = 10.0 ** (math.floor(math.log10(value)) - _DIGITS + 1)
    steps = math.ceil(value / unit) if up else math.floor(value / unit)
    return float(f"{steps * unit:.{_DIGITS}g}")
