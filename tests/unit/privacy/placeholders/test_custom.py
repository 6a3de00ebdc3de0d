from __future__ import annotations

import pytest

from fedsea.errors import RequestError
from fedsea.privacy.placeholders import custom
from fedsea.privacy.placeholders.custom import PatternDetector, WordDetector
from fedsea.privacy.placeholders.spans import Span


def test_words_are_found_where_they_stand_for_themselves():
    """In any case, the longest first, not within other words."""
    detector = WordDetector("PROJECT", ["Heron", "Blue Heron"])
    text = "blue heron, HERONRY, Heron"
    assert detector.find(text) == [Span(0, 10, "PROJECT"), Span(21, 26, "PROJECT")]


def test_a_pattern_that_explodes_is_given_up(monkeypatch):
    """A text that a pattern cannot finish is refused instead of sent."""
    monkeypatch.setattr(custom, "_SECONDS", 0.05)
    detector = PatternDetector("CASE", r"(?:(?:a|a|aa)+)+$")
    with pytest.raises(RequestError, match="pattern of CASE takes too long"):
        detector.find("a" * 40 + "b")


def test_empty_matches_are_no_spans():
    """A pattern that can match nothing after something finds only something."""
    assert PatternDetector("CASE", r"(?<=x)\d*").find("x12 x") == [Span(1, 3, "CASE")]
