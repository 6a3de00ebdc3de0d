"""The client's own parts, bottom and top, shared by all requests of a process.

Whatever requests need in the same turn of the event loop runs as one ragged batch.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch import Tensor

from fedsea.client.lockstep import Lockstep
from fedsea.client.sampling import Sampler, sample_batch
from fedsea.errors import Capacity, FedseaError
from fedsea.model.adapters import read_adapter
from fedsea.model.checkpoint import Checkpoint
from fedsea.model.compilation import compile_decode
from fedsea.model.kv_pool import KVPool
from fedsea.model.lora import Adapter
from fedsea.model.partition import Partition
from fedsea.model.runner import NewRows, SpanRunner
from fedsea.model.spans import BlockSpan, Placement, Top, load_bottom, load_top

# Rows that one turn of the loop computes at most, so that a long prompt does not hold up others.
MAX_TURN_ROWS = 512

Job = TypeVar("Job", bound="BottomJob | TopJob")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class BottomJob:
    """Token ids (n,) of one sequence that enter the bottom."""

    account: int
    sequence: int
    ids: Tensor = field(repr=False)

    @property
    def count(self) -> int:
        """Rows."""
        return int(self.ids.shape[0])


@dataclass(frozen=True, slots=True)
class TopJob:
    """The next `count` rows of one sequence that enter the top.

    `rows` is (count, hidden), or only the last of them when the top has no blocks to read the
    others. The last `keep` rows give logits; with a sampler, the last one gives the next token.
    """

    account: int
    sequence: int
    count: int
    rows: Tensor = field(repr=False)
    keep: int
    sampler: Sampler | None = None


@dataclass(frozen=True, slots=True)
class TopResult:
    """Logits (keep, vocabulary), and the sampled token when there was a sampler."""

    logits: Tensor = field(repr=False)
    token: int | None = field(default=None, repr=False)


class Turns(Generic[Job, Result]):
    """Collects jobs and runs those of one turn of the event loop together."""

    def __init__(self, run: Callable[[Sequence[Job]], Sequence[Result]]) -> None:
        self._run = run
        self._waiting: list[tuple[Job, asyncio.Future[Result]]] = []
        self._turn: asyncio.Handle | None = None

    def submit(self, job: Job, wait: float = 0.0) -> asyncio.Future[Result]:
        """Do the job in this turn, or within `wait` seconds when others are worth waiting for."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[Result] = loop.create_future()
        self._waiting.append((job, done))
        if self._turn is not None and wait <= 0:
            self._turn.cancel()
            self._turn = None
        if self._turn is None:
            self._turn = (
                loop.call_later(wait, self._take_turn)
                if wait > 0
                else loop.call_soon(self._take_turn)
            )
        return done

    def _take_turn(self) -> None:
        self._turn = None
        taken = self._choose()
        if taken:
            self._do(taken)
        if self._waiting and self._turn is None:
            self._turn = asyncio.get_running_loop().call_soon(self._take_turn)

    def _do(self, taken: Sequence[tuple[Job, asyncio.Future[Result]]]) -> None:
        try:
            results = self._run([job for job, _ in taken])
        except (FedseaError, RuntimeError) as error:
            # RuntimeError is how torch reports what its backend cannot do, such as out of memory.
            for _, done in taken:
                if not done.done():
                    done.set_exception(error)
            return
        for (_, done), result in zip(taken, results, strict=True):
            if not done.done():
                done.set_result(result)

    def _choose(self) -> list[tuple[Job, asyncio.Future[Result]]]:
        """The smallest jobs first, up to the limit, and always one."""
        self._waiting = [entry for entry in self._waiting if not entry[1].done()]
        self._waiting.sort(key=lambda entry: entry[0].count)
        rows, taken = 0, 0
        for job, _ in self._waiting:
            rows += job.count
            if taken and rows > MAX_TURN_ROWS:
                break
            taken += 1
        chosen, self._waiting = self._waiting[:taken], self._waiting[taken:]
        return chosen


