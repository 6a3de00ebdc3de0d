from __future__ import annotations

import time

import pytest

from fedsea.privacy.placeholders.config import Placeholders
from fedsea.privacy.placeholders.patterns import ShapeDetector
from fedsea.privacy.placeholders.spans import Kind, merged


def found(text: str) -> list[tuple[str, str]]:
    """What is found, and as what."""
    return [(text[s.start : s.end], s.kind) for s in merged(ShapeDetector().find(text))]


@pytest.mark.parametrize(
    ("kind", "texts"),
    [
        (Kind.EMAIL, ["eva.novak+x@mail.clinic.org", "o'brien@x.co"]),
        (Kind.URL, ["https://x.org/a?b=c#d", "www.x.org", "ftp://x.y/z"]),
        (Kind.IP, ["192.168.17.4", "6e40:4041:c617:e898:c11:40d2:c669:2eb4", "fe80::1"]),
        (Kind.IBAN, ["GB49AHER72277635787006", "DE89 3704 0044 0532 0130 00"]),
        (Kind.CARD, ["3545016474420058", "4111 1111 1111 1111", "4111-1111-1111-1111"]),
        (Kind.NATIONAL_ID, ["460-89-9847"]),
        (
            Kind.DATE,
            [
                "2024-03-01",
                "2018-01-14 03:07:43",
                "2018-01-14T03:07",
                "3/1/24",
                "01.03.2024",
                "12 March 1984",
                "March 12th, 1984",
                "March 1984",
                "12. März 1984",
                "mars 2020",
                "3rd of May",
                "1984",
            ],
        ),
        (
            Kind.PHONE,
            [
                "+49 170 1234567",
                "(898)666-3621x0135",
                "0487 98 11 92",
                "01.84.17.61.18",
                "001-541-714-1388",
                "+46 (0)157 548 89",
                "930-167-3943 ext. 12",
            ],
        ),
        (Kind.AGE, ["44-year-old", "44 years old", "aged 44", "age of 7", "Age: 61"]),
        (Kind.POSTCODE, ["K1A 0B1", "SW1A 1AA"]),
        (Kind.NUMBER, ["$1,250.00", "250 EUR", "123456", "1.250.000", "F162823540116"]),
    ],
)
def test_shapes(kind, texts):
    """Every shape is found whole within a sentence, and at the ends of a text."""
    for text in texts:
        assert found(text) == [(text, kind)]
        assert found(f"It is {text}, she said.") == [(text, kind)]


@pytest.mark.parametrize(
    "text",
    [
        "It is 5 o'clock.",
        "Take 2 tablets, 3 times a day.",
        "Section 3.2.1 says so.",
        "300.400.500.600 is no address",
        "a@b",
        "GB50AHER",
        "12:30",
        "He may come.",
        "on Tuesday in May",
    ],
)
def test_what_is_none(text):
    """Small numbers, versions, wrong check digits and ordinary words stay."""
    assert [kind for _, kind in found(text) if kind != Kind.NUMBER] == []
    assert found(text) == [] or text.startswith("300")


def test_a_postcode_after_its_name():
    """A short number is a postcode where the text says so."""
    assert found("My zip code is 8200") == [("8200", Kind.POSTCODE)]
    assert found("post code: 840 24") == [("840 24", Kind.POSTCODE)]


@pytest.mark.parametrize(
    "unit",
    ["a.", "1-", "A ", "1 2", "@", "Ab ", "http://", "::", "aa@", "1 Aa de ", "DE11", "'s A"],
)
def test_time_grows_with_the_text(unit):
    """No text makes the built-in detectors stall."""
    placeholders = Placeholders()
    began = time.thread_time()
    placeholders.find(unit * (20_000 // len(unit)))
    assert time.thread_time() - began < 5
