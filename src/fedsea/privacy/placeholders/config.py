"""`Placeholders`: what is replaced, by what, and who finds it."""

from __future__ import annotations

import random
import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from fedsea.errors import ConfigError
from fedsea.privacy.placeholders.addresses import AddressDetector
from fedsea.privacy.placeholders.custom import PatternDetector, WordDetector, checked_kind
from fedsea.privacy.placeholders.names import NameDetector
from fedsea.privacy.placeholders.patterns import ShapeDetector
from fedsea.privacy.placeholders.restoration import fold
from fedsea.privacy.placeholders.spans import Detector, Kind, Span
from fedsea.privacy.placeholders.substitution import Substitution

ALL_KINDS = tuple(kind.value for kind in Kind)
MODES = ("pseudonym", "tag")


@dataclass(frozen=True, slots=True, kw_only=True)
class Placeholders:
    """Sensitive spans of prompts are replaced on this machine and put back into the answers.

    What was replaced is not protected but absent: a substitute is drawn at random, so the server
    learns nothing of the value from it. What no detector found leaves like any other text, and the
    words around a span may still say who is meant. Measure on texts of your own.

    Args:
        kinds: which built-in kinds are replaced, as "name" or "email"; all of them by default.
        keep: words and phrases that the built-in detectors shall leave alone, such as the names of
            medicines and products: a capital letter alone makes a word suspicious to them.
        mode: "pseudonym" invents fluent text of the same kind, "tag" writes `[NAME_1]`.
        words: lists of your own, by a kind in capital letters: `{"PROJECT": ["Blue Heron"]}`.
        patterns: regular expressions of your own, by a kind in capital letters.
        detectors: further detectors, such as `PresidioDetector()`; the kinds that they find are
            always replaced.
        rng: an explicit source of random numbers, for tests; otherwise the operating system's.

    Raises:
        ConfigError: an unknown kind or mode, an empty list, a pattern that is none.
    """

    kinds: Collection[str] = ALL_KINDS
    keep: Sequence[str] = ()
    mode: str = "pseudonym"
    words: Mapping[str, Sequence[str]] = field(default_factory=dict, repr=False)
    patterns: Mapping[str, str] = field(default_factory=dict, repr=False)
    detectors: Sequence[Detector] = field(default=(), repr=False)
    rng: random.Random | None = field(default=None, repr=False)
    _found_by: tuple[Detector, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.kinds, str):
            raise ConfigError("kinds is one text; give a list, as in ['name', 'email']")
        unknown = sorted(set(self.kinds) - set(ALL_KINDS))
        if unknown:
            raise ConfigError(
                f"no such kind of placeholder: {', '.join(unknown)}; "
                f"there are {', '.join(kind.value for kind in Kind)}"
            )
        if isinstance(self.keep, str):
            raise ConfigError("keep is one text; give a list of words")
        if self.mode not in MODES:
            raise ConfigError(
                f"placeholder mode {self.mode!r} is not known; use {' or '.join(MODES)}"
            )
        own: list[Detector] = [
            *(WordDetector(checked_kind(kind), words) for kind, words in self.words.items()),
            *(PatternDetector(checked_kind(kind), found) for kind, found in self.patterns.items()),
            *self.detectors,
        ]
        if not self.kinds and not own:
            raise ConfigError("nothing would be replaced: give kinds, words, patterns or detectors")
        builtin: list[Detector] = [_BuiltIn(self.kinds, self.keep)] if self.kinds else []
        object.__setattr__(self, "_found_by", (*own, *builtin))

    @property
    def found_by(self) -> tuple[Detector, ...]:
        """All detectors at work."""
        return self._found_by

    def find(self, text: str) -> list[Span]:
        """What would be replaced in a text; a dry run to see what is found and what is missed."""
        return sorted(span for detector in self._found_by for span in detector.find(text))

    def session(self) -> Substitution:
        """A new mapping; it forgets everything when it is dropped."""
        rng = self.rng or secrets.SystemRandom()
        return Substitution(self._found_by, rng, tags=self.mode == "tag")


class _BuiltIn:
    """The built-in detectors, for some kinds and without some words."""

    def __init__(self, kinds: Collection[str], keep: Sequence[str]) -> None:
        self._kinds = frozenset(kinds)
        self._keep = frozenset(fold(word.strip()) for word in keep)
        self._detectors: tuple[Detector, ...] = (
            ShapeDetector(),
            AddressDetector(),
            NameDetector(),
        )

    def find(self, text: str) -> list[Span]:
        return [
            span
            for detector in self._detectors
            for span in detector.find(text)
            if span.kind in self._kinds and fold(text[span.start : span.end]) not in self._keep
        ]
