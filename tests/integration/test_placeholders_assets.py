"""What the built-in detectors of placeholders find in the public set of made-up sentences."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmarks.placeholders import Half, halves, load, measure

from fedsea.privacy.placeholders.config import Placeholders

DATA = Path(__file__).parents[2].parent / "shared" / "assets" / "data" / "pii"

pytestmark = [
    pytest.mark.shared,
    pytest.mark.skipif(not DATA.is_dir(), reason="the folder of shared assets is absent"),
]


@pytest.fixture(scope="module")
def held_out() -> Half:
    """The half on which no rule was made."""
    records = load(DATA / "synth_dataset_v2.json")
    return measure("held-out", halves(records)[1], Placeholders())


@pytest.mark.parametrize(
    ("kind", "least"),
    [
        ("PERSON", 0.95),
        ("GPE", 0.95),
        ("ORGANIZATION", 0.88),
        ("STREET_ADDRESS", 0.85),
        ("DATE_TIME", 0.9),
        ("PHONE_NUMBER", 0.95),
        ("EMAIL_ADDRESS", 1.0),
        ("CREDIT_CARD", 1.0),
        ("IBAN_CODE", 1.0),
        ("US_SSN", 1.0),
        ("IP_ADDRESS", 1.0),
        ("DOMAIN_NAME", 1.0),
    ],
)
def test_recall_does_not_fall(held_out: Half, kind: str, least: float) -> None:
    """A change of a rule that lets more through is noticed."""
    (row,) = [row for row in held_out.recall if row.type == kind]
    assert row.covered >= least * row.spans


def test_false_alarms_do_not_grow(held_out: Half) -> None:
    """Nor may words be hidden without need: at most 25 spans in 1,000 words."""
    assert sum(row.false_per_1000_words for row in held_out.alarms) < 25
