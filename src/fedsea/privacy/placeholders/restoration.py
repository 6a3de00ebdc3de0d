"""Finding known phrases in a text that arrives in pieces, and putting values in their places.

A phrase is found whatever its case, the longest where several begin, and only where it stands for
itself: not within a word or a number. A plural or possessive "s" may follow it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NoReturn

_LOOKAHEAD = 2


def fold(text: str) -> str:
    """The text in lower case, character by character, so that positions stay the same."""
    lowered = text.lower()
    if len(lowered) == len(text):
        return lowered
    return "".join(low if len(low := char.lower()) == 1 else char for char in text)


def joins(before: str, first: str) -> bool:
    """Whether `first` continues the word or the number in which `before` ends."""
    if not before:
        return False
    if _has_case(first):
        return _has_case(before[-1])
    if first.isdigit():
        return before[-1].isdigit() or (before[-1] in ".," and before[-2:-1].isdigit())
    return False


def continued(last: str, after: str, *, final: bool = True) -> bool | None:
    """Whether `after` continues the word or number that ends in `last`; None if it may yet.

    An "s" that ends the word does not continue it: it is an inflection.
    """
    following, later = after[:1], after[1:2]
    if _has_case(last):
        if following and following in "sS":
            return (None if not final else False) if not later else _has_case(later)
        return (None if not final else False) if not following else _has_case(following)
    if last.isdigit():
        if following and following in ".,":
            return (None if not final else False) if not later else later.isdigit()
        return (None if not final else False) if not following else following.isdigit()
    return False


def _has_case(char: str) -> bool:
    """Whether this is a letter of a script with cases, which are those that put spaces between."""
    return char.lower() != char.upper()


@dataclass(slots=True)
class _Node:
    """The phrases that begin alike: what may follow, and the phrase that ends here."""

    following: dict[str, _Node]
    phrase: str | None = None


@dataclass(frozen=True, slots=True)
class Match:
    """A phrase in a text."""

    start: int
    end: int
    phrase: str


class Lexicon:
    """Phrases to look for, each with a value."""

    def __init__(self, values: Mapping[str, str]) -> None:
        self._values = dict(values)
        self._root = _Node({})
        self._longest = max(map(len, self._values), default=0)
        for phrase in self._values:
            node = self._root
            for char in fold(phrase):
                node = node.following.setdefault(char, _Node({}))
            node.phrase = node.phrase or phrase

    def __repr__(self) -> str:
        return f"Lexicon({len(self._values)} phrases)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("what placeholders stand for does not leave its process")

    @property
    def hold_back(self) -> int:
        """Most characters that a `Restorer` keeps back."""
        return self._longest + _LOOKAHEAD

    def value_of(self, found: str, phrase: str) -> str:
        """The value for a phrase as it was found: in capitals for capitals."""
        if found in self._values:
            return self._values[found]
        value = self._values[phrase]
        if found.isupper() and not phrase.isupper():
            return value.upper()
        return value

    def matches(self, text: str) -> Iterator[Match]:
        """The phrases in a whole text, from left to right."""
        folded, at = fold(text), 0
        while at < len(text):
            found = self.match(text, folded, at, final=True)
            if found is not None:
                yield found
            at = at + 1 if found is None else found.end

    def match(self, text: str, folded: str, at: int, *, final: bool) -> Match | None:
        """The longest phrase that begins at a position.

        Raises:
            Undecided: more text may change the answer, and `final` is false.
        """
        node = self._root.following.get(folded[at])
        if node is None or joins(text[max(0, at - 2) : at], text[at]):
            return None
        found: Match | None = None
        end = at + 1
        while True:
            if node.phrase is not None:
                goes_on = continued(text[end - 1], text[end : end + _LOOKAHEAD], final=final)
                if goes_on is None:
                    raise Undecided
                if not goes_on:
                    found = Match(at, end, node.phrase)
            if end == len(text):
                if node.following and not final:
                    raise Undecided
                return found
            following = node.following.get(folded[end])
            if following is None:
                return found
            node, end = following, end + 1


class Undecided(Exception):
    """More text may make or break a match."""


class Restorer:
    """Puts values back into one text that arrives in pieces.

    What was given out does not depend on how the text was cut. At most `Lexicon.hold_back`
    characters are kept back, and only while they may belong to a phrase.
    """

    def __init__(self, lexicon: Lexicon) -> None:
        self._lexicon = lexicon
        self._before = ""
        self._held = ""

    def __repr__(self) -> str:
        return f"Restorer({self._lexicon!r})"

    def push(self, text: str) -> str:
        """Take the next piece and return what is certain."""
        return self._advance(text, final=False)

    def flush(self) -> str:
        """Return the rest, at the end of the text, and start anew."""
        rest = self._advance("", final=True)
        self._before = ""
        return rest

    def restore(self, text: str) -> str:
        """A whole text."""
        return self.push(text) + self.flush()

    def _advance(self, piece: str, *, final: bool) -> str:
        text = self._before + self._held + piece
        folded, at = fold(text), len(self._before)
        given: list[str] = []
        while at < len(text):
            try:
                found = self._lexicon.match(text, folded, at, final=final)
            except Undecided:
                break
            if found is None:
                given.append(text[at])
                at += 1
            else:
                given.append(self._lexicon.value_of(text[at : found.end], found.phrase))
                at = found.end
        self._before, self._held = text[max(0, at - 2) : at], text[at:]
        return "".join(given)
