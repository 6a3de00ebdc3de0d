"""How a model answers the records of a task: by the likelihood of choices, or in its own words.

`answers` is for any `Answerer`. `ByLogits` is one over whatever gives logits of whole sequences, a
model in training among them; `ByLLM` is one over a connection, which computes each prompt once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from fedsea.client.seams import encode_seam, encode_whole
from fedsea.client.text import decode
from fedsea.client.together import together
from fedsea.errors import ConfigError, DataError
from fedsea.tasks.records import Record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fedsea.client.llm import LLM
    from fedsea.client.split import SplitSession

Ids = tuple[int, ...]
OnAnswered = Callable[[int, int], None]

# Rows of whole sequences that one call for logits computes at most.
_ROWS_TOGETHER = 4096


class Method(StrEnum):
    """How an answer is found.

    `likelihood` takes the choice whose tokens are most likely after the prompt, `generation` what
    the model writes greedily; `auto` is the former wherever every choice has words.
    """

    AUTO = "auto"
    LIKELIHOOD = "likelihood"
    GENERATION = "generation"


class Score(StrEnum):
    """What of a choice is compared: log p of all its tokens, or that divided by their number."""

    SUM = "sum"
    MEAN = "mean"


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerOptions:
    """How records are answered.

    Attributes:
        method: by likelihood, by generation, or whichever fits.
        score: what of a choice is compared.
        new_tokens: most tokens of a generated answer.
        stop: text at which a generated answer ends; empty for the end of the text alone.
        max_tokens: most tokens of prompt and answer; longer prompts lose their front. None for as
            many as there are.
        batch: records that are computed together.
    """

    method: Method = Method.AUTO
    score: Score = Score.SUM
    new_tokens: int = 32
    stop: str = ""
    max_tokens: int | None = None
    batch: int = 8

    def __post_init__(self) -> None:
        for name in ("new_tokens", "batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; give 1 or more")


@dataclass(frozen=True, slots=True)
class Answers:
    """One prediction for each record, a label or text, and how many prompts lost their front."""

    predictions: tuple[str, ...] = field(repr=False)
    cut: int = 0


@dataclass(frozen=True, slots=True)
class Question:
    """Tokens of a prompt, at least one, and of the choices that may follow it, at least one each."""

    prompt: Ids = field(repr=False)
    choices: tuple[Ids, ...] = field(repr=False)


class Answerer(Protocol):
    """Whatever can say how likely choices are, and write."""

    def log_likelihoods(self, questions: Sequence[Question]) -> list[list[float]]:
        """For each choice of each question the sum of log p of its tokens after the prompt."""
        ...

    def write(self, prompts: Sequence[Ids], new_tokens: int, stop: str) -> list[str]:
        """Greedy continuations, up to an end-of-text token, the stop text, or so many tokens."""
        ...


class GivesLogits(Protocol):
    """A model of whole sequences of any lengths, such as `SplitForTraining`."""

    def logits(self, examples: Sequence[Tensor], keep: Sequence[Tensor] | None = None) -> Tensor:
        """Logits (K, vocabulary) of the rows to keep, example after example.

        Args:
            examples: token ids (n,) of each.
            keep: for each example the numbers of its rows that need logits.
        """
        ...


def answers(
    model: Answerer,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    options: AnswerOptions | None = None,
    on_answered: OnAnswered | None = None,
) -> Answers:
    """Answer every record; of equally likely choices the first one counts.

    `on_answered` is called with the records done and the records in all.

    Raises:
        ConfigError: likelihood was asked for, and a record has not two choices with words.
        DataError: a prompt has no token, or no room beside its answer.
        FedseaError: what the model raises.
    """
    options = options or AnswerOptions()
    predictions: list[str] = []
    cut = 0
    for start in range(0, len(records), options.batch):
        some = records[start : start + options.batch]
        prepared = [_Prepared.of(record, tokenizer, options) for record in some]
        cut += sum(each.cut for each in prepared)
        predictions += _answered(model, prepared, options)
        if on_answered is not None:
            on_answered(len(predictions), len(records))
    return Answers(tuple(predictions), cut)


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A record as tokens; without choices it is answered by generation."""

    record: Record
    question: Question
    cut: bool

    @classmethod
    def of(
        cls, record: Record, tokenizer: PreTrainedTokenizerBase, options: AnswerOptions
    ) -> _Prepared:
        choosable = len(record.choices) > 1 and all(choice.text for choice in record.choices)
        if options.method is Method.LIKELIHOOD and not choosable:
            raise ConfigError(
                "likelihood compares choices and there are not two with words; "
                "use generation, or a template with words for every label"
            )
        if not choosable or options.method is Method.GENERATION:
            prompt = encode_whole(tokenizer, record.prompt)
            choices: tuple[Ids, ...] = ()
            room = options.new_tokens
        else:
            seam = encode_seam(tokenizer, record.prompt, [each.text for each in record.choices])
            prompt, choices = seam.prompt, seam.completions
            room = max(map(len, choices))
        fitted = _fitted(prompt, room, tokenizer.bos_token_id, options.max_tokens)
        return cls(record, Question(fitted, choices), len(fitted) < len(prompt))


