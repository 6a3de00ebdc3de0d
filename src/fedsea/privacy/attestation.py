"""Decides whether a server may see rows: by a token in which a trusted service says what it runs.

In the mode `attested` a client sends nothing, not even the message that opens a session, before a
`Verifier` has accepted the server's `Evidence`. `TokenVerifier` takes a signed JWT (RFC 7519), such
as an Entity Attestation Token (EAT, RFC 9711), and accepts it only if all of these hold:

* the signature is of a pinned key, by an algorithm of a short list (never `none`, never a shared
  secret; the token's own header brings no keys, RFC 8725);
* issuer, audience and times are those of the policy;
* it was made for the nonce of this request, so that it is no older token;
* it names the TLS key at the other end of this connection, so that it is not the token of another
  server which somebody relays;
* the measurements of what runs there are in the allow-list, and debugging is off.

What acceptance means is limited. It is the word of the hardware's maker and of the service that
signs, about the software that was measured. It protects from the operator's software and from
other tenants of the machine. It does not protect from somebody with physical access: interposers on
the memory bus (TEE.fail, WireTap, Battering RAM) have broken SGX, TDX and SEV-SNP and the chains of
trust built on them, also those of confidential GPUs. Neither does it say that the measured software
is free of defects, or that it hides access patterns, sizes and times.
"""

from __future__ import annotations

import base64
import hashlib
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, NoReturn

import jwt

from fedsea.errors import AttestationError, ConfigError
from fedsea.privacy.token_policy import TokenPolicy, load_policy
from fedsea.privacy.trusted_keys import PublicKey, TrustedKey, load_keys

Clock = Callable[[], float]

# RFC 9711, 4.2.9, and the yes-or-no claims of the services that write no `dbgstat`.
_DEBUG_IS_OFF: Final = frozenset(
    (
        "disabled",
        "disabled-since-boot",
        "disabled-permanently",
        "disabled-fully-and-permanently",
        "false",
    )
)
_ABSENT: Final = object()