class LocalParts:
    """Bottom and top of one checkpoint with their KV pools.

    Args:
        bottom: runner of the first blocks.
        top_runner: runner of the last blocks.
        top: the last blocks with norm and head.
        adapters: what changes the blocks of bottom and top; None for nothing.
    """

    def __init__(
        self,
        bottom: SpanRunner,
        top_runner: SpanRunner,
        top: Top,
        adapters: tuple[Adapter | None, Adapter | None] = (None, None),
    ) -> None:
        self.bottom = bottom
        self.top_runner = top_runner
        self.top = top
        self._adapters = adapters
        self.lockstep = Lockstep()
        self._bottom_turns = Turns(self._run_bottom)
        self._top_turns = Turns(self._run_top)

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        partition: Partition,
        placement: Placement,
        kv_rows: int,
        compile_steps: bool = False,
        adapter: Path | None = None,
    ) -> LocalParts:
        """Load both parts; the trunk's tensors are never read.

        Args:
            checkpoint: a whole checkpoint or a client bundle.
            partition: what is ours.
            placement: device, dtype and weight format.
            kv_rows: rows of context that all requests share.
            compile_steps: compile decoding; takes a C++ compiler and up to a minute.
            adapter: folder of a LoRA adapter, of which the parts of these blocks are read.
        """
        top = load_top(checkpoint, partition.top_span(checkpoint.num_blocks), placement)
        bottom = load_bottom(checkpoint, partition.bottom_span(), placement)
        parts = cls(
            SpanRunner(bottom, kv_rows, placement),
            SpanRunner(top.span, kv_rows, placement),
            top,
            (_accepted(bottom, adapter, placement), _accepted(top.span, adapter, placement)),
        )
        if compile_steps:
            compile_decode(bottom)
            compile_decode(top.span)
        return parts

    @property
    def pools(self) -> tuple[KVPool, KVPool]:
        """Pools of bottom and top."""
        return self.bottom.pool, self.top_runner.pool

    def open(self, rows: int) -> tuple[int, int]:
        """Accounts of `rows` rows in both pools.

        Raises:
            Capacity: too many requests at once for this client's own KV memory.
        """
        bottom, top = self.pools
        first = bottom.open(rows)
        try:
            return first, top.open(rows)
        except Capacity:
            bottom.close(first)
            raise

    def close(self, accounts: tuple[int, int]) -> None:
        """Free both accounts."""
        for pool, account in zip(self.pools, accounts, strict=True):
            pool.close(account)

    async def run_bottom(self, job: BottomJob) -> Tensor:
        """Rows (n, hidden) at the first cut."""
        if self._is_alone():
            return self._run_bottom([job])[0]
        return await self._bottom_turns.submit(job)

    async def run_top(self, job: TopJob) -> TopResult:
        """Logits, and the next token when the job has a sampler."""
        if self._is_alone():
            return self._run_top([job])[0]
        return await self._top_turns.submit(job, self.lockstep.wait())

    def _is_alone(self) -> bool:
        """With one sequence in all there is nobody to share a turn with."""
        return self.bottom.pool.num_sequences == 1

    def _run_bottom(self, jobs: Sequence[BottomJob]) -> list[Tensor]:
        adapter = self._adapters[0]
        new = [NewRows(j.account, j.sequence, j.count, adapter) for j in jobs]
        batch = self.bottom.advance(new)
        rows = self.bottom.run(torch.cat([job.ids for job in jobs]), batch)
        return list(rows.split([job.count for job in jobs]))

    @torch.inference_mode()
    def _run_top(self, jobs: Sequence[TopJob]) -> list[TopResult]:
        runner = self.top_runner
        adapter = self._adapters[1]
        batch = runner.advance([NewRows(j.account, j.sequence, j.count, adapter) for j in jobs])
        entering = torch.cat([job.rows for job in jobs])
        leaving = runner.run(entering.to(runner.placement.device, runner.placement.dtype), batch)
        kept, offset = [], 0
        for job in jobs:
            offset += job.rows.shape[0]
            kept.append(leaving[offset - job.keep : offset])
        logits = self.top.logits(torch.cat(kept)) if any(job.keep for job in jobs) else leaving[:0]
        return _sampled(jobs, logits)


def _accepted(span: BlockSpan, folder: Path | None, placement: Placement) -> Adapter | None:
    """The part of an adapter that changes these blocks, if any."""
    if folder is None or not len(span.span):
        return None
    adapter = read_adapter(folder, span.span).to(placement.device).requires_grad_(False)
    span.accept(adapter)
    return adapter if adapter.factors else None


def _sampled(jobs: Sequence[TopJob], logits: Tensor) -> list[TopResult]:
    """Give each job its logits; all samplers draw from their last rows at once."""
    parts = logits.split([job.keep for job in jobs])
    drawing = [index for index, job in enumerate(jobs) if job.sampler is not None]
    tokens: dict[int, int] = {}
    if drawing:
        last = torch.cat([parts[index][-1:] for index in drawing])
        samplers = [job.sampler for job in jobs if job.sampler is not None]
        tokens = dict(zip(drawing, sample_batch(samplers, last), strict=True))
    return [TopResult(part, tokens.get(index)) for index, part in enumerate(parts)]
