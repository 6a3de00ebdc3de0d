"""One session's mapping between values and their substitutes. It never leaves the process."""

from __future__ import annotations

import random
import re
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

from fedsea.errors import RequestError
from fedsea.privacy.placeholders.invention import Inventor
from fedsea.privacy.placeholders.restoration import (
    Lexicon,
    Restorer,
    continued,
    fold,
    joins,
)
from fedsea.privacy.placeholders.spans import Detector, Kind, Span, merged

_MOST_CHARACTERS = 2_000_000
_DRAWS = 64
_ATTEMPTS = 4

_NAME_WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*\.?")
_WORD = "name:word"
_GIVEN = "name:given"
_SURNAME = "name:surname"
_PARTICLES = frozenset("al bin da de del della den der di do dos du el la le van von y zu".split())


@dataclass(slots=True, repr=False)
class _Mapping:
    """What stands for what; `values` is one to one from substitutes to values as they were written.

    `substitutes` finds the substitute of a value by its kind and its text; `bases` the first one
    among the spellings that differ in case only.
    """

    values: dict[str, str] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)
    substitutes: dict[tuple[str, str], str] = field(default_factory=dict)
    bases: dict[tuple[str, str], tuple[str, str]] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)

    def copy(self) -> _Mapping:
        return _Mapping(
            dict(self.values),
            dict(self.kinds),
            dict(self.substitutes),
            dict(self.bases),
            set(self.taken),
        )

    def add(self, kind: str, value: str, substitute: str) -> None:
        self.values[substitute] = value
        self.kinds[substitute] = kind
        self.substitutes[kind, value] = substitute
        self.bases.setdefault((kind, fold(value)), (value, substitute))
        self.taken.add(fold(substitute))


class Substitution:
    """Replaces sensitive spans by substitutes and back, with one mapping over many texts.

    A value keeps its substitute for the whole session, in capitals too, and every later mention of
    a value that was found once is replaced as well. A substitute is a fresh random draw: it depends
    on the kind and on the shape that `invention` keeps, and it equals no text and no value that the
    session has seen. Draws that would are made again, so a reader learns that a
    value is not among the substitutes, and nothing else.

    Make one with `Placeholders.session`. Methods may be called from any thread.
    """

    def __init__(self, detectors: Iterable[Detector], rng: random.Random, *, tags: bool) -> None:
        self._detectors = tuple(detectors)
        self._inventor = Inventor(rng)
        self._tags = tags
        self._mapping = _Mapping()
        self._lexicon = Lexicon({})
        self._seen: list[str] = []
        self._known: dict[str, str] = {}
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        counts = ", ".join(f"{count} {kind}" for kind, count in sorted(self._counts.items()))
        return f"Substitution({counts or 'nothing yet'})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("what placeholders stand for does not leave its process")

    @property
    def counts(self) -> Mapping[str, int]:
        """How many spans of which kind were replaced, in all texts so far."""
        return dict(self._counts)

    def substitute(self, text: str) -> str:
        """The text with substitutes; `restorer().restore` gives the text back.

        The same text gives the same result throughout the session.

        Raises:
            RequestError: the text is too long, or holds what cannot be told from a substitute.
        """
        if len(text) > _MOST_CHARACTERS:
            raise RequestError(
                f"a text of {len(text)} characters is too long for placeholders; "
                f"give at most {_MOST_CHARACTERS}"
            )
        with self._lock:
            if text not in self._known:
                self._known[text] = self._substitute(text)
            return self._known[text]

    def restorer(self) -> Restorer:
        """Puts values back into one answer, with the mapping as it is now."""
        return Restorer(self._lexicon)

    def remember(self, restored: str, raw: str) -> None:
        """An answer, as it was shown and as the model wrote it: it will be sent as it was written."""
        with self._lock:
            self._known[restored] = raw
            self._seen += [fold(restored), fold(raw)]

    def _substitute(self, text: str) -> str:
        found = merged(self._found(text))
        self._seen.append(fold(text))
        for attempt in range(_ATTEMPTS):
            draft = self._mapping.copy()
            spans = self._closed(text, found, draft, whole_words=attempt > 1)
            replaced = _replaced(text, spans, draft.substitutes)
            lexicon = Lexicon(draft.values)
            if Restorer(lexicon).restore(replaced) == text:
                self._mapping, self._lexicon = draft, lexicon
                self._counts.update(_family(span.kind) for span in spans)
                return replaced
        self._seen.pop()
        raise RequestError(
            "the prompt holds text that cannot be told from its substitutes; "
            "choose fewer kinds of placeholders, or the mode 'tag'"
        )

    def _found(self, text: str) -> Iterator[Span]:
        for detector in self._detectors:
            for span in detector.find(text):
                if not 0 <= span.start < span.end <= len(text):
                    raise RequestError(
                        f"{type(detector).__name__} found a span that is not in the text; "
                        "correct the detector"
                    )
                yield span

    def _closed(
        self, text: str, found: list[Span], draft: _Mapping, *, whole_words: bool
    ) -> list[Span]:
        """All spans to replace, with their substitutes drawn.

        They are what was found, every other mention of a known value, and what only looks like a
        substitute because the text says so itself.
        """
        spans = found
        while True:
            spans = merged(_widened(text, span, whole_words=whole_words) for span in spans)
            for span in spans:
                self._draw(draft, span.kind, text[span.start : span.end])
            more = merged([*spans, *_mentions(text, draft)])
            if more == spans:
                return spans
            spans = more

    def _draw(self, draft: _Mapping, kind: str, value: str) -> str:
        known = draft.substitutes.get((kind, value))
        if known is not None:
            return known
        substitute = self._in_other_case(draft, kind, value)
        if substitute is None and kind == Kind.NAME and not self._tags:
            substitute = self._name(draft, value)
        if substitute is None:
            substitute = self._fresh(draft, kind, value)
        draft.add(kind, value, substitute)
        return substitute

    def _in_other_case(self, draft: _Mapping, kind: str, value: str) -> str | None:
        """The substitute of the same value in other letters, in these letters."""
        base = draft.bases.get((kind, fold(value)))
        if base is None or self._tags:
            return None
        for convert in (str.upper, str.lower, str.title):
            if convert(base[0]) == value and convert(base[1]) not in draft.values:
                return convert(base[1])
        return None

    def _name(self, draft: _Mapping, value: str) -> str | None:
        """A name word by word, so that "Ms Novak" stays who "Eva Novak" was."""
        words = [found for found in _NAME_WORD.finditer(value) if fold(found[0]) not in _PARTICLES]
        if not any(_is_long(found[0]) for found in words):
            return None
        substitute, end = "", words[0].start()
        for word in words:
            gap = value[end : word.start()]
            substitute += gap if gap.isspace() or not substitute else " "
            substitute += self._name_word(draft, word[0], is_last=word is words[-1])
            end = word.end()
        return substitute if draft.values.get(substitute, value) == value else None

    def _name_word(self, draft: _Mapping, word: str, *, is_last: bool) -> str:
        if not _is_long(word):
            return self._inventor.initial() + "." * word.endswith(".")
        word = word.rstrip(".")
        known = draft.substitutes.get((_WORD, word)) or self._in_other_case(draft, _WORD, word)
        if known is None:
            known = self._fresh(draft, _SURNAME if is_last else _GIVEN, word)
        if known not in draft.values:
            draft.add(_WORD, word, known)
        return known

    def _fresh(self, draft: _Mapping, kind: str, value: str) -> str:
        for _ in range(0 if self._tags else _DRAWS):
            drawn = self._inventor.substitute(kind, value)
            if value.isupper() and len(value) > 1:
                drawn = drawn.upper()
            if drawn != value and self._is_new(draft, drawn):
                return drawn
        number = sum(1 for taken in draft.kinds.values() if taken == kind)
        while True:
            number += 1
            tag = f"[{_family(kind).upper()}_{number}]"
            if self._is_new(draft, tag):
                return tag

    def _is_new(self, draft: _Mapping, drawn: str) -> bool:
        folded = fold(drawn)
        return folded not in draft.taken and not any(folded in text for text in self._seen)