class Check(StrEnum):
    """What a token is checked for, in this order; a refusal names the first that failed."""

    FORM = "form"
    ALGORITHM = "algorithm"
    KEY = "signing key"
    SIGNATURE = "signature"
    ISSUER = "issuer"
    AUDIENCE = "audience"
    TIME = "time"
    NONCE = "nonce"
    TLS_KEY = "TLS key"
    DEBUG = "debug state"
    MEASUREMENT = "measurement"


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a server showed, and what this side knows about the connection.

    Attributes:
        token: as the server sent it; nothing in it has been checked.
        nonce: the random bytes for which this client asked.
        key_sha256: SHA-256, in hex, of the SubjectPublicKeyInfo of the server's TLS key. The
            transport promises that every later byte goes to the holder of this key.
        address: where the server was dialled, for messages.
    """

    token: str = field(repr=False)
    nonce: bytes
    key_sha256: str
    address: str


@dataclass(frozen=True, slots=True)
class Attested:
    """That a verifier accepted a server, until when, and on which grounds.

    Attributes:
        issuer: who signed the token.
        measurements: pairs of the claim's name and its accepted value.
        expires: seconds since 1970 after which the server has to prove itself again.
        key_sha256: the TLS key that was accepted.
    """

    issuer: str
    measurements: tuple[tuple[str, str], ...]
    expires: float
    key_sha256: str

    def describe(self) -> str:
        """One line for people: on whose word, what runs there, until when this holds."""
        found = ", ".join(f"{name} {value}" for name, value in self.measurements)
        until = datetime.fromtimestamp(self.expires, UTC)
        return f"attested by {self.issuer}: {found}; until {until:%Y-%m-%d %H:%M:%S} UTC"


class Verifier(ABC):
    """Decides about servers. Implementations may wait for other machines; calls come in a thread.

    Whatever `verify` raises, nothing is sent.
    """

    @abstractmethod
    def verify(self, evidence: Evidence) -> Attested:
        """Accept the evidence; its nonce and its TLS key must both be bound to what is accepted.

        Raises:
            AttestationError: the server did not prove what it runs. The message says which check
                failed and quotes nothing of the token.
        """


class TokenVerifier(Verifier):
    """Accepts servers by a signed token, without asking anybody else.

    Args:
        policy: what the token must say.
        keys: the pinned keys of the service that signs.
        clock: gives seconds since 1970; None for that of this machine.

    Raises:
        ConfigError: no key can be used with any of the policy's algorithms.
    """

    def __init__(
        self, policy: TokenPolicy, keys: Sequence[TrustedKey], clock: Clock | None = None
    ) -> None:
        if not any(key.fits(name, key.key_id) for key in keys for name in policy.algorithms):
            raise ConfigError(
                f"none of the pinned keys is for {' or '.join(policy.algorithms)}: "
                "fetch the keys of the service that signs"
            )
        self._policy = policy
        self._keys = tuple(keys)
        self._clock = clock or time.time
        self._jws = jwt.PyJWS(algorithms=list(policy.algorithms))

    @classmethod
    def from_file(cls, path: str | Path) -> TokenVerifier:
        """Read a policy, and the keys that it names, from a TOML file.

        Its keys are those of `TokenPolicy`, and `keys`: a JWKS or PEM file, relative to the policy.
        `binding = "nonce"` stands for a `key_claim` of None.

        Raises:
            ConfigError: a file cannot be read, a key of the policy is unknown or missing, or a
                value cannot be used.
        """
        policy, keys = load_policy(Path(path))
        return cls(policy, load_keys(keys))

    @property
    def policy(self) -> TokenPolicy:
        """What a token must say."""
        return self._policy

    def verify(self, evidence: Evidence) -> Attested:
        claims = self._signed_claims(evidence.token)
        policy = self._policy
        now = self._clock()
        _require(claims.get("iss") == policy.issuer, Check.ISSUER, "another one signed the token")
        _require(
            _is_for(claims.get("aud"), policy.audience),
            Check.AUDIENCE,
            "the token was made for somebody else",
        )
        expires = self._check_times(claims, now)
        self._check_binding(claims, evidence)
        _check_debugging(claims, policy.debug_claims)
        return Attested(
            issuer=policy.issuer,
            measurements=_checked_measurements(claims, policy.measurements),
            expires=min(expires, now + policy.max_age_s),
            key_sha256=evidence.key_sha256,
        )

    def _signed_claims(self, token: str) -> dict[str, Any]:
        """The claims of a token, after its signature has been verified."""
        try:
            header = jwt.get_unverified_header(token)
        except (jwt.InvalidTokenError, RecursionError):
            _refuse(Check.FORM, "this is no signed JWT")
        _require("crit" not in header, Check.FORM, "it asks for extensions that are unknown here")
        algorithm, key_id = header.get("alg"), header.get("kid")
        if algorithm not in self._policy.algorithms:
            _refuse(Check.ALGORITHM, "it is signed by one that the policy does not list")
        keys = [trusted.key for trusted in self._keys if trusted.fits(algorithm, key_id)]
        _require(bool(keys), Check.KEY, "it is signed by a key that is not pinned")
        return _claims(self._payload(token, keys, algorithm))

    def _payload(self, token: str, keys: Sequence[PublicKey], algorithm: str) -> bytes:
        for key in keys:
            with suppress(jwt.InvalidTokenError):
                payload: bytes = self._jws.decode_complete(token, key, algorithms=[algorithm])[
                    "payload"
                ]
                return payload
        return _refuse(Check.SIGNATURE, "no pinned key signed this")

    def _check_times(self, claims: Mapping[str, Any], now: float) -> float:
        """When the token expires, by this side's clock at its slowest."""
        skew = self._policy.clock_skew_s
        issued, expires = _time(claims, "iat"), _time(claims, "exp")
        starts = _time(claims, "nbf") if "nbf" in claims else issued
        _require(now < expires + skew, Check.TIME, "the token has expired")
        _require(starts <= now + skew, Check.TIME, "the token is not valid yet")
        _require(issued <= now + skew, Check.TIME, "the token was issued in the future")
        _require(
            now - issued <= self._policy.max_age_s + skew,
            Check.TIME,
            "the token was issued too long ago",
        )
        return expires + skew

    def _check_binding(self, claims: Mapping[str, Any], evidence: Evidence) -> None:
        policy = self._policy
        nonces = _texts(_claim(claims, policy.nonce_claim))
        if policy.key_claim is None:
            joint = joint_nonce(evidence.nonce, evidence.key_sha256)
            _require(
                _holds(nonces, joint),
                Check.NONCE,
                "the token was not made for this request and this TLS key",
            )
            return
        _require(
            _holds(nonces, evidence.nonce), Check.NONCE, "the token was not made for this request"
        )
        keys = _texts(_claim(claims, policy.key_claim))
        _require(
            _holds(keys, bytes.fromhex(evidence.key_sha256)),
            Check.TLS_KEY,
            "the token is of a server with another key, or somebody is in between",
        )


