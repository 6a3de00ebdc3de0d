"""What an attestation token must say, as a data owner writes it into a TOML file."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final

from fedsea.errors import ConfigError
from fedsea.privacy.trusted_keys import ALGORITHMS, need, read

MAX_CLOCK_SKEW: Final = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenPolicy:
    """What a token must say. Names of claims inside others are written with dots.

    Attributes:
        issuer: the exact `iss`.
        audience: must be among `aud`. None for services that write no audience: then a token that
            has one is refused, since it was made for somebody else.
        algorithms: those that the signing service uses.
        measurements: for each claim the accepted values; all of these claims must be there.
        nonce_claim: holds the nonce, in hex or base64url, alone or in a list.
        key_claim: holds the SHA-256 of the server's TLS key, in hex or base64url. None for
            services that sign nothing but a nonce: then `nonce_claim` must hold `joint_nonce`.
        debug_claims: must all be there and say that debugging is off. Any other claim whose name
            has `debug` or `dbg` in it must say so too, wherever it is.
        max_age_s: a token counts for so long after it was issued, and the server must then prove
            itself again, even if the token expires later.
        clock_skew_s: how far the clocks of service and client may be apart.
    """

    issuer: str
    audience: str | None = None
    algorithms: tuple[str, ...]
    measurements: Mapping[str, tuple[str, ...]]
    nonce_claim: str = "eat_nonce"
    key_claim: str | None = "tls_key_sha256"
    debug_claims: tuple[str, ...] = ("dbgstat",)
    max_age_s: float = 300.0
    clock_skew_s: float = 60.0

    def __post_init__(self) -> None:
        """Raise `ConfigError` for a policy that would accept nothing, or anything."""
        need(bool(self.issuer), "issuer is empty; name who signs the tokens")
        need(self.audience != "", "audience is empty; name it, or leave it out")
        need(bool(self.algorithms), f"algorithms is empty; use some of {', '.join(ALGORITHMS)}")
        for algorithm in self.algorithms:
            need(
                algorithm in ALGORITHMS,
                f"algorithm {algorithm!r} is not accepted; use some of {', '.join(ALGORITHMS)}",
            )
        need(bool(self.measurements), "measurements is empty; list what may run at the server")
        for name, values in self.measurements.items():
            need(
                bool(name) and bool(values) and all(values),
                f"measurement {name!r} needs at least one accepted value, none of them empty",
            )
        need(bool(self.nonce_claim), "nonce_claim is empty; name the claim with the nonce")
        need(self.key_claim != "", "key_claim is empty; name it, or set binding = 'nonce'")
        need(
            bool(self.debug_claims) and all(self.debug_claims),
            "debug_claims is empty; name the claim that says whether debugging is on",
        )
        need(0 < self.max_age_s < float("inf"), "max_age_s must be a positive number of seconds")
        need(
            0 <= self.clock_skew_s <= MAX_CLOCK_SKEW,
            f"clock_skew_s must be from 0 to {MAX_CLOCK_SKEW:g} seconds",
        )


def load_policy(path: Path) -> tuple[TokenPolicy, Path]:
    """The policy of a TOML file, and the path of the key file that it names.

    Keys are those of `TokenPolicy`, and `keys`: a JWKS or PEM file, relative to the policy.
    `binding = "nonce"` stands for a `key_claim` of None.

    Raises:
        ConfigError: the file cannot be read, a key is unknown or missing, or a value is unusable.
    """
    try:
        table = tomllib.loads(read(path, "attestation policy").decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError):
        raise ConfigError(f"{path} is not valid TOML: fix it") from None
    try:
        return _policy(table), path.parent / Path(table["keys"]).expanduser()
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _policy(table: dict[str, Any]) -> TokenPolicy:
    known = {entry.name: entry for entry in fields(TokenPolicy)}
    for key in table:
        if key not in (*known, "keys", "binding"):
            near = get_close_matches(key, (*known, "keys", "binding"), n=1, cutoff=0.0)[0]
            raise ConfigError(f"{key} is no key of an attestation policy; did you mean {near}?")
    for key in ("keys", *(name for name, entry in known.items() if entry.default is MISSING)):
        need(key in table, f"{key} is missing; add it")
    need(isinstance(table["keys"], str), "keys must be the path of a JWKS or PEM file")
    values = {key: _value(key, table[key]) for key in table if key in known}
    binding = table.get("binding", "key")
    need(binding in ("key", "nonce"), "binding must be 'key' or 'nonce'")
    if binding == "nonce":
        need("key_claim" not in table, "key_claim is given beside binding = 'nonce'; remove one")
        values["key_claim"] = None
    return TokenPolicy(**values)


def _value(key: str, value: Any) -> Any:
    if key == "measurements":
        need(isinstance(value, dict), "measurements must be a table of claims: [measurements]")
        return {name: _strings(f"measurement {name!r}", values) for name, values in value.items()}
    if key in ("algorithms", "debug_claims"):
        return _strings(key, value)
    if key in ("max_age_s", "clock_skew_s"):
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        need(is_number, f"{key} must be a number of seconds")
        return float(value)
    need(isinstance(value, str), f"{key} must be a text")
    return value


def _strings(key: str, value: Any) -> tuple[str, ...]:
    need(
        isinstance(value, list) and all(isinstance(entry, str) for entry in value),
        f"{key} must be a list of texts; put a name with dots into quotes",
    )
    return tuple(value)
