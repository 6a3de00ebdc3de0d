"""Public keys that a data owner pins: of the services whose attestation tokens are believed."""

from __future__ import annotations

import json
import re
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

import jwt
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

from fedsea.errors import ConfigError

PublicKey: TypeAlias = rsa.RSAPublicKey | ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey

MIN_RSA_BITS: Final = 2048
MAX_KEYS: Final = 64

_FITS: Final[Mapping[str, Callable[[PublicKey], bool]]] = types.MappingProxyType(
    {
        "RS256": lambda key: isinstance(key, rsa.RSAPublicKey),
        "ES256": lambda key: _is_on(key, ec.SECP256R1),
        "ES384": lambda key: _is_on(key, ec.SECP384R1),
        "EdDSA": lambda key: isinstance(key, ed25519.Ed25519PublicKey),
    }
)
ALGORITHMS: Final = tuple(_FITS)

_JWK_READERS: Final[Mapping[str, Callable[[dict[str, Any]], Any]]] = types.MappingProxyType(
    {"RSA": RSAAlgorithm.from_jwk, "EC": ECAlgorithm.from_jwk, "OKP": OKPAlgorithm.from_jwk}
)
_PEM: Final = re.compile(rb"-----BEGIN (?P<kind>[A-Z ]+)-----.+?-----END (?P=kind)-----", re.DOTALL)


@dataclass(frozen=True, slots=True)
class TrustedKey:
    """A public key of the signing service; `algorithm` and `key_id` are None where any will do."""

    key: PublicKey
    key_id: str | None = None
    algorithm: str | None = None

    def fits(self, algorithm: str, key_id: str | None) -> bool:
        """Whether a token with this header may be signed by this key."""
        return (
            _FITS[algorithm](self.key)
            and self.algorithm in (None, algorithm)
            and (key_id is None or self.key_id in (None, key_id))
        )


def load_keys(path: Path) -> tuple[TrustedKey, ...]:
    """The public keys of a JWKS (RFC 7517) or PEM file.

    PEM blocks are public keys or certificates, of which only the key counts. Keys of a JWKS that
    are for encryption, or for an algorithm that is not accepted, are passed over.

    Raises:
        ConfigError: the file cannot be read, holds private or shared keys, a key that is too
            short, or none that can be used.
    """
    data = read(path, "key file")
    try:
        found = list(_pem_keys(data)) if b"-----BEGIN " in data else list(_jwks_keys(data))
        for trusted in found:
            _check_strength(trusted.key)
        need(bool(found), f"there is no key for {', '.join(ALGORITHMS)}")
        need(len(found) <= MAX_KEYS, f"there are more than {MAX_KEYS} keys; keep those in use")
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return tuple(found)


def _pem_keys(data: bytes) -> Iterator[TrustedKey]:
    for block in _PEM.finditer(data):
        kind = block["kind"].decode()
        need("PRIVATE" not in kind, "it holds a private key; give public keys only")
        try:
            if kind == "CERTIFICATE":
                key: Any = x509.load_pem_x509_certificate(block[0]).public_key()
            else:
                key = load_pem_public_key(block[0])
        except (ValueError, UnsupportedAlgorithm):
            raise ConfigError(f"a block {kind} cannot be read; give public keys") from None
        if any(fits(key) for fits in _FITS.values()):
            yield TrustedKey(key)


def _jwks_keys(data: bytes) -> Iterator[TrustedKey]:
    try:
        entries = json.loads(data)["keys"]
        kinds = [str(entry["kty"]) for entry in entries]
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        raise ConfigError("it is neither PEM nor a JWKS; give one of them") from None
    for kind, entry in zip(kinds, entries, strict=True):
        need(
            kind != "oct" and "d" not in entry,
            "it holds a private or shared key; give public keys only",
        )
        algorithm = entry.get("alg")
        wanted = entry.get("use", "sig") == "sig" and algorithm in (None, *ALGORITHMS)
        if kind not in _JWK_READERS or not wanted:
            continue
        try:
            key = _JWK_READERS[kind](entry)
        except (jwt.PyJWTError, ValueError, TypeError, LookupError, AttributeError):
            raise ConfigError(
                f"a key of kind {kind} cannot be read; fetch the file again"
            ) from None
        if any(fits(key) for fits in _FITS.values()):
            yield TrustedKey(key, entry.get("kid"), algorithm)


def _check_strength(key: PublicKey) -> None:
    if isinstance(key, rsa.RSAPublicKey):
        need(
            key.key_size >= MIN_RSA_BITS,
            f"an RSA key has {key.key_size} bits; at least {MIN_RSA_BITS} are needed",
        )


def _is_on(key: PublicKey, curve: type[ec.EllipticCurve]) -> bool:
    return isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, curve)


def need(fulfilled: bool, message: str) -> None:
    """Raise `ConfigError` with `message` unless `fulfilled`."""
    if not fulfilled:
        raise ConfigError(message)


def read(path: Path, what: str) -> bytes:
    """The contents of a file; raises `ConfigError` naming the file and the fix."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"the {what} {path} does not exist: fix the path") from None
    except OSError as error:
        raise ConfigError(f"the {what} {path} cannot be read ({error.strerror})") from error
