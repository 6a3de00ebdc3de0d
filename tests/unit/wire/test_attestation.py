"""The messages of Attest: what goes in comes out, and nothing else is accepted."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsea.errors import LocalProtocolError, RemoteProtocolError
from fedsea.wire import trunk_pb2 as pb
from fedsea.wire.attestation import (
    MAX_TOKEN_CHARACTERS,
    NONCE_BYTES,
    decode_attest_request,
    decode_attestation,
    encode_attest_request,
    encode_attestation,
)

BASE64URL = st.text("ABCabc019_-", min_size=1, max_size=40)


@given(st.binary(min_size=NONCE_BYTES, max_size=NONCE_BYTES))
def test_a_nonce_comes_back(nonce):
    """Every nonce of 32 bytes survives the way."""
    assert decode_attest_request(encode_attest_request(nonce)) == nonce


@given(st.tuples(BASE64URL, BASE64URL, BASE64URL).map(".".join))
def test_a_token_comes_back(token):
    """Every token in compact form survives the way."""
    assert decode_attestation(encode_attestation(token)) == token


@given(st.binary(max_size=200))
def test_bytes_of_a_peer_are_read_or_refused(data):
    """Arbitrary bytes give a valid value or our error, never another one."""
    for decode in (decode_attest_request, decode_attestation):
        with suppress(RemoteProtocolError):
            assert decode(data)


@pytest.mark.parametrize("size", [0, 1, NONCE_BYTES - 1, NONCE_BYTES + 1])
def test_a_nonce_of_another_size(size):
    """Both sides insist on 32 bytes."""
    with pytest.raises(LocalProtocolError, match=f"{size} bytes; send 32"):
        encode_attest_request(bytes(size))
    with pytest.raises(RemoteProtocolError, match=f"{size} bytes; send 32"):
        decode_attest_request(pb.AttestRequest(nonce=bytes(size)).SerializeToString())


@pytest.mark.parametrize("token", ["", "a.b", "a.b.", "a.b.c.d", "a.b.c\n", "a b.c.d", "a.b.ü"])
def test_what_is_no_token(token):
    """Neither side lets anything through that is not three parts of base64url."""
    with pytest.raises(LocalProtocolError, match="no signed JWT"):
        encode_attestation(token)
    with pytest.raises(RemoteProtocolError, match="no signed JWT"):
        decode_attestation(pb.Attestation(token=token).SerializeToString())


def test_too_long_a_token():
    """Size is refused before anything looks into it, and the token is not quoted."""
    token = "a.b." + "c" * MAX_TOKEN_CHARACTERS
    with pytest.raises(LocalProtocolError, match="over the limit") as ours:
        encode_attestation(token)
    with pytest.raises(RemoteProtocolError, match="over the limit"):
        decode_attestation(pb.Attestation(token=token).SerializeToString())
    assert "ccc" not in str(ours.value)
