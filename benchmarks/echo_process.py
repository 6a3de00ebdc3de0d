"""A server that reads weights and sends every message back, with the seconds that it read."""

from __future__ import annotations

import asyncio
import signal
import struct
import sys
from pathlib import Path

import torch

from benchmarks.cases.floors import read, weights
from benchmarks.settings import THREADS
from fedsea.transport.base import Handler, Peer, ServerStream
from fedsea.transport.credentials import ServerTLS
from fedsea.transport.grpc_server import GrpcServer


class _Echo(Handler):
    def __init__(self, numbers: int) -> None:
        self._matrix = weights(numbers)

    async def describe(self, peer: Peer) -> bytes:  # noqa: ARG002 - the handler's interface
        return b""

    async def session(self, peer: Peer, stream: ServerStream) -> None:  # noqa: ARG002
        while (data := await stream.receive()) is not None:
            await stream.send(struct.pack("<d", read(self._matrix)) + data[8:])


async def _main(host: str, certificates: Path, numbers: int) -> None:
    tls = ServerTLS(
        certificates / "ca.pem", certificates / "server.pem", certificates / "server.key"
    )
    server = GrpcServer(_Echo(numbers), f"{host}:0", tls)
    print(await server.start(), flush=True)
    over = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, over.set)
    await over.wait()
    await server.stop()


if __name__ == "__main__":
    torch.set_num_threads(THREADS)
    asyncio.run(_main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])))
