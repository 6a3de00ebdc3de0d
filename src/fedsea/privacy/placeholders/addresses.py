"""Built-in detector of postal addresses: a street with a house number, or a unit, and what follows."""

from __future__ import annotations

from collections.abc import Iterator

import regex

from fedsea.privacy.placeholders.names import CAPITALISED, PARTICLE
from fedsea.privacy.placeholders.spans import Kind, Span
from fedsea.privacy.placeholders.words import (
    CALENDAR,
    ORDINARY,
    STREET_ENDINGS,
    STREET_WORDS,
    TITLES,
)

_LOWER_STREET = (
    r"(?:ul\.|u\.|út|útja|utca|tér|rkp\.|krt\.|gate|vei|veien|väg|gata|nám\.|sok\.|rue|via|calle)"
)
_STREET = (
    rf"(?P<street>(?:{_LOWER_STREET}[ ])?(?:{PARTICLE}[ ]){{0,3}}{CAPITALISED}\.?"
    rf"(?:[ ](?:{PARTICLE}[ ]){{0,3}}(?:\d{{1,3}}(?:st|nd|rd|th)?[ ])?{CAPITALISED}\.?){{0,5}}"
    rf"(?:[ ]{_LOWER_STREET})?)"
)
_HOUSE_FIRST = regex.compile(
    rf"(?<![\w.,#/-])\d{{1,5}}\p{{L}}?[ ](?:\d{{1,5}}[ ])?{_STREET}(?:[ ]\d{{1,4}}\p{{L}}?\b\.?)?"
)
_HOUSE_LAST = regex.compile(
    rf"(?<![\w@]){_STREET},?[ ]\d{{1,4}}(?:[ ]\d\d)?\p{{L}}?(?:/\d{{1,4}})?\b(?![.,:/-]\d|%)"
)
_UNIT = r"(?i:Suite|Ste\.?|Apt\.?|Apartment|Unit|Flat|Floor|P\.?O\.? ?Box|Postbox|Box|PSC|Bldg\.?)[ ]?#?\d+\p{L}?\b"
_MILITARY = r"(?i:[ADF]PO [A-Z]{2} \d{5})"
_UNIT_PART = regex.compile(rf"\b{_UNIT}(?:,? (?i:Box) \d+)?(?:\s{_MILITARY})?")
_SHIP = regex.compile(rf"\bUS(?:NS|S|CGC|NV) {CAPITALISED}\s+{_MILITARY}")
_CORNER = regex.compile(
    rf"\b(?:the )?corner of [^\n,.]{{1,40}}? and (?:{_LOWER_STREET} )?{CAPITALISED}"
    rf"(?: (?:{PARTICLE} ){{0,2}}{CAPITALISED}){{0,3}}(?: \d{{1,4}}\b)?"
)
_MORE = regex.compile(
    rf"(?:\s*,\s*|\s*\n[\s>,]*|[ ])(?:{_UNIT}|\d{{3,6}}(?:[ -]\d{{2,4}})?\b(?![-.]?\d)|"
    rf"\p{{Lu}}{{2,3}}(?:[ ]\d{{4,6}}(?:-\d{{4}})?)?\b|"
    rf"{CAPITALISED}(?:[ -](?:{PARTICLE}[ ]){{0,3}}(?:[dl]['’])?\p{{Lu}}[\p{{L}}'’-]*){{0,3}}(?:[ ]\(\p{{L}}+\))?"
    rf"(?=\s*(?:[,.?!\n]|$|\d))(?:[ ]\d{{3,6}}\b(?![-.]?\d))?)"
)
_PARTS = 7


class AddressDetector:
    """Finds postal addresses."""

    def find(self, text: str) -> list[Span]:
        return list(_addresses(text))


def _addresses(text: str) -> Iterator[Span]:
    for pattern in (_HOUSE_FIRST, _HOUSE_LAST):
        for found in pattern.finditer(text):
            words = regex.findall(r"\p{Lu}\p{L}*\.?", found["street"])
            if _is_street([word.lower() for word in words], house_first=pattern is _HOUSE_FIRST):
                yield _address(text, found)
    for pattern in (_UNIT_PART, _SHIP, _CORNER):
        for found in pattern.finditer(text):
            yield _address(text, found)


def _address(text: str, found: regex.Match[str]) -> Span:
    end = _end(text, found.end())
    return Span(found.start(), end - text[:end].endswith("."), Kind.ADDRESS)


def _is_street(words: list[str], *, house_first: bool) -> bool:
    """Whether these words are a street: they say so, or none of them is an ordinary word."""
    plain = [word.rstrip(".") for word in words]
    if any(word in CALENDAR for word in plain):
        return False
    if len(plain) > 1 and any(word in STREET_WORDS for word in plain):
        return True
    if any(
        word.endswith(ending) and len(word) > len(ending)
        for word in words
        for ending in STREET_ENDINGS
    ):
        return True
    edges = plain[-1:] + plain[: 1 if house_first else 0]
    return not any(word in ORDINARY or word in TITLES for word in edges)


def _end(text: str, end: int) -> int:
    """Where an address ends that goes on over commas and lines: unit, town, code, country."""
    for _ in range(_PARTS):
        more = _MORE.match(text, end)
        if more is None or _says_something_else(more[0]):
            break
        end = more.end()
    return end


def _says_something_else(part: str) -> bool:
    words = regex.findall(r"\p{L}+", part.lower())
    return bool(words) and (words[0] in TITLES or all(word in ORDINARY for word in words))
