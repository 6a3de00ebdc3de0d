"""A server process: loads the trunk, listens, says when it is ready, and stops in order."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from fedsea.errors import ConfigError
from fedsea.server.attestation import TokenCommand
from fedsea.server.config import SecuritySection, ServerConfig
from fedsea.server.logs import configure, get_logger
from fedsea.server.metrics import MetricsServer
from fedsea.server.service import SHORT_FINGERPRINT, TrunkService
from fedsea.transport.address import Address
from fedsea.transport.credentials import (
    Plaintext,
    ServerTLS,
    key_fingerprint_of,
    parse_certificates,
    read,
)
from fedsea.transport.grpc_server import GrpcServer, ServerOptions
from fedsea.transport.tokens import load_tokens

# Streams beyond the session table, so that a full table is explained and not just refused.
SPARE_STREAMS = 64

EXIT_STOPPED = 0
EXIT_FAILED = 1

_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class RunningServer:
    """A server that listens at `address`; `metrics_address` is None when nobody may read them."""

    service: TrunkService
    server: GrpcServer
    address: Address
    metrics_address: Address | None

    async def drain(self, grace: float) -> None:
        """Take no new sessions, let the open ones finish for `grace` seconds, then stop."""
        self.service.drain()
        await self.server.drain(grace)


@asynccontextmanager
async def running(config: ServerConfig) -> AsyncIterator[RunningServer]:
    """Serve over gRPC for as long as the block runs.

    Raises:
        ConfigError, SecurityError, ModelError, BindError: the server cannot start.
    """
    async with _serving(config, TrunkService.load(config)) as server:
        yield server


def serve(config: ServerConfig, announce: Callable[[str], None] | None = None) -> int:
    """Serve until SIGTERM or SIGINT, then drain; a second signal stops at once.

    `announce` gets one line when the server is ready; the default prints it.

    Returns:
        The exit code: 0 after a signal, 1 when the engine has failed.

    Raises:
        ConfigError, SecurityError, ModelError, BindError: the server cannot start.
    """
    configure(config.log)
    # Outside of the event loop, where an interruption from the keyboard is heard at once.
    service = TrunkService.load(config)
    return asyncio.run(_run(config, service, announce or _print_line))


async def _run(config: ServerConfig, service: TrunkService, announce: Callable[[str], None]) -> int:
    signals = _Signals()
    async with _serving(config, service) as server:
        announce(ready_line(server))
        stopped = server.service.engine.stopped
        await _first_of(signals.first.wait(), stopped.wait())
        if stopped.is_set():
            return EXIT_FAILED
        _log.info("draining", sessions=server.service.num_sessions)
        await _first_of(server.drain(config.server.drain_grace_s), signals.second.wait())
        _log.info("stopped")
    return EXIT_STOPPED


async def _first_of(*waits: Coroutine[Any, Any, object]) -> None:
    """Wait for whichever ends first and cancel the others."""
    tasks = [asyncio.create_task(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@asynccontextmanager
async def _serving(config: ServerConfig, service: TrunkService) -> AsyncIterator[RunningServer]:
    metrics = (
        None
        if config.metrics.address is None
        else MetricsServer(service.metrics, config.metrics.address)
    )
    try:
        server = _grpc_server(config, service)
        async with service:
            address = await server.start()
            try:
                yield RunningServer(
                    service, server, address, None if metrics is None else metrics.address
                )
            finally:
                await server.stop()
    finally:
        if metrics is not None:
            metrics.close()


def _grpc_server(config: ServerConfig, service: TrunkService) -> GrpcServer:
    tokens = config.security.tokens
    return GrpcServer(
        service,
        config.server.address,
        _credentials(config.security),
        tokens=None if tokens is None else load_tokens(tokens),
        attester=_attester(config),
        options=ServerOptions(
            max_message_bytes=service.limits.max_message_bytes,
            max_streams=config.server.max_sessions + SPARE_STREAMS,
        ),
    )


def _attester(config: ServerConfig) -> TokenCommand | None:
    if not config.attestation.command:
        return None
    return TokenCommand(config.attestation, _key_sha256(config))


def _key_sha256(config: ServerConfig) -> str:
    """The TLS key that clients see."""
    named, path = config.attestation.key_sha256, config.security.certificate
    if named is not None:
        return named
    if path is None:
        raise ConfigError(
            "attestation.command needs a TLS key to attest: configure certificates, "
            "or name the key in attestation.key_sha256"
        )
    return key_fingerprint_of(parse_certificates(read(path, "server certificate"), path)[0])


def _credentials(section: SecuritySection) -> ServerTLS | Plaintext:
    if section.plaintext:
        return Plaintext(allow_insecure=True)
    if section.ca is None or section.certificate is None or section.key is None:
        raise ConfigError(
            "security names no certificates; make some with `fedsea certs init` and "
            "`fedsea certs server` and give --certs, or set security.plaintext on a loopback address"
        )
    return ServerTLS(section.ca, section.certificate, section.key)


def ready_line(server: RunningServer) -> str:
    """One line that says what is served where."""
    about = server.service.description
    kind = f"{about.dtype} {about.quantization}".strip()
    return (
        f"serving blocks {about.first_block}:{about.end_block} of {about.model} ({kind}, "
        f"{about.fingerprint[:SHORT_FINGERPRINT]}) at {server.address}"
    )


class _Signals:
    """SIGTERM and SIGINT as events of the running loop."""

    def __init__(self) -> None:
        self.first = asyncio.Event()
        self.second = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._arrived)

    def _arrived(self) -> None:
        (self.second if self.first.is_set() else self.first).set()


def _print_line(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
