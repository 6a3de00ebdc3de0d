from __future__ import annotations

import asyncio
import http.client
import ssl
import threading

import pytest
from flwr.proto.fleet_pb2 import PullMessagesRequest
from flwr.proto.message_pb2 import PushObjectRequest
from flwr.proto.node_pb2 import Node
from hypothesis import given
from hypothesis import strategies as st

from fedsea.client.background import Background
from fedsea.errors import BindError, CertificateError
from fedsea.federated.gate import Gate, Tunnel, body_length
from fedsea.federated.nodes import Nodes, owner_in
from fedsea.transport.address import Address
from fedsea.transport.credentials import ClientTLS, ServerTLS

GOOD = b"POST /v1/fleet/pull-messages HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\n\r\n"


def test_requests_of_a_node_pass():
    """What a SuperNode sends is let through, with the length of its body."""
    assert body_length(GOOD) == 5


@pytest.mark.parametrize(
    "head",
    [
        GOOD.replace(b"fleet", b"control"),
        GOOD.replace(b"fleet", b"runtime"),
        GOOD.replace(b"POST", b"GET"),
        GOOD.replace(b"pull-messages", b"../control/start-run"),
        GOOD.replace(b"pull-messages", b"pull-messages?x=1"),
        GOOD.replace(b"pull-messages", b"%2e%2e/control"),
        GOOD.replace(b"HTTP/1.1", b"HTTP/1.0"),
        GOOD.replace(b"content-length: 5", b"transfer-encoding: chunked"),
        GOOD.replace(b"host: x", b"Transfer-Encoding: chunked"),
        GOOD.replace(b"host: x", b"content-length: 5"),
        GOOD.replace(b"host: x", b"upgrade: h2c"),
        GOOD.replace(b"host: x", b"Content-Encoding: gzip"),
        GOOD.replace(b"host: x", b"no colon"),
        GOOD.replace(b"host: x", b" folded: x"),
        GOOD.replace(b"content-length: 5", b"content-length: +5"),
        GOOD.replace(b"content-length: 5", b"content-length: 5, 5"),
        GOOD.replace(b"content-length: 5", b"content-length: 99999999999"),
        GOOD.replace(b"content-length: 5", b"content-length:"),
        GOOD.replace(b"content-length: 5\r\n", b""),
    ],
)
def test_everything_else_is_refused(head):
    """Other interfaces, other methods, and whatever two parsers could read differently."""
    assert body_length(head) is None


@given(st.binary(max_size=200))
def test_any_bytes_are_judged(data):
    """No bytes break the judgement, and none but a well-formed request passes."""
    found = body_length(data + b"\r\n\r\n")

    assert found is None or data.startswith(b"POST /v1/fleet/")


