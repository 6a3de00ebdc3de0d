"""Medians with their spread, interleaved pairs, targets, and the rows of a report."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, least and greatest of some values."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Summarise at least one value.

        Raises:
            ValueError: there is none.
        """
        given = list(values)
        if not given:
            raise ValueError("there are no values to summarise")
        return cls(statistics.median(given), min(given), max(given), len(given))


class Verdict(Enum):
    """How a median stands against its target."""

    MET = "met"
    MISSED = "missed"
    NONE = ""


@dataclass(frozen=True, slots=True)
class Target:
    """A bound on a median: at least, or at most."""

    bound: float
    at_least: bool = True

    def verdict(self, value: float) -> Verdict:
        """Whether the value keeps the bound."""
        kept = value >= self.bound if self.at_least else value <= self.bound
        return Verdict.MET if kept else Verdict.MISSED

    def __str__(self) -> str:
        return f"{'>=' if self.at_least else '<='} {self.bound:g}"


def at_least(bound: float) -> Target:
    """More is better."""
    return Target(bound)


def at_most(bound: float) -> Target:
    """Less is better."""
    return Target(bound, at_least=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the report.

    `key` names the value in the summary; `note` says in a few words how it was measured.
    """

    case: str
    name: str
    spread: Spread
    unit: str = "x"
    target: Target | None = None
    key: str | None = None
    note: str = ""

    @property
    def verdict(self) -> Verdict:
        """Of the median."""
        return Verdict.NONE if self.target is None else self.target.verdict(self.spread.median)


def interleave(works: Sequence[Callable[[], T]], repeats: int) -> list[tuple[T, ...]]:
    """Run all works in turn, `repeats` times: A B A B ..."""
    return [tuple(work() for work in works) for _ in range(repeats)]


def ratios(over: Iterable[float], under: Iterable[float]) -> Spread:
    """Quotients of values that belong together."""
    return Spread.of(a / b for a, b in zip(over, under, strict=True))


def differences(of: Iterable[float], minus: Iterable[float]) -> Spread:
    """Differences of values that belong together."""
    return Spread.of(a - b for a, b in zip(of, minus, strict=True))


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` (0..1) of the values lie, by the nearest rank."""
    ordered = sorted(values)
    if not ordered:
        raise ValueError("there are no values")
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]
