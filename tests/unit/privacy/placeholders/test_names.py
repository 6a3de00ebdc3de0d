from __future__ import annotations

import pytest

from fedsea.privacy.placeholders.addresses import AddressDetector
from fedsea.privacy.placeholders.names import NameDetector
from fedsea.privacy.placeholders.spans import Kind, merged


def found(text: str) -> list[tuple[str, str]]:
    """Names and what they are."""
    return [(text[s.start : s.end], s.kind) for s in merged(NameDetector().find(text))]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("Dear Dr. Zsófia Gelencsér,", ["Zsófia Gelencsér"]),
        ("Szabina J Gelencsér's report", ["Szabina J Gelencsér"]),
        ("She met Ludwig van den Berg and O'Brien.", ["Ludwig van den Berg", "O'Brien"]),
        ("Maria lives here.", ["Maria"]),
        ("my name is lena andersson.", ["lena andersson"]),
        ("ask mr. elliott about it", ["elliott"]),
        ("I told Ivan King.", ["Ivan King"]),
        ("Name: GIULIA ROSSI", ["GIULIA ROSSI"]),
        ("Oyelaran was admitted.", ["Oyelaran"]),
    ],
)
def test_names(text, names):
    """Listed and unlisted names, with initials and particles, without titles."""
    assert [said for said, kind in found(text) if kind == Kind.NAME] == names


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("She flew to Tujetsch.", ("Tujetsch", Kind.PLACE)),
        ("They moved from New Zealand.", ("New Zealand", Kind.PLACE)),
        ("He works for Kyruus.", ("Kyruus", Kind.ORGANISATION)),
        ("Ask the Vanguard Group.", ("Vanguard Group", Kind.ORGANISATION)),
        ("We asked Hale, Orr and Weiss.", ("Hale, Orr and Weiss", Kind.ORGANISATION)),
    ],
)
def test_places_and_organisations(text, expected):
    """The words around a name say what it is."""
    assert expected in found(text)


@pytest.mark.parametrize(
    "text",
    [
        "Please write a summary. Thank you!",
        "I'm sure that I don't know. What's that?",
        "The patient reports headaches on Monday in March.",
        "My SSN and my ATM card",
        "",
    ],
)
def test_ordinary_words_stay(text):
    """Capitals at the beginning of a sentence are no names."""
    assert found(text) == []


@pytest.mark.parametrize(
    "address",
    [
        "24 Clarke Avenue",
        "6108 Friedhofstrasse 33 Suite 979",
        "Via Roma 131, Milano",
        "PSC 3294, Box 9168\nAPO AA 61487",
        "2456 Rue de Virton 38\n Suite 510\n Ettelgem\n Belgium",
        "ul. Narewska 94",
        "USNS Saibara\nFPO AP 12428",
    ],
)
def test_addresses(address):
    """Street and number in either order, units, and the lines that follow."""
    text = f"Send it to {address}."
    (span,) = merged(AddressDetector().find(text))
    assert text[span.start : span.end] == address


def test_no_address():
    """A number beside an ordinary word is none."""
    assert AddressDetector().find("Take 2 tablets in March 2024. Chapter 5 and 3 cats.") == []
