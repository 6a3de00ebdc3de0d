"""Kinds of tokens, so that a rate over all of them does not hide what is lost first.

Function words and punctuation are guessed by any language model; names and numbers are what a data
owner minds. A token is of the first kind that fits: a part of a private span, a number, a function
word or no word at all, and everything else is content.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import StrEnum


class Kind(StrEnum):
    """What a token is, as in reports."""

    PII = "pii"
    NUMBER = "numbers"
    FUNCTION = "function"
    CONTENT = "content"


# The closed classes of English: determiners, pronouns, prepositions, conjunctions, auxiliaries,
# particles and the contractions of these.
FUNCTION_WORDS = frozenset(
    """
    a an the this that these those each every either neither some any no none all both half such
    what which whose who whom whoever whatever another other others much many more most few fewer
    fewest little less least several enough own same
    i me my mine myself you your yours yourself yourselves he him his himself she her hers herself
    it its itself we us our ours ourselves they them their theirs themselves one ones oneself
    someone somebody something anyone anybody anything everyone everybody everything nobody nothing
    of in to for with on at by from up about into over after under above below between through
    during before without within along across behind beyond near off onto out outside inside since
    until till upon toward towards against among around as like than per via down past despite
    except beside besides
    and or but nor so yet if because although though while whereas unless whether when where why
    how then there here thus hence therefore however also too very just only even still already
    again not never ever always once
    be am is are was were been being do does did doing done have has had having will would shall
    should can could may might must ought need dare used let
    s t d ll m re ve don didn doesn isn aren wasn weren won wouldn couldn shouldn hasn haven hadn
    """.split()
)  # fmt: skip

_SPACES = " \t\r\n\u2581\u0120\u010a"


def kind_of(piece: str, *, is_private: bool = False) -> Kind:
    """The kind of one token by its text; marks of word beginnings do not count."""
    if is_private:
        return Kind.PII
    word = piece.strip(_SPACES)
    if any(character.isdigit() for character in word):
        return Kind.NUMBER
    if word.strip("'\u2019").lower() in FUNCTION_WORDS:
        return Kind.FUNCTION
    if not any(character.isalpha() for character in word):
        return Kind.FUNCTION
    return Kind.CONTENT


def kinds_of(pieces: Sequence[str], private: Iterable[tuple[int, int]] = ()) -> list[Kind]:
    """Kinds of the tokens of a text.

    Args:
        pieces: the tokens as they follow each other in the text.
        private: spans [begin, end) of characters of the joined pieces that are private.
    """
    spans = sorted(private)
    kinds = []
    begin = 0
    for piece in pieces:
        end = begin + len(piece)
        inside = any(first < end and begin < last for first, last in spans)
        kinds.append(kind_of(piece, is_private=inside and bool(piece.strip(_SPACES))))
        begin = end
    return kinds
