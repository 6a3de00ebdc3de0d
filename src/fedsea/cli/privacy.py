"""`fedsea privacy`: what a mechanism promises, costs and needs."""

from __future__ import annotations

import typer

from fedsea.cli import privacy_ledger, privacy_noise, privacy_training

app = typer.Typer(
    name="privacy",
    help="Plan, measure and account for what leaves this machine.",
    no_args_is_help=True,
)

privacy_noise.register(app)
privacy_ledger.register(app)
privacy_training.register(app)
