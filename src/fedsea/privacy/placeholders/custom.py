"""Lists and regular expressions of the user's own."""

from __future__ import annotations

import re
from collections.abc import Sequence

import regex

from fedsea.errors import ConfigError, RequestError
from fedsea.privacy.placeholders.restoration import Lexicon
from fedsea.privacy.placeholders.spans import Span

_KIND = re.compile(r"[A-Z][A-Z0-9_]{0,30}")
_SECONDS = 2.0


def checked_kind(kind: str) -> str:
    """The kind of a custom list or pattern.

    Raises:
        ConfigError: it is not a word in capital letters.
    """
    if not _KIND.fullmatch(kind):
        raise ConfigError(
            f"{kind!r} cannot name a kind of placeholder: use capital letters, digits and _"
        )
    return kind


class WordDetector:
    """Finds the words and phrases of a list, in any case, where they stand for themselves."""

    def __init__(self, kind: str, words: Sequence[str]) -> None:
        if isinstance(words, str):
            raise ConfigError(f"the words of {kind} are one text; give a list of them")
        cleaned = [word.strip() for word in words]
        if not cleaned or not all(cleaned):
            raise ConfigError(f"the list of words of {kind} is empty or has an empty word")
        self._kind = kind
        self._lexicon = Lexicon(dict.fromkeys(cleaned, ""))

    def find(self, text: str) -> list[Span]:
        return [Span(found.start, found.end, self._kind) for found in self._lexicon.matches(text)]


class PatternDetector:
    """Finds what a regular expression finds. One that takes seconds over a text is given up."""

    def __init__(self, kind: str, pattern: str) -> None:
        self._kind = kind
        try:
            self._pattern = regex.compile(pattern)
            is_empty = self._pattern.search("", timeout=_SECONDS) is not None
        except regex.error as error:
            raise ConfigError(
                f"the pattern of {kind} is no regular expression: {error.msg} at {error.pos}"
            ) from None
        except TimeoutError:
            raise ConfigError(f"the pattern of {kind} takes too long: simplify it") from None
        if is_empty:
            raise ConfigError(f"the pattern of {kind} matches the empty text: let it match more")

    def find(self, text: str) -> list[Span]:
        """The matches that are not empty.

        Raises:
            RequestError: the pattern takes too long over this text; nothing is let through.
        """
        try:
            return [
                Span(found.start(), found.end(), self._kind)
                for found in self._pattern.finditer(text, timeout=_SECONDS)
                if found.end() > found.start()
            ]
        except TimeoutError:
            raise RequestError(
                f"the pattern of {self._kind} takes too long over this text; simplify it"
            ) from None
