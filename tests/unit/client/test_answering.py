"""Answers to records equal those of the unsplit model, from a connection and from logits alike."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from tests.conftest import character_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM

from fedsea.client.answering import (
    AnswerOptions,
    ByLLM,
    ByLogits,
    GivesLogits,
    Method,
    Question,
    Score,
    answers,
)
from fedsea.errors import ConfigError, DataError, RequestError
from fedsea.tasks.records import Choice, Record

if TYPE_CHECKING:
    from fedsea.client.training import SplitForTraining

    def _in_training(model: SplitForTraining) -> GivesLogits:
        """A model in training can be asked: the type checker says so."""
        return model


TOKENIZER = character_tokenizer()
EOS = 2


class Whole:
    """The unsplit model, which gives logits of sequences of any lengths."""

    def __init__(self, folder: Path) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.rows: list[int] = []

    def logits(self, examples: Sequence[Tensor], keep: Sequence[Tensor] | None = None) -> Tensor:
        """Logits of the rows to keep."""
        assert keep is not None
        self.rows.append(sum(map(len, examples)))
        return torch.cat(
            [
                self._model(ids[None]).logits[0][rows]
                for ids, rows in zip(examples, keep, strict=True)
            ]
        )


@pytest.fixture(scope="module")
def whole(tiny_model: Path) -> Whole:
    """The unsplit model."""
    return Whole(tiny_model)


def by_hand(whole: Whole, prompt: Sequence[int], choice: Sequence[int]) -> float:
    """The sum of log p of each token of a choice, one after the other."""
    total, ids = 0.0, list(prompt)
    for token in choice:
        logits = whole.logits([torch.tensor(ids)], [torch.tensor([len(ids) - 1])])[0]
        total += logits.log_softmax(-1)[token].item()
        ids.append(token)
    return total


QUESTIONS = (
    Question((5, 9, 40, 7), ((8,), (11, 12, 13), (8, 9))),
    Question((30,), ((4, 5), (6,))),
)


def choosing(prompt: str, *texts: str, gold: str = "0") -> Record:
    """A record with choices named 0, 1, ..."""
    choices = tuple(Choice(str(at), text.strip(), text) for at, text in enumerate(texts))
    return Record(prompt, "", choices, "g", "s", (gold,))


def test_likelihoods_are_those_of_token_after_token(split, whole) -> None:
    """Over the wire with one prompt for all choices, and from whole sequences."""
    expected = [[by_hand(whole, q.prompt, choice) for choice in q.choices] for q in QUESTIONS]

    for model in (ByLLM(split.llm), ByLogits(whole, TOKENIZER, {EOS})):
        found = model.log_likelihoods(QUESTIONS)
        assert [each == pytest.approx(e, abs=1e-4) for each, e in zip(found, expected, strict=True)]
        assert found[0] == pytest.approx(expected[0], abs=1e-4)
        assert found[1] == pytest.approx(expected[1], abs=1e-4)


def test_both_write_what_the_unsplit_model_writes(split, whole, greedy) -> None:
    """Prompts of different lengths, greedily, the same text."""
    prompts = [tuple(split.llm.encode(text)) for text in ("What is it?", "No", "Ann met Bob.")]
    expected = [TOKENIZER.decode(greedy(p, 12), skip_special_tokens=True) for p in prompts]

    assert ByLLM(split.llm).write(prompts, 12, "") == expected
    assert ByLogits(whole, TOKENIZER, {EOS}).write(prompts, 12, "") == expected


def test_a_stop_text_ends_an_answer(split, whole) -> None:
    """What stands before it is the answer, from both."""
    prompts = [tuple(split.llm.encode("What is it?"))]
    (text,) = ByLogits(whole, TOKENIZER, ()).write(prompts, 12, "")
    stop = text[5]

    shorter = text.split(stop)[0]
    assert ByLogits(whole, TOKENIZER, ()).write(prompts, 12, stop) == [shorter]
    assert ByLLM(split.llm).write(prompts, 12, stop) == [shorter]


class Fixed:
    """Answers that the test says, and what was asked."""

    def __init__(self, likelihoods: Sequence[Sequence[float]] = (), texts: Sequence[str] = ()):
        self._likelihoods, self._texts = iter(likelihoods), iter(texts)
        self.questions: list[Question] = []
        self.prompts: list[tuple[int, ...]] = []
        self.turns: list[int] = []

    def log_likelihoods(self, questions: Sequence[Question]) -> list[list[float]]:
        """The next likelihoods."""
        self.questions += questions
        self.turns.append(len(questions))
        return [list(next(self._likelihoods)) for _ in questions]

    def write(self, prompts: Sequence[tuple[int, ...]], new_tokens: int, stop: str) -> list[str]:
        """The next texts."""
        self.prompts += prompts
        return [next(self._texts) for _ in prompts]


def test_the_most_likely_choice_and_the_first_of_equals() -> None:
    """Labels come back, in the order of the records."""
    records = [choosing("q", " a", " b"), choosing("q", " a", " b"), choosing("q", " a", " b")]
    model = Fixed([(-2, -1), (-1, -2), (-1, -1)])

    assert answers(model, TOKENIZER, records).predictions == ("1", "0", "0")


def test_the_mean_does_not_punish_long_choices() -> None:
    """log p by token: -3 / 6 is more than -2 / 2."""
    record, model = choosing("q", " a", " seven"), Fixed([(-2, -3)] * 2)

    assert answers(model, TOKENIZER, [record]).predictions == ("0",)
    options = AnswerOptions(score=Score.MEAN)
    assert answers(model, TOKENIZER, [record], options).predictions == ("1",)


def test_open_answers_and_silent_choices_are_written() -> None:
    """Records of both kinds in one batch keep their order."""
    silent = Record("w", "", (Choice("x", "x", " x"), Choice("rest", "", "")))
    records = [Record("open", ""), choosing("q", " a", " b"), silent]
    model = Fixed([(-1, -2)], [" text \n", " y"])

    assert answers(model, TOKENIZER, records).predictions == ("text", "0", "y")
    assert len(model.prompts) == 2


def test_a_method_can_be_demanded() -> None:
    """Choices can be written instead; likelihood without choices is refused."""
    written = answers(
        Fixed(texts=["b it is"]),
        TOKENIZER,
        [choosing("q", " a", " b")],
        AnswerOptions(method=Method.GENERATION),
    )

    assert written.predictions == ("b it is",)
    with pytest.raises(ConfigError, match="use generation"):
        answers(Fixed(), TOKENIZER, [Record("q", "")], AnswerOptions(method=Method.LIKELIHOOD))


def test_batches_and_progress() -> None:
    """So many records at once, told after each batch."""
    model, steps = Fixed([(-1, -2)] * 5), []

    answers(
        model,
        TOKENIZER,
        [choosing("q", " a", " b")] * 5,
        AnswerOptions(batch=2),
        lambda *step: steps.append(step),
    )

    assert (model.turns, steps) == ([2, 2, 1], [(2, 5), (4, 5), (5, 5)])


def test_long_prompts_lose_their_front() -> None:
    """What is asked stands at the end; the number of such prompts is told."""
    model = Fixed([(-1, -2)] * 2)
    records = [choosing("a long prompt", " a", " bcd"), choosing("short", " a", " b")]

    found = answers(model, TOKENIZER, records, AnswerOptions(max_tokens=10))

    assert found.cut == 1
    assert TOKENIZER.decode(model.questions[0].prompt) == "prompt"
    assert TOKENIZER.decode(model.questions[1].prompt) == "short"


@pytest.mark.parametrize(
    ("record", "options", "complaint"),
    [
        (Record("", ""), AnswerOptions(), "empty prompt"),
        (Record("long", ""), AnswerOptions(max_tokens=4, new_tokens=4), "raise max_tokens"),
    ],
)
def test_prompts_without_a_token(record, options, complaint) -> None:
    """There is nothing to answer, or no room for it."""
    with pytest.raises(DataError, match=complaint):
        answers(Fixed(), TOKENIZER, [record], options)


def test_numbers_below_one() -> None:
    """They would answer nothing."""
    with pytest.raises(ConfigError, match="new_tokens is 0"):
        AnswerOptions(new_tokens=0)
    with pytest.raises(ConfigError, match="batch is -1"):
        AnswerOptions(batch=-1)


def test_ids_of_another_tokenizer_are_refused(split) -> None:
    """The message says which vocabulary it is, and no id."""
    with pytest.raises(RequestError, match="vocabulary of 96"):
        ByLLM(split.llm).log_likelihoods([Question((5, 96), ((4,), (5,)))])
    with pytest.raises(RequestError, match="vocabulary of 96"):
        ByLLM(split.llm).log_likelihoods([Question((5,), ((4,), (96, 5)))])


def test_rows_of_one_call_are_bounded(whole, monkeypatch) -> None:
    """Many choices are computed in turns, each prompt once where choices have one token."""
    monkeypatch.setattr("fedsea.client.answering._ROWS_TOGETHER", 8)
    model = ByLogits(whole, TOKENIZER, {EOS})
    whole.rows.clear()

    model.log_likelihoods([Question((5, 6, 7), ((8,), (9,), (8, 9, 10)))] * 2)

    assert whole.rows == [8]


def test_an_answerer_of_a_connection_leaves_nothing_behind(split) -> None:
    """After an error and after answers no place is held (the fixture checks it)."""
    ByLLM(split.llm).log_likelihoods(QUESTIONS)

    split.wait_until(split.settled)
