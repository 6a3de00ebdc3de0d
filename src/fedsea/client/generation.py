"""The generation loop: a prompt goes in, tokens come out, text is cut at stop strings."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from transformers import PreTrainedTokenizerBase

from fedsea.client.link import Traffic
from fedsea.client.protection import Spent
from fedsea.client.sampling import FinishReason, Sampler, SamplingParams
from fedsea.client.split import Progress, SplitSession
from fedsea.client.text import IncrementalDecoder, StopStrings, decode
from fedsea.client.together import together
from fedsea.privacy.placeholders.restoration import Restorer
from fedsea.privacy.placeholders.substitution import Substitution

# Text is made while the next token is on its way, not before it is sent.
_TEXT_DELAY = 0.0005

OnText = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Sample:
    """One answer to a prompt. Neither text nor tokens are in its `repr`, which ends up in logs."""

    text: str = field(repr=False)
    token_ids: tuple[int, ...] = field(repr=False)
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds from the request to the first token and to the end."""

    first_token: float
    total: float


@dataclass(frozen=True, slots=True)
class Completion:
    """The answers to one prompt; `text`, `token_ids` and `finish_reason` are the first one's.

    `traffic` is what crossed the wire in the session meanwhile, and `spent` what was charged to the
    ledger for it, None in the mode plain; requests that are answered together share both.
    `substituted` says how many spans of which kind placeholders stood for in the prompts so far.
    """

    samples: tuple[Sample, ...]
    prompt_tokens: int
    timing: Timing
    substituted: Mapping[str, int] = field(default_factory=dict)
    traffic: Traffic = field(default_factory=Traffic)
    spent: Spent | None = None

    @property
    def text(self) -> str:
        """Text of the first sample."""
        return self.samples[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Token ids of the first sample."""
        return self.samples[0].token_ids

    @property
    def finish_reason(self) -> FinishReason:
        """Why the first sample ended."""
        return self.samples[0].finish_reason

    @property
    def tokens_per_second(self) -> float:
        """Tokens after the first, of all samples together, per second."""
        later = sum(len(sample.token_ids) - 1 for sample in self.samples)
        return later / max(self.timing.total - self.timing.first_token, 1e-9)


class TextWriter:
    """Turns the tokens of one sample into text, now or a little later.

    With stop strings the text decides whether to go on, so it is made at once. Placeholders are
    restored before stop strings are looked for.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop: Sequence[str],
        on_text: OnText | None,
        restorer: Restorer | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._decoder = IncrementalDecoder(tokenizer)
        self._restorer = restorer
        self._stops = StopStrings(stop) if stop else None
        self._on_text = on_text
        self._unwritten: list[int] = []
        self._pieces: list[str] = []
        self._handle: asyncio.TimerHandle | None = None

    @property
    def stopped(self) -> bool:
        """Whether a stop string was met."""
        return self._stops is not None and self._stops.stopped

    def add(self, token: int) -> None:
        """Take the next token."""
        self._unwritten.append(token)
        if self._stops is not None:
            self._write()
        elif self._on_text is not None and self._handle is None:
            loop = asyncio.get_running_loop()
            self._handle = loop.call_later(_TEXT_DELAY, self._write)

    def finish(self, token_ids: Sequence[int]) -> str:
        """Write what is left and return the whole text."""
        if self._stops is None and self._on_text is None:
            text = decode(self._tokenizer, token_ids)
            return text if self._restorer is None else self._restorer.restore(text)
        self._write()
        self._give(self._decoder.flush(), at_end=True)
        return "".join(self._pieces)

    def _write(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
        for token in self._unwritten:
            self._give(self._decoder.push(token))
        self._unwritten.clear()

    def _give(self, text: str, *, at_end: bool = False) -> None:
        if self._restorer is not None:
            text = self._restorer.push(text) + (self._restorer.flush() if at_end else "")
        if self._stops is not None:
            text = self._stops.push(text)
            if at_end:
                text += self._stops.flush()
        if text:
            self._pieces.append(text)
            if self._on_text is not None:
                self._on_text(text)


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt and how to continue it."""

    ids: tuple[int, ...] = field(repr=False)
    params: SamplingParams
    on_text: OnText | None = None
    progress: Progress | None = None
    substitution: Substitution | None = None

    @property
    def capacity(self) -> int:
        """Most rows that one sample needs."""
        return len(self.ids) + self.params.max_new_tokens


async def complete(
    session: SplitSession,
    request: Request,
    tokenizer: PreTrainedTokenizerBase,
    eos_ids: Collection[int],
) -> Completion:
    """Answer one request in a session that has room for it; its sequences are dropped at the end.

    Samples after the first share the prompt's rows everywhere.
    """
    began, meter = time.perf_counter(), Meter(session)
    first_sequence = session.begin(request.capacity)
    samplers = [
        Sampler(request.params, request.ids, eos_ids, index=index)
        for index in range(request.params.n)
    ]
    prompt = torch.tensor(request.ids)
    first = await session.feed(
        first_sequence, prompt, sampler=samplers[0], progress=request.progress
    )
    first_token = time.perf_counter() - began
    sequences = [first_sequence]
    tokens = [first.token]
    for sampler in samplers[1:]:
        sequences.append(session.fork(first_sequence, len(request.ids), request.capacity))
        tokens.append(sampler.sample(first.logits[-1]))
    samples = await together(
        continue_sample(
            session,
            sequence,
            sampler,
            token or 0,
            TextWriter(
                tokenizer, request.params.stop, request.on_text, restorer_of(request.substitution)
            ),
        )
        for sequence, sampler, token in zip(sequences, samplers, tokens, strict=True)
    )
    for sequence in sequences:
        session.drop(sequence)
    timing = Timing(first_token, time.perf_counter() - began)
    return Completion(
        tuple(samples),
        len(request.ids),
        timing,
        counts_of(request.substitution),
        meter.traffic(),
        meter.spent(),
    )


class Meter:
    """What a session sends, gets and is charged from now on."""

    def __init__(self, session: SplitSession) -> None:
        self._session = session
        self._traffic = replace(session.traffic)
        self._charged = session.charged

    def traffic(self) -> Traffic:
        """What crossed the wire so far."""
        return self._session.traffic.since(self._traffic)

    def spent(self) -> Spent | None:
        """What was charged so far; None in the mode plain."""
        return self._session.spent(self._session.charged - self._charged)


def restorer_of(substitution: Substitution | None) -> Restorer | None:
    """What puts values back into one answer, if placeholders are in use."""
    return None if substitution is None else substitution.restorer()


def counts_of(substitution: Substitution | None) -> Mapping[str, int]:
    """How many spans of which kind were replaced so far."""
    return {} if substitution is None else substitution.counts


async def continue_sample(
    session: SplitSession, sequence: int, sampler: Sampler, token: int, writer: TextWriter
) -> Sample:
    """Go on from a sampled token until the sample ends. The last token is never fed."""
    while True:
        writer.add(token)
        if sampler.finish_reason is not None or writer.stopped:
            break
        result = await session.feed(sequence, torch.tensor([token]), sampler=sampler)
        token = result.token or 0
    token_ids = tuple(sampler.generated)
    text = writer.finish(token_ids)
    stopped = FinishReason.STOP_STRING if writer.stopped else None
    return Sample(text, token_ids, stopped or sampler.finish_reason or FinishReason.LENGTH)
