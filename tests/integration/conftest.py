"""Server processes over mutual TLS, a proxy that breaks connections, and clients of both."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.ports import free_port

from fedsea.client.background import Background
from fedsea.client.link import Patience
from fedsea.client.llm import LLM
from fedsea.transport.credentials import ClientTLS

READY_SECONDS = 60.0


class ServerProcess:
    """`fedsea serve` as a process of its own, from its ready line to its end."""

    def __init__(self, model: Path, certificates: Path, log: Path, *options: str) -> None:
        self.metrics = f"127.0.0.1:{free_port()}"
        self._log = log.open("wb")
        command = [sys.executable, "-m", "fedsea", "serve", str(model), "--threads", "1"]
        command += ["--certs", str(certificates), "--metrics", self.metrics, *options]
        if "--address" not in options:
            command += ["--address", "127.0.0.1:0"]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )
        self.log_file = log
        self._address: str | None = None

    @property
    def address(self) -> str:
        """Where it listens; waits until it does."""
        if self._address is None:
            assert self.process.stdout is not None
            timer = threading.Timer(READY_SECONDS, self.process.kill)
            timer.start()
            line = self.process.stdout.readline()
            timer.cancel()
            assert " at " in line, self.log_file.read_text()
            self._address = line.rsplit(" at ", 1)[1].strip()
        return self._address

    def kill(self) -> None:
        """kill -9, and wait until it is gone."""
        self.process.kill()
        self.process.wait(10)

    def send(self, number: signal.Signals) -> None:
        """Send a signal."""
        self.process.send_signal(number)

    def metric(self, name: str) -> float:
        """One number of its metrics."""
        with urllib.request.urlopen(f"http://{self.metrics}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))

    def close(self) -> None:
        """End the process, however it is."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)
        assert self.process.stdout is not None
        self.process.stdout.close()
        self._log.close()


Start = Callable[..., ServerProcess]


@contextlib.contextmanager
def processes(model: Path, certificates: Path, logs: Path) -> Iterator[Start]:
    """A function that starts servers, all of which end with the block."""
    started: list[ServerProcess] = []

    def start(*options: str) -> ServerProcess:
        log = logs / f"server-{len(started)}.log"
        started.append(ServerProcess(model, certificates, log, *options))
        return started[-1]

    try:
        yield start
    finally:
        for server in started:
            server.close()


@pytest.fixture
def start_server(tiny_model: Path, certificates: Path, tmp_path: Path) -> Iterator[Start]:
    """Start servers of the tiny model that end with the test."""
    with processes(tiny_model, certificates, tmp_path) as start:
        yield start


@pytest.fixture(scope="session")
def shared_server(
    tiny_model: Path, certificates: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    """A server that many tests use and none harms; globex has small quotas."""
    logs = tmp_path_factory.mktemp("logs")
    config = logs / "server.toml"
    config.write_text("[quotas.tenants.globex]\nsessions = 2\nkv_rows = 512\n")
    with processes(tiny_model, certificates, logs) as start:
        server = start("--config", str(config), "--kv-rows", "4096", "--set", "kv.page_rows=8")
        assert server.address
        yield server


def tls_of(certificates: Path, tenant: str) -> ClientTLS:
    """The files of a tenant."""
    return ClientTLS(
        certificates / "ca.pem",
        certificates / f"client-{tenant}.pem",
        certificates / f"client-{tenant}.key",
    )


class Clients:
    """Makes clients of the tiny model; `notices` are the lines that they told."""

    def __init__(self, model: Path, certificates: Path) -> None:
        self._model = model
        self._certificates = certificates
        self._made: list[LLM] = []
        self.notices: list[str] = []

    def connect(self, *addresses: str, tenant: str = "acme", **options: Any) -> LLM:
        """A client of servers at some addresses, or over the channels of `servers`."""
        options.setdefault("patience", Patience(open=60.0, recover=60.0, answer=30.0))
        options.setdefault("tls", tls_of(self._certificates, tenant))
        servers = options.pop("servers", addresses)
        llm = LLM.connect(self._model, servers, on_notice=self.notices.append, **options)
        self._made.append(llm)
        return llm

    def close(self) -> None:
        """Close all of them."""
        for llm in self._made:
            llm.close()


@pytest.fixture
def clients(tiny_model: Path, certificates: Path) -> Iterator[Clients]:
    """Clients that are closed with the test."""
    made = Clients(tiny_model, certificates)
    yield made
    made.close()


class Proxy:
    """Forwards TCP connections to a server; breaks the first one after so many bytes downward.

    `address` is where it listens. `throttle` delays every piece of that direction by so many
    seconds.
    """

    def __init__(self, target: str, cut_after: int | None = None, throttle: float = 0.0) -> None:
        host, _, port = target.rpartition(":")
        self._target = host, int(port)
        self._left = cut_after
        self._throttle = throttle
        self.cuts = 0
        self._background = Background("proxy")
        self._server = self._background.run(self._start())
        port_here = self._server.sockets[0].getsockname()[1]
        self.address = f"127.0.0.1:{port_here}"

    def close(self) -> None:
        """Stop; open connections break."""
        self._background.stop(self._stop())

    async def _start(self) -> asyncio.Server:
        return await asyncio.start_server(self._serve, "127.0.0.1", 0)

    async def _stop(self) -> None:
        self._server.close()

    async def _serve(self, near: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far, far_writer = await asyncio.open_connection(*self._target)
        pumps = [
            asyncio.create_task(self._pump(near, far_writer, counted=False)),
            asyncio.create_task(self._pump(far, writer, counted=True)),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            for side in (writer, far_writer):
                side.transport.abort()
            await asyncio.gather(*pumps, return_exceptions=True)

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, counted: bool
    ) -> None:
        while data := await reader.read(65536):
            if counted:
                if self._throttle:
                    await asyncio.sleep(self._throttle)
                if self._left is not None:
                    data, cut = data[: self._left], len(data) >= self._left
                    self._left -= len(data)
                    if cut:
                        self._left = None
                        self.cuts += 1
                        writer.write(data)
                        await writer.drain()
                        return
            writer.write(data)
            await writer.drain()


@pytest.fixture
def make_proxy() -> Iterator[Callable[..., Proxy]]:
    """Proxies that end with the test."""
    made: list[Proxy] = []

    def make(target: str, **options: Any) -> Proxy:
        made.append(Proxy(target, **options))
        return made[-1]

    yield make
    for proxy in made:
        proxy.close()
