"""What a model is fine-tuned on: examples of token ids, read from files, and the order they come in.

An `Example` says which of its tokens the loss is on. `read_examples` makes them from JSON lines or a
text file, `record_examples` from the records of a task; errors name the file and the line, never
what stands there. `Batches` is the order in which steps see the examples: a function of the seed
alone, so that a run can go on at any step. Examples of different lengths lie one after the other in
a batch; nothing is padded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from hashlib import blake2b
from itertools import groupby, islice, starmap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from fedsea.client.seams import encode_seam, encode_whole
from fedsea.errors import ConfigError, DataError
from fedsea.settings import choice

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fedsea.tasks.records import Record

JSON_LINES = (".jsonl", ".ndjson")
TEXTS = (".txt", ".text", ".md")
ASSISTANT = "assistant"

# Examples of so many batches are sorted by length before they are cut into batches: enough for
# batches of nearly equal lengths, few enough for a different company in every epoch.
_SORTED_BATCHES = 16
_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


class LossOn(StrEnum):
    """Which tokens the loss is on: those of answers, or all that can be predicted."""

    ANSWER = "answer"
    ALL = "all"


class TooLong(StrEnum):
    """What happens to an example of more than `max_tokens` tokens.

    `skip` leaves it out. `cut` shortens it: the front of a prompt that has one completion, the end
    of everything else; what has no answer left is left out.
    """

    SKIP = "skip"
    CUT = "cut"


class Paragraphs(StrEnum):
    """What an example of a text file is.

    `single` is one paragraph, the lines between two blank lines. `packed` is a window of
    `max_tokens` tokens of the paragraphs one after the other.
    """

    SINGLE = "single"
    PACKED = "packed"


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids of one sequence, and where in it the answers are.

    Attributes:
        ids: the tokens. They never leave this process.
        answers: ranges (start, end) of positions in `ids` in ascending order; the loss is on the
            tokens there. The first token is never among them, for nothing predicts it.

    Raises:
        DataError: there is no answer, or it lies outside of the tokens.
    """

    ids: tuple[int, ...] = field(repr=False)
    answers: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        edges = [edge for span in self.answers for edge in span]
        if not edges:
            raise DataError("an example has no answer to learn; leave it out")
        ascending = all(start < end for start, end in self.answers) and edges == sorted(edges)
        if not ascending or edges[0] < 1 or edges[-1] > len(self.ids):
            raise DataError(
                "the answers of an example are no ascending ranges of positions from 1 to its "
                "length; fix them"
            )

    @classmethod
    def of(cls, ids: Sequence[int], answer_from: int = 1) -> Example:
        """An example whose answer is everything from a position on; 0 and 1 mean all of it."""
        return cls(tuple(ids), ((max(1, answer_from), len(ids)),))

    @property
    def inputs(self) -> tuple[int, ...]:
        """The tokens that have to be run: those before the last token of the last answer."""
        return self.ids[: self.answers[-1][1] - 1]

    @property
    def rows(self) -> int:
        """How many tokens have to be run."""
        return self.answers[-1][1] - 1

    @property
    def predicting(self) -> tuple[int, ...]:
        """The rows whose logits predict an answer's token, in order."""
        return tuple(at - 1 for start, end in self.answers for at in range(start, end))

    @property
    def targets(self) -> tuple[int, ...]:
        """The answers' tokens, those that the rows of `predicting` predict."""
        return tuple(token for start, end in self.answers for token in self.ids[start:end])

    @property
    def answer_tokens(self) -> int:
        """How many tokens the loss is on."""
        return sum(end - start for start, end in self.answers)

    def with_loss_on_all(self) -> Example:
        """The same tokens, with the loss on every one that can be predicted."""
        return replace(self, answers=((1, len(self.ids)),))

    def cut(self, most: int) -> Example | None:
        """The first `most` tokens; None when no answer is left in them."""
        spans = tuple((start, min(end, most)) for start, end in self.answers if start < most)
        return Example(self.ids[:most], spans) if spans else None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadOptions:
    """How a file becomes examples.

    Attributes:
        loss_on: tokens that the loss is on.
        max_tokens: most tokens of one example; None for as many as it has.
        too_long: what happens to longer ones.
        paragraphs: what an example of a text file is.
        end_of_text: whether a completion or a paragraph ends with the tokenizer's end-of-text
            token, so that the model learns to stop. Chat templates say for themselves.
    """

    loss_on: LossOn | str = LossOn.ANSWER
    max_tokens: int | None = None
    too_long: TooLong | str = TooLong.SKIP
    paragraphs: Paragraphs | str = Paragraphs.SINGLE
    end_of_text: bool = True

    def __post_init__(self) -> None:
        kinds = {"loss_on": LossOn, "too_long": TooLong, "paragraphs": Paragraphs}
        for name, kind in kinds.items():
            object.__setattr__(self, name, choice(name, kind, getattr(self, name)))
        if self.max_tokens is not None and self.max_tokens < 2:
            raise ConfigError(f"max_tokens is {self.max_tokens}; give at least 2")
        if self.paragraphs is Paragraphs.PACKED and self.max_tokens is None:
            raise ConfigError("packed paragraphs need max_tokens, the size of a window; give it")


