"""Settings of a federation: the aggregator's file, and the file of each client.

One frozen dataclass for each table of the TOML file, checked when read; an unknown key is an error.
Paths are relative to the file. `docs/reference` lists every key with its default.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Self

from fedsea.settings import from_tables, need, read_toml

_NAME = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,61}[a-z0-9])?")


class Kind(StrEnum):
    """A strategy."""

    FEDAVG = "fedavg"
    FEDPROX = "fedprox"
    FEDADAM = "fedadam"
    NORMFEDAVG = "normfedavg"


class Neighbours(StrEnum):
    """Which two federations must be hard to tell apart."""

    REPLACE = "replace"
    REMOVE = "remove"


class Outside(StrEnum):
    """What becomes of an update with numbers beyond the clip range of secure aggregation."""

    SCALE = "scale"
    REFUSE = "refuse"


@dataclass(frozen=True, slots=True, kw_only=True)
class FederationSection:
    """What all clients do together.

    Attributes:
        name: of the federation; the ledger's account is named so.
        clients: names of the clients that may take part, as in their certificates.
        folder: where the global adapter is saved after every round.
        rounds: rounds of local training and averaging.
        least: fewest clients whose updates make a round.
        wait_s: how long to wait for clients at the beginning, and for missing ones after a failure.
        round_timeout_s: how long a round waits for a client.
        attempts: how often a round is begun before the federation gives up.
        keep: saved rounds that stay.
        evaluate: ask for the mean loss after every round, of clients that share it.
    """

    name: str
    clients: tuple[str, ...]
    folder: Path
    rounds: int = 10
    least: int = 2
    wait_s: float = 300.0
    round_timeout_s: float = 3600.0
    attempts: int = 3
    keep: int = 2
    evaluate: bool = False

    def __post_init__(self) -> None:
        _named("federation.name", self.name)
        for name in self.clients:
            _named("federation.clients", name)
        need(
            len(self.clients) >= 2 and len(set(self.clients)) == len(self.clients),
            "federation.clients must name two or more different clients",
        )
        _at_least(1, "federation", self, "rounds", "least", "attempts", "keep")
        _positive("federation", self, "wait_s", "round_timeout_s")
        need(
            self.least <= len(self.clients),
            f"federation.least is {self.least} of {len(self.clients)} clients; lower it",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StrategySection:
    """How updates become new global arrays.

    Attributes:
        kind: `fedavg`, `fedprox`, `fedadam` or `normfedavg`.
        weigh: clients count by their number of examples; otherwise all the same.
        proximal: mu of the proximal term in the clients' losses, with `fedprox`.
        learning_rate: of the aggregator, with `fedadam` and `normfedavg`.
        beta1: decay of the running mean of the updates, with `fedadam`.
        beta2: decay of the running mean of their squares, with `fedadam`.
        tau: added to the root of the second, with `fedadam`.
    """

    kind: Kind = Kind.FEDAVG
    weigh: bool = True
    proximal: float = 0.01
    learning_rate: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3

    def __post_init__(self) -> None:
        _at_least(0, "strategy", self, "proximal")
        _positive("strategy", self, "learning_rate", "tau")
        need(0 <= self.beta1 < 1 and 0 <= self.beta2 < 1, "strategy.beta1 and beta2 are in [0, 1)")


@dataclass(frozen=True, slots=True, kw_only=True)
class SecureSection:
    """Secure aggregation: the aggregator learns the sum of the updates only. All sides agree on it.

    Attributes:
        enabled: use it; a client with it refuses rounds without it.
        least: fewest clients whose updates may be summed; 3 or more.
        clip: numbers of an update lie within [-clip, clip], in steps of clip / 2^21.
        max_weight: largest number of examples of one client; the fewer, the finer the steps.
        timeout_s: how long each of the four exchanges of a round waits for a client.
        outside: what a client does with an update beyond `clip`: `scale` it as a whole, or
            `refuse` to send it.
    """

    enabled: bool = False
    least: int = 3
    clip: float = 1.0
    max_weight: float = 10000.0
    timeout_s: float = 600.0
    outside: Outside = Outside.SCALE

    def __post_init__(self) -> None:
        need(
            self.least >= 3,
            f"secure.least is {self.least}; the sum of fewer than 3 updates tells one client "
            "the other's",
        )
        _positive("secure", self, "clip", "max_weight", "timeout_s")

    def threshold(self, cohort: int) -> int:
        """How many of a cohort must answer for their sum to be unmasked: a majority at least.

        Two disjoint sets of so many cannot exist, so nobody gets both secrets of one client by
        asking half of the cohort for each.
        """
        return max(self.least, cohort // 2 + 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class PrivacySection:
    """Noise on unit updates (`normfedavg`), for the unit client.

    In the aggregator's file it is added once, to the sum: it protects from those who receive the
    adapter. In a client's file it is added to that client's update: it protects from the aggregator
    too.

    Attributes:
        mu: what one round costs; None for no noise.
        neighbours: `replace` one client's data by other data, or `remove` a client.
        ledger: file that rounds are charged to; None for the usual one.
        budget_mu: most that all rounds may cost; None for no limit.
    """

    mu: float | None = None
    neighbours: Neighbours = Neighbours.REPLACE
    ledger: Path | None = None
    budget_mu: float | None = None

    def __post_init__(self) -> None:
        for name in ("mu", "budget_mu"):
            value = getattr(self, name)
            need(
                value is None or (math.isfinite(value) and value > 0),
                f"privacy.{name} is {value}; give a positive number",
            )
        need(
            self.mu is not None or self.budget_mu is None,
            "privacy.budget_mu limits nothing without privacy.mu; give both",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class FederationConfig:
    """The aggregator's settings."""

    federation: FederationSection
    strategy: StrategySection = field(default_factory=StrategySection)
    secure: SecureSection = field(default_factory=SecureSection)
    privacy: PrivacySection = field(default_factory=PrivacySection)

    def __post_init__(self) -> None:
        section, secure = self.federation, self.secure
        need(
            not secure.enabled or secure.least <= len(section.clients),
            f"secure.least is {secure.least} and there are {len(section.clients)} clients",
        )
        weighs = self.strategy.weigh and self.strategy.kind is not Kind.NORMFEDAVG
        need(
            weighs or not secure.enabled or secure.max_weight == 1,
            "all clients weigh the same here; set secure.max_weight to 1 at all sides",
        )
        need(
            self.privacy.mu is None or self.strategy.kind is Kind.NORMFEDAVG,
            f"privacy.mu is of unit updates and strategy.kind is {self.strategy.kind}; "
            "use normfedavg",
        )

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a TOML file.

        Raises:
            ConfigError: it cannot be read, or a key or value in it cannot be used.
        """
        path = Path(path)
        return from_tables(cls, read_toml(path), path.parent)

    @property
    def least(self) -> int:
        """Fewest clients of a round."""
        secure = self.secure.least if self.secure.enabled else 1
        return max(self.federation.least, secure)


@dataclass(frozen=True, slots=True, kw_only=True)
class AggregatorSection:
    """Where clients reach the aggregator, and with which certificates.

    Attributes:
        address: host:port to listen on; the only one that is not on loopback.
        ca: certificate of the authority that signs clients.
        certificate: the aggregator's certificate, for its host.
        key: key of the certificate.
    """

    ca: Path
    certificate: Path
    key: Path
    address: str = "127.0.0.1:50061"


@dataclass(frozen=True, slots=True, kw_only=True)
class AggregatorConfig(FederationConfig):
    """The settings of an aggregator that clients reach over a network."""

    aggregator: AggregatorSection


def _named(key: str, text: str) -> None:
    need(
        _NAME.fullmatch(text) is not None,
        f"{key}: {text!r} is no name; use up to 63 of a-z, 0-9, dots, dashes and underscores",
    )


def _at_least(least: float, section: str, owner: Any, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        need(value >= least, f"{section}.{name} is {value}; give at least {least}")


def _positive(section: str, owner: Any, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        need(
            math.isfinite(value) and value > 0,
            f"{section}.{name} is {value}; give a positive number",
        )
