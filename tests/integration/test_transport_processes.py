"""The gRPC transport between real processes: servers that die, stall or start badly."""

from __future__ import annotations

import asyncio
import os
import signal
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from fedsea.errors import ConnectionLost, Unreachable
from fedsea.transport.certificates import init_ca, issue_client, issue_server
from fedsea.transport.credentials import ClientTLS
from fedsea.transport.grpc_client import ClientOptions, GrpcChannel
from fedsea.transport.runtime import CIPHER_VARIABLE

pytestmark = pytest.mark.anyio

SERVER = """
import asyncio, sys
{first}
from pathlib import Path
from fedsea.errors import SecurityError
from fedsea.transport.credentials import ServerTLS
from fedsea.transport.grpc_server import GrpcServer

class Echo:
    async def describe(self, peer):
        return peer.tenant.encode()

    async def session(self, peer, stream):
        while (data := await stream.receive()) is not None:
            await stream.send(data)

async def main():
    ca = Path(sys.argv[1])
    tls = ServerTLS(ca / "ca.pem", ca / "server.pem", ca / "server.key")
    try:
        address = await GrpcServer(Echo(), sys.argv[2], tls).start()
    except SecurityError as error:
        print(error, flush=True)
        return
    print(address, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""

LATE_CLIENT = """
import grpc
import asyncio, sys
from pathlib import Path
from fedsea.errors import FedseaError
from fedsea.transport.credentials import ClientTLS
from fedsea.transport.grpc_client import GrpcChannel

async def main():
    ca = Path(sys.argv[1])
    tls = ClientTLS(ca / "ca.pem", ca / "client-acme.pem", ca / "client-acme.key")
    async with GrpcChannel(sys.argv[2], tls) as channel:
        try:
            print((await channel.describe()).decode())
        except FedseaError as error:
            print(f"{type(error).__name__}: {error}")

asyncio.run(main())
"""

Start = Callable[..., tuple["subprocess.Popen[str]", str]]


@pytest.fixture
def anyio_backend() -> str:
    """Our transports are written for asyncio."""
    return "asyncio"


@pytest.fixture
def authority(tmp_path: Path) -> Path:
    """A CA with certificates for one server and one tenant."""
    init_ca(tmp_path)
    issue_server(tmp_path, ["127.0.0.1"])
    issue_client(tmp_path, "acme")
    return tmp_path


@pytest.fixture
def client_tls(authority: Path) -> ClientTLS:
    """The tenant's files."""
    return ClientTLS(
        authority / "ca.pem", authority / "client-acme.pem", authority / "client-acme.key"
    )


def clean_environment() -> dict[str, str]:
    """This environment without the setting that importing the transport made."""
    return {name: value for name, value in os.environ.items() if name != CIPHER_VARIABLE}


@pytest.fixture
def start(authority: Path) -> Iterator[Start]:
    """Start server processes; returns the process and the first line that it prints."""
    processes = []

    def started(address="127.0.0.1:0", first="") -> tuple[subprocess.Popen[str], str]:
        process = subprocess.Popen(
            [sys.executable, "-c", SERVER.format(first=first), str(authority), address],
            stdout=subprocess.PIPE,
            text=True,
            env=clean_environment(),
        )
        processes.append(process)
        assert process.stdout is not None
        return process, process.stdout.readline().strip()

    yield started
    for process in processes:
        process.kill()
        process.wait(10)
        assert process.stdout is not None
        process.stdout.close()


@pytest.fixture
async def tls12_server(authority: Path) -> AsyncIterator[str]:
    """The address of a server that accepts TLS 1.2."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(authority / "server.pem", authority / "server.key")
    async with await asyncio.start_server(
        lambda _, writer: writer.close(), "127.0.0.1", 0, ssl=context
    ) as server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def the_loss_is_noticed(channel: GrpcChannel) -> None:
    """Ask until gRPC knows that its connection is gone, and raise what it says then."""
    while True:
        with suppress(ConnectionLost):
            await channel.describe()


async def test_a_killed_server_and_its_successor(start, client_tls):
    """kill -9 in mid-stream is a lost connection at once; the successor is reached as soon."""
    process, address = start()
    async with GrpcChannel(address, client_tls) as channel:
        stream = await channel.open_stream()
        await stream.send(b"hello")
        assert await stream.receive() == b"hello"
        waiting = asyncio.create_task(stream.receive())
        await asyncio.sleep(0)
        process.kill()
        process.wait(10)
        with pytest.raises(ConnectionLost):
            await asyncio.wait_for(waiting, 2)
        with pytest.raises(Unreachable, match="is the server running"):
            await the_loss_is_noticed(channel)
        with pytest.raises(Unreachable, match="is the server running"):
            await channel.open_stream()
        await asyncio.to_thread(start, address)
        stream = await channel.open_stream()
        await stream.send(b"again")
        assert await stream.receive() == b"again"


async def test_a_stalled_server_is_noticed(start, client_tls):
    """A server that stops answering altogether is a lost connection after the probe's time."""
    process, address = start()
    options = ClientOptions(keepalive=5, keepalive_timeout=1)
    async with GrpcChannel(address, client_tls, options=options) as channel:
        stream = await channel.open_stream()
        await stream.send(b"hello")
        assert await stream.receive() == b"hello"
        process.send_signal(signal.SIGSTOP)
        with pytest.raises(ConnectionLost):
            await asyncio.wait_for(stream.receive(), 15)


async def test_a_server_that_would_accept_tls_1_2_does_not_start(start):
    """When gRPC was imported before us, a server finds out and refuses, saying what to do."""
    _, printed = start(first="import grpc")
    assert printed == (
        "gRPC was imported before fedsea and accepts TLS 1.2: import fedsea.transport first"
    )


async def run_late_client(authority: Path, address: str) -> str:
    """What a client prints that imported gRPC before us."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        LATE_CLIENT,
        str(authority),
        address,
        stdout=asyncio.subprocess.PIPE,
        env=clean_environment(),
    )
    output, _ = await process.communicate()
    return output.decode().strip()


async def test_a_late_client_insists_on_a_strict_server(start, authority, tls12_server):
    """Such a client talks to a server that refuses TLS 1.2 and to no other."""
    _, address = start()
    assert await run_late_client(authority, address) == "acme"
    refusal = await run_late_client(authority, tls12_server)
    assert refusal.startswith(f"SecurityError: {tls12_server} accepts TLS 1.2")
