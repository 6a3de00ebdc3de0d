"""Threads that compute for training, beside the engine and behind it.

Each worker has a replica of the span: the weights are shared, what a step says about itself is not.
Decoding goes first, for workers run at a lower priority where the system has priorities of threads.
The jobs of one `Line` run one after another, whichever workers they run on, so that a run's results
do not depend on how many workers there are.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import threading
from collections import deque
from collections.abc import Callable
from concurrent import futures
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, TypeVar
from weakref import WeakSet

import torch

from fedsea.model.lora import Adapter
from fedsea.model.spans import BlockSpan

NICENESS = 10
"""How far below the engine a worker runs, in the steps of `nice`."""

_T = TypeVar("_T")


@dataclass(slots=True, eq=False)
class Worker:
    """What one thread computes with."""

    blocks: BlockSpan
    _accepted: WeakSet[Adapter] = field(default_factory=WeakSet)

    def accept(self, adapter: Adapter) -> None:
        """Make the blocks ready for an adapter, once.

        Raises:
            ConfigError: it does not fit the blocks.
        """
        if adapter not in self._accepted:
            self.blocks.accept(adapter)
            self._accepted.add(adapter)


Job = Callable[[Worker], _T]


class Workers:
    """A fixed number of workers.

    Args:
        blocks: what they replicate.
        count: how many.
        threads: torch's threads for one operation in each; 0 for torch's own number.
    """

    def __init__(self, blocks: BlockSpan, count: int, threads: int) -> None:
        self._threads = threads
        self._local = threading.local()
        self._replicas: SimpleQueue[BlockSpan] = SimpleQueue()
        for _ in range(count):
            self._replicas.put(blocks.replica())
        self._executor = futures.ThreadPoolExecutor(count, "training", self._begin)

    def submit(self, job: Job[_T]) -> futures.Future[_T]:
        """Run a job on the next worker that is free."""
        return self._executor.submit(lambda: job(self._local.worker))

    async def stop(self) -> None:
        """End the threads behind the jobs that are running."""
        await asyncio.to_thread(self._executor.shutdown, wait=True, cancel_futures=True)

    def _begin(self) -> None:
        self._local.worker = Worker(self._replicas.get())
        if self._threads:
            torch.set_num_threads(self._threads)
        if sys.platform == "linux":  # elsewhere a priority belongs to the whole process
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)


@dataclass(frozen=True, slots=True)
class _Waiting:
    job: Callable[[Any], Any]
    answer: asyncio.Future[Any]
    on_loop: bool


class Line:
    """Jobs one after another, in the order in which they were put; to be used on the loop only."""

    def __init__(self, workers: Workers) -> None:
        self._workers = workers
        self._waiting: deque[_Waiting] = deque()
        self._running = False
        self._is_held = False
        self._loop = asyncio.get_running_loop()

    def put(self, job: Job[_T]) -> asyncio.Future[_T]:
        """Run a job on a worker behind those that were put before.

        Cancelling the answer forgets a job that has not begun.
        """
        return self._put(job, on_loop=False)

    def put_on_loop(self, job: Callable[[], _T]) -> asyncio.Future[_T]:
        """Run something short on the event loop in its place in the line; at once when idle."""
        return self._put(lambda _: job(), on_loop=True)

    def hold(self) -> None:
        """Begin nothing more, until `release`."""
        self._is_held = True

    def release(self) -> None:
        """Go on; safe to repeat."""
        self._is_held = False
        self._advance()

    async def idle(self) -> None:
        """Wait until everything that was put has ended."""
        await self.put_on_loop(lambda: None)

    def _put(self, job: Callable[[Any], _T], *, on_loop: bool) -> asyncio.Future[_T]:
        answer: asyncio.Future[_T] = self._loop.create_future()
        self._waiting.append(_Waiting(job, answer, on_loop))
        self._advance()
        return answer

    def _advance(self) -> None:
        while self._waiting and not (self._running or self._is_held):
            item = self._waiting.popleft()
            if item.answer.cancelled():
                continue
            if item.on_loop:
                try:
                    item.answer.set_result(item.job(None))
                except Exception as error:  # noqa: BLE001 - those behind it have their turn all the same
                    item.answer.set_exception(error)
                continue
            self._running = True
            begun = self._workers.submit(item.job)
            begun.add_done_callback(
                lambda done, answer=item.answer: self._loop.call_soon_threadsafe(  # type: ignore[misc]
                    self._finish, done, answer
                )
            )

    def _finish(self, done: futures.Future[Any], answer: asyncio.Future[Any]) -> None:
        self._running = False
        if not answer.cancelled():
            error = None if done.cancelled() else done.exception()
            if done.cancelled():
                answer.cancel()
            elif error is not None:
                answer.set_exception(error)
            else:
                answer.set_result(done.result())
        self._advance()
