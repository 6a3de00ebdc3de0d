"""Invented names, places, numbers: what stands in for a sensitive span.

Every draw is fresh and looks at nothing of the value but its kind and, where the table says so, its
shape. Whatever looks like an address, an account or a card is chosen so that it can belong to
nobody: reserved domains and networks, check digits that are never valid.

    kind                       kept of the value
    name                       number of words; initials stay initials
    phone, number, ids, post   lengths and separators
    card, iban                 separators (card: length)
    date, age                  the format
    e-mail, URL, IP, place,    nothing (IP: version)
    organisation, address
    custom                     lengths and separators where it has digits, else nothing
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable

from fedsea.privacy.placeholders.check_digits import iban_is_valid, luhn
from fedsea.privacy.placeholders.spans import Kind
from fedsea.privacy.placeholders.words import GIVEN_NAMES, MONTHS, ORDINARY, PLACES, SURNAMES

_ONSETS = "b br c cl d dr f fl g gr h j k kl l m n p pl pr qu r s sk st t tr v w z".split()
_VOWELS = "a e i o u ae ia".split()
_CODAS = "l m n r s nd rn th x".split()
_GIVEN_ENDINGS = "a an el en eth ia iel in ir is ola on or us".split()
_SURNAME_ENDINGS = (
    "acre aldt berin dale ek ett feld gard holt mere ovan quist sby strom vane wick".split()
)
_PLACE_ENDINGS = "burgh bury by combe field ford hampton haven minster mouth port stead ton".split()
_STREETS = "Street Road Avenue Lane Way Drive".split()
_TRADES = "Group Partners Systems Works Holdings Associates Industries Services".split()

_DATE_PART = re.compile(r"\d{1,2}(?:st|nd|rd|th)\b|\d+(?::\d+)*|[^\W\d_]+")
_LISTED = GIVEN_NAMES | SURNAMES | PLACES | ORDINARY
_AMOUNT = re.compile(r"USD|EUR|GBP|CHF")
_LETTER_OR_DIGIT = re.compile(r"[^\W_]")


class Inventor:
    """Draws substitutes from a random source."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._makers: dict[str, Callable[[str], str]] = {
            Kind.NAME: lambda _: f"{self.given_name()} {self.surname()}",
            "name:given": lambda _: self.given_name(),
            "name:surname": lambda _: self.surname(),
            Kind.PLACE: lambda _: self._stem(1) + self._pick(_PLACE_ENDINGS),
            Kind.ORGANISATION: lambda _: f"{self.surname()} {self._pick(_TRADES)}",
            Kind.ADDRESS: lambda _: self._address(),
            Kind.EMAIL: lambda _: self._email(),
            Kind.URL: lambda _: f"https://www.{self._word()}.example",
            Kind.IP: self._ip,
            Kind.IBAN: self._iban,
            Kind.CARD: self._card,
            Kind.DATE: self._date,
            Kind.AGE: lambda value: re.sub(r"\d+", lambda _: str(self._rng.randint(18, 97)), value),
            Kind.PHONE: self._digits,
            Kind.NUMBER: self._number,
            Kind.NATIONAL_ID: self.shaped,
            Kind.POSTCODE: self.shaped,
        }

    def substitute(self, kind: str, value: str) -> str:
        """One draw for a value of a kind."""
        return self._makers.get(kind, self._custom)(value)

    def given_name(self) -> str:
        """A word that reads like a given name."""
        return self._unlisted(_GIVEN_ENDINGS)

    def surname(self) -> str:
        """A word that reads like a surname."""
        return self._unlisted(_SURNAME_ENDINGS)

    def initial(self) -> str:
        """A capital letter."""
        return self._pick("ABCDEFGHIJKLMNOPRSTVWZ")

    def shaped(self, value: str) -> str:
        """Digits for digits, letters for letters of the same case; the first digit is not zero."""
        drawn = _LETTER_OR_DIGIT.sub(lambda found: self._like(found[0]), value)
        return re.sub(r"\d", lambda _: self._pick("123456789"), drawn, count=1)

    def _digits(self, value: str) -> str:
        """Digits for digits; the rest stays."""
        drawn = re.sub(r"\d", lambda _: self._pick("0123456789"), value)
        return re.sub(r"\d", lambda _: self._pick("123456789"), drawn, count=1)

    def _number(self, value: str) -> str:
        return self._digits(value) if _AMOUNT.search(value) else self.shaped(value)

    def _like(self, char: str) -> str:
        if char.isdigit():
            return self._pick("0123456789")
        letter = self._pick("abcdefghijklmnopqrstuvwxyz")
        return letter.upper() if char.isupper() else letter

    def _custom(self, value: str) -> str:
        if any(char.isdigit() for char in value):
            return self.shaped(value)
        return self.surname()

    def _pick(self, choices: str | list[str]) -> str:
        return self._rng.choice(choices)

    def _unlisted(self, endings: list[str]) -> str:
        """A word that is no name or word of the lists: models say those of their own accord."""
        while True:
            word = self._stem(1) + self._pick(endings)
            if word.lower() not in _LISTED:
                return word

    def _stem(self, syllables: int) -> str:
        parts = [
            self._pick(_ONSETS) + self._pick(_VOWELS) + (self._pick(_CODAS) if last else "")
            for last in [False] * (syllables - 1) + [True]
        ]
        return "".join(parts).capitalize()

    def _word(self) -> str:
        return self._stem(2).lower()

    def _address(self) -> str:
        street = f"{self._stem(1)}{self._pick(_PLACE_ENDINGS)} {self._pick(_STREETS)}"
        return f"{self._rng.randint(100, 9999)} {street}"

    def _email(self) -> str:
        return f"{self.given_name()}.{self._word()}@{self._word()}.example".lower()

    def _ip(self, value: str) -> str:
        if ":" in value:
            return "2001:db8:" + ":".join(f"{self._rng.randrange(4096, 65536):x}" for _ in range(6))
        return f"198.{self._rng.randint(18, 19)}.{self._byte()}.{self._byte()}"

    def _byte(self) -> int:
        return self._rng.randrange(256)

    def _iban(self, value: str) -> str:
        compact = self._pick(["DE", "FR", "NL", "ES", "IT", "AT", "BE", "PL"]) + "00"
        compact += "".join(self._pick("0123456789") for _ in range(18))
        if iban_is_valid(compact):
            compact = compact[:-1] + str((int(compact[-1]) + 1) % 10)
        if " " in value:
            return " ".join(compact[at : at + 4] for at in range(0, len(compact), 4))
        return compact

    def _card(self, value: str) -> str:
        drawn = self.shaped(value)
        if luhn(drawn) and any(char.isdecimal() for char in drawn):
            last = max(at for at, char in enumerate(drawn) if char.isdecimal())
            drawn = f"{drawn[:last]}{(int(drawn[last]) + 1) % 10}{drawn[last + 1 :]}"
        return drawn

    def _date(self, value: str) -> str:
        return _DATE_PART.sub(lambda found: self._date_part(found[0]), value)

    def _date_part(self, part: str) -> str:
        if ":" in part:
            first, *rest = part.split(":")
            hour = str(self._rng.randint(1, 12)).zfill(len(first))
            return ":".join([hour, *(f"{self._rng.randrange(60):02}" for _ in rest)])
        if part[0].isdigit() and part.endswith(("st", "nd", "rd", "th")):
            return f"{self._rng.randint(4, 20)}th"
        if part.isdigit():
            if len(part) >= 4:
                return str(self._rng.randint(1930, 2029))
            return str(self._rng.randint(1, 12 if len(part) > 1 else 9)).zfill(len(part))
        for names in MONTHS.values():
            if part.casefold() in (months := names.casefold().split()):
                drawn = self._pick(months)
                return drawn if part.islower() else drawn.title()
        return part
