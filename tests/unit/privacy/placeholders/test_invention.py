from __future__ import annotations

import ipaddress
import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsea.privacy.placeholders.check_digits import iban_is_valid, luhn
from fedsea.privacy.placeholders.invention import Inventor
from fedsea.privacy.placeholders.spans import Kind
from fedsea.privacy.placeholders.words import GIVEN_NAMES, SURNAMES

SEEDS = st.integers(0, 2**32)


def drawn(kind: str, value: str, seed: int) -> str:
    """One draw."""
    return Inventor(random.Random(seed)).substitute(kind, value)


@given(SEEDS)
def test_nothing_leads_to_anybody(seed):
    """Accounts and cards are invalid, domains and networks reserved, names in no list."""
    assert not iban_is_valid(drawn(Kind.IBAN, "GB49AHER72277635787006", seed))
    assert not luhn(drawn(Kind.CARD, "4111 1111 1111 1111", seed))
    assert drawn(Kind.EMAIL, "eva@x.org", seed).endswith(".example")
    assert drawn(Kind.URL, "http://x.org", seed).endswith(".example")
    assert ipaddress.ip_address(drawn(Kind.IP, "1.2.3.4", seed)) in ipaddress.ip_network(
        "198.18.0.0/15"
    )
    assert ipaddress.ip_address(drawn(Kind.IP, "fe80::1", seed)) in ipaddress.ip_network(
        "2001:db8::/32"
    )
    first, last = drawn(Kind.NAME, "Eva Novak", seed).lower().split()
    assert first not in GIVEN_NAMES
    assert last not in SURNAMES


@pytest.mark.parametrize(
    ("kind", "value", "shape"),
    [
        (Kind.PHONE, "(898)666-3621x0135", r"\(\d{3}\)\d{3}-\d{4}x\d{4}"),
        (Kind.CARD, "4111-1111-1111-1111", r"\d{4}(-\d{4}){3}"),
        (Kind.NUMBER, "$1,250.00", r"\$\d,\d{3}\.\d\d"),
        (Kind.NUMBER, "USD 250", r"USD \d{3}"),
        (Kind.NUMBER, "F162823540116", r"[A-Z]\d{12}"),
        (Kind.POSTCODE, "SW1A 1AA", r"[A-Z]{2}\d[A-Z] \d[A-Z]{2}"),
        (Kind.DATE, "2018-01-14 03:07:43", r"(19|20)\d\d-(0\d|1[0-2])-(0\d|1[0-2]) \d\d:\d\d:\d\d"),
        (
            Kind.DATE,
            "12 March 1984",
            r"\d\d (January|February|March|April|May|June|July|August|"
            r"September|October|November|December) (19|20)\d\d",
        ),
        (Kind.DATE, "May 3rd", r"\w+ \d+th"),
        (Kind.DATE, "3. Mai", r"\d\. \w+"),
        (Kind.AGE, "44-year-old", r"\d\d-year-old"),
        (Kind.IBAN, "DE89 3704 0044 0532 0130 00", r"[A-Z]{2}00( \d{4}){4} \d\d"),
        ("CASE", "C-12345", r"[A-Z]-\d{5}"),
        ("PROJECT", "Blue Heron", r"[A-Z][a-z]+"),
    ],
)
def test_shapes_are_kept(kind, value, shape):
    """What a model reads looks like what stood there."""
    for seed in range(50):
        assert re.fullmatch(shape, drawn(kind, value, seed))


@given(st.sampled_from([*Kind, "CASE"]), st.text(max_size=12), SEEDS)
def test_any_value_has_a_substitute(kind, value, seed):
    """Detectors may call anything anything; nothing breaks."""
    drawn(kind, value, seed)
