"""Mutual TLS around Flower, which knows none: a gate at the aggregator, a tunnel at each client.

Flower's SuperLink takes runs, with their code, from whoever reaches its port. Here it listens on
loopback only. The *gate* listens on the given address, lets in certificates of named clients
(TLS 1.3), and passes on requests to Flower's fleet interface, which is what a SuperNode needs, and
to nothing else, and those only in the name of the client's own nodes. The *tunnel* gives a SuperNode
a port of loopback that leads to the gate.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import ssl
import threading
import time
from collections.abc import Awaitable, Callable, Collection
from typing import Final

from cryptography import x509

from fedsea.client.background import Background
from fedsea.errors import BindError, Unauthenticated
from fedsea.federated.nodes import Nodes
from fedsea.transport.address import Address
from fedsea.transport.credentials import (
    ClientTLS,
    ServerTLS,
    load_client,
    load_server,
    tenant_of,
)

LOOPBACK: Final = "127.0.0.1"

_HEAD_BYTES: Final = 1 << 15
# Flower sends arrays in pieces of 5 MiB.
_BODY_BYTES: Final = 1 << 26
_CHUNK: Final = 1 << 16
_HANDSHAKE_S: Final = 10.0
_TURNS: Final = 5
_REQUEST: Final = re.compile(rb"POST (/v1/fleet/[a-z-]+) HTTP/1\.1")
_HEADER: Final = re.compile(rb"([A-Za-z0-9!#$%&'*+.^_`|~-]+):[ \t]*([^\r\n]*)")
_REFUSED: Final = b"HTTP/1.1 403 Forbidden\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"

_log = logging.getLogger(__name__)


class Gate:
    """Listens for clients until it is closed.

    Args:
        address: where; port 0 takes a free one.
        tls: certificate of the aggregator, and the CA that signs clients.
        clients: names that may come in.
        link: port of the SuperLink on loopback.
        nodes: whose the nodes are.

    Raises:
        BindError: the address cannot be listened on.
        CertificateError: a file of `tls` cannot be used.

    Attributes:
        address: where it listens.
    """

    def __init__(
        self,
        address: Address,
        tls: ServerTLS,
        clients: Collection[str],
        link: int,
        nodes: Nodes,
    ) -> None:
        self._clients = frozenset(clients)
        self._link = link
        self._nodes = nodes
        load_server(tls)
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(tls.ca))
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_cert_chain(tls.certificate, tls.key)
        self._background = Background("federation-gate")
        self._server = self._background.run(_listening(self._serve, address, context))
        self.address = Address(address.host, self._server.sockets[0].getsockname()[1])

    def close(self) -> None:
        """Stop; open connections end."""
        self._background.stop(_closed(self._server))

    async def _serve(self, near: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
        # Cancelled when the gate is closed.
        ends = (OSError, ssl.SSLError, asyncio.IncompleteReadError, asyncio.CancelledError)
        with contextlib.suppress(*ends):
            try:
                name = self._name(back)
                if name is None or name not in self._clients:
                    _log.warning("a certificate of %s was shown, which takes no part", name)
                    return
                await self._pass_on(name, near, back)
            finally:
                back.close()

    def _name(self, back: asyncio.StreamWriter) -> str | None:
        shown = back.get_extra_info("ssl_object").getpeercert(binary_form=True)
        try:
            return tenant_of(x509.load_der_x509_certificate(shown)) if shown else None
        except (Unauthenticated, ValueError):
            return None

    async def _pass_on(
        self, name: str, near: asyncio.StreamReader, back: asyncio.StreamWriter
    ) -> None:
        far, forth = await asyncio.open_connection(LOOPBACK, self._link)
        answers = asyncio.create_task(_pump(far, back))
        try:
            while (head := await _head(near)) is not None:
                length = body_length(head)
                body = None if length is None else await near.readexactly(length)
                if body is None or not self._nodes.admits(name, _path(head), body):
                    _log.warning("a request of %s was refused", name)
                    back.write(_REFUSED)
                    await back.drain()
                    return
                forth.write(head + body)
                await forth.drain()
        finally:
            forth.close()
            answers.cancel()
            await asyncio.gather(answers, return_exceptions=True)


class Tunnel:
    """A port of loopback that leads to a gate, until it is closed.

    Args:
        gate: the gate's address.
        tls: this client's certificate, and the CA that signs the aggregator.
        over: set when the federation has ended; then a gate that is gone is no news.

    Raises:
        CertificateError: a file of `tls` cannot be used.

    Attributes:
        address: where it listens on loopback.
        lost: set when the gate could not be reached.
        answered: when something last came from the gate, on the monotonic clock.
    """

    def __init__(self, gate: Address, tls: ClientTLS, over: threading.Event | None = None) -> None:
        load_client(tls)
        self._gate = gate
        self._over = over or threading.Event()
        self._name = tls.server_name or gate.host
        self._context = ssl.create_default_context(ssl.Purpose.SERVER_AUTH, cafile=str(tls.ca))
        self._context.minimum_version = ssl.TLSVersion.TLSv1_3
        self._context.load_cert_chain(tls.certificate, tls.key)
        self.lost = threading.Event()
        self.answered = time.monotonic()
        self._background = Background("federation-tunnel")
        here = Address(LOOPBACK, 0)
        self._server = self._background.run(_listening(self._serve, here, None))
        self.address = Address(LOOPBACK, self._server.sockets[0].getsockname()[1])

    def close(self) -> None:
        """Stop; open connections end."""
        self._background.stop(_closed(self._server))

    async def _serve(self, near: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
        try:
            far, forth = await asyncio.open_connection(
                self._gate.host,
                self._gate.port,
                ssl=self._context,
                server_hostname=self._name,
                ssl_handshake_timeout=_HANDSHAKE_S,
            )
        except (OSError, ssl.SSLError) as error:
            if not (self.lost.is_set() or self._over.is_set()):
                reason = _reason(error)
                _log.warning("the aggregator at %s cannot be reached: %s", self._gate, reason)
            self.lost.set()
            back.close()
            return
        self.lost.clear()
        answers = _pump(far, back, self._note_answer)
        pumps = [asyncio.create_task(_pump(near, forth)), asyncio.create_task(answers)]
        try:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            # What went forth was drained; a TLS farewell would be waited for.
            forth.transport.abort()
            back.close()

    def _note_answer(self) -> None:
        self.answered = time.monotonic()


def body_length(head: bytes) -> int | None:
    """How many bytes follow the head of a request; None when it may not pass.

    Only POST to the fleet interface with one plain Content-Length passes, so that the gate and
    Flower cannot disagree about where a request ends.
    """
    first, *lines = head.removesuffix(b"\r\n\r\n").split(b"\r\n")
    if _REQUEST.fullmatch(first) is None:
        return None
    lengths = []
    for line in lines:
        match = _HEADER.fullmatch(line)
        if match is None:
            return None
        name = match[1].lower()
        if name in (b"transfer-encoding", b"content-encoding", b"upgrade", b"expect"):
            return None
        if name == b"content-length":
            lengths.append(match[2].strip())
    if len(lengths) != 1 or not lengths[0].isdigit() or int(lengths[0]) > _BODY_BYTES:
        return None
    return int(lengths[0])


def _path(head: bytes) -> bytes:
    return head.split(b" ", 2)[1]


async def _head(near: asyncio.StreamReader) -> bytes | None:
    """The head of the next request; None at the end."""
    try:
        return await near.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError as error:
        if error.partial:
            raise
        return None
    except asyncio.LimitOverrunError as error:
        raise ConnectionError from error


async def _pump(
    near: asyncio.StreamReader,
    forth: asyncio.StreamWriter,
    came: Callable[[], None] = lambda: None,
) -> None:
    with contextlib.suppress(OSError, ssl.SSLError):
        while part := await near.read(_CHUNK):
            came()
            forth.write(part)
            await forth.drain()
        forth.close()


async def _listening(
    serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
    address: Address,
    context: ssl.SSLContext | None,
) -> asyncio.Server:
    timeout = None if context is None else _HANDSHAKE_S
    try:
        return await asyncio.start_server(
            serve,
            address.host,
            address.port,
            ssl=context,
            limit=_HEAD_BYTES,
            ssl_handshake_timeout=timeout,
        )
    except OSError as error:
        raise BindError(
            f"{address} cannot be listened on ({_reason(error)}); choose another"
        ) from error


async def _closed(server: asyncio.Server) -> None:
    server.close()
    for _ in range(_TURNS):  # in which what was closed is let go
        await asyncio.sleep(0)


def _reason(error: OSError) -> str:
    return error.strerror or type(error).__name__