def joint_nonce(nonce: bytes, key_sha256: str) -> bytes:
    """SHA-256(nonce || TLS key hash): binds both where a service signs nothing but a nonce.

    Both parts are 32 bytes, so that no two pairs give the same input.
    """
    return hashlib.sha256(nonce + bytes.fromhex(key_sha256)).digest()


def _claims(payload: bytes) -> dict[str, Any]:
    try:
        claims = json.loads(payload, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError):
        claims = None
    if not isinstance(claims, dict):
        _refuse(Check.FORM, "its claims are no JSON object, or name one twice")
    return claims


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError
    return found


def _is_for(claimed: Any, audience: str | None) -> bool:
    return audience in _texts(claimed) if audience is not None else claimed is None


def _time(claims: Mapping[str, Any], name: str) -> float:
    value = claims.get(name)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 2**53:
        _refuse(Check.TIME, f"{name} is missing or no time")
    return float(value)


def _claim(claims: Mapping[str, Any], path: str) -> Any:
    """The claim of that name, or inside others along the dots; `_ABSENT` when there is none."""
    if path in claims:
        return claims[path]
    outer, dot, inner = path.partition(".")
    child = claims.get(outer)
    return _claim(child, inner) if dot and isinstance(child, dict) else _ABSENT


def _texts(value: Any) -> list[str]:
    """A claim as the texts that it holds: one, or those of a list."""
    return [text for text in (value if isinstance(value, list) else [value]) if _is_text(text)]


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _holds(texts: Sequence[str], wanted: bytes) -> bool:
    """Whether one of the texts is `wanted` in hex or in base64url."""
    base64url = base64.urlsafe_b64encode(wanted).decode().rstrip("=")
    return any(text.lower() == wanted.hex() or text.rstrip("=") == base64url for text in texts)


def _check_debugging(claims: Mapping[str, Any], required: Sequence[str]) -> None:
    for path in required:
        _require(
            _is_off(_claim(claims, path)),
            Check.DEBUG,
            f"claim {path} does not say that debugging is off",
        )
    _require(
        all(_is_off(value) for value in _debug_values(claims)),
        Check.DEBUG,
        "a claim says that debugging is on",
    )


def _debug_values(value: Any) -> Iterator[Any]:
    """Values of all claims about debugging, at any depth."""
    if isinstance(value, list):
        for item in value:
            yield from _debug_values(item)
    elif isinstance(value, dict):
        for name, inner in value.items():
            about_debugging = "debug" in name.lower() or "dbg" in name.lower()
            if about_debugging and not isinstance(inner, dict | list):
                yield inner
            yield from _debug_values(inner)


def _is_off(value: Any) -> bool:
    return value is False or (isinstance(value, str) and value.lower() in _DEBUG_IS_OFF)


def _checked_measurements(
    claims: Mapping[str, Any], allowed: Mapping[str, tuple[str, ...]]
) -> tuple[tuple[str, str], ...]:
    found: list[tuple[str, str]] = []
    for path, values in allowed.items():
        value = _claim(claims, path)
        if not isinstance(value, str) or value not in values:
            _refuse(Check.MEASUREMENT, f"claim {path} is missing or not in the allow-list")
        found.append((path, value))
    return tuple(found)


def _require(fulfilled: bool, check: Check, reason: str) -> None:
    if not fulfilled:
        _refuse(check, reason)


def _refuse(check: Check, reason: str) -> NoReturn:
    raise AttestationError(
        f"the server's attestation was refused at its {check}: {reason}; nothing was sent"
    )
