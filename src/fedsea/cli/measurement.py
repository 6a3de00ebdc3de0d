"""Measures a live server through a client: time to the first token, then what each token costs.

A decoding step is the time from one answer of the server to the next. It is taken apart at the
wire: until the row goes up the client computes, until the answer comes down the server computes,
by its own account, and the rest is queue and wire.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

from fedsea.errors import RequestError
from fedsea.transport.recording import Direction, Message, Recorder
from fedsea.wire.framing import decode_event
from fedsea.wire.limits import DEFAULT_LIMITS
from fedsea.wire.messages import Append, Output, Role

if TYPE_CHECKING:
    from fedsea.client.llm import LLM

_TEXT = "The quick brown fox jumps over the lazy dog. "


@dataclass(frozen=True, slots=True)
class Step:
    """One decoding step; times in seconds, sizes in bytes."""

    total: float
    client: float
    server: float
    wire: float
    bytes_up: int
    bytes_down: int


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, least and greatest of some measurements."""

    median: float
    least: float
    greatest: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Of at least one value."""
        found = sorted(values)
        return cls(statistics.median(found), found[0], found[-1])


@dataclass(slots=True)
class Measurement:
    """What some rounds gave."""

    prompt_tokens: int
    new_tokens: int
    first_token: list[float] = field(default_factory=list)
    tokens_per_second: list[float] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)

    @property
    def rounds(self) -> int:
        """How many answers were measured."""
        return len(self.first_token)

    def spread(self, part: Callable[[Step], float]) -> Spread:
        """Of one part of all steps."""
        return Spread.of(part(step) for step in self.steps)


def measure(
    llm: LLM,
    recorder: Recorder,
    *,
    prompt_tokens: int,
    new_tokens: int,
    rounds: int,
    seconds: float,
) -> Iterator[Measurement]:
    """Measure up to `rounds` answers after one to warm up; ends earlier after `seconds`.

    Yields the growing result after every round, one at least. `recorder` must see the messages of
    `llm` and keep all messages of an answer.

    Raises:
        RequestError: a length that gives nothing to measure.
    """
    if prompt_tokens < 1 or new_tokens < 3 or rounds < 1:
        raise RequestError("there is nothing to measure: use 1 prompt token, 3 new ones, 1 round")
    prompt = _prompt(llm, prompt_tokens)
    found = Measurement(prompt_tokens, new_tokens)
    deadline = time.monotonic() + seconds
    llm.generate(prompt, max_new_tokens=3, ignore_eos=True)
    while found.rounds < rounds and (not found.rounds or time.monotonic() < deadline):
        recorder.messages.clear()
        completion = llm.generate(prompt, max_new_tokens=new_tokens, ignore_eos=True)
        found.first_token.append(completion.timing.first_token)
        found.tokens_per_second.append(completion.tokens_per_second)
        found.steps.extend(steps(list(recorder.messages)))
        yield found


def steps(messages: Sequence[Message]) -> list[Step]:
    """The decoding steps in the messages of one answer; the first one follows the prompt."""
    rows = [message for message in messages if _carries_rows(message)]
    turns = [
        (up, down)
        for up, down in pairwise(rows)
        if up.direction is Direction.UP and down.direction is Direction.DOWN
    ]
    return [_step(before, up, down) for (_, before), (up, down) in pairwise(turns)]


def _step(before: Message, up: Message, down: Message) -> Step:
    output = decode_event(down.data, Role.SERVER, DEFAULT_LIMITS)
    server = output.compute_us / 1e6 if isinstance(output, Output) else 0.0
    return Step(
        total=down.seconds - before.seconds,
        client=up.seconds - before.seconds,
        server=server,
        wire=down.seconds - up.seconds - server,
        bytes_up=len(up.data),
        bytes_down=len(down.data),
    )


def _carries_rows(message: Message) -> bool:
    sender = Role.CLIENT if message.direction is Direction.UP else Role.SERVER
    return isinstance(decode_event(message.data, sender, DEFAULT_LIMITS), Append | Output)


def _prompt(llm: LLM, count: int) -> list[int]:
    """Exactly `count` ids of an English text."""
    once = len(llm.encode(_TEXT))
    return list(llm.encode(_TEXT * (count // max(1, once - 2) + 1))[:count])
