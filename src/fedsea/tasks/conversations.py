"""Questions one after another about one text: CoQA and QuAC."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from fedsea.tasks.files import Item, json_document, json_lines
from fedsea.tasks.records import Entry

# What QuAC calls the answer to a question that its text does not answer.
NO_ANSWER = "CANNOTANSWER"

_JSON_LINES = (".jsonl", ".ndjson")
_QUESTION = "question"
_ANSWERS = "possible answers for question"


def read_coqa(path: Path) -> Iterator[Entry]:
    """CoQA's JSON: `data` with `story`, `questions`, `answers` and, in its dev set, more answers."""
    for at, dialogue in enumerate(json_document(path).items("data")):
        story, source = dialogue.text("story"), dialogue.name("id", at)
        questions, answers = dialogue.items("questions"), dialogue.items("answers")
        if len(questions) != len(answers):
            raise dialogue.fault(f"it has {len(questions)} questions and {len(answers)} answers")
        turns: list[tuple[str, str]] = []
        for number, (question, answer) in enumerate(zip(questions, answers, strict=True)):
            asked = question.text("input_text")
            gold = (answer.text("input_text"), *_more_answers(dialogue, number, len(questions)))
            fields = {"story": story, "question": asked}
            yield Entry(fields, source, f"{source}/{number}", gold, turns=tuple(turns))
            turns.append((asked, gold[0]))


def read_quac(path: Path) -> Iterator[Entry]:
    """QuAC's JSON, or JSON lines of `passage` and numbered lines of `question` and `answer`.

    In the latter form the answers to a question are run together. They are pieces of the passage,
    so they are taken apart where they leave it.
    """
    lines = path.suffix.lower() in _JSON_LINES
    yield from _numbered(path) if lines else _paragraphs(path)


def _more_answers(dialogue: Item, number: int, count: int) -> list[str]:
    if "additional_answers" not in dialogue:
        return []
    more = dialogue.item("additional_answers")
    given = [more.items(annotator) for annotator in more.values]
    if any(len(answers) != count for answers in given):
        raise more.fault(f"an annotator has not answered {count} questions")
    return [answers[number].text("input_text") for answers in given]


def _paragraphs(path: Path) -> Iterator[Entry]:
    for at, article in enumerate(json_document(path).items("data")):
        for place, paragraph in enumerate(article.items("paragraphs")):
            story = paragraph.text("context").removesuffix(NO_ANSWER).rstrip()
            source = paragraph.name("id", f"{at}/{place}")
            turns: list[tuple[str, str]] = []
            for number, question in enumerate(paragraph.items("qas")):
                asked = question.text("question")
                answers = question.items("answers") if "answers" in question else []
                gold = tuple(answer.text("text") for answer in answers)
                group = question.name("id", f"{source}/{number}")
                fields = {"story": story, "question": asked}
                yield Entry(fields, source, group, gold, turns=tuple(turns))
                turns.append((asked, gold[0] if gold else ""))


def _numbered(path: Path) -> Iterator[Entry]:
    for at, item in enumerate(json_lines(path)):
        story = item.text("passage")
        questions = _sections(item, _QUESTION, _QUESTION)
        answers = _sections(item, "answer", _ANSWERS)
        if len(questions) != len(answers):
            raise item.fault(f"it has {len(questions)} questions and {len(answers)} answers")
        turns: list[tuple[str, str]] = []
        for number, (asked, joined) in enumerate(zip(questions, answers, strict=True)):
            gold = taken_apart(joined, story)
            fields = {"story": story, "question": asked}
            yield Entry(fields, str(at), f"{at}/{number}", gold, turns=tuple(turns))
            turns.append((asked, gold[0]))


def _sections(item: Item, key: str, mark: str) -> list[str]:
    """The texts after `mark1:`, `mark2:` and so on, each at the beginning of a line."""
    first, *parts = re.split(rf"(?:^|\n){mark}(\d+):", item.text(key))
    numbers, texts = parts[::2], [" ".join(text.split()) for text in parts[1::2]]
    if first.strip() or not texts or numbers != [str(at + 1) for at in range(len(texts))]:
        raise item.fault(f"{key} is not numbered as {mark}1:, {mark}2: and so on")
    if not all(texts):
        raise item.fault(f"{key} has a number with nothing behind it")
    return texts


def taken_apart(joined: str, passage: str) -> tuple[str, ...]:
    """The fewest pieces of the passage that, with spaces between, are the joined text.

    A part of a piece is a piece, so the longest one at every place gives the fewest. Words that do
    not stand in the passage are pieces of their own.
    """
    text = " ".join(passage.split())
    words = joined.split()
    pieces, start = [], 0
    for end in range(1, len(words) + 1):
        longer = " ".join(words[start : end + 1])
        if end == len(words) or longer not in text:
            pieces.append(" ".join(words[start:end]))
            start = end
    return tuple(pieces)
