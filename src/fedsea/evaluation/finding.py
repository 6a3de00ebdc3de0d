"""What one attack found, before it becomes a row of a report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from fedsea.redteam.intervals import Interval, clopper_pearson
from fedsea.redteam.report import Rate


@dataclass(frozen=True, slots=True)
class Score:
    """Whether each thing that was to be found, such as a token, was; `kind` may be empty."""

    kind: str
    hit: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A rate with all that stands beside it.

    Attributes:
        attack: short name, a key of `report.TITLES`.
        exposed: what the attacker saw, see `report.Row`.
        rate: of success, with its interval.
        prior: what a guess without observation gets.
        by_class: rates by kind.
        details: further numbers.
        seconds: how long the attack took.
    """

    attack: str
    exposed: str
    rate: Rate
    prior: float
    by_class: Mapping[str, Rate] = field(default_factory=dict)
    details: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0

    @classmethod
    def of(
        cls,
        attack: str,
        exposed: str,
        scores: Sequence[Score],
        prior: float,
        details: Mapping[str, float] | None = None,
        seconds: float = 0.0,
    ) -> Finding:
        """From single successes and failures."""
        return cls(
            attack=attack,
            exposed=exposed,
            rate=rate_of(scores),
            prior=prior,
            by_class=rates_by_class(scores),
            details=details or {},
            seconds=seconds,
        )


def rate_of(scores: Sequence[Score]) -> Rate:
    """Share of hits with its interval; 0 of 0 is 0."""
    hits = sum(score.hit for score in scores)
    interval = clopper_pearson(hits, len(scores)) if scores else Interval(0.0, 1.0)
    return Rate(hits / max(1, len(scores)), interval.low, interval.high, len(scores))


def rates_by_class(scores: Iterable[Score]) -> dict[str, Rate]:
    """Rates of those that have a kind, by kind."""
    found: dict[str, list[Score]] = {}
    for score in scores:
        if score.kind:
            found.setdefault(score.kind, []).append(score)
    return {kind: rate_of(found[kind]) for kind in sorted(found)}
