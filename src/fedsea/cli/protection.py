"""Options of the mechanism that rows go through, and the lines that say what it promises and costs."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedsea.cli import screen
from fedsea.cli.options import ConnectionOptions, only_tenant
from fedsea.errors import ConfigError

if TYPE_CHECKING:
    from fedsea.client.generation import Completion
    from fedsea.client.llm import LLM
    from fedsea.client.protection import Protection

_PANEL = "Privacy"
PLAIN = "plain"


LedgerFile = Annotated[
    Path | None,
    typer.Option(
        help="File that counts what was spent.",
        envvar="FEDSEA_LEDGER",
        show_default="of this user",
        rich_help_panel=_PANEL,
    ),
]
Delta = Annotated[
    float | None,
    typer.Option(
        help="At which epsilon is shown and the budget holds.",
        show_default="1e-05",
        rich_help_panel=_PANEL,
    ),
]


class PrivacyUnit(StrEnum):
    """What a guarantee protects."""

    TOKEN = "token"  # noqa: S105 - a unit of text
    PROMPT = "prompt"
    RECORD = "record"


@dataclass(frozen=True, slots=True)
class ProtectionOptions:
    """How rows are protected before they leave; None leaves the library's default."""

    mechanism: Annotated[
        str,
        typer.Option(
            help="What is done to rows before they leave, as NAME:KEY=VALUE,...; plain for nothing.",
            rich_help_panel=_PANEL,
        ),
    ] = PLAIN
    unit: Annotated[
        PrivacyUnit | None,
        typer.Option(
            help="What the guarantee protects; token needs --bottom 0.",
            show_default="prompt",
            rich_help_panel=_PANEL,
        ),
    ] = None
    record: Annotated[
        str | None,
        typer.Option(
            help="Name of the record that the text belongs to, for --unit record.",
            show_default=False,
            rich_help_panel=_PANEL,
        ),
    ] = None
    ledger: LedgerFile = None
    epsilon: Annotated[
        float | None,
        typer.Option(
            help="Budget of the account: nothing is sent beyond it.",
            show_default="what the ledger keeps",
            rich_help_panel=_PANEL,
        ),
    ] = None
    delta: Delta = None
    public_prefix: Annotated[
        str | None,
        typer.Option(
            help="Text that every prompt may begin with and that is no secret, or a number of "
            "tokens; its rows cost nothing.",
            show_default="the begin-of-text token",
            rich_help_panel=_PANEL,
        ),
    ] = None
    projection: Annotated[
        Path | None,
        typer.Option(
            help="File whose encoder makes rows narrow first.",
            show_default=False,
            rich_help_panel=_PANEL,
        ),
    ] = None
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="File with public statistics; rows are clipped around their mean.",
            show_default=False,
            rich_help_panel=_PANEL,
        ),
    ] = None
    denoiser: Annotated[
        Path | None,
        typer.Option(
            help="File of a denoiser that restores what comes back.",
            show_default=False,
            rich_help_panel=_PANEL,
        ),
    ] = None

    def chosen(self, connection: ConnectionOptions) -> Protection | None:
        """The same for the library; None in the mode plain.

        Raises:
            ConfigError: options without a mechanism, or values out of range.
        """
        given = {
            "unit": None if self.unit is None else self.unit.value,
            "record": self.record,
            "delta": self.delta,
            "public_prefix": prefix_of(self.public_prefix),
            "projection": self.projection,
            "calibration": self.calibration,
            "denoiser": self.denoiser,
        }
        named = {name: value for name, value in given.items() if value is not None}
        if self.mechanism == PLAIN:
            unused = [*named, *(["epsilon"] if self.epsilon is not None else [])]
            if unused:
                raise ConfigError(
                    f"--{unused[0].replace('_', '-')} is given without a mechanism, and rows would "
                    "leave as they are: give --mechanism"
                )
            return None
        from fedsea.client.protection import Protection
        from fedsea.privacy.accounts import DEFAULT_DELTA, Budget

        delta = DEFAULT_DELTA if self.delta is None else self.delta
        budget = None if self.epsilon is None else Budget(self.epsilon, delta)
        return Protection(
            mechanism=self.mechanism,
            ledger=self.ledger,
            tenant=tenant_of(connection),
            budget=budget,
            **named,  # type: ignore[arg-type]  # each value belongs to its field
        )


def tenant_of(connection: ConnectionOptions) -> str:
    """Whose account is charged: the tenant that the server sees, where options name one."""
    from fedsea.client.protection import DEFAULT_TENANT

    if connection.tenant is not None:
        return connection.tenant
    return DEFAULT_TENANT if connection.certs is None else only_tenant(connection.certs)


def show_mode(llm: LLM) -> None:
    """A line with the mode and what it guarantees."""
    screen.detail(llm.describe_mode())


def show_spent(completion: Completion) -> None:
    """A line with what an answer was charged; nothing in the mode plain."""
    if completion.spent is not None:
        screen.detail(f"privacy: {completion.spent.describe()}")


def summary_of(llm: LLM, completion: Completion) -> dict[str, Any]:
    """The mode and the charges, for programs."""
    spent = completion.spent
    if spent is None:
        return {"mode": llm.mode.value, "privacy": None}
    loss = spent.composed()
    policy = llm.privacy
    assert policy is not None
    return {
        "mode": llm.mode.value,
        "privacy": {
            "mechanism": policy.mechanism.spec(),
            "unit": spent.unit.value,
            "releases": spent.releases,
            "delta": spent.delta,
            "mu": None if loss is None else loss.mu(),
            "epsilon": None if loss is None else loss.epsilon(spent.delta),
        },
    }


def prefix_of(text: str | None) -> str | int | None:
    """A text, or a number of tokens, as an option gives it."""
    return int(text) if text is not None and text.isdecimal() else text
