"""Built-in detector of what has a shape: addresses on the net, accounts, numbers, dates."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterator

from fedsea.privacy.placeholders.check_digits import iban_is_valid, luhn
from fedsea.privacy.placeholders.spans import Kind, Span
from fedsea.privacy.placeholders.words import MONTHS

Check = Callable[[re.Match[str]], bool]


def _iban(found: re.Match[str]) -> bool:
    return iban_is_valid(found[0])


def _card(found: re.Match[str]) -> bool:
    return 12 <= sum(char.isdigit() for char in found[0]) <= 19 and luhn(found[0])


def _ip(found: re.Match[str]) -> bool:
    try:
        ipaddress.ip_address(found[0])
    except ValueError:
        return False
    return True


def _phone(found: re.Match[str]) -> bool:
    digits = sum(char.isdigit() for char in found[0])
    return 7 <= digits <= 18


_MONTH = "|".join(
    sorted({name for names in MONTHS.values() for name in names.split()}, key=len, reverse=True)
)
_DAY = r"(?:0?[1-9]|[12]\d|3[01])"
_YEAR = r"(?:1[89]|20)\d\d"
_TIME = r"\d{1,2}:\d\d(?::\d\d)?(?:\.\d+)?(?:\s?[AaPp]\.?[Mm]\b\.?)?"
_EXTENSION = r"(?:\s?(?:x|ext\.?)\s?\d{1,6})?"
_TLD = r"[A-Za-z]{2,24}"
_HOST = rf"(?:[A-Za-z0-9](?:[A-Za-z0-9-]{{0,62}})\.){{1,8}}{_TLD}"

_SHAPES: tuple[tuple[Kind, str, Check | None], ...] = (
    (Kind.EMAIL, rf"(?<![\w.+-])[\w.!#$%&'*+/=?^`{{|}}~-]{{1,64}}@{_HOST}\b", None),
    (Kind.URL, r"\b(?:https?|ftp)://[^\s<>\"]{1,2000}[^\s<>\".,;:!?')\]]", None),
    (Kind.URL, rf"\bwww\.{_HOST}(?:/[^\s<>\"]{{0,500}}[^\s<>\".,;:!?')\]])?", None),
    (Kind.IP, r"(?<![\w.:])(?:\d{1,3}\.){3}\d{1,3}(?![\w.]?\w)", _ip),
    (Kind.IP, r"(?<![\w.:])[0-9A-Fa-f]{0,4}(?::[0-9A-Fa-f]{0,4}){2,7}(?![\w:])", _ip),
    (Kind.IBAN, r"\b[A-Za-z]{2}\d{2}(?:[ ]?[A-Za-z0-9]{4}){2,7}(?:[ ]?[A-Za-z0-9]{1,3})?\b", _iban),
    (Kind.CARD, r"(?<![\d-])\d(?:[ -]?\d){11,18}(?![\d-])", _card),
    (Kind.NATIONAL_ID, r"(?<![\d-])\d{3}-\d{2}-\d{4}(?![\d-])", None),
    (Kind.DATE, rf"(?<![\d/.-]){_YEAR}[-/.]\d{{1,2}}[-/.]\d{{1,2}}(?:[T ]{_TIME})?(?!\d)", None),
    (
        Kind.DATE,
        rf"(?<![\d/.-])\d{{1,2}}([-/.])\d{{1,2}}\1(?:\d{{4}}|\d\d)(?:,? {_TIME})?(?!\d)",
        None,
    ),
    (
        Kind.DATE,
        rf"(?i)\b(?:{_DAY}(?:st|nd|rd|th|\.)? (?:of )?)?(?:{_MONTH})\.?(?: {_DAY}(?:st|nd|rd|th)?)?,? {_YEAR}\b",
        None,
    ),
    (Kind.DATE, rf"(?i)\b{_DAY}(?:st|nd|rd|th|\.)? (?:of )?(?:{_MONTH})\b", None),
    (Kind.DATE, rf"\b(?:{_MONTH})\.? {_DAY}(?:st|nd|rd|th)?\b", None),
    (Kind.DATE, rf"(?<![\w.,/#-]){_YEAR}(?![\w/]|[.,-]\d)", None),
    (
        Kind.PHONE,
        rf"(?<![\w.])(?:\+|00)\d{{1,3}}(?:[ .-]?\(\d{{1,4}}\))?(?:[ ./-]{{0,2}}\d{{1,5}}){{2,6}}{_EXTENSION}(?!\d)",
        _phone,
    ),
    (
        Kind.PHONE,
        rf"(?<![\w.])\(?0?\d{{1,5}}\)?(?:[ ./-]{{1,2}}\d{{2,5}}){{1,5}}{_EXTENSION}(?!\d|[/-]\d)",
        _phone,
    ),
    (Kind.PHONE, r"(?<![\w.])\(\d{2,5}\)[ ]?\d{3,4}[ .-]?\d{3,4}(?:x\d{1,6})?(?!\d)", _phone),
    (Kind.AGE, r"(?i)\b\d{1,3}(?:[ -]?years?[ -]old|[ -]?y/?o)\b", None),
    (Kind.AGE, r"(?i)\bage: ?\d{1,3}\b(?![.,]\d)", None),
    (Kind.AGE, r"(?i)\b(?:age of|aged?|turn(?:ed|s)?) \d{1,3}(?: years old)?\b(?![.,]\d)", None),
    (
        Kind.POSTCODE,
        r"(?i)\b(?:zip|zip[ -]?code|post(?:al)?[ -]?code|PLZ)\W{1,3}(?:is )?"
        r"(?P<span>(?=\S*\d|\S+ \d)[A-Z0-9]{2,5}(?:[ -](?=\S*\d)[A-Z0-9]{2,4})?\b)",
        None,
    ),
    (Kind.POSTCODE, r"\b[ABCEGHJ-NPRSTVXY]\d[A-Z][ -]?\d[A-Z]\d\b", None),
    (Kind.POSTCODE, r"\b[A-Z]{1,2}\d[A-Z\d]? \d[A-Z]{2}\b", None),
    (Kind.NUMBER, r"(?:[$€£¥]|\b(?:USD|EUR|GBP|CHF)) ?\d[\d.,]{0,18}\d\b", None),
    (Kind.NUMBER, r"\b\d{1,12}(?:[.,]\d{1,4})* ?(?:[$€£¥]|(?:USD|EUR|GBP|CHF)\b)", None),
    (Kind.NUMBER, r"(?<![\w])\d{1,3}(?:[.,]\d{3}){1,5}(?:[.,]\d{1,2})?(?!\w)", None),
    (Kind.NUMBER, r"(?<![\d.,])\d{4,40}(?![\d])(?![.,]\d)", None),
    (
        Kind.NUMBER,
        r"\b(?=[A-Z0-9-]{0,5}\d)(?=[A-Z0-9-]{0,20}[A-Z])[A-Z0-9]{1,20}(?:-[A-Z0-9]{1,20}){0,4}\d{3}[A-Z0-9]{0,10}\b",
        None,
    ),
)


class ShapeDetector:
    """Finds what is told by its characters alone."""

    def __init__(self) -> None:
        self._shapes = [(kind, re.compile(shape), check) for kind, shape, check in _SHAPES]

    def find(self, text: str) -> list[Span]:
        return list(self._found(text))

    def _found(self, text: str) -> Iterator[Span]:
        for kind, shape, check in self._shapes:
            for found in shape.finditer(text):
                if check is None or check(found):
                    group = "span" if "span" in shape.groupindex else 0
                    yield Span(found.start(group), found.end(group), kind)
