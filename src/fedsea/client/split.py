"""The split model: bottom -> (protect) -> remote trunk -> (restore) -> top.

`SplitModel` holds what all sessions share. `SplitSession` is one session: sequences that exist in
three places at once, at the bottom, in the trunk and at the top. Generation loops, the
transformers wrapper and the benchmarks are its callers.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from weakref import WeakSet

import torch
from torch import Tensor

from fedsea.client.link import Patience, Tell, Traffic
from fedsea.client.local import BottomJob, LocalParts, TopJob, TopResult
from fedsea.client.protection import ReleasePolicy, Spent
from fedsea.client.protector import Protector
from fedsea.client.releases import ReleaseStore
from fedsea.client.remote import RemoteTrunk, SessionPlan
from fedsea.client.sampling import Sampler
from fedsea.client.servers import Endpoint, Expectation
from fedsea.errors import FedseaError, PromptTooLong
from fedsea.wire.codecs import RowFormat
from fedsea.wire.messages import Description, Want

# Rows of a prompt that travel in one message; several are on their way at once.
PREFILL_CHUNK = 256
_CHUNKS_AHEAD = 4

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class SplitModel:
    """The client's parts, the servers, and how they talk.

    The trunk's `description` is that of the first server that answered. Without a `policy` rows
    leave as they are. `adapter` names the server's part of a LoRA adapter and `prompt` a soft
    prompt that the server has; empty for none.
    """

    parts: LocalParts
    endpoints: tuple[Endpoint, ...]
    expectation: Expectation
    description: Description
    store: ReleaseStore
    patience: Patience
    tell: Tell
    up: RowFormat
    down: RowFormat
    policy: ReleasePolicy | None = None
    adapter: str = ""
    prompt: str = ""
    protectors: WeakSet[Protector] = field(default_factory=WeakSet, repr=False)

    async def open(self, capacities: Sequence[int]) -> SplitSession:
        """Open a session that can hold sequences of the given capacities in rows.

        Raises:
            PromptTooLong: a capacity is over the model's or the server's context.
            Capacity, QuotaExceeded, Unreachable: no place in time.
        """
        limit = self.description.max_context
        longest = max(capacities)
        if limit and longest > limit:
            raise PromptTooLong(
                f"prompt and new tokens need {longest} positions and the context is {limit}; "
                "shorten the prompt or lower max_new_tokens"
            )
        page = max(1, self.description.page_rows)
        local_page = self.parts.bottom.pool.page_rows
        accounts = self.parts.open(sum(_whole(rows, local_page) for rows in capacities))
        plan = SessionPlan(
            expectation=self.expectation,
            reserve_rows=sum(_whole(rows, page) for rows in capacities),
            up=self.up,
            down=self.down,
            adapter=self.adapter,
            prompt=self.prompt,
        )
        trunk = RemoteTrunk(self.endpoints, plan, self.store, self.patience, self.tell)
        try:
            await trunk.open()
        except BaseException:
            self.parts.close(accounts)
            raise
        return SplitSession(self.parts, trunk, accounts, self._new_protector())

    async def close(self) -> None:
        """Disconnect from all servers."""
        for endpoint in self.endpoints:
            await endpoint.close()
        self.store.close()
        if self.policy is not None:
            for protector in tuple(self.protectors):
                protector.close()
            self.policy.close()

    def _new_protector(self) -> Protector | None:
        if self.policy is None:
            return None
        protector = Protector(self.policy, self.store)
        self.protectors.add(protector)
        return protector


class SplitSession:
    """Sequences of one session. All methods belong to the client's event loop.

    Calls for one sequence come one at a time; calls for different sequences run together.
    """

    def __init__(
        self,
        parts: LocalParts,
        trunk: RemoteTrunk,
        accounts: tuple[int, int],
        protector: Protector | None = None,
    ) -> None:
        self._parts = parts
        self._trunk = trunk
        self._accounts = accounts
        self._protector = protector
        self._numbers = itertools.count()
        self._closed = False

    @property
    def traffic(self) -> Traffic:
        """Messages, bytes and rows so far."""
        return self._trunk.traffic

    @property
    def address(self) -> str | None:
        """The server in use."""
        return self._trunk.address

    @property
    def charged(self) -> int:
        """Releases that were charged to the ledger for rows of this session."""
        return 0 if self._protector is None else self._protector.charged

    def spent(self, releases: int) -> Spent | None:
        """What so many charged releases amount to; None without a mechanism."""
        return None if self._protector is None else self._protector.policy.spent(releases)

    def begin(self, capacity: int) -> int:
        """A new, empty sequence."""
        sequence = next(self._numbers)
        for pool, account in zip(self._parts.pools, self._accounts, strict=True):
            pool.begin(account, sequence, capacity)
        self._trunk.begin(sequence, capacity)
        if self._protector is not None:
            self._protector.begin(sequence)
        return sequence

    def fork(self, source: int, length: int, capacity: int) -> int:
        """A new sequence that starts as the first `length` rows of `source`."""
        target = next(self._numbers)
        for runner_pool, account in zip(self._parts.pools, self._accounts, strict=True):
            runner_pool.fork(account, source, target, length, capacity)
        self._trunk.fork(source, target, length, capacity)
        if self._protector is not None:
            self._protector.fork(source, target, length)
        return target

    def rollback(self, sequence: int, length: int) -> None:
        """Forget the rows from `length` on, in all three places."""
        for pool, account in zip(self._parts.pools, self._accounts, strict=True):
            held = pool.sequence(account, sequence).length
            pool.rollback(account, sequence, min(length, held))
        self._trunk.rollback(sequence, length)
        if self._protector is not None:
            self._protector.rollback(sequence, length)

    def drop(self, sequence: int) -> None:
        """Forget a sequence."""
        for pool, account in zip(self._parts.pools, self._accounts, strict=True):
            pool.drop(account, sequence)
        self._trunk.drop(sequence)
        if self._protector is not None:
            self._protector.drop(sequence)

    def length(self, sequence: int) -> int:
        """Rows released for a sequence."""
        return self._trunk.length(sequence)

    def sequences(self) -> list[int]:
        """Ids of the living sequences."""
        return self._parts.bottom.pool.sequences(self._accounts[0])

    async def feed(
        self,
        sequence: int,
        ids: Tensor,
        keep: int = 1,
        sampler: Sampler | None = None,
        progress: Progress | None = None,
    ) -> TopResult:
        """Run the next tokens (n,) of a sequence through all three parts.

        Long prompts go in chunks, several on their way at once.

        Args:
            sequence: which one.
            ids: token ids; they never leave this process.
            keep: logits of how many of the last rows are wanted.
            sampler: draws the next token from the last row.
            progress: called with the rows done and the rows in all after every chunk.

        Returns:
            Logits (keep, vocabulary) and the token.

        Raises:
            PrivacyError: rows may not leave; a prompt that does not fit the budget is refused
                before any of it is sent. The session can be used on.
            FedseaError: what ended the session.
        """
        if len(ids) == 1 and keep == 1:
            return await self._step(sequence, ids, sampler)
        if self._protector is not None:
            self._protector.reserve_ahead(sequence, ids.tolist(), PREFILL_CHUNK)
        chunks = deque(ids.split(PREFILL_CHUNK))
        coming: deque[tuple[int, asyncio.Future[Tensor]]] = deque()
        unread = unsent = len(ids)
        kept: list[Tensor] = []
        while True:
            while chunks and len(coming) < _CHUNKS_AHEAD:
                chunk = chunks.popleft()
                rows = await self._parts.run_bottom(BottomJob(self._accounts[0], sequence, chunk))
                unsent -= len(chunk)
                want = self._want(keep_any=unsent < keep)
                later = ids[len(ids) - unsent :]
                coming.append((len(chunk), self._release(sequence, chunk, rows, want, later)))
            count, arrival = coming.popleft()
            unread -= count
            last = unread == 0
            wanted = max(0, min(count, keep - unread))
            result = await self._finish(
                sequence, await arrival, count, wanted, sampler if last else None
            )
            if wanted:
                kept.append(result.logits)
            if progress is not None:
                progress(len(ids) - unread, len(ids))
            if last:
                logits = kept[0] if len(kept) == 1 else torch.cat(kept or [result.logits])
                return TopResult(logits, result.token)

    async def _step(self, sequence: int, ids: Tensor, sampler: Sampler | None) -> TopResult:
        """One token of a sequence, in step with the other sequences of this process."""
        rows = await self._parts.run_bottom(BottomJob(self._accounts[0], sequence, ids))
        arrival = self._release(sequence, ids, rows, Want.LAST, ids[1:])
        key = self._parts.lockstep.send()
        try:
            back = await arrival
        finally:
            self._parts.lockstep.back(key)
        return await self._finish(sequence, back, 1, 1, sampler)

    def _release(
        self, sequence: int, ids: Tensor, rows: Tensor, want: Want, later: Tensor
    ) -> asyncio.Future[Tensor]:
        """Send the rows of some tokens as the policy lets them leave, or as they are.

        `later` are the tokens that follow in the same prompt.
        """
        if self._protector is None:
            return self._trunk.append(sequence, rows, want)
        try:
            data = self._protector.release(sequence, ids.tolist(), rows, later.tolist())
            return self._trunk.send(sequence, data, len(ids), want)
        except FedseaError:
            self._forget_unreleased(sequence)
            raise

    def _forget_unreleased(self, sequence: int) -> None:
        """Rows that were not sent are made anew, or taken from the memo, when they are fed again."""
        bottom, released = self._parts.bottom.pool, self.length(sequence)
        if self._protector is not None and self._protector.length(sequence) > released:
            self._protector.rollback(sequence, released)
        if bottom.sequence(self._accounts[0], sequence).length > released:
            bottom.rollback(self._accounts[0], sequence, released)

    def _want(self, *, keep_any: bool) -> Want:
        """The top reads every row; without blocks there it needs only those that give logits."""
        if len(self._parts.top.span.span) or keep_any:
            return Want.ALL
        return Want.NONE

    async def _finish(
        self, sequence: int, rows: Tensor, count: int, keep: int, sampler: Sampler | None
    ) -> TopResult:
        if self._protector is not None:
            rows = self._protector.restore(sequence, count, rows)
        job = TopJob(self._accounts[1], sequence, count, rows, keep, sampler)
        return await self._parts.run_top(job)

    async def resume(self, sequence: int) -> None:
        """Reconnect when no server was in reach, and bring bottom, trunk and top together.

        A call that failed or was cancelled may have left the parts at different lengths: rows that
        were not released are made anew, rows that did not come back are asked for again.
        """
        await self._trunk.resume()
        self._forget_unreleased(sequence)
        released = self.length(sequence)
        finished = self._parts.top_runner.pool.sequence(self._accounts[1], sequence).length
        if finished < released:
            if self._protector is not None:
                self._protector.rewind(sequence, finished)
            rows = await self._trunk.ask_again(sequence, finished)
            await self._finish(sequence, rows, released - finished, 0, None)

    async def close(self) -> None:
        """Free everything, here and at the server."""
        if self._closed:
            return
        self._closed = True
        try:
            await self._trunk.close()
        finally:
            self._parts.close(self._accounts)
            if self._protector is not None:
                self._protector.close()


def _whole(rows: int, page: int) -> int:
    return -(-rows // page) * page
