"""Deadlines: once, unless stopped."""

from __future__ import annotations

import asyncio

from fedsea.server.timers import Deadline


def test_a_deadline_expires_once_and_can_be_started_again():
    """Starting one that runs changes nothing; stopping is safe to repeat."""
    seen: list[int] = []

    async def dialogue():
        expired = asyncio.Event()

        def expire():
            seen.append(1)
            expired.set()

        deadline = Deadline(expire)
        deadline.start(0)
        deadline.start(60)
        await expired.wait()
        expired.clear()
        deadline.start(60)
        deadline.stop()
        deadline.stop()
        deadline.start(0)
        await expired.wait()

    asyncio.run(asyncio.wait_for(dialogue(), 10))
    assert seen == [1, 1]