@dataclass(frozen=True, slots=True)
class ExampleSet:
    """The examples of one file, and how many did not fit.

    Attributes:
        examples: what can be learned from, in the order of the file.
        cut: examples among them that were shortened.
        skipped: examples that were left out.
    """

    examples: tuple[Example, ...] = field(repr=False)
    cut: int = 0
    skipped: int = 0

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def tokens(self) -> int:
        """Tokens of all examples."""
        return sum(len(example.ids) for example in self.examples)

    @property
    def answer_tokens(self) -> int:
        """Tokens that the loss is on."""
        return sum(example.answer_tokens for example in self.examples)

    def split(self, share: float, seed: int) -> tuple[ExampleSet, ExampleSet]:
        """A part of the examples for training and one for evaluation, chosen by the seed alone.

        Raises:
            ConfigError: the share leaves one of them empty.
        """
        count = round(share * len(self.examples))
        if not 0 < count < len(self.examples):
            raise ConfigError(
                f"an evaluation share of {share:g} of {len(self.examples)} examples leaves one "
                "side without any; choose another share, or give a file for evaluation"
            )
        order = _order(len(self.examples), f"{seed}/evaluation")
        held_out = set(order[:count])
        kept = [example for at, example in enumerate(self.examples) if at not in held_out]
        return (
            ExampleSet(tuple(kept), self.cut, self.skipped),
            ExampleSet(tuple(self.examples[at] for at in sorted(held_out))),
        )


def read_examples(
    path: Path, tokenizer: PreTrainedTokenizerBase, options: ReadOptions | None = None
) -> ExampleSet:
    """Read a file of examples: JSON lines (`.jsonl`, `.ndjson`) or text (`.txt`, `.text`, `.md`).

    A JSON line is an object with the texts `prompt` and `completion`, or with `messages`: a list of
    objects with `role` and `content`, rendered by the tokenizer's chat template. Other keys are
    ignored. The loss is on the completion, on the assistant's turns, or on the whole text.

    Raises:
        DataError: the file cannot be read, or something in it is no example; it names the line.
    """
    options = options or ReadOptions()
    suffix = path.suffix.lower()
    if suffix not in JSON_LINES + TEXTS:
        raise DataError(
            f"{path} is of no known kind; name it {JSON_LINES[0]} for JSON lines or {TEXTS[0]} "
            "for text"
        )
    reader = _Reader(tokenizer, options)
    lines = _lines(path)
    if suffix in JSON_LINES:
        drafts = reader.of_json_lines(path, lines)
    elif options.paragraphs is Paragraphs.SINGLE:
        drafts = reader.of_paragraphs(path, lines)
    else:
        drafts = reader.of_windows(path, lines)
    found = _fitted(drafts, options)
    if not found.examples:
        reason = "only examples that do not fit" if found.skipped else "no examples"
        raise DataError(f"{path} holds {reason}; check the file, or raise max_tokens")
    return found


def record_examples(
    records: Iterable[Record],
    tokenizer: PreTrainedTokenizerBase,
    options: ReadOptions | None = None,
) -> ExampleSet:
    """Examples of the records of a task that have a completion to learn.

    Raises:
        DataError: there is none, or none that fits.
    """
    options = options or ReadOptions()
    pairs = (
        (f"record {number}", record.prompt, record.completion)
        for number, record in enumerate(records, start=1)
        if record.completion
    )
    found = _fitted(_Reader(tokenizer, options).of_pairs(pairs), options)
    if not found.examples:
        reason = "fits: raise max_tokens" if found.skipped else "says what shall be learned"
        raise DataError(f"no record {reason}")
    return found


