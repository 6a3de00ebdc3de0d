"""Built-in detector of names, organisations and places, without a model.

It reads runs of capitalised words. What stands in them, before and after them says what they are; a
run that nothing explains, and that is not made of ordinary words, is taken for a name: to hide a
word too many costs little, to send a name costs what all this is for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import regex

from fedsea.privacy.placeholders.spans import Kind, Span
from fedsea.privacy.placeholders.words import (
    AMBIGUOUS_NAMES,
    CALENDAR,
    DIRECTIONS,
    GIVEN_NAMES,
    ORDINARY,
    ORGANISATION_WORDS,
    PLACES,
    SURNAMES,
    TITLES,
)

PARTICLE = (
    r"(?:van|von|vom|zu|zum|de|da|di|do|du|dos|das|del|della|den|der|des|la|le|les|el|al|bin|ter|ten|af|of|the"
    r"|nad|pod|sur|y|e|&)"
)
CAPITALISED = r"(?:[dl]['’])?\p{Lu}(?:\p{L}|(?<=\p{L})['’-](?=\p{L}))*"
_RUN = regex.compile(
    rf"(?<![\p{{L}}\d_@/.-]){CAPITALISED}\.?"
    rf"(?:[ ](?:{PARTICLE}[ ]){{0,3}}{CAPITALISED}\.?){{0,8}}(?![\p{{L}}_@])"
)
_PART = regex.compile(r"(?:[dl]['’])?\p{L}+(?:['’-]\p{L}+)*|&")
_SENTENCE_START = regex.compile(r"(?:^|[.!?:>\"“”()\n\t•*])[\s\"'“”>*-]*$")
_FIRM = regex.compile(
    r"(?<!, )\b(?P<span>\p{Lu}[\p{L}'’-]+(?:, \p{Lu}[\p{L}'’-]+)? and \p{Lu}[\p{L}'’-]+)(?!,)"
)
_FIRM_ENDINGS = frozenset("sons daughters co company partners associates brothers poors".split())

_PLACE_CUE = regex.compile(
    r"(?i)\b(?:in|to|from|near|at|visit|visited|visiting|around|across|outside|towards?|leave|left|city|town|"
    r"village|state|region|capital|of|through|via|between|here)\s+(?:the\s+)?(?:city of\s+)?$"
)
_STRONG_PLACE_CUE = regex.compile(
    r"(?i)\b(?:live[sd]?|living|born|gr[eo]wn? up|move[sd]?|moving|fl(?:y|ies|ew|ying)|travel(?:l?ed|l?ing|s)?|"
    r"trip|based|located|go(?:es|ing)?|went|resident|been|here)\b[^.!?\n]{0,24}"
    r"\b(?:in|to|from|at|near)\s+(?:the\s+)?$"
)
_NAME_CUE = regex.compile(
    r"(?i)\b(?:names?|named|calls?|called|dear|hi|hello|hey|i am|i'm|this is|by|with|says?|said|patient|signed|"
    r"sincerely|regards|thanks|attn|contact|ask|tell|told|met)\b[\s:,>\"]*$"
)
_ORGANISATION_CUE = regex.compile(
    r"(?i)\b(?:work(?:s|ed|ing)?(?: for| at)|company|employer|employed (?:by|at)|invest(?:ed)? in|firm|"
    r"(?:ceo|cto|director|founder|employee|customer) (?:of|at)|owned by|made by|acquired(?: by)?)\s+(?:the\s+)?$"
)
_AFTER_ORGANISATION = regex.compile(
    r"\s+(?:is|was) an? (?:\S+\s){0,4}?(?:company|bank|firm|corporation|organi[sz]ation|charity|university|"
    r"publisher|manufacturer|provider|startup|business|non-?profit)\b|"
    r"\s+(?:invested|announced|acquired|employs|hired|manufactures|launched|released)\b"
)
_LOWER_NAME = regex.compile(
    r"(?i)(?:\b(?:my name is|name is|name:|calls? me|called)\s+|\b(?:mr|mrs|ms|dr|prof)\b\.?\s+)"
    r"(?P<span>\p{Ll}\p{L}*(?:['’-]\p{L}+)*(?:\s\p{Ll}\.?(?=\s)|\s\p{Ll}\p{L}+){0,3})"
)
_LOWER_WORD = regex.compile(r"(?<![\p{L}\d_@/.-])\p{Ll}{3,}(?![\p{L}\d_@]|\.\p{L})")
_LOWER_PLACE = regex.compile(r"(?P<span>\p{Ll}{3,}(?:[ -]\p{Ll}{3,})?)")


@dataclass(frozen=True, slots=True)
class _Part:
    """A word of a run."""

    start: int
    end: int
    word: str

    @property
    def key(self) -> str:
        return self.word.lower()

    @property
    def is_plain(self) -> bool:
        """Whether it may be an ordinary word that happens to have a capital letter."""
        first = regex.split("['’]", self.key)[0]
        return self.key in ORDINARY or first in ORDINARY or self.is_abbreviation

    @property
    def is_abbreviation(self) -> bool:
        return self.word.isupper() and 1 < len(self.word) <= 3

    @property
    def joins_nothing(self) -> bool:
        """Whether this cannot be the first or last word of a name."""
        return self.key in TITLES or self.key in CALENDAR or self.word[0].islower()

    @property
    def is_name(self) -> bool:
        return self.key in GIVEN_NAMES or self.key in SURNAMES


class NameDetector:
    """Finds names of people, organisations and places."""

    def find(self, text: str) -> list[Span]:
        return [*_firms(text), *_named(text), *_in_lower_case(text)]


def _named(text: str) -> Iterator[Span]:
    for run in _RUN.finditer(text):
        parts = [
            _Part(run.start() + found.start(), run.start() + found.end(), found[0])
            for found in _PART.finditer(run[0])
        ]
        for group in _groups(text, parts):
            kind = _kind(text, group)
            if kind is not None:
                end = group[-1].end
                yield Span(group[0].start, end + _is_initial(text, group[-1]), kind)


def _is_initial(text: str, part: _Part) -> bool:
    return len(part.word) == 1 and text[part.end : part.end + 1] == "."


def _groups(text: str, parts: list[_Part]) -> Iterator[list[_Part]]:
    """A run in pieces: where a sentence or a possessive ends in it, and without its edges."""
    group: list[_Part] = []
    for part in parts:
        if group and _ends_before(text, group[-1], part):
            yield from _trimmed(text, group)
            group = []
        owner = regex.search(r"['’][sS]$", part.word)
        if owner:
            group.append(_Part(part.start, part.end - 2, part.word[:-2]))
            yield from _trimmed(text, group)
            group = []
        else:
            group.append(part)
    yield from _trimmed(text, group)


def _ends_before(text: str, last: _Part, part: _Part) -> bool:
    between = text[last.end : part.start]
    return between.startswith(".") and len(last.word) > 3 and last.key not in TITLES


def _trimmed(text: str, group: list[_Part]) -> Iterator[list[_Part]]:
    """Without words at the edges that belong to the sentence rather than to the name."""
    while group and (group[0].joins_nothing or _opens_sentence(text, group)):
        group = group[1:]
    while group and (
        group[-1].key in CALENDAR or group[-1].word[0].islower() or group[-1].word == "&"
    ):
        group = group[:-1]
    if group:
        yield group


def _opens_sentence(text: str, group: list[_Part]) -> bool:
    """Whether the first word is ordinary and has its capital letter from the sentence."""
    first = group[0]
    if not first.is_plain or " ".join(part.key for part in group) in PLACES:
        return False
    if len(group) > 1 and (first.key in DIRECTIONS or first.is_name):
        return False
    if len(group) > 1 and group[-1].key in ORGANISATION_WORDS and len(first.word) > 3:
        return False
    return bool(_SENTENCE_START.search(text[max(0, first.start - 8) : first.start]))


def _kind(text: str, group: list[_Part]) -> Kind | None:
    start, end = group[0].start, group[-1].end
    keys = [part.key for part in group]
    before, after = text[max(0, start - 60) : start], text[end : end + 80]
    if _follows_title(before):
        return Kind.NAME
    if _is_place(keys):
        return Kind.PLACE
    if all(part.is_plain for part in group):
        return _kind_of_plain(text, group)
    is_firm = any(key in ORGANISATION_WORDS for key in keys[1:])
    if is_firm or _ORGANISATION_CUE.search(before) or _AFTER_ORGANISATION.match(after):
        return Kind.ORGANISATION
    return _name_or_place(group, before)


def _name_or_place(group: list[_Part], before: str) -> Kind:
    if group[0].key in GIVEN_NAMES:
        return Kind.NAME
    if _STRONG_PLACE_CUE.search(before):
        return Kind.PLACE
    if any(part.is_name for part in group):
        return Kind.NAME
    if _PLACE_CUE.search(before) and not _NAME_CUE.search(before):
        return Kind.PLACE
    return Kind.NAME


def _kind_of_plain(text: str, group: list[_Part]) -> Kind | None:
    """What ordinary words with capitals are, if they are anything.

    They are a name where they stand within a sentence and are one elsewhere, or an organisation
    that says so.
    """
    before = text[max(0, group[0].start - 60) : group[0].start]
    opens = _SENTENCE_START.search(before)
    if len(group) > 1 and group[-1].key in ORGANISATION_WORDS and not opens:
        return Kind.ORGANISATION
    if any(part.is_abbreviation for part in group):
        return None
    if any(part.is_name for part in group) and (len(group) > 1 or not opens):
        return Kind.NAME
    if not opens and group[0].word.istitle():
        if _ORGANISATION_CUE.search(before):
            return Kind.ORGANISATION
        if _STRONG_PLACE_CUE.search(before):
            return Kind.PLACE
    return None


def _is_place(keys: list[str]) -> bool:
    phrase = " ".join(keys)
    return phrase in PLACES or phrase.removeprefix("the ") in PLACES


def _follows_title(before: str) -> bool:
    found = regex.search(r"(\p{Lu}\p{L}*)\.?\s+$", before)
    return found is not None and found[1].lower() in TITLES


def _firms(text: str) -> Iterator[Span]:
    """Firms named after their partners: "Hale, Orr and Weiss", "Orr and Sons"."""
    for found in _FIRM.finditer(text):
        words = [word.lower() for word in regex.findall(r"\p{L}+", found["span"])]
        partners = "," in found["span"] and not any(
            word in GIVEN_NAMES and word not in SURNAMES for word in words
        )
        if partners or words[-1] in _FIRM_ENDINGS:
            yield Span(found.start("span"), found.end("span"), Kind.ORGANISATION)


def _in_lower_case(text: str) -> Iterator[Span]:
    """Names without capitals: after words that announce one, and given names that mean nothing else."""
    for found in _LOWER_NAME.finditer(text):
        end = found.start("span")
        for word in regex.finditer(r"[\p{L}'’-]+\.?", found["span"]):
            if word[0] in ORDINARY and word[0] not in SURNAMES:
                break
            end = found.start("span") + word.end()
        if end > found.start("span"):
            yield Span(found.start("span"), end, Kind.NAME)
    for found in _LOWER_WORD.finditer(text):
        if found[0] in GIVEN_NAMES and found[0] not in AMBIGUOUS_NAMES | ORDINARY:
            yield Span(found.start(), found.end(), Kind.NAME)
        elif (
            found[0] in PLACES and found[0] not in ORDINARY | AMBIGUOUS_NAMES and found[0] != "nice"
        ):
            yield Span(found.start(), found.end(), Kind.PLACE)
    if text.islower():
        yield from _places_in_lower_case(text)


def _places_in_lower_case(text: str) -> Iterator[Span]:
    for found in _LOWER_PLACE.finditer(text):
        words = found[0].split()
        if _STRONG_PLACE_CUE.search(text[max(0, found.start() - 60) : found.start()]):
            count = next((n for n, word in enumerate(words) if word in ORDINARY), len(words))
            if count:
                yield Span(found.start(), found.start() + len(" ".join(words[:count])), Kind.PLACE)
