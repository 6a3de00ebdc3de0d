from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsea.privacy.placeholders.restoration import Lexicon, Restorer, fold

PAIRS = {
    "Tavira Brenholt": "Eva Novak",
    "Tavira": "Eva",
    "Brenholt": "Novak",
    "[DATE_1]": "12 March",
    "4711": "1234",
}
PIECES = st.sampled_from(
    [
        *PAIRS,
        "Tav",
        "ira",
        "BRENHOLT",
        "brenholt",
        "s",
        "'s",
        " ",
        ".",
        ",",
        "1",
        "4",
        "é",
        "[",
        "ß",
    ]
)


def restored(text: str) -> str:
    """A whole text through a fresh restorer."""
    return Restorer(Lexicon(PAIRS)).restore(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Tavira Brenholt is 4711.", "Eva Novak is 1234."),
        ("Ms Brenholt's dog", "Ms Novak's dog"),
        ("the Brenholts", "the Novaks"),
        ("MS BRENHOLT", "MS NOVAK"),
        ("tavira", "Eva"),
        ("on [date_1]", "on 12 March"),
        ("14711 47112 4711,5 3.4711", "14711 47112 4711,5 3.4711"),
        ("Taviral, Brenholtz, xTavira", "Taviral, Brenholtz, xTavira"),
        ("4711, 4711.", "1234, 1234."),
        ("Tavira\nBrenholt", "Eva\nNovak"),
        ("", ""),
    ],
)
def test_what_is_put_back(text, expected):
    """Whole words and numbers, in any case, with an inflection; never a part of another word."""
    assert restored(text) == expected


@given(st.lists(PIECES).map("".join), st.data())
def test_the_cut_does_not_matter(text, data):
    """However a text is cut, the pieces together are what the whole text gives."""
    restorer = Restorer(Lexicon(PAIRS))
    pieces, start = [], 0
    while start < len(text):
        end = data.draw(st.integers(start + 1, len(text)))
        pieces.append(restorer.push(text[start:end]))
        start = end
    assert "".join(pieces) + restorer.flush() == restored(text)


@given(st.lists(PIECES).map("".join))
def test_little_is_held_back(text):
    """No more than the longest phrase and what follows it waits."""
    lexicon = Lexicon(PAIRS)
    restorer = Restorer(lexicon)
    for char in text:
        restorer.push(char)
        assert len(restorer._held) <= lexicon.hold_back


def test_other_text_passes_at_once():
    """What cannot be part of a phrase is given out with the piece that brings it."""
    restorer = Restorer(Lexicon(PAIRS))
    assert [restorer.push(piece) for piece in ("No ", "doubt", " at all")] == [
        "No ",
        "doubt",
        " at all",
    ]


@given(st.text())
def test_folding_keeps_positions(text):
    """Every character has its place in the folded text."""
    assert len(fold(text)) == len(text)


def test_nothing_shows_values():
    """Neither a lexicon nor a restorer tells what it holds."""
    restorer = Restorer(Lexicon(PAIRS))
    restorer.push("Tavira Bren")
    assert repr(restorer) == "Restorer(Lexicon(5 phrases))"