@dataclass(frozen=True, slots=True)
class _Draft:
    """An example before it is made to fit; tokens from `front` to the answer may be left out."""

    ids: tuple[int, ...]
    answers: tuple[tuple[int, int], ...]
    front: int | None = None

    def without_front(self, excess: int) -> _Draft:
        """Without tokens of the prompt, at most so many; one always stays before the answer."""
        (start, end), front = self.answers[0], self.front
        if front is None or len(self.answers) > 1:
            return self
        dropped = min(excess, start - 1)
        kept = self.ids[:front] + self.ids[front + dropped :]
        return _Draft(kept, ((start - dropped, end - dropped),))


def _fitted(drafts: Iterator[_Draft], options: ReadOptions) -> ExampleSet:
    """Examples of at most `max_tokens` tokens."""
    examples: list[Example] = []
    cut = skipped = 0
    for draft in drafts:
        excess = 0 if options.max_tokens is None else len(draft.ids) - options.max_tokens
        if len(draft.ids) < 2 or (excess > 0 and options.too_long is TooLong.SKIP):
            skipped += 1
            continue
        kept = draft.without_front(excess) if excess > 0 else draft
        example: Example | None = Example(kept.ids, kept.answers)
        if example is not None and excess > 0:
            example = example.cut(len(draft.ids) - excess)
        if example is None:
            skipped += 1
            continue
        cut += excess > 0
        everything = options.loss_on is LossOn.ALL
        examples.append(example.with_loss_on_all() if everything else example)
    return ExampleSet(tuple(examples), cut, skipped)


