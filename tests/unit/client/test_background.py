"""The loop in a thread: results, errors, cancellation and the end of the loop."""

from __future__ import annotations

import asyncio
import threading

import pytest

from fedsea.client.background import Background
from fedsea.errors import RequestError


@pytest.fixture
def background():
    """A loop of its own, stopped afterwards."""
    made = Background("test-loop")
    yield made
    made.stop()


def test_work_runs_in_its_own_thread(background):
    """Callers of any thread share one loop that is not theirs."""

    async def name():
        return threading.current_thread().name

    assert background.run(name()) == "test-loop"


def test_an_error_reaches_the_caller(background):
    """What the work raises, `result` raises."""

    async def fail():
        raise RequestError("the prompt is empty; give one")

    with pytest.raises(RequestError, match="the prompt is empty"):
        background.run(fail())


def test_pending_work_can_be_awaited_in_another_loop(background):
    """One object serves synchronous callers and every event loop."""

    async def seven():
        return 7

    async def caller():
        return await background.start(seven())

    assert asyncio.run(caller()) == 7
    pending = background.start(seven())
    assert pending.result(5) == 7
    assert pending.done()


def test_work_cancelled_at_once_still_begins_and_cleans_up(background):
    """Work that nobody wants any more gets to its own clean-up, however early that was said."""
    gate = threading.Event()
    cleaned = threading.Event()

    async def hold():
        gate.wait(5)

    async def work():
        try:
            await asyncio.Event().wait()
        finally:
            cleaned.set()

    holding = background.start(hold())
    pending = background.start(work())
    pending.cancel()
    gate.set()
    holding.result(5)
    assert cleaned.wait(5)


def test_stopping_cancels_what_runs(background):
    """Work under way ends with the loop, and its clean-up runs."""
    started, cleaned = threading.Event(), threading.Event()

    async def work():
        try:
            started.set()
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            cleaned.set()

    background.start(work())
    assert started.wait(5)
    background.stop()
    assert cleaned.is_set()


def test_stopping_twice_is_harmless(background):
    """A second stop finds nothing to do."""
    background.stop()
    background.stop()


def test_work_after_the_end_is_refused_by_name(background):
    """Nothing is left hanging on a loop that runs no more."""
    background.stop()

    async def work():
        return 1

    with pytest.raises(RequestError, match="closed"):
        background.run(work())
