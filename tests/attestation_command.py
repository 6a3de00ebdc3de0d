"""The program of a test's server: signs a token as a machine with an attestation service would.

    python attestation_command.py STATE NONCE KEY_SHA256

STATE is a JSON file that the test writes: the signing key as PEM, the algorithm, the key id, claims
that replace the good ones. Each run is noted as a line of the file `log` beside it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import jwt
from cryptography.hazmat.primitives.serialization import load_pem_private_key


def main() -> None:
    """Print one token."""
    state_file, nonce, key_sha256 = sys.argv[1:4]
    path = Path(state_file)
    state: dict[str, Any] = json.loads(path.read_text())
    with path.with_name("log").open("a") as log:
        log.write(f"{nonce} {key_sha256}\n")
    claims = json.loads(state["claims"].replace("NONCE", nonce).replace("KEY_SHA256", key_sha256))
    signing_key: Any = load_pem_private_key(state["key"].encode(), None)
    token = jwt.PyJWS().encode(
        json.dumps(claims).encode(), signing_key, state["algorithm"], {"kid": state["key_id"]}
    )
    sys.stdout.write(token + "\n")


if __name__ == "__main__":
    main()
