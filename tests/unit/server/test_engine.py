"""The engine computes what the blocks compute, however sessions and chunks are mixed."""

from __future__ import annotations

import asyncio


def test_smoke(serving, connect, rows):
    """A session gets rows back."""

    async def dialogue():
        async with serving() as service:
            client = await connect(service)
            await client.begin()
            out = await client.run(rows(5))
            one = await client.run(rows(1, 3))
            await client.close()
            return out, one

    out, one = asyncio.run(dialogue())
    assert out.shape == (5, 32)
    assert one.shape == (1, 32)
