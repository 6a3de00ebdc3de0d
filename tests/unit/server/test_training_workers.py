"""Workers and lines: order within a line, lines beside each other, and what is forgotten."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from contextlib import asynccontextmanager

import pytest
import torch

from fedsea.model.checkpoint import Checkpoint
from fedsea.model.partition import Span
from fedsea.model.spans import Placement, load_trunk
from fedsea.server.training_workers import NICENESS, Line, Workers


def run(dialogue, seconds=30):
    """Run a dialogue; a hang is a failure."""
    return asyncio.run(asyncio.wait_for(dialogue, seconds))


@pytest.fixture
def working(checkpoint_folder):
    """An async context manager of two workers."""
    blocks = load_trunk(Checkpoint.open(checkpoint_folder), Span(1, 3), Placement())

    @asynccontextmanager
    async def start(count=2):
        workers = Workers(blocks, count, threads=1)
        yield workers
        await workers.stop()

    return start


def test_a_line_keeps_its_order(working):
    """Jobs, and what runs on the loop between them, come one after another."""
    seen: list[int | str] = []

    async def dialogue():
        async with working() as workers:
            line = Line(workers)
            line.put(lambda _: seen.append(1))
            line.put_on_loop(lambda: seen.append("loop"))
            last = line.put(lambda _: seen.append(2))
            await last
            await line.idle()
            assert seen == [1, "loop", 2]

    run(dialogue())


def test_lines_run_beside_each_other(working):
    """Two jobs of two lines meet; each has its own copy of what a step says about itself."""
    barrier = threading.Barrier(2, timeout=20)

    def meet(worker):
        barrier.wait()
        return worker.blocks.context, torch.get_num_threads()

    async def dialogue():
        async with working() as workers:
            found = await asyncio.gather(Line(workers).put(meet), Line(workers).put(meet))
            assert found[0][0] is not found[1][0]
            assert [threads for _, threads in found] == [1, 1]

    run(dialogue())


def test_a_cancelled_job_is_not_begun(working):
    """What nobody waits for is skipped, and what follows runs."""
    gate, seen = threading.Event(), list[int]()

    async def dialogue():
        async with working(1) as workers:
            line = Line(workers)
            first = line.put(lambda _: gate.wait(20))
            second = line.put(lambda _: seen.append(2))
            third = line.put(lambda _: seen.append(3))
            second.cancel()
            gate.set()
            await asyncio.gather(first, third)
            assert seen == [3]

    run(dialogue())


def test_a_held_line_waits(working):
    """Nothing begins until it is released, which may be said twice."""
    seen: list[int] = []

    async def dialogue():
        async with working(1) as workers:
            line = Line(workers)
            line.hold()
            waiting = line.put(lambda _: seen.append(1))
            await Line(workers).put(lambda _: None)
            assert not seen
            line.release()
            line.release()
            await waiting
            assert seen == [1]

    run(dialogue())


def test_an_error_is_the_jobs_own(working):
    """It reaches whoever waits, and the line goes on."""

    def fail(_):
        raise ValueError("wrong")

    async def dialogue():
        async with working(1) as workers:
            line = Line(workers)
            with pytest.raises(ValueError, match="wrong"):
                await line.put(fail)
            assert await line.put(lambda _: 5) == 5

    run(dialogue())


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no priorities of their own here")
def test_workers_go_behind_the_engine(working):
    """Their threads have a lower priority than the thread of the process that decodes."""

    def niceness(_):
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    async def dialogue():
        ours = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
        async with working(1) as workers:
            assert await Line(workers).put(niceness) == NICENESS >= ours
        assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == ours

    run(dialogue())