class _Reader:
    """Makes token ids of what stands in a file; `where` names a line in errors."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, options: ReadOptions) -> None:
        self._tokenizer = tokenizer
        self._options = options
        self._end = tokenizer.eos_token_id if options.end_of_text else None
        template = tokenizer.chat_template
        self._template_marks = isinstance(template, str) and bool(_GENERATION_MARK.search(template))

    def of_json_lines(self, path: Path, lines: Iterator[str]) -> Iterator[_Draft]:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                where = f"{path}, line {number}"
                yield self._of_object(where, _object(where, line))

    def of_paragraphs(self, path: Path, lines: Iterator[str]) -> Iterator[_Draft]:
        for where, text in _paragraphs(path, lines):
            ids = self._paragraph(where, text)
            yield _Draft(ids, ((1, len(ids)),))

    def of_windows(self, path: Path, lines: Iterator[str]) -> Iterator[_Draft]:
        paragraphs = _paragraphs(path, lines)
        tokens = (token for where, text in paragraphs for token in self._paragraph(where, text))
        while window := tuple(islice(tokens, self._options.max_tokens)):
            yield _Draft(window, ((1, len(window)),))

    def _of_object(self, where: str, value: Mapping[str, Any]) -> _Draft:
        if "messages" in value and "prompt" not in value and "completion" not in value:
            return self._conversation(where, _messages(where, value["messages"]))
        if "messages" in value or not {"prompt", "completion"} <= value.keys():
            raise DataError(
                f"{where} has neither prompt and completion nor messages alone; give one of the two"
            )
        prompt = _text(where, "prompt", value["prompt"])
        return self._completion(where, prompt, _text(where, "completion", value["completion"]))

    def of_pairs(self, pairs: Iterable[tuple[str, str, str]]) -> Iterator[_Draft]:
        """Of places, prompts and completions."""
        return starmap(self._completion, pairs)

    def _completion(self, where: str, prompt: str, completion: str) -> _Draft:
        """A prompt and what shall follow, with the end of the text when it is asked for."""
        if not completion:
            raise DataError(f"{where} has an empty completion; give what shall be learned")
        seam = encode_seam(self._tokenizer, prompt, [completion])
        joined = seam.prompt + seam.completions[0]
        ids = joined if self._end is None or joined[-1] == self._end else (*joined, self._end)
        begins = self._tokenizer.bos_token_id is not None and ids[0] == self._tokenizer.bos_token_id
        return _Draft(ids, ((max(1, len(seam.prompt)), len(ids)),), front=int(begins))

    def _paragraph(self, where: str, text: str) -> tuple[int, ...]:
        ids = encode_whole(self._tokenizer, _text(where, "text", text))
        return ids if self._end is None or ids[-1:] == (self._end,) else (*ids, self._end)

    def _conversation(self, where: str, messages: list[dict[str, str]]) -> _Draft:
        if not self._tokenizer.chat_template:
            raise DataError(
                f"{where} has messages and the model's tokenizer has no chat template; "
                "give prompt and completion"
            )
        if not self._template_marks and _last_answer(messages) == 0:
            raise DataError(
                f"{where}: nothing stands before the last turn of the role {ASSISTANT}, and the chat "
                "template marks no turns; add the message that it answers"
            )
        try:
            ids, answers = self._marked(messages) if self._template_marks else self._turns(messages)
        except TemplateError:
            raise DataError(
                f"{where}: the chat template refuses these roles or their order; change them"
            ) from None
        if not answers:
            raise DataError(
                f"{where}: the chat template hides the assistant's turns; "
                "give prompt and completion"
            )
        return _Draft(ids, answers)

    def _marked(self, messages: list[dict[str, str]]) -> tuple[tuple[int, ...], _Spans]:
        """Where the template itself says what the assistant writes."""
        found = self._tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return tuple(found["input_ids"]), _spans(found["assistant_masks"])

    def _turns(self, messages: list[dict[str, str]]) -> tuple[tuple[int, ...], _Spans]:
        """The last turn of the assistant: what the template adds to the question before it.

        Templates may write earlier turns in another way than they were once asked for, so that
        only the last one is what the model would have to write.
        """
        last = _last_answer(messages)
        before = self._rendered(messages[:last], add_generation_prompt=True)
        ids = self._rendered(messages[: last + 1])
        if ids[: len(before)] != before or len(ids) <= len(before):
            return ids, ()
        return ids, ((max(1, len(before)), len(ids)),)

    def _rendered(self, messages: list[dict[str, str]], **options: bool) -> tuple[int, ...]:
        return tuple(
            self._tokenizer.apply_chat_template(
                messages, tokenize=True, return_dict=False, **options
            )
        )


_Spans = tuple[tuple[int, int], ...]


def _last_answer(messages: Sequence[Mapping[str, str]]) -> int:
    return max(at for at, message in enumerate(messages) if message["role"] == ASSISTANT)


def _spans(mask: Sequence[int]) -> _Spans:
    """The runs of ones, without the first position."""
    answers = [at for at in range(1, len(mask)) if mask[at]]
    runs = groupby(enumerate(answers), key=lambda entry: entry[1] - entry[0])
    found = [[at for _, at in run] for _, run in runs]
    return tuple((run[0], run[-1] + 1) for run in found)


def _lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file, without what ends them."""
    number = 0
    try:
        with path.open("rb") as opened:
            for number, line in enumerate(opened, start=1):
                encoding = "utf-8-sig" if number == 1 else "utf-8"
                yield line.decode(encoding).rstrip("\r\n")
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; fix the path") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}, line {number} is not UTF-8 text; convert the file") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None


def _paragraphs(path: Path, lines: Iterator[str]) -> Iterator[tuple[str, str]]:
    """Lines between blank ones, and where each paragraph begins."""
    held: list[str] = []
    begin = 0
    for number, line in enumerate(lines, start=1):
        if line.strip():
            begin = begin or number
            held.append(line)
        elif held:
            yield f"{path}, line {begin}", "\n".join(held)
            held, begin = [], 0
    if held:
        yield f"{path}, line {begin}", "\n".join(held)


