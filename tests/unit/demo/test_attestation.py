"""The stand-in for an attestation service: its tokens are accepted, and its mistakes are told."""

from __future__ import annotations

import stat

import pytest

from fedsea.demo.attestation import IMAGE_DIGEST, ISSUER, main
from fedsea.errors import AttestationError, ConfigError
from fedsea.privacy.attestation import Evidence, TokenVerifier
from fedsea.privacy.token_policy import TokenPolicy
from fedsea.privacy.trusted_keys import load_keys

NONCE, KEY = bytes(range(32)), "ab" * 32
POLICY = TokenPolicy(
    issuer=ISSUER, algorithms=("ES256",), measurements={"image_digest": (IMAGE_DIGEST,)}
)


def test_its_tokens_are_accepted(tmp_path, capsys):
    """For the nonce and key that they were made for, and no others."""
    folder = str(tmp_path / "quotes")
    assert main(["keys", folder]) == 0
    assert main(["token", folder, NONCE.hex(), KEY]) == 0
    token = capsys.readouterr().out.strip()
    verifier = TokenVerifier(POLICY, load_keys(tmp_path / "quotes" / "keys.json"))
    assert verifier.verify(Evidence(token, NONCE, KEY, "host:1")).issuer == ISSUER
    with pytest.raises(AttestationError, match="at its nonce"):
        verifier.verify(Evidence(token, bytes(32), KEY, "host:1"))
    assert stat.S_IMODE((tmp_path / "quotes" / "signing.key").stat().st_mode) == 0o600


def test_keys_are_not_replaced(tmp_path, capsys):
    """A second call leaves the first key where it is."""
    assert main(["keys", str(tmp_path)]) == 0
    key = (tmp_path / "signing.key").read_bytes()
    assert main(["keys", str(tmp_path)]) == ConfigError.exit_code
    assert (tmp_path / "signing.key").read_bytes() == key
    assert "exists" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["keys"], ["token", "x"], ["other", "x"]])
def test_other_arguments(arguments, capsys):
    """The usage is one line."""
    assert main(arguments) == ConfigError.exit_code
    assert "write keys FOLDER" in capsys.readouterr().err


def test_no_key(tmp_path, capsys):
    """It is said how to make one, and nothing is printed that could be taken for a token."""
    assert main(["token", str(tmp_path), NONCE.hex(), KEY]) == ConfigError.exit_code
    shown = capsys.readouterr()
    assert "holds no signing key" in shown.err
    assert not shown.out
