"""Sessions that stay open: continue a text, go back to a position, branch off, hold a chat."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch

from fedsea.client.generation import (
    Completion,
    Meter,
    OnText,
    Sample,
    TextWriter,
    Timing,
    continue_sample,
    counts_of,
    restorer_of,
)
from fedsea.client.link import Traffic
from fedsea.client.llm import LLM, Message, check_unicode, streamed, substituted
from fedsea.client.sampling import FinishReason, Sampler, SamplingParams
from fedsea.client.split import Progress, SplitSession
from fedsea.client.streams import Feed, Stream
from fedsea.client.text import decode
from fedsea.errors import PromptTooLong, RequestError
from fedsea.privacy.placeholders.substitution import Substitution

DEFAULT_ROWS = 2048


@dataclass(slots=True)
class _Branches:
    """The branches of one session: how many are alive, and for how many there is room."""

    alive: int
    most: int


class Session:
    """A text that grows: what was said stays in the caches of all three parts.

    `position` counts tokens, prompts and answers alike. Make one with `Session.open`. When no
    server is in reach the call fails with a clear error and the session keeps its text; the next
    call, or `resume`, connects again and goes on.
    """

    def __init__(
        self,
        llm: LLM,
        split: SplitSession,
        sequence: int,
        max_tokens: int,
        branches: _Branches,
        substitution: Substitution | None,
    ) -> None:
        self._llm = llm
        self._split = split
        self._sequence = sequence
        self._max_tokens = max_tokens
        self._ids: list[int] = []
        self._branches = branches
        self._substitution = substitution
        self._turn = asyncio.Lock()

    @classmethod
    def open(cls, llm: LLM, max_tokens: int | None = None, forks: int = 0) -> Session:
        """Open a session.

        Args:
            llm: the model.
            max_tokens: most tokens of one branch; default 2,048 or the context of the model.
            forks: how many branches will be alive beside the first one.

        Raises:
            PromptTooLong, Capacity, QuotaExceeded, Unreachable: there is no room for it.
        """
        limit = llm.split.description.max_context or DEFAULT_ROWS
        tokens = max_tokens if max_tokens is not None else min(DEFAULT_ROWS, limit)
        split = llm.background.run(llm.split.open([tokens] * (1 + forks)))

        async def begin() -> int:
            return split.begin(tokens)

        branches = _Branches(alive=1, most=1 + forks)
        sequence = llm.background.run(begin())
        return cls(llm, split, sequence, tokens, branches, llm.new_substitution())

    @property
    def position(self) -> int:
        """Tokens so far."""
        return len(self._ids)

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The tokens so far; they exist only in this process."""
        return tuple(self._ids)

    @property
    def max_tokens(self) -> int:
        """Most tokens that the session holds."""
        return self._max_tokens

    @property
    def traffic(self) -> Traffic:
        """What crossed the wire so far."""
        return self._split.traffic

    def generate(
        self,
        prompt: str | Sequence[int] = (),
        params: SamplingParams | None = None,
        **options: Any,
    ) -> Completion:
        """Add a prompt, which may be empty, and answer it."""
        return self.stream(prompt, params, **options).result()

    def stream(
        self,
        prompt: str | Sequence[int] = (),
        params: SamplingParams | None = None,
        progress: Progress | None = None,
        **options: Any,
    ) -> Stream[str, Completion]:
        """Add a prompt, which may be empty, and answer it piece by piece."""
        chosen = self._llm.sampling_params(params, options)
        if chosen.n != 1:
            raise RequestError(f"a session has one answer at a time and n is {chosen.n}; use fork")
        self._check_open()
        ids = self._new_ids(prompt)

        async def answer(feed: Feed[str]) -> Completion:
            async with self._turn:
                return await self._answer(ids, chosen, feed.put, progress)

        return streamed(self._llm.background, answer)

    def rollback(self, position: int) -> None:
        """Forget all tokens from `position` on.

        Raises:
            RequestError: the session is not that long, or closed.
        """
        self._check_open()
        if not 0 <= position <= self.position:
            raise RequestError(
                f"cannot go back to {position}: the session has {self.position} tokens"
            )

        async def go_back() -> None:
            async with self._turn:
                self._rollback(position)

        self._llm.background.run(go_back())

    def fork(self) -> Session:
        """A second session that starts as this one is now and goes its own way.

        Raises:
            RequestError: the session is closed, or was opened with too few `forks`.
        """
        self._check_open()
        if self._branches.alive == self._branches.most:
            raise RequestError(
                f"the session was opened for {self._branches.most - 1} forks and has as many; "
                "close one, or open it with more"
            )

        async def branch() -> int:
            async with self._turn:
                await self._resume()
            held = self._split.length(self._sequence)
            return self._split.fork(self._sequence, held, self._max_tokens)

        sequence = self._llm.background.run(branch())
        forked = Session(
            self._llm,
            self._split,
            sequence,
            self._max_tokens,
            self._branches,
            self._substitution,
        )
        forked._ids = list(self._ids)
        self._branches.alive += 1
        return forked

    def resume(self) -> None:
        """Connect again after no server was in reach; what was sent goes out again unchanged."""
        self._check_open()

        async def connect() -> None:
            async with self._turn:
                await self._resume()

        self._llm.background.run(connect())

    def close(self) -> None:
        """Free this branch; the last branch ends the session at the server."""
        if self._sequence < 0:
            return
        sequence, self._sequence = self._sequence, -1
        self._branches.alive -= 1
        last = self._branches.alive == 0

        async def leave() -> None:
            if last:
                await self._split.close()
            else:
                self._split.drop(sequence)

        with suppress(RequestError):  # the client is closed, and with it all its sessions
            self._llm.background.run(leave())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._sequence < 0:
            raise RequestError("the session is closed; open another")

    def _new_ids(self, prompt: str | Sequence[int]) -> list[int]:
        if not prompt:
            return []
        prompt = substituted(prompt, self._substitution)
        if not isinstance(prompt, str):
            return list(self._llm.checked(prompt))
        check_unicode(prompt)
        special = not self._ids
        ids: list[int] = self._llm.tokenizer(prompt, add_special_tokens=special).input_ids
        return ids

    async def _answer(
        self,
        ids: list[int],
        params: SamplingParams,
        on_text: OnText | None,
        progress: Progress | None,
    ) -> Completion:
        began, meter = time.perf_counter(), Meter(self._split)
        await self._resume()
        needed = self.position + len(ids) + params.max_new_tokens
        if needed > self._max_tokens:
            raise PromptTooLong(
                f"the session would grow to {needed} tokens and holds {self._max_tokens}; "
                "lower max_new_tokens, roll back, or open it with more max_tokens"
            )
        entering = [*self._ids[self._fed :], *ids]
        if not entering:
            if not self._ids:
                raise RequestError("the session is empty; give a prompt")
            # The last token's row is made anew for its logits, from the same release.
            entering = self._ids[-1:]
            self._rollback_rows(self.position - 1)
        sampler = Sampler(params, [*self._ids, *ids], self._llm.eos_ids)
        self._ids.extend(ids)
        first = await self._split.feed(
            self._sequence, torch.tensor(entering), sampler=sampler, progress=progress
        )
        first_token = time.perf_counter() - began
        restorer = restorer_of(self._substitution)
        writer = TextWriter(self._llm.tokenizer, params.stop, on_text, restorer)
        try:
            sample: Sample = await continue_sample(
                self._split, self._sequence, sampler, first.token or 0, writer
            )
        finally:
            self._ids.extend(sampler.generated)
        timing = Timing(first_token, time.perf_counter() - began)
        return Completion(
            (sample,),
            len(ids),
            timing,
            counts_of(self._substitution),
            meter.traffic(),
            meter.spent(),
        )

    @property
    def _fed(self) -> int:
        """Tokens whose rows were released."""
        return self._split.length(self._sequence)

    def _rollback(self, position: int) -> None:
        self._rollback_rows(min(position, self._fed))
        del self._ids[position:]

    def _rollback_rows(self, length: int) -> None:
        if length < self._fed:
            self._split.rollback(self._sequence, length)

    async def _resume(self) -> None:
        await self._split.resume(self._sequence)


