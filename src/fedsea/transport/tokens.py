"""Bearer tokens: 256 random bits per token, kept as SHA-256, bound to a tenant, with an end date.

A random token of full strength needs no slow hash: nobody can try 2**256 of them. The file is JSON:

    {"version": 1, "tokens": [{"tenant": "acme", "sha256": "<64 hex>", "expires": "<ISO 8601>"}]}
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from fedsea.errors import ConfigError, Unauthenticated
from fedsea.transport.base import LOCAL_TENANT, Peer
from fedsea.transport.credentials import check_tenant
from fedsea.transport.files import PRIVATE, write_atomically

AUTHORIZATION = "authorization"
BEARER = "Bearer "
TOKEN_DAYS = 90
MAX_TOKEN_CHARACTERS = 256

_FILE_KEYS = {"version", "tokens"}
_TOKEN_KEYS = {"tenant", "sha256", "expires"}


@dataclass(frozen=True, slots=True)
class TokenRecord:
    """What a server keeps of a token: whose it is, its SHA-256 in hex, when it ends."""

    tenant: str
    sha256: str
    expires: datetime


@dataclass(frozen=True, slots=True)
class TokenTable:
    """All tokens that a server accepts."""

    records: tuple[TokenRecord, ...] = ()

    def tenant_of(self, token: str, now: datetime) -> str | None:
        """The tenant of a live token, None for any other; every record is compared every time."""
        digest = hash_token(token)
        tenant = None
        for record in self.records:
            matches = hmac.compare_digest(record.sha256, digest)
            if matches and now < record.expires:
                tenant = record.tenant
        return tenant


def new_token() -> str:
    """A fresh token of 256 random bits."""
    return secrets.token_urlsafe(32)


def hash_token(token: str) -> str:
    """What is stored of a token."""
    return hashlib.sha256(token.encode()).hexdigest()


def token_metadata(token: str | None) -> tuple[tuple[str, str], ...]:
    """The call metadata that shows `token`."""
    return () if token is None else ((AUTHORIZATION, BEARER + token),)


def authorize(
    peer: Peer, metadata: Iterable[tuple[str, str | bytes]], table: TokenTable | None
) -> Peer:
    """The peer as the server may trust it, after the token in `metadata` is checked.

    Without a table tokens are ignored. With one, each call needs a live token: it must name the
    tenant of the certificate, or names the tenant where there is no certificate. Raises
    Unauthenticated; the message does not say which part was wrong.
    """
    if table is None:
        return peer
    tenant = table.tenant_of(_bearer(metadata), datetime.now(UTC))
    if tenant is None:
        raise Unauthenticated("no valid token was shown: ask the server's operator for one")
    if peer.fingerprint is None and peer.tenant == LOCAL_TENANT:
        return replace(peer, tenant=tenant)
    if tenant != peer.tenant:
        raise Unauthenticated("token and certificate name different tenants: use a matching pair")
    return peer


def add_token(path: Path, tenant: str, *, days: int = TOKEN_DAYS) -> str:
    """Make a token for `tenant`, add it to the file at `path` and return it; it is shown once."""
    if not 1 <= days <= 3650:
        raise ConfigError(f"a token cannot be valid for {days} days: use 1 to 3650")
    token = new_token()
    expires = datetime.now(UTC).replace(microsecond=0) + timedelta(days=days)
    record = TokenRecord(check_tenant(tenant), hash_token(token), expires)
    known = load_tokens(path).records if path.exists() else ()
    save_tokens(path, TokenTable((*known, record)))
    return token


def save_tokens(path: Path, table: TokenTable) -> None:
    """Write a token file, replacing what was there."""
    entries = [
        {"tenant": record.tenant, "sha256": record.sha256, "expires": record.expires.isoformat()}
        for record in table.records
    ]
    data = json.dumps({"version": 1, "tokens": entries}, indent=2) + "\n"
    write_atomically(path, data.encode(), mode=PRIVATE, overwrite=True)


def load_tokens(path: Path) -> TokenTable:
    """Read a token file; raises ConfigError naming the file and what is wrong."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ConfigError(f"the token file {path} does not exist: fix the path") from None
    except OSError as error:
        raise ConfigError(f"the token file {path} cannot be read ({error.strerror})") from error
    except ValueError:
        raise ConfigError(f"{path} is not a token file: it holds no valid JSON") from None
    if not isinstance(content, dict) or set(content) != _FILE_KEYS or content["version"] != 1:
        raise ConfigError(f"{path} is not a token file of version 1: make one with `fedsea certs`")
    entries = content["tokens"]
    if not isinstance(entries, list):
        raise ConfigError(f"{path}: tokens must be a list")
    return TokenTable(tuple(_record(entry, path, i) for i, entry in enumerate(entries)))


def _record(entry: Any, path: Path, index: int) -> TokenRecord:
    if not isinstance(entry, dict) or set(entry) != _TOKEN_KEYS:
        raise ConfigError(f"{path}: token {index} needs exactly the keys {sorted(_TOKEN_KEYS)}")
    tenant, digest, expires = entry["tenant"], entry["sha256"], entry["expires"]
    if not all(isinstance(value, str) for value in entry.values()):
        raise ConfigError(f"{path}: token {index} has a value that is not a string")
    if len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
        raise ConfigError(f"{path}: token {index} has no SHA-256 of 64 lower-case hex digits")
    try:
        end = datetime.fromisoformat(expires)
    except ValueError:
        raise ConfigError(f"{path}: token {index} has no ISO 8601 date in expires") from None
    if end.tzinfo is None:
        raise ConfigError(f"{path}: token {index} expires without a time zone: append +00:00")
    return TokenRecord(check_tenant(tenant), digest, end)


def _bearer(metadata: Iterable[tuple[str, str | bytes]]) -> str:
    shown = [value for key, value in metadata if key == AUTHORIZATION]
    if len(shown) != 1 or not isinstance(shown[0], str) or not shown[0].startswith(BEARER):
        raise Unauthenticated("this server needs a bearer token: configure the client's token")
    return shown[0].removeprefix(BEARER)[:MAX_TOKEN_CHARACTERS]