def _fitted(prompt: Ids, room: int, begin: int | None, most: int | None) -> Ids:
    """The prompt without tokens of its front, so that an answer has room behind it."""
    if not prompt:
        raise DataError("a record has an empty prompt; its template must give at least one token")
    if most is None or len(prompt) + room <= most:
        return prompt
    kept = prompt[:1] if prompt[0] == begin else ()
    left = most - room - len(kept)
    if left < 1:
        raise DataError(
            f"an answer of {room} tokens leaves no room for a prompt in {most}; raise max_tokens"
        )
    return kept + prompt[-left:]


def _answered(model: Answerer, prepared: Sequence[_Prepared], options: AnswerOptions) -> list[str]:
    choosing = [each for each in prepared if each.question.choices]
    writing = [each for each in prepared if not each.question.choices]
    found: dict[int, str] = {}
    if choosing:
        scores = model.log_likelihoods([each.question for each in choosing])
        for each, likelihoods in zip(choosing, scores, strict=True):
            found[id(each)] = _most_likely(each, likelihoods, options.score)
    if writing:
        prompts = [each.question.prompt for each in writing]
        texts = model.write(prompts, options.new_tokens, options.stop)
        found |= {id(each): text.strip() for each, text in zip(writing, texts, strict=True)}
    return [found[id(each)] for each in prepared]


def _most_likely(prepared: _Prepared, likelihoods: Sequence[float], score: Score) -> str:
    if score is Score.MEAN:
        counts = map(len, prepared.question.choices)
        likelihoods = [each / count for each, count in zip(likelihoods, counts, strict=True)]
    best = max(range(len(likelihoods)), key=likelihoods.__getitem__)
    return prepared.record.choices[best].label


