"""A network in a process: a TCP proxy on loopback with delay and bandwidth in both directions.

    python -m benchmarks.shaping HOST:PORT ONE_WAY_MS MBIT_PER_S

Bytes leave a direction in order, no faster than its bandwidth, and arrive its delay later. Nothing
is lost. The timers of the event loop are late by up to a millisecond, which adds to the delay.
"""

from __future__ import annotations

import asyncio
import sys
from contextlib import suppress
from dataclasses import dataclass

from benchmarks.settings import HOST

_READ_BYTES = 16 * 1024
# A queue in front of the link holds this many seconds of traffic; then the sender has to wait.
_QUEUE_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class Link:
    """One-way delay in seconds, and bytes per second in each direction."""

    delay: float
    rate: float


class Schedule:
    """When bytes that enter one direction of a link leave it."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._free_at = 0.0

    def arrival(self, size: int, now: float) -> float:
        """When `size` bytes that enter now are all at the other end."""
        self._free_at = max(self._free_at, now) + size / self._link.rate
        return self._free_at + self._link.delay

    def backlog(self, now: float) -> float:
        """Seconds that the link needs for what has entered."""
        return max(0.0, self._free_at - now)


async def serve(host: str, port: int, link: Link) -> None:
    """Forward connections to host:port until the process is ended; writes its own address."""

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(host, port)
        await asyncio.gather(
            _forward(reader, far_writer, Schedule(link)),
            _forward(far_reader, writer, Schedule(link)),
        )

    server = await asyncio.start_server(accept, HOST, 0)
    print(f"{HOST}:{server.sockets[0].getsockname()[1]}", flush=True)
    await server.serve_forever()


async def _forward(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, schedule: Schedule
) -> None:
    loop = asyncio.get_running_loop()
    travelling: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

    async def deliver() -> None:
        while True:
            arrival, data = await travelling.get()
            await asyncio.sleep(arrival - loop.time())
            if not data:
                break
            writer.write(data)
            await writer.drain()
        writer.close()

    delivery = asyncio.create_task(deliver())
    with suppress(ConnectionError):
        while data := await reader.read(_READ_BYTES):
            travelling.put_nowait((schedule.arrival(len(data), loop.time()), data))
            await asyncio.sleep(max(0.0, schedule.backlog(loop.time()) - _QUEUE_SECONDS))
    travelling.put_nowait((schedule.arrival(0, loop.time()), b""))
    with suppress(ConnectionError):
        await delivery


def _main(target: str, delay_ms: str, megabits: str) -> None:
    host, _, port = target.rpartition(":")
    link = Link(float(delay_ms) / 1e3, float(megabits) * 1e6 / 8)
    asyncio.run(serve(host, int(port), link))


if __name__ == "__main__":
    _main(*sys.argv[1:4])