class Chat:
    """A conversation in the model's chat template.

    Only what is new in the rendered conversation is sent; a change of an earlier turn rolls back to
    the first token that differs.

    Args:
        llm: the model.
        system: a system message that opens the conversation.
        max_tokens: most tokens of the whole conversation.
    """

    def __init__(self, llm: LLM, system: str | None = None, max_tokens: int | None = None) -> None:
        self._llm = llm
        self._session = Session.open(llm, max_tokens)
        self._opening: list[Message] = (
            [] if system is None else [{"role": "system", "content": system}]
        )
        self.messages: list[Message] = list(self._opening)

    @property
    def session(self) -> Session:
        """The session underneath."""
        return self._session

    def send(
        self, text: str, params: SamplingParams | None = None, **options: Any
    ) -> Stream[str, Completion]:
        """Say something and get the answer piece by piece.

        The turn becomes part of the conversation when the answer is complete.
        """
        chosen = self._llm.sampling_params(params, options)
        asked: list[Message] = [*self.messages, {"role": "user", "content": text}]
        ids = self._llm.encode_chat(self._as_sent(asked))

        async def answer(feed: Feed[str]) -> Completion:
            session = self._session
            async with session._turn:
                known = _common_prefix(session.token_ids, ids[:-1])
                session._rollback(known)
                completion = await session._answer(list(ids[known:]), chosen, feed.put, None)
            self.messages = [*asked, {"role": "assistant", "content": completion.text}]
            self._remember(completion)
            return completion

        return streamed(self._llm.background, answer)

    def undo(self) -> None:
        """Take the last question and its answer back."""
        if len(self.messages) >= len(self._opening) + 2:
            del self.messages[-2:]

    def reset(self) -> None:
        """Forget the conversation, the opening message excepted."""
        self.messages = list(self._opening)
        self._session.rollback(0)

    def _as_sent(self, messages: Sequence[Message]) -> list[Message]:
        """The messages with placeholders, if they are in use."""
        substitution = self._session._substitution
        if substitution is None:
            return list(messages)
        return [
            {**message, "content": substitution.substitute(message["content"])}
            for message in messages
        ]

    def _remember(self, completion: Completion) -> None:
        """An answer goes into the next prompt as the model wrote it, so that it is not sent anew."""
        substitution = self._session._substitution
        if substitution is not None and completion.finish_reason is not FinishReason.STOP_STRING:
            raw = decode(self._llm.tokenizer, completion.token_ids)
            substitution.remember(completion.text, raw)

    def close(self) -> None:
        """End the session."""
        self._session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _common_prefix(known: Sequence[int], wanted: Sequence[int]) -> int:
    """How many tokens both begin with."""
    for index, (left, right) in enumerate(zip(known, wanted, strict=False)):
        if left != right:
            return index
    return min(len(known), len(wanted))
