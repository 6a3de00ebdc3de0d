"""Looking at handshakes from outside gRPC."""

from __future__ import annotations

import asyncio
import socket
import ssl

import pytest

from fedsea.errors import Unreachable
from fedsea.transport.address import Address
from fedsea.transport.grpc_server import GrpcServer
from fedsea.transport.handshake import accepts_tls12, diagnose

pytestmark = pytest.mark.anyio


async def test_a_server_that_accepts_tls_1_2_is_found(server_tls):
    """The check answers yes where TLS 1.2 works: it can fail."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(server_tls.certificate, server_tls.key)
    async with await asyncio.start_server(
        lambda _, writer: writer.close(), "127.0.0.1", 0, ssl=context
    ) as server:
        address = Address(*server.sockets[0].getsockname())
        assert await asyncio.to_thread(accepts_tls12, address, 3.0)


async def test_our_server_refuses_tls_1_2(handler, server_tls):
    """The check answers no for a server of ours."""
    server = GrpcServer(handler, "127.0.0.1:0", server_tls)
    address = await server.start()
    assert not await asyncio.to_thread(accepts_tls12, address, 3.0)
    await server.stop()


async def test_the_check_needs_a_server():
    """Without a connection there is no answer, and no false comfort."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = Address(*listener.getsockname())
    with pytest.raises(Unreachable, match="refused the connection"):
        accepts_tls12(address, 1.0)


async def test_a_good_connection_has_no_diagnosis(handler, server_tls, client_tls):
    """Where everything works there is nothing to say."""
    server = GrpcServer(handler, "127.0.0.1:0", server_tls)
    address = await server.start()
    assert await asyncio.to_thread(diagnose, address, client_tls, 3.0) is None
    assert await asyncio.to_thread(diagnose, address, None, 3.0) is None
    await server.stop()
