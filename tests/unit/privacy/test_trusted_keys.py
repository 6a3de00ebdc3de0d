"""Pinned keys: JWKS and PEM files, and everything that is in them and must not be."""

from __future__ import annotations

import json

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed448, rsa
from tests.signing_service import SigningService

from fedsea.errors import ConfigError
from fedsea.privacy.trusted_keys import ALGORITHMS, MAX_KEYS, load_keys
from fedsea.transport.certificates import init_ca

SERVICES = [SigningService(name, key_id=name) for name in ALGORITHMS]


@pytest.fixture
def write(tmp_path):
    """Write a key file; entries of a JWKS, or bytes as they are."""

    def written(content):
        path = tmp_path / "keys"
        data = content if isinstance(content, bytes) else json.dumps({"keys": content}).encode()
        path.write_bytes(data)
        return path

    return written


def pem(key) -> bytes:
    """A public key as PEM."""
    return bytes(
        key.public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )


def test_a_jwks_with_every_algorithm(write):
    """Keys come with their ids, each for its own algorithm only."""
    keys = load_keys(write([service.jwk() for service in SERVICES]))
    assert [key.key_id for key in keys] == list(ALGORITHMS)
    for key, name in zip(keys, ALGORITHMS, strict=True):
        assert [other for other in ALGORITHMS if key.fits(other, name)] == [name]
        assert not key.fits(name, "another id")
        assert key.fits(name, None)


def test_a_pem_file_with_every_algorithm(write):
    """Several blocks follow each other; without ids any id fits."""
    keys = load_keys(write(b"# comment\n" + b"\n".join(s.public_pem() for s in SERVICES)))
    for key, name in zip(keys, ALGORITHMS, strict=True):
        assert [other for other in ALGORITHMS if key.fits(other, "any")] == [name]


def test_the_key_of_a_certificate(tmp_path):
    """A certificate stands for its key."""
    (key,) = load_keys(init_ca(tmp_path))
    assert key.fits("ES256", None)


def test_keys_that_are_passed_over(write):
    """Keys for encryption, for other algorithms or of unknown kinds are not used and do no harm."""
    good = SERVICES[1].jwk()
    others = [
        SERVICES[0].jwk(use="enc"),
        SERVICES[0].jwk(alg="PS256"),
        {"kty": "AKP", "pub": "AAAA"},
    ]
    assert [key.key_id for key in load_keys(write([*others, good]))] == ["ES256"]


@pytest.mark.parametrize(
    "change",
    [{"kty": "oct", "k": "c2VjcmV0"}, {"d": "AAAA"}],
)
def test_secret_keys_in_a_jwks(write, change):
    """A shared secret or a private key in the file is a mistake to be told."""
    with pytest.raises(ConfigError, match="private or shared key"):
        load_keys(write([{**SERVICES[1].jwk(), **change}]))


def test_a_private_key_as_pem(write):
    """The same as PEM."""
    with pytest.raises(ConfigError, match="private key"):
        load_keys(write(SERVICES[1].private_pem()))


def test_an_rsa_key_that_is_too_short(write):
    """1024 bits are refused."""
    with pytest.raises(ConfigError, match="1024 bits; at least 2048"):
        load_keys(write(pem(rsa.generate_private_key(65537, 1024).public_key())))


@pytest.mark.parametrize(
    "key", [ec.generate_private_key(ec.SECP521R1()), ed448.Ed448PrivateKey.generate()]
)
def test_keys_that_fit_no_algorithm(write, key):
    """Curves that no accepted algorithm uses leave the file empty."""
    with pytest.raises(ConfigError, match="there is no key for RS256"):
        load_keys(write(pem(key.public_key())))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"nothing",
        b"[]",
        b"{}",
        b'{"keys": 5}',
        b'{"keys": ["x"]}',
        b'{"keys": [{}]}',
        b"[" * 5000,
    ],
)
def test_what_is_no_key_file(write, content):
    """Neither PEM nor JWKS."""
    with pytest.raises(ConfigError, match="neither PEM nor a JWKS"):
        load_keys(write(content))


@pytest.mark.parametrize("content", [[], b"-----BEGIN nothing"])
def test_a_file_without_keys(write, content):
    """A key file that pins nothing is refused."""
    with pytest.raises(ConfigError, match="there is no key"):
        load_keys(write(content))


@pytest.mark.parametrize(
    ("kind", "entry"),
    [
        ("RSA", {"kty": "RSA"}),
        ("RSA", {"kty": "RSA", "n": 5, "e": "AQAB"}),
        ("EC", {"kty": "EC", "crv": "P-256"}),
        ("EC", {"kty": "EC", "crv": "P-256", "x": "AAAA", "y": "AAAA"}),
        ("OKP", {"kty": "OKP", "crv": "Ed25519", "x": "AAAA"}),
    ],
)
def test_a_broken_jwk(write, kind, entry):
    """It is told which kind of key cannot be read."""
    with pytest.raises(ConfigError, match=f"a key of kind {kind} cannot be read"):
        load_keys(write([entry]))


def test_a_broken_pem_block(write):
    """The same for PEM."""
    broken = b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n"
    with pytest.raises(ConfigError, match="a block PUBLIC KEY cannot be read"):
        load_keys(write(broken))


def test_too_many_keys(write):
    """Every one of them would be tried."""
    with pytest.raises(ConfigError, match="more than 64"):
        load_keys(write([SERVICES[1].jwk(kid=str(i)) for i in range(MAX_KEYS + 1)]))


def test_a_missing_file(tmp_path):
    """The file is named."""
    with pytest.raises(ConfigError, match=r"nowhere\.json does not exist"):
        load_keys(tmp_path / "nowhere.json")