class ByLogits:
    """Answers from logits of whole sequences; a token that is written costs its whole prefix again.

    Args:
        model: gives logits; dropout is its owner's to switch off.
        tokenizer: that of the model.
        eos_ids: tokens that end a text.
    """

    def __init__(
        self, model: GivesLogits, tokenizer: PreTrainedTokenizerBase, eos_ids: Collection[int]
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._eos_ids = eos_ids

    @torch.no_grad()
    def log_likelihoods(self, questions: Sequence[Question]) -> list[list[float]]:
        """For each choice of each question the sum of log p of its tokens after the prompt."""
        # Choices of one token read the same row, that of the prompt's last token.
        pairs = [(each.prompt, choice) for each in questions for choice in each.choices]
        starts = {prompt + choice[:-1]: len(prompt) - 1 for prompt, choice in pairs}
        logits: dict[Ids, Tensor] = {}
        for some in _packed(list(starts)):
            examples = [torch.tensor(ids) for ids in some]
            keep = [torch.arange(starts[ids], len(ids)) for ids in some]
            rows = self._model.logits(examples, keep).split([len(each) for each in keep])
            logits |= dict(zip(some, rows, strict=True))
        return [
            [_log_likelihood(logits[each.prompt + choice[:-1]], choice) for choice in each.choices]
            for each in questions
        ]

    @torch.no_grad()
    def write(self, prompts: Sequence[Ids], new_tokens: int, stop: str) -> list[str]:
        """Greedy continuations, up to an end-of-text token, the stop text, or so many tokens."""
        written: list[Ids] = [()] * len(prompts)
        going = list(range(len(prompts)))
        for _ in range(new_tokens):
            examples = [torch.tensor(prompts[at] + written[at]) for at in going]
            last = [torch.tensor([len(example) - 1]) for example in examples]
            tokens = self._model.logits(examples, last).argmax(-1).tolist()
            for at, token in zip(going, tokens, strict=True):
                written[at] = (*written[at], token)
            going = [at for at in going if not self._has_ended(written[at], stop)]
            if not going:
                break
        return [self._text(ids, stop) for ids in written]

    def _has_ended(self, ids: Ids, stop: str) -> bool:
        return ids[-1] in self._eos_ids or bool(stop and stop in decode(self._tokenizer, ids))

    def _text(self, ids: Ids, stop: str) -> str:
        ended = bool(ids) and ids[-1] in self._eos_ids
        return _before(decode(self._tokenizer, ids[:-1] if ended else ids), stop)


class ByLLM:
    """Answers from a connection: a prompt is computed once, its choices one after the other behind it.

    Args:
        llm: the connection; its adapters are used.
    """

    def __init__(self, llm: LLM) -> None:
        self._llm = llm

    def log_likelihoods(self, questions: Sequence[Question]) -> list[list[float]]:
        """For each choice of each question the sum of log p of its tokens after the prompt."""
        return self._llm.background.start(self._read(questions)).result()

    def write(self, prompts: Sequence[Ids], new_tokens: int, stop: str) -> list[str]:
        """Greedy continuations, up to an end-of-text token, the stop text, or so many tokens."""
        stops = (stop,) if stop else ()
        pending = self._llm.submit(prompts, max_new_tokens=new_tokens, stop=stops)
        return [completion.text for completion in pending.result()]

    async def _read(self, questions: Sequence[Question]) -> list[list[float]]:
        for question in questions:
            for ids in (question.prompt, *question.choices):
                self._llm.checked(ids)
        capacities = [len(each.prompt) + max(map(len, each.choices)) - 1 for each in questions]
        session = await self._llm.split.open(capacities)
        try:
            return await together(
                _read_choices(session, each, capacity)
                for each, capacity in zip(questions, capacities, strict=True)
            )
        finally:
            await session.close()


async def _read_choices(session: SplitSession, question: Question, capacity: int) -> list[float]:
    sequence = session.begin(capacity)
    start = len(question.prompt)
    first = (await session.feed(sequence, torch.tensor(question.prompt))).logits
    found = []
    for choice in question.choices:
        rows = first
        if len(choice) > 1:
            ids = torch.tensor(choice[:-1])
            fed = await session.feed(sequence, ids, keep=len(ids))
            session.rollback(sequence, start)
            rows = torch.cat([first, fed.logits])
        found.append(_log_likelihood(rows, choice))
    session.drop(sequence)
    return found


def _log_likelihood(logits: Tensor, tokens: Ids) -> float:
    """The sum of log p of tokens (n,) under logits (n, vocabulary)."""
    logs = logits.float().log_softmax(-1)
    chosen = torch.tensor(tokens, device=logs.device)
    return logs.gather(1, chosen[:, None]).sum().item()


def _packed(examples: Sequence[Ids]) -> list[list[Ids]]:
    """The examples in turns of at most so many rows that one call shall compute, and one at least."""
    turns: list[list[Ids]] = []
    rows = 0
    for ids in examples:
        if not turns or rows + len(ids) > _ROWS_TOGETHER:
            turns.append([])
            rows = 0
        turns[-1].append(ids)
        rows += len(ids)
    return turns


def _before(text: str, stop: str) -> str:
    return text.split(stop, 1)[0] if stop else text
