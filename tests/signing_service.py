"""An attestation service of the tests: signs what it is told, with keys made on the spot."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import jwt
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

ISSUER = "https://attestation.test"
AUDIENCE = "clinic"
IMAGE = "sha256:" + "5a" * 32
IMAGE_CLAIM = "submods.container.image_digest"

_MAKERS: dict[str, Any] = {
    "RS256": lambda: rsa.generate_private_key(65537, 2048),
    "ES256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "ES384": lambda: ec.generate_private_key(ec.SECP384R1()),
    "EdDSA": ed25519.Ed25519PrivateKey.generate,
}


def good_claims(nonce: bytes, key_sha256: str, now: float | None = None) -> dict[str, Any]:
    """What a service says of a server in good order."""
    issued = int(time.time() if now is None else now)
    return {
        "iss": ISSUER,
        "aud": AUDIENCE,
        "iat": issued,
        "nbf": issued,
        "exp": issued + 600,
        "eat_nonce": nonce.hex(),
        "tls_key_sha256": key_sha256,
        "dbgstat": "disabled-since-boot",
        "submods": {"container": {"image_digest": IMAGE}},
    }


class SigningService:
    """A service with one key; `key_id` is in its JWKS and in its tokens."""

    def __init__(self, algorithm: str = "ES256", key_id: str | None = "key-1") -> None:
        self.algorithm = algorithm
        self.key_id = key_id
        self.key = _MAKERS[algorithm]()

    def sign(self, claims: Any, **header: Any) -> str:
        """A token with these claims; `header` adds fields or replaces its own."""
        fields = {"kid": self.key_id} if self.key_id else {}
        payload = claims if isinstance(claims, bytes) else json.dumps(claims).encode()
        return jwt.PyJWS().encode(payload, self.key, self.algorithm, {**fields, **header})

    def jwk(self, **changes: Any) -> dict[str, Any]:
        """The public key as a JWK."""
        algorithm: Any = jwt.get_algorithm_by_name(self.algorithm)
        found = algorithm.to_jwk(self.key.public_key(), as_dict=True)
        return {**found, "kid": self.key_id, "alg": self.algorithm, "use": "sig", **changes}

    def private_pem(self) -> bytes:
        """The signing key, for a command of a server."""
        return bytes(
            self.key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )

    def public_pem(self) -> bytes:
        """The public key."""
        return bytes(
            self.key.public_key().public_bytes(
                serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
            )
        )

    def write_policy(self, folder: Path, **changes: str | None) -> Path:
        """A policy file and its JWKS; `changes` are lines of TOML, None leaves one out."""
        (folder / "keys.json").write_text(json.dumps({"keys": [self.jwk()]}))
        lines = {
            "issuer": f'"{ISSUER}"',
            "audience": f'"{AUDIENCE}"',
            "keys": '"keys.json"',
            "algorithms": f'["{self.algorithm}"]',
            "measurements": f'{{ "{IMAGE_CLAIM}" = ["{IMAGE}"] }}',
            **changes,
        }
        path = folder / "attestation.toml"
        path.write_text("\n".join(f"{key} = {value}" for key, value in lines.items() if value))
        return path
