"""Options of the mechanisms that rows and gradients go through in training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedsea.cli import screen
from fedsea.cli.options import ConnectionOptions
from fedsea.cli.protection import PLAIN, Delta, LedgerFile, prefix_of, tenant_of
from fedsea.errors import ConfigError

if TYPE_CHECKING:
    from fedsea.client.training_protection import TrainingPolicy, TrainingProtection
    from fedsea.privacy.mechanism import Mechanism

_PANEL = "Privacy"


@dataclass(frozen=True, slots=True)
class TrainingProtectionOptions:
    """How rows and gradients are protected in training; None leaves the library's default."""

    privacy: Annotated[
        str,
        typer.Option(
            help="What is done to rows before they leave, as NAME:KEY=VALUE,...; plain for nothing.",
            rich_help_panel=_PANEL,
        ),
    ] = PLAIN
    gradient_privacy: Annotated[
        str,
        typer.Option(
            help="The same for gradients, which hold the labels; gaussian with by=frobenius clips "
            "an example as a whole.",
            rich_help_panel=_PANEL,
        ),
    ] = PLAIN
    record: Annotated[
        str | None,
        typer.Option(
            help="Whose data it is, in the ledger: a data set or a person.",
            show_default="the name of the run",
            rich_help_panel=_PANEL,
        ),
    ] = None
    each_example: Annotated[
        bool,
        typer.Option(
            "--each-example",
            help="Every example is a record of its own; only where nothing but the trunk is trained.",
            rich_help_panel=_PANEL,
        ),
    ] = False
    ledger: LedgerFile = None
    epsilon: Annotated[
        float | None,
        typer.Option(
            help="Budget of the account: training stops before it is exceeded.",
            show_default="what the ledger keeps",
            rich_help_panel=_PANEL,
        ),
    ] = None
    delta: Delta = None
    public_prefix: Annotated[
        str | None,
        typer.Option(
            help="Text that every example may begin with and that is no secret, or a number of "
            "tokens; its rows cost nothing where the bottom is not trained.",
            show_default="the begin-of-text token",
            rich_help_panel=_PANEL,
        ),
    ] = None

    def chosen(self, connection: ConnectionOptions, run: str) -> TrainingProtection | None:
        """The same for the library; None where neither rows nor gradients are protected.

        Args:
            connection: says whose account is charged.
            run: name of the run.

        Raises:
            ConfigError: options without a mechanism, or values out of range.
        """
        if self.privacy == PLAIN and self.gradient_privacy == PLAIN:
            self._refuse_unused()
            return None
        from fedsea.client.protection import BOS
        from fedsea.client.training_protection import Record, TrainingProtection
        from fedsea.privacy.accounts import DEFAULT_DELTA, Budget

        delta = DEFAULT_DELTA if self.delta is None else self.delta
        prefix = prefix_of(self.public_prefix)
        return TrainingProtection(
            rows=None if self.privacy == PLAIN else self.privacy,
            gradients=None if self.gradient_privacy == PLAIN else self.gradient_privacy,
            record=run if self.record is None else self.record,
            of=Record.EXAMPLE if self.each_example else Record.DATA,
            tenant=tenant_of(connection),
            ledger=self.ledger,
            budget=None if self.epsilon is None else Budget(self.epsilon, delta),
            delta=delta,
            public_prefix=BOS if prefix is None else prefix,
        )

    def _refuse_unused(self) -> None:
        given = {
            "--record": self.record is not None,
            "--each-example": self.each_example,
            "--epsilon": self.epsilon is not None,
            "--delta": self.delta is not None,
            "--public-prefix": self.public_prefix is not None,
        }
        for option in (name for name, is_given in given.items() if is_given):
            raise ConfigError(
                f"{option} is given without a mechanism, and everything would leave as it is: give "
                "--privacy and --gradient-privacy"
            )


def show_training_privacy(policy: TrainingPolicy | None) -> None:
    """A line with what is done and what has been spent, or that nothing is protected.

    What leaks although something is protected is logged by the library, and so shown already.
    """
    from fedsea.client.training_protection import NOTHING_PROTECTED

    if policy is None:
        screen.notice(NOTHING_PROTECTED)
    else:
        screen.detail(f"privacy: {policy.describe()}")


def show_training_spent(policy: TrainingPolicy | None) -> None:
    """A line with what the account has spent by now; nothing without mechanisms."""
    if policy is not None:
        from fedsea.client.protection import account_line

        screen.detail(f"privacy: {account_line(policy.statement(), policy.delta)}")


def training_privacy_summary(policy: TrainingPolicy | None) -> dict[str, Any] | None:
    """What is done and what the account has spent, for programs; None without mechanisms."""
    if policy is None:
        return None
    statement = policy.statement()
    spending = statement.spending()
    bounded = not spending.is_unbounded
    return {
        "rows": _spec(policy.rows.mechanism),
        "gradients": _spec(policy.gradients.mechanism),
        "record": statement.record,
        "releases": statement.releases,
        "delta": policy.delta,
        "mu": spending.mu() if bounded else None,
        "epsilon": spending.epsilon(policy.delta) if bounded else None,
        "warning": policy.warning,
    }


def _spec(mechanism: Mechanism | None) -> str | None:
    return None if mechanism is None else mechanism.spec()
