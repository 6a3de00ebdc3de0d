"""The unary call Attest: a nonce up, a token down, as bytes."""

from __future__ import annotations

import re
from typing import Final, TypeVar

from google.protobuf.message import DecodeError

from fedsea.errors import LocalProtocolError, ProtocolError, RemoteProtocolError
from fedsea.wire import trunk_pb2 as pb

_M = TypeVar("_M", pb.AttestRequest, pb.Attestation)

NONCE_BYTES: Final = 32
MAX_TOKEN_CHARACTERS: Final = 32 * 2**10
MAX_REQUEST_BYTES: Final = 64
MAX_ATTESTATION_BYTES: Final = MAX_TOKEN_CHARACTERS + 64

# The compact form of a signed JWT: three parts of base64url.
_COMPACT: Final = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+")


def encode_attest_request(nonce: bytes) -> bytes:
    """The request of an Attest call.

    Raises:
        LocalProtocolError: the nonce is not 32 bytes.
    """
    _check_nonce(nonce, LocalProtocolError)
    return pb.AttestRequest(nonce=nonce).SerializeToString()


def decode_attest_request(data: bytes) -> bytes:
    """The nonce for which a client asks proof.

    Raises:
        RemoteProtocolError: the bytes are not an AttestRequest with a nonce of 32 bytes.
    """
    nonce = _parse(pb.AttestRequest, data, MAX_REQUEST_BYTES).nonce
    _check_nonce(nonce, RemoteProtocolError)
    return nonce


def encode_attestation(token: str) -> bytes:
    """The answer to an Attest call.

    Raises:
        LocalProtocolError: this is no token in compact form, or a too long one.
    """
    _check_token(token, LocalProtocolError)
    return pb.Attestation(token=token).SerializeToString()


def decode_attestation(data: bytes) -> str:
    """The token of a server, of which only the form has been checked.

    Raises:
        RemoteProtocolError: the bytes are not an Attestation with a token in compact form.
    """
    token = _parse(pb.Attestation, data, MAX_ATTESTATION_BYTES).token
    _check_token(token, RemoteProtocolError)
    return token


def _parse(kind: type[_M], data: bytes, cap: int) -> _M:
    if len(data) > cap:
        raise RemoteProtocolError(
            f"a {kind.DESCRIPTOR.name} of {len(data)} bytes is over the limit of {cap}; "
            "check that the peer is fedsea"
        )
    try:
        return kind.FromString(data)
    except DecodeError:
        raise RemoteProtocolError(
            f"a {kind.DESCRIPTOR.name} is not valid protobuf; check that the peer is fedsea"
        ) from None


def _check_nonce(nonce: bytes, fault: type[ProtocolError]) -> None:
    if len(nonce) != NONCE_BYTES:
        raise fault(f"the nonce has {len(nonce)} bytes; send {NONCE_BYTES} random ones")


def _check_token(token: str, fault: type[ProtocolError]) -> None:
    if len(token) > MAX_TOKEN_CHARACTERS:
        raise fault(
            f"the attestation token has {len(token)} characters, over the limit of "
            f"{MAX_TOKEN_CHARACTERS}; leave out what nobody checks"
        )
    if _COMPACT.fullmatch(token) is None:
        raise fault("the attestation token is no signed JWT in compact form; send one")