def _mentions(text: str, draft: _Mapping) -> Iterator[Span]:
    """Where a text says a known value again, or says by itself what is a substitute."""
    kinds: dict[str, str] = {}
    for kind, value in draft.substitutes:
        if kind == Kind.NAME:
            kinds.update(dict.fromkeys(_telling_words(value), kind))
        kinds[value] = _family(kind)
    for found in Lexicon(kinds).matches(text):
        said = text[found.start : found.end]
        if said == found.phrase or said.isupper():
            yield Span(found.start, found.end, kinds[found.phrase])
    for found in Lexicon(draft.values).matches(text):
        yield Span(found.start, found.end, _family(draft.kinds[found.phrase]))


def _telling_words(name: str) -> Iterator[str]:
    """The words of a name that point at its bearer when they stand alone."""
    for found in _NAME_WORD.finditer(name):
        word = found[0].rstrip(".")
        if len(word) > 2 and word[0].isupper() and fold(word) not in _PARTICLES:
            yield word


def _replaced(text: str, spans: Sequence[Span], substitutes: Mapping[tuple[str, str], str]) -> str:
    pieces, end = list[str](), 0
    for span in spans:
        pieces += [text[end : span.start], substitutes[span.kind, text[span.start : span.end]]]
        end = span.end
    return "".join([*pieces, text[end:]])


def _widened(text: str, span: Span, *, whole_words: bool) -> Span:
    """The span, up to where its words and numbers begin and end: a substitute stands for itself."""
    start, end = span.start, span.end
    while start > 0 and (
        joins(text[max(0, start - 2) : start], text[start])
        or (whole_words and not text[start - 1].isspace())
    ):
        start -= 1
    while end < len(text) and (
        continued(text[end - 1], text[end : end + 2]) or (whole_words and not text[end].isspace())
    ):
        end += 1
    return Span(start, end, span.kind)


def _is_long(word: str) -> bool:
    """Whether this is more than an initial."""
    return len(word.rstrip(".")) > 1


def _family(kind: str) -> str:
    """The kind that people know: a word of a name is a name."""
    return kind.partition(":")[0]
