"""Kinds of tokens."""

from __future__ import annotations

import pytest

from fedsea.redteam.classes import Kind, kind_of, kinds_of


@pytest.mark.parametrize(
    ("piece", "kind"),
    [
        ("▁the", Kind.FUNCTION),
        ("Ġand", Kind.FUNCTION),
        (" The", Kind.FUNCTION),
        ("'s", Kind.FUNCTION),
        (".", Kind.FUNCTION),
        ("", Kind.FUNCTION),
        ("▁dragon", Kind.CONTENT),
        ("ing", Kind.CONTENT),
        ("42", Kind.NUMBER),
        ("3rd", Kind.NUMBER),
    ],
)
def test_kinds_by_text(piece, kind):
    """Marks of word beginnings and capitals do not count."""
    assert kind_of(piece) is kind


def test_private_spans_come_first():
    """Every token that touches a private span is private, spaces around it are not."""
    pieces = ["call", " ", "Ann", "a", " at", " 555"]

    assert kinds_of(pieces, [(5, 9), (12, 16)]) == [
        Kind.CONTENT, Kind.FUNCTION, Kind.PII, Kind.PII, Kind.FUNCTION, Kind.PII,
    ]  # fmt: skip
    assert kinds_of(pieces)[-1] is Kind.NUMBER
