"""Protected rows over real processes: a crash charges nothing, and what a row takes on the wire."""

from __future__ import annotations

import functools

import pytest
import torch
from tests.integration.conftest import Clients, tls_of

from fedsea.client.protection import Protection
from fedsea.client.sessions import Session
from fedsea.model.checkpoint import Checkpoint
from fedsea.model.projection import Projection
from fedsea.transport.grpc_client import GrpcChannel
from fedsea.transport.recording import Direction, RecordingChannel
from fedsea.wire.codecs import Codec, RowFormat
from fedsea.wire.connection import Connection
from fedsea.wire.framing import decode_event
from fedsea.wire.limits import DEFAULT_LIMITS
from fedsea.wire.messages import Append, Begin, Open, Opened, Output, Role, Segment, Want

PROMPT = "The patient came in on Monday and"
HIDDEN = 48
GAUSSIAN = "gaussian:clip_norm=5,mu=2"
COUNTS = "stochastic-quantization:bits=4,clip=0.5,mu=20"
HTTP2_FRAME = 9
"""Bytes of the header of a frame, RFC 9113, section 4.1."""
GRPC_PREFIX = 5
"""Bytes before each gRPC message: whether it is compressed, and its length."""


class Listener:
    """Every released row, by connection, sequence and position."""

    def __init__(self) -> None:
        self.connections = 0
        self.rows: dict[tuple[int, int, int], bytes] = {}

    def __call__(self, message) -> None:
        """Take a message."""
        if message.direction is not Direction.UP:
            return
        event = decode_event(message.data, Role.CLIENT, DEFAULT_LIMITS)
        if isinstance(event, Open):
            self.connections += 1
        if isinstance(event, Append):
            size, offset = len(event.rows) // event.count, 0
            for segment in event.segments:
                for position in range(segment.start, segment.end):
                    key = self.connections, segment.sequence, position
                    self.rows[key] = bytes(event.rows[offset : offset + size])
                    offset += size

    def of(self, connection: int) -> dict[int, bytes]:
        """The rows of one connection by position."""
        return {at: row for (number, _, at), row in self.rows.items() if number == connection}


def listened(clients: Clients, certificates, address: str, listener: Listener, **options):
    """A client of which every message up is seen."""
    channel = GrpcChannel(address, tls_of(certificates, "acme"))
    servers = {address: functools.partial(RecordingChannel, channel, listener)}
    return clients.connect(servers=servers, **options)


@pytest.mark.parametrize("spec", [GAUSSIAN, COUNTS], ids=["floats", "counts"])
def test_a_crash_in_mid_answer_charges_nothing(start_server, clients, certificates, tmp_path, spec):
    """kill -9 of the server: the same bytes go out again, and the ledger is that of a calm answer."""
    server = start_server()
    listener = Listener()
    privacy = Protection(mechanism=spec, ledger=tmp_path / "privacy.ledger")
    llm = listened(clients, certificates, server.address, listener, privacy=privacy)
    stream = llm.stream(PROMPT, max_new_tokens=120, ignore_eos=True)
    for count, _ in enumerate(stream, start=1):
        if count == 40:
            server.kill()
            start_server("--address", server.address)
    completion = stream.result(90)
    assert listener.connections == 2
    before, after = listener.of(1), listener.of(2)
    assert len(before) >= len(PROMPT) + 30
    assert all(after[at] == row for at, row in before.items())
    released = len(PROMPT) + 119
    assert len(after) == released
    assert completion.spent is not None
    assert completion.spent.releases == llm.privacy.statement().releases == released


def test_a_session_goes_on_after_a_crash_and_a_rollback(
    start_server, clients, certificates, tmp_path
):
    """Rows that were rolled back before the crash are the same bytes when they are fed again."""
    server = start_server()
    listener = Listener()
    privacy = Protection(mechanism=GAUSSIAN, ledger=tmp_path / "privacy.ledger")
    llm = listened(clients, certificates, server.address, listener, privacy=privacy)
    with Session.open(llm, 200) as session:
        session.generate(PROMPT, max_new_tokens=20, ignore_eos=True)
        tokens = session.token_ids
        session.rollback(30)
        server.kill()
        start_server("--address", server.address)
        again = session.generate(tokens[30:50], max_new_tokens=1)
        assert again.spent is not None
        assert again.spent.releases == 0
    before, after = listener.of(1), listener.of(2)
    assert {at: after[at] for at in range(50)} == {at: before[at] for at in range(50)}


@pytest.mark.parametrize("hidden", [2048, 4096])
def test_a_narrow_row_of_counts_is_small(hidden):
    """DEL with 4 bits at hidden / 32: everything that a token sends is within hidden / 64 + 64."""
    counts = RowFormat(Codec.COUNTS, hidden // 32, 15, 0.5)
    greeting = Open(
        fingerprint="f" * 64,
        first_block=1,
        end_block=31,
        up_codec=Codec.COUNTS,
        down_codec=Codec.BF16,
        up_width=counts.width,
        up_levels=counts.levels,
        up_scale=counts.scale,
        projection="p" * 64,
    )
    client, server = (Connection(role, hidden_size=hidden) for role in Role)
    for event in (greeting, Begin(255, 4096)):
        server.receive(client.send(event))
    client.receive(server.send(Opened("s" * 16)))
    sizes = []
    for position in range(4096):
        rows = counts.encode(torch.randint(0, 16, (1, counts.width), dtype=torch.uint8))
        append = Append(2**31 + position, (Segment(255, position, 1, Want.LAST),), rows)
        message = client.send(append)
        sizes.append(len(message) + GRPC_PREFIX + HTTP2_FRAME)
        server.receive(message)
        client.receive(server.send(Output(append.id, append.answer(), bytes(2 * hidden))))
    assert max(sizes) <= hidden // 64 + 64


def test_bytes_of_an_answer_over_grpc(start_server, clients, certificates, tiny_model, tmp_path):
    """The same through real processes: 40 tokens more cost 40 small messages more, and no other."""
    width = 12
    basis = torch.linalg.qr(torch.randn(HIDDEN, width))[0]
    pair = Projection.of(basis.T, basis, 1, Checkpoint.open(tiny_model).fingerprint())
    pair.for_server().save(tmp_path / "decoder.safetensors")
    server = start_server("--projection", str(tmp_path / "decoder.safetensors"))
    privacy = Protection(
        mechanism=COUNTS, ledger=tmp_path / "privacy.ledger", projection=pair.for_client()
    )
    llm = clients.connect(server.address, privacy=privacy)
    short, long = (
        llm.generate(PROMPT, max_new_tokens=count, ignore_eos=True) for count in (10, 50)
    )
    assert long.traffic.messages_up - short.traffic.messages_up == 40
    per_token = (long.traffic.bytes_up - short.traffic.bytes_up) / 40
    assert per_token + GRPC_PREFIX + HTTP2_FRAME <= width * 4 / 8 + 64
