"""Work that belongs together: results in order, and nothing left running after an error."""

from __future__ import annotations

import asyncio

import pytest

from fedsea.client.together import together
from fedsea.errors import ModelError


def test_results_come_in_order():
    """Whoever finishes first, the results stand where their work stood."""

    async def work():
        first_may_end = asyncio.Event()

        async def first():
            await first_may_end.wait()
            return 1

        async def second():
            first_may_end.set()
            return 2

        return await together([first(), second()])

    assert asyncio.run(work()) == [1, 2]


def test_after_an_error_the_others_are_over():
    """When the error is raised, the rest has been cancelled and has cleaned up."""
    cleaned = []

    async def work():
        async def fail():
            raise ModelError("the logits are not finite: use float32")

        async def wait():
            try:
                await asyncio.Event().wait()
            finally:
                await asyncio.sleep(0)
                cleaned.append(True)

        with pytest.raises(ModelError):
            await together([wait(), fail(), wait()])

    asyncio.run(work())
    assert cleaned == [True, True]


def test_nothing_to_do():
    """No work has no results."""
    assert asyncio.run(together([])) == []
