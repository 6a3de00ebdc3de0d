"""Readers of SuperGLUE, on files that the tests write."""

from __future__ import annotations

from typing import Any

import pytest

from fedsea.errors import DataError
from fedsea.tasks import superglue

MULTIRC = {
    "idx": 7,
    "passage": {
        "text": "Ann fed the cat.",
        "questions": [
            {
                "idx": 3,
                "question": "Who fed whom?",
                "answers": [
                    {"text": "Ann the cat", "idx": 0, "label": 1},
                    {"text": "", "label": 0},
                ],
            },
            {"idx": 4, "question": "When?", "answers": [{"text": "At noon", "label": 0}]},
        ],
    },
}
RECORD = {
    "idx": 1,
    "passage": {
        "text": "Ann met Bob\n@highlight\nBob is tall.\n@highlight\nAnn is not",
        "entities": [{"start": 0, "end": 2}, {"start": 8, "end": 10}, {"start": 23, "end": 25}],
    },
    "qas": [{"idx": 5, "query": "Later @placeholder left.", "answers": [{"text": "Bob"}] * 2}],
}
WSC = {
    "text": "The cat saw the dog, so it ran .",
    "target": {"span1_text": "The cat", "span2_text": "it", "span2_index": 6},
    "label": True,
}
COPA = {"premise": "It rained.", "choice1": "I got wet.", "choice2": "I slept.", "label": 0}


def test_boolq(lines) -> None:
    """A truth value is a label, and a line's own number is its name."""
    path = lines({"question": "is it", "passage": "It is.", "label": False, "idx": 4})

    (entry,) = superglue.read_boolq(path)

    assert dict(entry.fields) == {"question": "is it", "passage": "It is."}
    assert (entry.gold, entry.candidates, entry.group) == (("false",), ("true", "false"), "4")


def test_a_split_without_labels(lines) -> None:
    """Test files say no answer; the candidates are the same."""
    (entry,) = superglue.read_boolq(lines({"question": "is it", "passage": "It is."}))

    assert entry.gold == ()
    assert entry.candidates == ("true", "false")


@pytest.mark.parametrize(
    ("read", "label", "labels"),
    [
        (superglue.read_rte, "not_entailment", ("entailment", "not_entailment")),
        (superglue.read_cb, "neutral", ("entailment", "contradiction", "neutral")),
    ],
)
def test_pairs(lines, read, label, labels) -> None:
    """RTE and CB are pairs of sentences with named labels."""
    (entry,) = read(lines({"premise": "p", "hypothesis": "h", "label": label, "idx": 0}))

    assert dict(entry.fields) == {"premise": "p", "hypothesis": "h"}
    assert (entry.gold, entry.candidates) == ((label,), labels)


def test_rte_as_a_table(file) -> None:
    """The same task in GLUE's format."""
    path = file("index\tsentence1\tsentence2\tlabel\n0\tp\th\tentailment\n", "dev.tsv")

    (entry,) = superglue.read_rte(path)

    assert dict(entry.fields) == {"premise": "p", "hypothesis": "h"}
    assert entry.gold == ("entailment",)


@pytest.mark.parametrize(("question", "link"), [("cause", "because"), ("effect", "so")])
def test_copa(lines, question: str, link: str) -> None:
    """The question decides the word that links premise and choice."""
    (entry,) = superglue.read_copa(lines({**COPA, "question": question}))

    assert entry.fields["link"] == link
    assert entry.gold == ("0",)


def test_wic(lines) -> None:
    """A word in two sentences."""
    path = lines({"word": "w", "sentence1": "a w", "sentence2": "the w", "label": True})

    (entry,) = superglue.read_wic(path)

    assert entry.fields["word"] == "w"
    assert entry.gold == ("true",)


@pytest.mark.parametrize("index", [6, 5, 7])
def test_wsc_marks_the_pronoun(lines, index: int) -> None:
    """An index that is off by one is put right by the pronoun itself."""
    path = lines({**WSC, "target": {**WSC["target"], "span2_index": index}})  # type: ignore[dict-item]

    (entry,) = superglue.read_wsc(path)

    assert entry.fields["marked"] == "The cat saw the dog, so *it* ran ."
    assert entry.fields["noun"] == "The cat"


def test_multirc(lines) -> None:
    """Each answer is an entry; a group is a question; an answer may be blank."""
    entries = list(superglue.read_multirc(lines(MULTIRC)))

    assert [entry.group for entry in entries] == ["7/3", "7/3", "7/4"]
    assert [entry.gold for entry in entries] == [("true",), ("false",), ("false",)]
    assert {entry.source for entry in entries} == {"7"}
    assert entries[0].fields["candidate"] == "Ann the cat"


def test_record(lines) -> None:
    """The passage stands there once, without marks; each candidate and right answer once."""
    (entry,) = superglue.read_record(lines(RECORD))

    assert entry.fields["passage"] == "Ann met Bob. Bob is tall. Ann is not"
    assert (entry.fields["before"], entry.fields["after"]) == ("Later ", " left.")
    assert entry.candidates == ("Ann", "Bob")
    assert entry.gold == ("Bob",)


@pytest.mark.parametrize(
    ("read", "value", "complaint"),
    [
        (superglue.read_boolq, {"question": "q", "passage": "p", "label": 1}, "label is none of"),
        (superglue.read_boolq, {"question": "q"}, "there is no passage"),
        (superglue.read_cb, {"premise": "p", "hypothesis": "h", "label": "x"}, "label is none of"),
        (superglue.read_copa, COPA, "there is no question"),
        (superglue.read_copa, {**COPA, "question": "why"}, "question is none of cause, effect"),
        (superglue.read_wsc, {**WSC, "text": "Nothing here."}, "span2_text does not stand in text"),
        (superglue.read_wsc, {"text": "t"}, "there is no target"),
        (
            superglue.read_multirc,
            {"passage": {"text": "t", "questions": {}}},
            "questions is no list",
        ),
        (superglue.read_multirc, {"passage": {"text": "t", "questions": [{}]}}, "question"),
        (superglue.read_record, {**RECORD, "qas": [{"query": "no gap"}]}, "no @placeholder"),
        (
            superglue.read_record,
            {**RECORD, "passage": {"text": "t", "entities": [{"start": 0, "end": 9}]}},
            "no place in the passage",
        ),
    ],
)
def test_what_is_wrong_is_named(lines, read, value: dict[str, Any], complaint: str) -> None:
    """Errors say the file, the line and the key."""
    with pytest.raises(DataError, match=complaint) as caught:
        list(read(lines(value)))
    assert "data.jsonl, line 1" in str(caught.value)
