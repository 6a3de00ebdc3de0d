"""One data owner's settings, and what they make: a model, its training, and a client.

A client's TOML file has the sections of `fedsea finetune` ([run], [parts], [lora], [data],
[training]) and, for the federation, [client], [secure] and [privacy].
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
from fedsea.errors import ConfigError
from fedsea.federated.config import Neighbours, PrivacySection, SecureSection
from fedsea.federated.local import LocalClient, Policy
from fedsea.federated.training import SplitTraining
from fedsea.federated.unit_update import account_of, mechanism_of
from fedsea.privacy.ledger import Ledger, default_path
from fedsea.settings import need
from fedsea.transport.credentials import ClientTLS, check_tenant

_OWN: Final = ("client", "secure", "privacy")
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
class ClientConfig:
    """All settings of one client."""

    client: ClientSection
    finetune: FinetuneConfig
    secure: SecureSection = field(default_factory=SecureSection)
    privacy: PrivacySection = field(default_factory=PrivacySection)

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
    """

    def __init__(
        self, config: ClientConfig, notice: Tell | None = None, servers: Servers | None = None
    ) -> None:
        self._stack = ExitStack()
        run = Finetuning(config.finetune)
        section = config.client
        if servers is None:
            need(bool(section.servers), "client.servers names no server of the trunk; name one")
            servers = section.servers
        try:
            self.model = self._stack.enter_context(
                run.connect(servers, tls=section.tls, on_notice=notice)
            )
            evaluation = () if run.evaluation_set is None else run.evaluation_set.examples
            self.training = SplitTraining(
                self.model, config.finetune.training, run.train_set.examples, evaluation
            )
            ledger = self._ledger(config.privacy)
            mechanism = mechanism_of(config.privacy)
            protection = None
            if mechanism is not None and ledger is not None:
                account = account_of(ledger, section.name, config.privacy, mechanism)
                protection = mechanism, account
            self.client = LocalClient(
                section.name,
                self.training,
                policy_of(config, self.training),
                config.finetune.run.out,
                protection,
            )
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Disconnect from the server."""
        self._stack.close()

    def _ledger(self, section: PrivacySection) -> Ledger | None:
        if section.mu is None:
            return None
        return self._stack.enter_context(Ledger.open(section.ledger or default_path()))


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
