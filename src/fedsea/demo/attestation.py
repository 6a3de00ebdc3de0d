"""A stand-in for measured hardware and its attestation service, to try the mode `attested` out.

    python -m fedsea.demo.attestation keys FOLDER
    python -m fedsea.demo.attestation token FOLDER NONCE KEY_SHA256

`keys` makes a signing key and a JWKS of its public half; `token` prints a token such as a server's
attestation command has to print. It proves nothing: the key lies in a file and signs whatever it is
asked to. Where there is real hardware, a program of its maker takes this one's place.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any, Final

import jwt
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from jwt.algorithms import ECAlgorithm

from fedsea.errors import ConfigError, FedseaError
from fedsea.transport.files import PRIVATE, PUBLIC, write_atomically

ISSUER: Final = "https://attestation.example"
IMAGE_DIGEST: Final = "sha256:" + "0" * 64
LIFETIME_SECONDS: Final = 600

_KEY_FILE: Final = "signing.key"
_JWKS_FILE: Final = "keys.json"
_KEY_ID: Final = "demo"
_ALGORITHM: Final = "ES256"


def make_keys(folder: Path) -> None:
    """Write a new signing key and its JWKS into `folder`.

    Raises:
        ConfigError: there is one already, or the folder cannot be written.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    public: Any = ECAlgorithm.to_jwk(key.public_key(), as_dict=True)
    entry = {**public, "kid": _KEY_ID, "alg": _ALGORITHM, "use": "sig"}
    pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be made ({error.strerror}): choose another") from error
    write_atomically(folder / _KEY_FILE, pem, mode=PRIVATE, overwrite=False)
    jwks = json.dumps({"keys": [entry]}, indent=2) + "\n"
    write_atomically(folder / _JWKS_FILE, jwks.encode(), mode=PUBLIC, overwrite=False)


def make_token(folder: Path, nonce: str, key_sha256: str) -> str:
    """A token for a nonce and a TLS key, both in hex, signed by the key in `folder`.

    Raises:
        ConfigError: there is no key.
    """
    try:
        pem = (folder / _KEY_FILE).read_bytes()
        key: Any = serialization.load_pem_private_key(pem, password=None)
    except (OSError, ValueError):
        raise ConfigError(
            f"{folder} holds no signing key: make one with "
            f"`python -m fedsea.demo.attestation keys {folder}`"
        ) from None
    now = int(time.time())
    claims = {
        "iss": ISSUER,
        "iat": now,
        "exp": now + LIFETIME_SECONDS,
        "eat_nonce": nonce,
        "tls_key_sha256": key_sha256,
        "dbgstat": "disabled-permanently",
        "image_digest": IMAGE_DIGEST,
    }
    return jwt.encode(claims, key, _ALGORITHM, headers={"kid": _KEY_ID})


def main(arguments: list[str]) -> int:
    """Run one of the two commands; returns the exit code."""
    try:
        match arguments:
            case ["keys", folder]:
                make_keys(Path(folder))
            case ["token", folder, nonce, key_sha256]:
                sys.stdout.write(make_token(Path(folder), nonce, key_sha256) + "\n")
            case _:
                raise ConfigError("write keys FOLDER, or token FOLDER NONCE KEY_SHA256")
    except FedseaError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
