"""Bearer tokens: making, keeping, checking."""

from __future__ import annotations

import json
import stat
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsea.errors import ConfigError, Unauthenticated
from fedsea.transport.base import Peer
from fedsea.transport.tokens import (
    TokenRecord,
    TokenTable,
    add_token,
    authorize,
    hash_token,
    load_tokens,
    new_token,
    token_metadata,
)

NOW = datetime.now(UTC)
LATER = NOW + timedelta(days=1)
CERTIFIED = Peer("acme", "ipv4:127.0.0.1:1", "ab" * 32)
LOCAL = Peer("local", "memory")


def table(*pairs: tuple[str, str], expires: datetime = LATER) -> TokenTable:
    """A table that accepts (tenant, token) pairs."""
    return TokenTable(tuple(TokenRecord(t, hash_token(token), expires) for t, token in pairs))


def test_tokens_are_long_and_fresh():
    """256 bits each, in characters that a header can hold."""
    tokens = {new_token() for _ in range(50)}
    assert len(tokens) == 50
    assert all(len(token) == 43 and token.isascii() for token in tokens)


def test_a_file_keeps_hashes_only(tmp_path):
    """Tokens of several tenants are kept as hashes, in a file that only its owner reads."""
    path = tmp_path / "tokens.json"
    tokens = {tenant: add_token(path, tenant) for tenant in ("acme", "beta")}
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not any(token in path.read_text() for token in tokens.values())
    loaded = load_tokens(path)
    for tenant, token in tokens.items():
        assert loaded.tenant_of(token, NOW) == tenant
    assert loaded.tenant_of(new_token(), NOW) is None


def test_an_expired_token_is_none():
    """A token ends at its date."""
    known = table(("acme", "t"), expires=NOW)
    assert known.tenant_of("t", NOW - timedelta(seconds=1)) == "acme"
    assert known.tenant_of("t", NOW) is None


def test_certificate_and_token_must_agree():
    """Both are needed and both name the same tenant."""
    known = table(("acme", "a"), ("beta", "b"))
    assert authorize(CERTIFIED, token_metadata("a"), known) == CERTIFIED
    with pytest.raises(Unauthenticated, match="different tenants"):
        authorize(CERTIFIED, token_metadata("b"), known)
    with pytest.raises(Unauthenticated, match="no valid token"):
        authorize(CERTIFIED, token_metadata("c"), known)
    with pytest.raises(Unauthenticated, match="needs a bearer token"):
        authorize(CERTIFIED, (), known)


def test_a_certificate_for_local_gets_no_other_tenant():
    """Only a peer without a certificate takes its tenant from the token."""
    certified = Peer("local", "x", "ab" * 32)
    with pytest.raises(Unauthenticated):
        authorize(certified, token_metadata("a"), table(("acme", "a")))
    assert authorize(LOCAL, token_metadata("a"), table(("acme", "a"))).tenant == "acme"


def test_without_a_table_tokens_do_not_matter():
    """A server without a token file trusts the certificate alone."""
    assert authorize(CERTIFIED, token_metadata("anything"), None) == CERTIFIED


@pytest.mark.parametrize(
    "metadata",
    [
        [("authorization", "a")],
        [("authorization", "bearer a")],
        [("authorization", b"Bearer a")],
        [("authorization", "Bearer a"), ("authorization", "Bearer a")],
    ],
)
def test_other_authorizations_are_refused(metadata):
    """One header, one scheme."""
    with pytest.raises(Unauthenticated, match="needs a bearer token"):
        authorize(CERTIFIED, metadata, table(("acme", "a")))


@given(st.text(max_size=300))
def test_no_shown_text_breaks_the_check(text):
    """Whatever is shown, the answer is our own error."""
    with pytest.raises(Unauthenticated):
        authorize(CERTIFIED, [("authorization", "Bearer " + text)], table(("acme", new_token())))


GOOD = {"tenant": "acme", "sha256": "0" * 64, "expires": "2030-01-01T00:00:00+00:00"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "valid JSON"),
        ([], "version 1"),
        ({"version": 2, "tokens": []}, "version 1"),
        ({"version": 1, "tokens": [], "more": 1}, "version 1"),
        ({"version": 1, "tokens": {}}, "must be a list"),
        ({"version": 1, "tokens": [1]}, "token 0 needs exactly"),
        ({"version": 1, "tokens": [GOOD, GOOD | {"x": 1}]}, "token 1 needs exactly"),
        ({"version": 1, "tokens": [GOOD | {"sha256": 5}]}, "not a string"),
        ({"version": 1, "tokens": [GOOD | {"sha256": "0"}]}, "SHA-256"),
        ({"version": 1, "tokens": [GOOD | {"sha256": "G" * 64}]}, "SHA-256"),
        ({"version": 1, "tokens": [GOOD | {"tenant": "A B"}]}, "cannot name a tenant"),
        ({"version": 1, "tokens": [GOOD | {"expires": "soon"}]}, "ISO 8601"),
        ({"version": 1, "tokens": [GOOD | {"expires": "2030-01-01T00:00:00"}]}, "time zone"),
    ],
)
def test_bad_token_files_are_named(tmp_path, content, message):
    """Each mistake in the file is a ConfigError that says which."""
    path = tmp_path / "tokens.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ConfigError, match=message):
        load_tokens(path)


def test_a_missing_token_file_is_named(tmp_path):
    """The path is in the message."""
    with pytest.raises(ConfigError, match=r"absent.json does not exist"):
        load_tokens(tmp_path / "absent.json")


@pytest.mark.parametrize("days", [0, -1, 4000])
def test_a_tokens_life_is_bounded(tmp_path, days):
    """Tokens live from a day to ten years."""
    with pytest.raises(ConfigError, match="days"):
        add_token(tmp_path / "tokens.json", "acme", days=days)
