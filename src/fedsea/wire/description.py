"""The unary call Describe: its request and its answer as bytes."""

from __future__ import annotations

from dataclasses import replace
from typing import Final, TypeVar

from google.protobuf.message import DecodeError

from fedsea.errors import LocalProtocolError, ProtocolError, RemoteProtocolError
from fedsea.wire import trunk_pb2 as pb
from fedsea.wire.framing import CODEC_NUMBERS, CODECS_BY_NUMBER
from fedsea.wire.limits import DEFAULT_LIMITS, Limits
from fedsea.wire.messages import PROTOCOL_VERSION, Description
from fedsea.wire.text import check_text

_M = TypeVar("_M", pb.DescribeRequest, pb.Description)

MAX_DESCRIPTION_BYTES: Final = 16 * 2**10

_TEXTS: Final = ("model", "family", "fingerprint", "dtype", "quantization", "server_version")
_CAPS: Final = (
    "max_message_bytes",
    "max_rows_per_message",
    "max_segments",
    "max_sequences",
    "max_pending",
)
MAX_PROJECTIONS: Final = 64
_POSITIVE: Final = ("hidden_size", "max_context", "page_rows", *_CAPS)


def encode_describe_request() -> bytes:
    """The request of a Describe call."""
    return pb.DescribeRequest(protocol=PROTOCOL_VERSION).SerializeToString()


def decode_describe_request(data: bytes) -> int:
    """The protocol version of the client that asks.

    Raises:
        RemoteProtocolError: the bytes are not a DescribeRequest.
    """
    return _parse(pb.DescribeRequest, data).protocol


def encode_description(description: Description) -> bytes:
    """Serialize what a server serves.

    Raises:
        LocalProtocolError: a value cannot be right, such as an empty span.
    """
    _check(description, LocalProtocolError)
    try:
        return pb.Description(
            protocol=description.protocol,
            model=description.model,
            family=description.family,
            fingerprint=description.fingerprint,
            hidden_size=description.hidden_size,
            num_blocks=description.num_blocks,
            first_block=description.first_block,
            end_block=description.end_block,
            codecs=[CODEC_NUMBERS[codec] for codec in description.codecs],
            max_context=description.max_context,
            max_rows_per_message=description.max_rows_per_message,
            max_message_bytes=description.max_message_bytes,
            dtype=description.dtype,
            quantization=description.quantization,
            server_version=description.server_version,
            page_rows=description.page_rows,
            max_segments=description.max_segments,
            max_sequences=description.max_sequences,
            max_pending=description.max_pending,
            projections=description.projections,
            max_forwards=description.max_forwards,
        ).SerializeToString()
    except (TypeError, ValueError):
        raise LocalProtocolError(
            "the description holds a number that is not unsigned 32 bits; check the server's limits"
        ) from None


def decode_description(data: bytes) -> Description:
    """Parse what a server serves.

    Codecs that this version does not know are left out: they are offers. The protocol version is
    not judged here, so that the caller can name both versions.

    Raises:
        RemoteProtocolError: the bytes are not a Description, or a value cannot be right.
    """
    message = _parse(pb.Description, data)
    description = Description(
        model=message.model,
        family=message.family,
        fingerprint=message.fingerprint,
        hidden_size=message.hidden_size,
        num_blocks=message.num_blocks,
        first_block=message.first_block,
        end_block=message.end_block,
        codecs=tuple(CODECS_BY_NUMBER[n] for n in message.codecs if n in CODECS_BY_NUMBER),
        max_context=message.max_context,
        max_rows_per_message=message.max_rows_per_message,
        max_message_bytes=message.max_message_bytes,
        dtype=message.dtype,
        quantization=message.quantization,
        server_version=message.server_version,
        page_rows=message.page_rows,
        max_segments=message.max_segments,
        max_sequences=message.max_sequences,
        max_pending=message.max_pending,
        projections=tuple(message.projections),
        max_forwards=message.max_forwards,
        protocol=message.protocol,
    )
    _check(description, RemoteProtocolError)
    return description


def limits_for(description: Description, own: Limits = DEFAULT_LIMITS) -> Limits:
    """The caps of a client that talks to this server: of each, the smaller of both sides'.

    Not of the capacity: a server that refuses too long a sequence says what it serves.
    """
    shared = {name: min(getattr(own, name), getattr(description, name)) for name in _CAPS}
    # A server that trains nothing says 0; the cap is then never reached.
    forwards = min(own.max_forwards, description.max_forwards or own.max_forwards)
    return replace(own, max_forwards=forwards, **shared)


def _parse(kind: type[_M], data: bytes) -> _M:
    if len(data) > MAX_DESCRIPTION_BYTES:
        raise RemoteProtocolError(
            f"a {kind.DESCRIPTOR.name} of {len(data)} bytes is over the limit of "
            f"{MAX_DESCRIPTION_BYTES}; check that the peer is fedsea"
        )
    try:
        return kind.FromString(data)
    except DecodeError:
        raise RemoteProtocolError(
            f"a {kind.DESCRIPTOR.name} is not valid protobuf; check that the peer is fedsea"
        ) from None


def _check(description: Description, fault: type[ProtocolError]) -> None:
    for name in _TEXTS:
        check_text(name, getattr(description, name), DEFAULT_LIMITS.max_text, fault)
    if len(description.projections) > MAX_PROJECTIONS:
        raise fault(
            f"the description names {len(description.projections)} projections, over the limit of "
            f"{MAX_PROJECTIONS}; serve fewer"
        )
    for projection in description.projections:
        check_text("projection", projection, DEFAULT_LIMITS.max_text, fault)
        if not projection:
            raise fault("the description names a projection without a fingerprint; leave it out")
    for name in _POSITIVE:
        if getattr(description, name) < 1:
            raise fault(f"the description gives no {name}; it must be at least 1")
    if not 0 <= description.first_block < description.end_block <= description.num_blocks:
        raise fault(
            f"the description serves blocks {description.first_block} to "
            f"{description.end_block} of {description.num_blocks}; "
            "a span is not empty and lies inside the model"
        )