def _object(where: str, line: str) -> Mapping[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        raise DataError(f"{where} is not valid JSON; write one object in each line") from None
    if not isinstance(value, dict):
        raise DataError(f"{where} is no JSON object; write one object in each line")
    return value


def _messages(where: str, value: object) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: messages is no list with messages; write one")
    found = []
    for number, message in enumerate(value, start=1):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise DataError(f"{where}: message {number} lacks role or content; add it")
        keys = ("role", "content")
        found.append({key: _text(where, f"message {number} {key}", message[key]) for key in keys})
    if not any(message["role"] == ASSISTANT for message in found):
        raise DataError(
            f"{where}: no message is of the role {ASSISTANT}; add what shall be learned"
        )
    return found


def _text(where: str, name: str, value: object) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: {name} is no text; write it in quotes")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(f"{where}: {name} is not valid Unicode; convert it") from None
    return value


@dataclass(frozen=True, slots=True)
class StepBatches:
    """What one step works on.

    Attributes:
        epoch: which pass over the examples it belongs to, from 0.
        number: which step of that epoch it is, from 0.
        batches: what is run together; gradients of all of them make one step.
    """

    epoch: int
    number: int
    batches: tuple[tuple[Example, ...], ...] = field(repr=False)

    @property
    def answer_tokens(self) -> int:
        """Tokens that the step's loss is the mean over."""
        return sum(example.answer_tokens for batch in self.batches for example in batch)

    @property
    def rows(self) -> int:
        """Rows that are run."""
        return sum(example.rows for batch in self.batches for example in batch)


class Batches:
    """The order in which steps see examples: each one once in an epoch, another order in each.

    Examples are shuffled, sorted by length within stretches of some batches, cut into batches, and
    the batches are shuffled. All of it follows from the seed and the number of the epoch, on any
    machine. The last step of an epoch takes what is left.

    Args:
        examples: what to learn from.
        batch_size: most examples of a batch; None for no bound.
        rows: most rows of a batch; None for no bound.
        accumulate: batches of one step.
        seed: start of the order.

    Raises:
        ConfigError: no bound at all, a number below 1, or an example alone has more rows.
        DataError: there are no examples.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        batch_size: int | None = 8,
        rows: int | None = None,
        accumulate: int = 1,
        seed: int = 0,
    ) -> None:
        if not examples:
            raise DataError("there are no examples to learn from; give some")
        if batch_size is None and rows is None:
            raise ConfigError("batches have no bound; give batch_size, rows or both")
        for name, value in (("batch_size", batch_size), ("rows", rows), ("accumulate", accumulate)):
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; give at least 1")
        longest = max(example.rows for example in examples)
        if rows is not None and longest > rows:
            raise ConfigError(
                f"an example has {longest} rows and a batch holds {rows}; raise rows, "
                "or lower max_tokens"
            )
        self._examples = examples
        self._batch_size = batch_size
        self._rows = rows
        self._accumulate = accumulate
        self._seed = seed

    def epoch(self, number: int) -> list[StepBatches]:
        """The steps of one epoch."""
        batches = self._batches(number)
        order = _order(len(batches), f"{self._seed}/{number}/batches")
        shuffled = [batches[at] for at in order]
        starts = range(0, len(shuffled), self._accumulate)
        return [
            StepBatches(number, step, tuple(shuffled[start : start + self._accumulate]))
            for step, start in enumerate(starts)
        ]

    def from_step(self, step: int) -> Iterator[StepBatches]:
        """The steps of all epochs without end, those before `step` left out."""
        epoch = 0
        while True:
            steps = self.epoch(epoch)
            yield from steps[step:]
            step = max(0, step - len(steps))
            epoch += 1

    def steps(self, epochs: int) -> int:
        """How many steps so many epochs have."""
        return sum(len(self.epoch(number)) for number in range(epochs))

    def _batches(self, epoch: int) -> list[tuple[Example, ...]]:
        order = _order(len(self._examples), f"{self._seed}/{epoch}/examples")
        stretch = _SORTED_BATCHES * self._typical_size()
        batches: list[tuple[Example, ...]] = []
        for start in range(0, len(order), stretch):
            near = sorted(order[start : start + stretch], key=lambda at: self._examples[at].rows)
            batches += self._cut([self._examples[at] for at in near])
        return batches

    def _typical_size(self) -> int:
        mean = sum(example.rows for example in self._examples) / len(self._examples)
        by_rows = len(self._examples) if self._rows is None else max(1, int(self._rows / mean))
        return by_rows if self._batch_size is None else min(self._batch_size, by_rows)

    def _cut(self, examples: Sequence[Example]) -> Iterator[tuple[Example, ...]]:
        held: list[Example] = []
        rows = 0
        for example in examples:
            full = self._batch_size is not None and len(held) == self._batch_size
            if held and (full or (self._rows is not None and rows + example.rows > self._rows)):
                yield tuple(held)
                held, rows = [], 0
            held.append(example)
            rows += example.rows
        yield tuple(held)


def _order(count: int, seed: str) -> list[int]:
    """Numbers below `count`, shuffled: sorted by a keyed hash, which no version of Python changes."""
    key = blake2b(seed.encode(), digest_size=32).digest()
    return sorted(
        range(count),
        key=lambda at: blake2b(at.to_bytes(8, "little"), key=key, digest_size=16).digest(),
    )