class Link:
    """Stands for the SuperLink: answers every request with its target."""

    def __init__(self):
        self.seen = []
        self._background = Background("link")
        self._server = self._background.run(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.port = self._server.sockets[0].getsockname()[1]

    async def _serve(self, near, back):
        try:
            while True:
                head = await near.readuntil(b"\r\n\r\n")
                body = await near.readexactly(body_length(head))
                self.seen.append((head.split(b" ")[1].decode(), body))
                back.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
                await back.drain()
        except (asyncio.IncompleteReadError, asyncio.CancelledError):
            back.close()

    def close(self):
        async def stop():
            self._server.close()

        self._background.stop(stop())


@pytest.fixture
def link():
    """A link on loopback."""
    made = Link()
    yield made
    made.close()


@pytest.fixture
def gate(link, certificates, tmp_path):
    """A gate that lets in acme."""
    tls = ServerTLS(
        certificates / "ca.pem", certificates / "server.pem", certificates / "server.key"
    )
    made = Gate(Address("127.0.0.1", 0), tls, ["acme"], link.port, Nodes(tmp_path / "nodes"))
    yield made
    made.close()


def tunnel_to(gate, certificates, tenant, over=None):
    """A tunnel with a tenant's certificate."""
    files = ClientTLS(
        certificates / "ca.pem",
        certificates / f"client-{tenant}.pem",
        certificates / f"client-{tenant}.key",
    )
    return Tunnel(gate.address, files, over)


def post(address, path, context=None, body=b"hello"):
    """The status of an answer; None when the other side hangs up."""
    if context is None:
        connection = http.client.HTTPConnection(address.host, address.port, timeout=10)
    else:
        connection = http.client.HTTPSConnection(
            address.host, address.port, context=context, timeout=10
        )
    try:
        connection.request("POST", path, body=body)
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def test_a_tunnel_leads_through_the_gate(gate, link, certificates):
    """Several requests on one connection reach the link whole."""
    tunnel = tunnel_to(gate, certificates, "acme")
    before = tunnel.answered
    connection = http.client.HTTPConnection(tunnel.address.host, tunnel.address.port, timeout=10)
    bodies = [
        PushObjectRequest(node=Node(node_id=7), object_content=b"x" * n) for n in (5, 200_000)
    ]
    for body in map(PushObjectRequest.SerializeToString, bodies):
        connection.request("POST", "/v1/fleet/push-object", body=body)
        assert connection.getresponse().read() == b"ok"
    connection.close()
    tunnel.close()

    assert tunnel.answered > before
    assert [(path, len(body)) for path, body in link.seen] == [
        ("/v1/fleet/push-object", bodies[0].ByteSize()),
        ("/v1/fleet/push-object", bodies[1].ByteSize()),
    ]


def test_other_interfaces_are_closed(gate, link, certificates):
    """A certificate does not open the interface that starts runs."""
    tunnel = tunnel_to(gate, certificates, "acme")

    assert post(tunnel.address, "/v1/control/start-run") == 403
    tunnel.close()
    assert link.seen == []


def test_other_tenants_are_turned_away(gate, link, certificates):
    """A certificate of the same CA that the federation does not list."""
    tunnel = tunnel_to(gate, certificates, "globex")

    assert post(tunnel.address, "/v1/fleet/pull-messages") is None
    tunnel.close()
    assert link.seen == []


def test_a_node_is_of_the_certificate_that_used_it_first(link, certificates, tmp_path):
    """Requests in the name of another client's node are refused, and so is what names none."""
    tls = ServerTLS(
        certificates / "ca.pem", certificates / "server.pem", certificates / "server.key"
    )
    nodes = tmp_path / "nodes"
    gate = Gate(Address("127.0.0.1", 0), tls, ["acme", "globex"], link.port, Nodes(nodes))
    tunnels = {name: tunnel_to(gate, certificates, name) for name in ("acme", "globex")}
    pull = PullMessagesRequest(node=Node(node_id=7)).SerializeToString()

    def pulled(name, body=pull):
        return post(tunnels[name].address, "/v1/fleet/pull-messages", body=body)

    assert pulled("acme") == 200
    assert (owner_in(nodes, 7), owner_in(nodes, 8)) == ("acme", None)
    assert pulled("globex") == 403
    assert pulled("globex", b"no request") == 403
    assert pulled("acme") == 200
    for each in (*tunnels.values(), gate):
        each.close()
    assert len(link.seen) == 2


def test_nobody_comes_in_without_a_certificate(gate, certificates):
    """Plain TLS is not enough, and plain TCP is not either."""
    context = ssl.create_default_context(cafile=str(certificates / "ca.pem"))

    assert post(gate.address, "/v1/fleet/pull-messages", context=context) is None
    assert post(gate.address, "/v1/fleet/pull-messages") is None


@pytest.mark.parametrize("is_over", [False, True])
def test_a_gate_that_is_gone_is_noticed(gate, certificates, caplog, is_over):
    """The tunnel says so once, and not at all when the federation has ended anyway."""
    over = threading.Event()
    tunnel = tunnel_to(gate, certificates, "acme", over)
    gate.close()
    if is_over:
        over.set()

    for _ in range(2):
        assert post(tunnel.address, "/v1/fleet/pull-messages") is None
    assert tunnel.lost.is_set()
    assert caplog.text.count("cannot be reached") == (0 if is_over else 1)
    tunnel.close()


def test_a_taken_address_is_said_to_be_taken(gate, certificates, tmp_path):
    """Another gate cannot listen there."""
    tls = ServerTLS(
        certificates / "ca.pem", certificates / "server.pem", certificates / "server.key"
    )
    with pytest.raises(BindError, match="choose another"):
        Gate(gate.address, tls, ["acme"], 1, Nodes(tmp_path / "nodes"))


def test_files_are_checked_first(tmp_path, certificates):
    """A missing file is an error before anything listens."""
    tls = ServerTLS(certificates / "ca.pem", tmp_path / "no.pem", certificates / "server.key")
    with pytest.raises(CertificateError):
        Gate(Address("127.0.0.1", 0), tls, ["acme"], 1, Nodes(tmp_path / "nodes"))
