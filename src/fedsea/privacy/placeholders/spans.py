"""What a detector finds: spans of a text, their kinds, and how overlapping ones become one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol


class Kind(StrEnum):
    """What a span is. Custom lists and patterns bring kinds of their own, in capital letters."""

    IBAN = "iban"
    CARD = "card"
    EMAIL = "email"
    URL = "url"
    IP = "ip"
    NATIONAL_ID = "national-id"
    DATE = "date"
    AGE = "age"
    POSTCODE = "postcode"
    NUMBER = "number"
    PHONE = "phone"
    ADDRESS = "address"
    ORGANISATION = "organisation"
    NAME = "name"
    PLACE = "place"


_RANKS = {kind.value: rank for rank, kind in enumerate(Kind)}


@dataclass(frozen=True, slots=True, order=True)
class Span:
    """Characters `start` to `end` of a text, `end` not included."""

    start: int
    end: int
    kind: str


class Detector(Protocol):
    """Finds sensitive spans. Spans may overlap and come in any order."""

    def find(self, text: str) -> Sequence[Span]:
        """The spans of a text."""
        ...


def merged(spans: Iterable[Span]) -> list[Span]:
    """Spans in order, without overlaps: those that overlap become one that covers them all.

    So whatever a detector found is covered. The longest span of a group gives its kind; of equally
    long ones a custom kind, then the first in the order of `Kind`.
    """
    groups: list[list[Span]] = []
    end = -1
    for span in sorted(spans):
        if groups and span.start < end:
            groups[-1].append(span)
        else:
            groups.append([span])
        end = max(end, span.end)
    return [
        Span(group[0].start, max(span.end for span in group), min(group, key=_rank).kind)
        for group in groups
    ]


def _rank(span: Span) -> tuple[int, int, str]:
    return span.start - span.end, _RANKS.get(span.kind, -1), span.kind
