from __future__ import annotations

import pytest

from fedsea.errors import ConfigError
from fedsea.privacy.placeholders.config import Placeholders
from fedsea.privacy.placeholders.spans import Kind, Span


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"kinds": ["name", "shoe size"]},
            "no such kind of placeholder: shoe size; there are iban",
        ),
        ({"kinds": "name"}, "give a list"),
        ({"keep": "Newton"}, "give a list of words"),
        ({"kinds": []}, "nothing would be replaced"),
        ({"mode": "hash"}, "use pseudonym or tag"),
        ({"words": {"project": ["x"]}}, "use capital letters"),
        ({"words": {"PROJECT": []}}, "list of words of PROJECT is empty"),
        ({"words": {"PROJECT": ["a", " "]}}, "empty word"),
        ({"words": {"PROJECT": "Heron"}}, "give a list"),
        ({"patterns": {"CASE": "(["}}, "pattern of CASE is no regular expression"),
        ({"patterns": {"CASE": "x*"}}, "matches the empty text"),
        ({"patterns": {"a b": "x"}}, "cannot name a kind"),
    ],
)
def test_settings_that_cannot_be(options, words):
    """Every wrong setting is refused at once, with what to do."""
    with pytest.raises(ConfigError, match=words):
        Placeholders(**options)


def test_only_chosen_kinds_are_found():
    """Kinds that were not asked for stay in the text."""
    found = Placeholders(kinds=["email"]).find("Eva Novak, eva@x.org, 12 March 1984")
    assert found == [Span(11, 20, Kind.EMAIL)]


def test_own_words_and_patterns_and_detectors_join_the_built_in_ones():
    """Everything finds side by side."""

    class Seats:
        def find(self, text):
            return [Span(text.index("17C"), text.index("17C") + 3, "SEAT")]

    chosen = Placeholders(
        kinds=["email"],
        words={"PROJECT": ["Blue Heron"]},
        patterns={"CASE": r"C-\d{3}"},
        detectors=[Seats()],
    )
    text = "a@b.org about BLUE HERON, C-123, from 17C"
    assert [(text[span.start : span.end], span.kind) for span in chosen.find(text)] == [
        ("a@b.org", "email"),
        ("BLUE HERON", "PROJECT"),
        ("C-123", "CASE"),
        ("17C", "SEAT"),
    ]


def test_words_that_stay():
    """What is known to be no name is left alone, in any case; custom lists are not asked."""
    chosen = Placeholders(kinds=["name"], keep=["metoprolol"], words={"DRUG": ["Aspirin"]})
    text = "He took Metoprolol, Aspirin and Zyxolan"
    assert [text[span.start : span.end] for span in chosen.find(text)] == [
        "Aspirin",
        "Aspirin",
        "Zyxolan",
    ]


def test_own_words_are_not_shown():
    """What a list holds is as sensitive as what it finds."""
    shown = repr(Placeholders(words={"PROJECT": ["Heron"]}, patterns={"CASE": "C-7"}))
    assert "Heron" not in shown
    assert "C-7" not in shown
