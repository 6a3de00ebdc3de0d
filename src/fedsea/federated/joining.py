"""One data owner's settings, and what they make: a model, its training, and a client.

A client's TOML file has the sections of `fedsea finetune` ([run], [parts], [lora], [data],
[training]) and, for the federation, [client], [secure], [privacy] and [protection].
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Self

from fedsea import settings
from fedsea.client.connecting import Servers
from fedsea.client.finetuning import FinetuneConfig, Finetuning
from fedsea.client.link import Tell
from fedsea.client.training_protection import TrainingProtection
from fedsea.errors import ConfigError
from fedsea.federated.config import Neighbours, PrivacySection, SecureSection
from fedsea.federated.local import LocalClient, Policy
from fedsea.federated.training import SplitTraining
from fedsea.federated.unit_update import UnitUpdate, account_of, mechanism_of
from fedsea.privacy.accounts import DEFAULT_DELTA, Budget
from fedsea.privacy.ledger import Account, Ledger, default_path
from fedsea.settings import need
from fedsea.transport.credentials import ClientTLS, check_tenant

_OWN: Final = ("client", "secure", "privacy", "protection")
PLAIN: Final = "plain"
_NOT_USED: Final = ("evaluate_every", "patience", "save_every")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientSection:
    """Who this client is, and whom it talks to.

    Attributes:
        name: as in its certificate and in `federation.clients`.
        aggregator: host:port of the aggregator.
        servers: host:port of the servers of the trunk, in order of preference.
        ca: certificate of the authority that signs aggregator and servers.
        certificate: this client's certificate.
        key: key of the certificate.
        personal: parts that are not averaged and never leave: `bottom`, `top`.
        share_loss: the aggregator may be told the mean loss on the examples for evaluation.
    """

    name: str
    aggregator: str = "127.0.0.1:50061"
    servers: tuple[str, ...] = ()
    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    personal: tuple[str, ...] = ()
    share_loss: bool = False

    def __post_init__(self) -> None:
        check_tenant(self.name)

    @property
    def tls(self) -> ClientTLS:
        """Its certificate.

        Raises:
            ConfigError: a file is not named.
        """
        if self.ca is None or self.certificate is None or self.key is None:
            raise ConfigError("client.ca, client.certificate and client.key are needed; name them")
        return ClientTLS(self.ca, self.certificate, self.key)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProtectionSection:
    """What is done to rows and gradients before they leave for the servers of the trunk.

    It protects the data as a whole: bottom or top is trained here, and learns from every example.

    Attributes:
        rows: a mechanism as NAME:KEY=VALUE,...; `plain` for none.
        gradients: the same for gradients, which hold the labels.
        record: whose data it is, in the ledger; the name of the adapter unless given.
        ledger: file that counts what was spent; that of this user unless given.
        epsilon: budget of the account: nothing leaves that would exceed it.
        delta: at which epsilon is shown and the budget holds.
    """

    rows: str = PLAIN
    gradients: str = PLAIN
    record: str | None = None
    ledger: Path | None = None
    epsilon: float | None = None
    delta: float = DEFAULT_DELTA

    def __post_init__(self) -> None:
        unused = (self.record, self.ledger, self.epsilon, self.delta)
        need(
            self.is_given or unused == (None, None, None, DEFAULT_DELTA),
            "protection has no mechanism, and rows and gradients would leave as they are: give "
            "protection.rows and protection.gradients",
        )

    @property
    def is_given(self) -> bool:
        """Whether there is any mechanism."""
        return (self.rows, self.gradients) != (PLAIN, PLAIN)

    def chosen(self, tenant: str, adapter: str) -> TrainingProtection | None:
        """The same for the library; None where there is no mechanism.

        Args:
            tenant: whose account is charged.
            adapter: name of what is trained.

        Raises:
            ConfigError: a value is out of range.
        """
        if not self.is_given:
            return None
        return TrainingProtection(
            rows=None if self.rows == PLAIN else self.rows,
            gradients=None if self.gradients == PLAIN else self.gradients,
            record=adapter if self.record is None else self.record,
            tenant=tenant,
            ledger=self.ledger,
            budget=None if self.epsilon is None else Budget(self.epsilon, self.delta),
            delta=self.delta,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientConfig:
    """All settings of one client."""

    client: ClientSection
    finetune: FinetuneConfig
    secure: SecureSection = field(default_factory=SecureSection)
    privacy: PrivacySection = field(default_factory=PrivacySection)
    protection: ProtectionSection = field(default_factory=ProtectionSection)

    def __post_init__(self) -> None:
        need(
            self.finetune.lora.prompt_rows == 0,
            "lora.prompt_rows: soft prompts take no part in a federation; leave them out",
        )
        for key in _NOT_USED:
            need(
                getattr(self.finetune.training, key) is None,
                f"training.{key} is not used in a federation: the aggregator says when rounds are "
                "evaluated and saved; leave it out",
            )
        need(not self.finetune.run.tensorboard, "run.tensorboard is not used in a federation")
        need(
            self.privacy.mu is None or self.privacy.neighbours is Neighbours.REPLACE,
            "privacy.neighbours=remove is for the aggregator's file: to the aggregator it is no "
            "secret that a client takes part; use replace",
        )
        unknown = sorted(set(self.client.personal) - {"bottom", "top"})
        need(not unknown, f"client.personal names {', '.join(unknown)}; use bottom and top")

    @classmethod
    def load(cls, path: str | Path) -> ClientConfig:
        """Read a TOML file.

        Raises:
            ConfigError: it cannot be read, or a key or value in it cannot be used.
        """
        path = Path(path)
        return cls.from_table(settings.read_toml(path), path.parent)

    @classmethod
    def from_table(cls, table: settings.Table, base: Path | None = None) -> ClientConfig:
        """Settings out of nested tables; paths are relative to `base`.

        Raises:
            ConfigError: a key or value cannot be used.
        """
        rest = {name: value for name, value in table.items() if name not in _OWN}
        return cls(
            client=settings.section(
                ClientSection, "client", settings.table_at(table, "client"), base
            ),
            finetune=FinetuneConfig.from_table(rest, base=base),
            secure=settings.section(
                SecureSection, "secure", settings.table_at(table, "secure"), base
            ),
            privacy=settings.section(
                PrivacySection, "privacy", settings.table_at(table, "privacy"), base
            ),
            protection=settings.section(
                ProtectionSection, "protection", settings.table_at(table, "protection"), base
            ),
        )


class Joined:
    """A client with its model and data; use it as a context manager, or call `close`.

    Args:
        config: its settings.
        notice: is told what people should know.
        servers: of the trunk; None for those of the settings.

    Raises:
        FedseaError: model, data or ledger cannot be used, or no server takes the session.

    Attributes:
        client: answers the requests of the federation.
        training: what it trains with.
        model: what is trained.
        guarded: by which rules rows and gradients leave for the trunk; None for as they are.
    """

    def __init__(
        self, config: ClientConfig, notice: Tell | None = None, servers: Servers | None = None
    ) -> None:
        run = Finetuning(config.finetune)
        section = config.client
        if servers is None:
            need(bool(section.servers), "client.servers names no server of the trunk; name one")
            servers = section.servers
        chosen = config.protection.chosen(section.name, config.finetune.run.adapter)
        with ExitStack() as stack:
            self.guarded = None if chosen is None else run.protect(chosen)
            if self.guarded is not None:
                stack.callback(self.guarded.close)
            self.model = stack.enter_context(
                run.connect(servers, tls=section.tls, on_notice=notice, policy=self.guarded)
            )
            evaluation = () if run.evaluation_set is None else run.evaluation_set.examples
            self.training = SplitTraining(
                self.model, config.finetune.training, run.train_set.examples, evaluation
            )
            self.client = LocalClient(
                section.name,
                self.training,
                policy_of(config, self.training),
                config.finetune.run.out,
                _noise_of(config, stack),
            )
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Disconnect from the server."""
        self._stack.close()


def _noise_of(config: ClientConfig, stack: ExitStack) -> tuple[UnitUpdate, Account] | None:
    """What makes this client's updates private, and its account; the stack closes the ledger."""
    mechanism = mechanism_of(config.privacy)
    if mechanism is None:
        return None
    ledger = stack.enter_context(Ledger.open(config.privacy.ledger or default_path()))
    return mechanism, account_of(ledger, config.client.name, config.privacy, mechanism)


def policy_of(config: ClientConfig, training: SplitTraining) -> Policy:
    """What the settings allow."""
    personal = frozenset[str]().union(*(training.part(part) for part in config.client.personal))
    frozen: frozenset[str] = frozenset()
    if config.finetune.lora.freeze_a:
        frozen = training.frozen()
    secure = config.secure if config.secure.enabled else None
    return Policy(
        personal=personal,
        frozen=frozen,
        clip=None if secure is None else secure.clip,
        outside=config.secure.outside,
        max_weight=None if secure is None else secure.max_weight,
        share_loss=config.client.share_loss,
    )
