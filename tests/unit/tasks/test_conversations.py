"""Readers of CoQA and QuAC, on files that the tests write."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsea.errors import DataError
from fedsea.tasks.conversations import read_coqa, read_quac, taken_apart


def turn(text: str) -> dict[str, Any]:
    """A question or an answer of CoQA."""
    return {"input_text": text, "turn_id": 1}


def coqa(**changes: Any) -> dict[str, Any]:
    """A file of CoQA with one conversation."""
    dialogue = {
        "id": "s",
        "story": "Ann has a cat.",
        "questions": [turn("Who?"), turn("What?")],
        "answers": [turn("Ann"), turn("a cat")],
        "additional_answers": {"0": [turn("Ann"), turn("cat")]},
    }
    return {"data": [{**dialogue, **changes}]}


def test_coqa(file) -> None:
    """Each question knows those before it; the answers of all annotators are right."""
    first, second = read_coqa(file(coqa(), "dev.json"))

    assert dict(first.fields) == {"story": "Ann has a cat.", "question": "Who?"}
    assert (first.turns, second.turns) == ((), (("Who?", "Ann"),))
    assert second.gold == ("a cat", "cat")
    assert (first.source, first.group, second.group) == ("s", "s/0", "s/1")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"answers": [turn("Ann")]}, "data 1: it has 2 questions and 1 answers"),
        ({"additional_answers": {"0": [turn("Ann")]}}, "has not answered 2 questions"),
        ({"questions": [turn("Who?"), {"text": "x"}]}, "questions 2: there is no input_text"),
        ({"story": ""}, "data 1: story is blank"),
    ],
)
def test_coqa_that_is_damaged(file, changes: dict[str, Any], complaint: str) -> None:
    """The place in the document is named."""
    with pytest.raises(DataError, match=complaint):
        list(read_coqa(file(coqa(**changes), "dev.json")))


def test_quac_as_published(file) -> None:
    """The mark at the end of a context is no part of the story; test files may lack answers."""
    paragraph = {
        "id": "p",
        "context": "Ann has a cat. CANNOTANSWER",
        "qas": [
            {"id": "p_q#0", "question": "Who?", "answers": [{"text": "Ann"}, {"text": "Ann has"}]},
            {"id": "p_q#1", "question": "When?"},
        ],
    }

    first, second = read_quac(file({"data": [{"paragraphs": [paragraph]}]}, "val.json"))

    assert first.fields["story"] == "Ann has a cat."
    assert first.gold == ("Ann", "Ann has")
    assert (second.group, second.gold, second.turns) == ("p_q#1", (), (("Who?", "Ann"),))


def test_quac_as_numbered_lines(lines) -> None:
    """Questions and answers are taken out of their lists, and answers taken apart."""
    path = lines(
        {
            "passage": "Ann has a cat. Bob has a dog.",
            "question": "question1: Who has what?\nquestion2: Since when?",
            "answer": "possible answers for question1:\nAnn has a cat. Ann has Bob has a dog.\n"
            "possible answers for question2:\nCANNOTANSWER CANNOTANSWER",
        }
    )

    first, second = read_quac(path)

    assert first.gold == ("Ann has a cat.", "Ann has", "Bob has a dog.")
    assert second.gold == ("CANNOTANSWER", "CANNOTANSWER")
    assert second.turns == (("Who has what?", "Ann has a cat."),)


@pytest.mark.parametrize(
    ("question", "answer", "complaint"),
    [
        ("who?", "possible answers for question1:\nx", "question is not numbered"),
        ("question2: who?", "possible answers for question1:\nx", "question is not numbered"),
        ("question1: a\nquestion2:", "x", "question has a number with nothing behind it"),
        ("question1: who?", "x", "answer is not numbered"),
        (
            "question1: a\nquestion2: b",
            "possible answers for question1:\nx",
            "2 questions and 1 answers",
        ),
    ],
)
def test_numbered_lines_that_are_damaged(lines, question, answer, complaint) -> None:
    """Numbers without texts, and texts without numbers, are refused."""
    with pytest.raises(DataError, match=complaint):
        list(read_quac(lines({"passage": "p", "question": question, "answer": answer})))


WORDS = st.lists(st.sampled_from("abcd"), min_size=1, max_size=8)


@given(passage=WORDS, joined=WORDS)
def test_pieces_are_the_joined_text(passage: list[str], joined: list[str]) -> None:
    """No word is lost or added, and a piece of several words stands in the passage."""
    text = " ".join(passage)

    pieces = taken_apart(" ".join(joined), text)

    assert " ".join(pieces).split() == joined
    assert all(piece in text for piece in pieces if " " in piece)


@given(passage=WORDS, cut=st.data())
def test_no_fewer_pieces_are_possible(passage: list[str], cut: st.DataObject) -> None:
    """Pieces of the passage, run together, are taken apart into as many pieces at most."""
    places = st.integers(0, len(passage) - 1)
    spans = cut.draw(st.lists(st.tuples(places, places), min_size=1, max_size=3))
    given_pieces = [" ".join(passage[min(span) : max(span) + 1]) for span in spans]

    assert len(taken_apart(" ".join(given_pieces), " ".join(passage))) <= len(given_pieces)
