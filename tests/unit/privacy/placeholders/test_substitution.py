from __future__ import annotations

import copy
import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsea.errors import RequestError
from fedsea.privacy.placeholders.config import MODES, Placeholders
from fedsea.privacy.placeholders.restoration import fold
from fedsea.privacy.placeholders.spans import Kind, Span

NOTE = (
    "Dr Eva Novak (eva.novak@clinic.org, +49 170 1234567, born 12 March 1984) moved to Oslo. "
    "NOVAK paid $1,250.00 by card 3545016474420058, IBAN GB49AHER72277635787006."
)
VALUES = ["Eva", "Novak", "eva.novak", "1234567", "March 1984", "Oslo", "1,250", "35450", "AHER"]
FRAGMENTS = st.sampled_from(
    [
        *"Eva Novak Novaks NOVAK novak O'Brien Straße STRASSE Dr Mr. [NAME_1] [name_2]".split(" "),
        "Rosa van der Berg",
        "a@b.example",
        "2024-03-01",
        "12.3.1984",
        "$1,250.00",
        "+49 170 1234567",
        "123",
        "10.0.0.1",
        "İstanbul",
        "the",
        "\n",
        " ",
        " ",
        ", ",
        "'s ",
        ".",
        "-",
        "東京",
    ]
)


class Marker:
    """Finds every occurrence of given words."""

    def __init__(self, **kinds: str) -> None:
        self.kinds = kinds

    def find(self, text):
        return [
            Span(found.start(), found.end(), kind)
            for word, kind in self.kinds.items()
            for found in re.finditer(re.escape(word), text)
        ]


def session(mode="pseudonym", seed=0, **options):
    """A session whose draws repeat."""
    return Placeholders(mode=mode, rng=random.Random(seed), **options).session()


@pytest.mark.parametrize("mode", MODES)
def test_values_leave_and_come_back(mode):
    """No value is in the text that is sent, and restoring it gives the text."""
    substitution = session(mode)
    sent = substitution.substitute(NOTE)
    assert not [value for value in VALUES if value.lower() in sent.lower()]
    assert substitution.restorer().restore(sent) == NOTE


@settings(max_examples=300)
@given(st.lists(st.one_of(FRAGMENTS, st.text(max_size=4)), max_size=12), st.sampled_from(MODES))
def test_any_text_comes_back(fragments, mode):
    """restore(substitute(text)) is text, and so it stays for later texts of the session."""
    substitution = session(mode)
    half = len(fragments) // 2
    for text in ("".join(fragments[:half]), "".join(fragments), " ".join(fragments)):
        sent = substitution.substitute(text)
        assert substitution.restorer().restore(sent) == text


@given(st.text(max_size=60), st.data())
def test_any_spans_come_back_in_any_pieces(text, data):
    """The same for spans anywhere, within words too, and answers cut anywhere."""

    class Anywhere:
        def find(self, text):
            ends = st.lists(st.integers(0, len(text)), max_size=6)
            marks = sorted(data.draw(ends)) if text else []
            return [
                Span(a, b, Kind.NAME)
                for a, b in zip(marks[::2], marks[1::2], strict=False)
                if a < b
            ]

    substitution = session(kinds=(), detectors=[Anywhere()])
    sent = substitution.substitute(text)
    restorer = substitution.restorer()
    cut = data.draw(st.integers(0, len(sent)))
    pieces = [restorer.push(sent[:cut]), restorer.push(sent[cut:]), restorer.flush()]
    assert "".join(pieces) == text


def test_a_value_keeps_its_substitute():
    """The same name is the same invented person, in parts and in capitals, in later texts too."""
    substitution = session()
    first = substitution.substitute("Eva Novak called Dr Smith.")
    given_name, surname = first.split()[:2]
    assert substitution.substitute("NOVAK and Eva") == f"{surname.upper()} and {given_name}"
    assert substitution.substitute("Eva Novak called Dr Smith.") == first


def test_other_mentions_of_a_found_value_are_replaced():
    """What one sentence gave away is not sent by the next, where no detector would see it."""
    substitution = session(kinds=(), detectors=[Marker(**{"Project Heron": "PROJECT"})])
    substitution._detectors = (Once(substitution._detectors[0]),)
    sent = substitution.substitute("Project Heron is late. PROJECT HERON is over, Project Heron!")
    assert "heron" not in sent.lower()
    assert substitution.counts == {"PROJECT": 3}


