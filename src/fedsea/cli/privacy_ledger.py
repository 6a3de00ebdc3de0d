"""`fedsea privacy report` and `budget`: what the ledger holds, and what it may come to hold."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from fedsea.cli import screen
from fedsea.cli.protection import PrivacyUnit
from fedsea.errors import ConfigError

if TYPE_CHECKING:
    from fedsea.privacy.accounts import Budget, Statement

_STANDARD_OUTPUT = Path("-")

LedgerFile = Annotated[
    Path | None,
    typer.Option(
        "--ledger",
        help="File of the ledger.",
        metavar="FILE",
        envvar="FEDSEA_LEDGER",
        show_default="that of this user",
    ),
]

Delta = Annotated[float, typer.Option(help="Delta at which epsilon is given.")]


def register(app: typer.Typer) -> None:
    """Add the commands to `fedsea privacy`."""
    app.command("report")(report)
    app.command("budget")(budget)


def report(
    ledger: LedgerFile = None,
    delta: Delta = 1e-5,
    prior: Annotated[
        float, typer.Option(help="Chance of guessing right, for the bound on recovery.")
    ] = 0.01,
    to_json: Annotated[
        Path | None,
        typer.Option(
            "--json",
            help="Write one JSON object to FILE instead; - is standard output.",
            metavar="FILE",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Show what was released for whom, what that amounts to, and what is left.

    Recovery is the most likely recovery of what is protected, whoever attacks, given the chance of
    guessing it without the rows.
    """
    from fedsea.privacy.ledger import Ledger, default_path
    from fedsea.privacy.loss import check_delta, check_prior

    check_delta(delta)
    check_prior(prior)
    path = ledger or default_path()
    with Ledger.open(path, create=False) as opened:
        statements = opened.statements()
    if to_json is not None:
        accounts = [summary(statement, delta, prior) for statement in statements]
        _write_json({"ledger": str(path), "accounts": accounts}, to_json)
    elif statements:
        _show(statements, delta, prior)
    else:
        screen.write("nothing was released yet\n")


def budget(
    tenant: Annotated[str, typer.Argument(help="Whose account.", show_default=False)],
    unit: Annotated[PrivacyUnit, typer.Option(help="What it protects.", show_default=False)],
    record: Annotated[
        str | None, typer.Option(help="Which record, for unit record.", show_default=False)
    ] = None,
    epsilon: Annotated[
        float | None, typer.Option(help="Most epsilon, at --delta.", show_default=False)
    ] = None,
    delta: Delta = 1e-5,
    mu: Annotated[float | None, typer.Option(help="Most mu.", show_default=False)] = None,
    unlimited: Annotated[
        bool, typer.Option("--unlimited", help="Count on, and refuse nothing.")
    ] = False,
    ledger: LedgerFile = None,
) -> None:
    """Change the most that an account may spend. What was spent stays spent."""
    from fedsea.privacy.accounts import Budget
    from fedsea.privacy.ledger import Ledger, default_path
    from fedsea.privacy.mechanism import Unit

    if unlimited == (epsilon is not None or mu is not None):
        raise ConfigError("give either --unlimited, or --epsilon or --mu")
    made = None if unlimited else Budget(epsilon=epsilon, delta=delta, mu=mu)
    with Ledger.open(ledger or default_path(), create=False) as opened:
        opened.set_budget(tenant, Unit(unit.value), record, made)
    screen.write(f"{tenant}, {unit.value}: {made or 'no budget'}\n")


def summary(statement: Statement, delta: float, prior: float) -> dict[str, Any]:
    """An account for programs; what has no bound is null."""
    spent = statement.spending()
    return {
        "tenant": statement.tenant,
        "unit": statement.unit.value,
        "record": statement.record or None,
        "opened": statement.opened,
        "releases": statement.releases,
        "differentially_private": not spent.is_unbounded,
        "mu": _finite(spent.mu()),
        "epsilon": _finite(spent.epsilon(delta)),
        "delta": delta,
        "recovery_bound": spent.recovery(prior),
        "prior": prior,
        "budget": _budget(statement.budget),
        "mechanisms": [
            {
                "mechanism": charge.spec,
                "releases": charge.releases,
                "held": charge.held,
                "left": statement.left(charge.spec),
                "last": charge.last,
            }
            for charge in statement.charges
        ],
    }


def _show(statements: Sequence[Statement], delta: float, prior: float) -> None:
    accounts = screen.table(
        f"epsilon at delta {delta:g}; recovery where a guess is right {prior:.3g} of the time",
        *("account", "releases", "mu", "epsilon", "recovery", "budget"),
    )
    mechanisms = screen.table("by mechanism", "account", "releases", "held", "left")
    for table in (accounts, mechanisms):
        table.columns[0].overflow = "fold"
    for statement in statements:
        spent = statement.spending()
        named = f", {statement.record}" if statement.record else ""
        account = escape(f"{statement.tenant}, {statement.unit.value}{named}")
        accounts.add_row(
            account,
            f"{statement.releases:,}",
            screen.figure(spent.mu()),
            screen.figure(spent.epsilon(delta)),
            f"<= {spent.recovery(prior):.2%}",
            _limit(statement.budget, delta),
        )
        mechanisms.add_row(account)
        for charge in statement.charges:
            left = statement.left(charge.spec)
            mechanisms.add_row(
                f"  {escape(charge.spec)}",
                f"{charge.releases:,}",
                f"{charge.held:,}",
                "" if left is None else f"{left:,}",
            )
    screen.out.print(accounts)
    screen.out.print(mechanisms)
    if any(charge.held for statement in statements for charge in statement.charges):
        screen.detail("held: reserved by sessions that are open, or that ended without settling")


def _limit(budget: Budget | None, delta: float) -> str:
    if budget is None:
        return "none"
    if budget.mu is not None:
        return f"mu {budget.mu:g}"
    at = "" if budget.delta == delta else f" ({budget.delta:g})"
    return f"epsilon {budget.epsilon:g}{at}"


def _budget(found: Budget | None) -> dict[str, float | None] | None:
    if found is None:
        return None
    return {"epsilon": found.epsilon, "delta": found.delta, "mu": found.mu}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _write_json(value: dict[str, Any], path: Path) -> None:
    if path == _STANDARD_OUTPUT:
        screen.write_json(value)
        return
    try:
        path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror}): check it") from error
    screen.detail(f"written to {path}")