class Once:
    """Finds only the first span that another detector finds."""

    def __init__(self, detector) -> None:
        self.detector = detector

    def find(self, text):
        return self.detector.find(text)[:1]


def test_substitutes_do_not_depend_on_values():
    """The same random numbers give the same substitute whatever the value is."""
    for one, other in (
        ("Dear Eva Novak,", "Dear Adam Kowalski,"),
        ("write to eva@home.org", "write to someone.else@work.example"),
        ("call +49 170 1234567", "call +31 612 7654321"),
        ("born on 2 May 1984", "born on 9 August 2001"),
        ("IBAN GB49AHER72277635787006", "IBAN GB28JHYZ70389205223963"),
    ):
        assert session().substitute(one) == session().substitute(other)


def test_draws_differ_between_sessions():
    """Without a seed nothing is predictable."""
    sent = {Placeholders().session().substitute("Dear Eva Novak") for _ in range(8)}
    assert len(sent) == 8


def test_a_substitute_is_nothing_that_was_said():
    """Draws that the texts already contain, in any case, are made again."""
    drawn = session().substitute("Dear Eva Novak").removeprefix("Dear ")
    substitution = session()
    sent = substitution.substitute(f"Dear Eva Novak, {drawn.upper()} and {drawn} are not you")
    assert drawn.lower() not in sent.lower()
    assert not [
        substitute for substitute in substitution._mapping.taken if substitute in fold(drawn)
    ]


@pytest.mark.parametrize("mode", MODES)
def test_text_that_looks_like_a_substitute_is_not_restored(mode):
    """A later text that says by itself what is a substitute gets it back, not the value."""
    substitution = session(mode)
    drawn = substitution.substitute("Dear Eva Novak").removeprefix("Dear ")
    later = f"is {drawn} somebody else?"
    sent = substitution.substitute(later)
    assert drawn not in sent
    assert substitution.restorer().restore(sent) == later


def test_answers_are_sent_as_they_were_written():
    """A remembered answer goes out as the model wrote it, whatever it looks like restored."""
    substitution = session()
    substitution.substitute("Dear Eva Novak")
    substitution.remember("Hello Eva, how is Berlin?", "Hello Tavira, how is Berlin?")
    assert substitution.substitute("Hello Eva, how is Berlin?") == "Hello Tavira, how is Berlin?"


def test_tags_count():
    """Tags number the values of a kind in the order in which they come."""
    sent = session("tag").substitute(
        "Dear Eva Novak, Adam Kowalski wrote from eva@x.org to Eva Novak"
    )
    assert sent == "Dear [NAME_1], [NAME_2] wrote from [EMAIL_1] to [NAME_1]"


def test_counts_are_by_kind():
    """What a person may see are numbers and kinds."""
    substitution = session()
    substitution.substitute(NOTE)
    assert substitution.counts == {
        "name": 2,
        "email": 1,
        "phone": 1,
        "date": 1,
        "place": 1,
        "number": 1,
        "card": 1,
        "iban": 1,
    }
    assert "Novak" not in repr(substitution)
    assert repr(substitution) == (
        "Substitution(1 card, 1 date, 1 email, 1 iban, 2 name, 1 number, 1 phone, 1 place)"
    )


def test_the_mapping_stays_in_the_process():
    """It cannot be copied or serialised."""
    substitution = session()
    substitution.substitute(NOTE)
    for holder in (substitution, substitution.restorer()):
        with pytest.raises(TypeError, match="does not leave"):
            copy.deepcopy(holder)


@pytest.mark.parametrize(("start", "end"), [(-1, 2), (0, 4), (2, 2), (2, 1)])
def test_spans_outside_of_the_text_are_refused(start, end):
    """A detector that is wrong about positions lets nothing through."""

    class Wrong:
        def find(self, text):
            return [Span(start, end, "X")]

    with pytest.raises(RequestError, match="Wrong found a span that is not in the text"):
        session(detectors=[Wrong()]).substitute("abc")


def test_a_text_without_end_is_refused():
    """A text of millions of characters is an error, not an hour of work."""
    with pytest.raises(RequestError, match="too long for placeholders"):
        session().substitute("a" * 2_000_001)


def test_every_word_of_a_name_is_covered_after_folding():
    """Folding is by character, so letters without a simple lower case do no harm."""
    substitution = session()
    text = "Dear İrem Straße, STRASSE and İREM"
    sent = substitution.substitute(text)
    assert substitution.restorer().restore(sent) == text
    assert fold("İ") == "İ"
