"""`fedsea federate`: several data owners train one adapter, each on its own data."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedsea.cli import screen
from fedsea.cli.training_protection import show_training_privacy, show_training_spent
from fedsea.errors import ConfigError

if TYPE_CHECKING:
    from fedsea.federated.rounds import RoundReport

app = typer.Typer(
    name="federate",
    help="Train one adapter with other data owners, by averaging.",
    no_args_is_help=True,
)

Settings = Annotated[Path, typer.Argument(help="TOML file of the federation.", show_default=False)]


@app.command("run")
def run(settings: Settings) -> None:
    """Be the aggregator: wait for the clients, make all rounds, save the adapter after each.

    Stopped and started again, it goes on after the last round.
    """
    _needs_flower()
    from fedsea.federated.aggregator import Aggregator

    aggregator = Aggregator(settings)
    try:
        screen.write(f"waiting for clients at {aggregator.address}\n")
        with _until_sigterm():
            aggregator.run(_show, screen.notice)
        _done(aggregator.config.federation.folder, aggregator.config.federation.rounds)
    finally:
        aggregator.close()


@app.command("client")
def client(
    settings: Annotated[Path, typer.Argument(help="TOML file of this client.", show_default=False)],
) -> None:
    """Take part: train here, on this client's data, until the federation has ended."""
    _needs_flower()
    from fedsea.federated.joining import ClientConfig, Joined
    from fedsea.federated.participant import Participant
    from fedsea.transport.address import parse_address

    config = ClientConfig.load(settings)
    section = config.client
    if not config.protection.is_given:
        show_training_privacy(None)  # before anything is loaded, or leaves
    with screen.loading(f"loading {Path(config.finetune.run.model).name}"):
        joined = Joined(config, screen.notice)
    with joined:
        if joined.guarded is not None:
            show_training_privacy(joined.guarded)
        participant = Participant(
            joined.client,
            parse_address(section.aggregator),
            section.tls,
            config.secure,
            config.finetune.run.out,
            _trained,
        )
        try:
            screen.write(f"{section.name}: taking part at {section.aggregator}\n")
            with _until_sigterm():
                ended = participant.run(screen.notice)
        finally:
            participant.close()
        show_training_spent(joined.guarded)
    if ended:
        screen.write(f"the adapter is in {config.finetune.run.out / 'adapter'}\n")


@app.command("simulate")
def simulate(
    settings: Settings,
    clients: Annotated[
        list[Path],
        typer.Argument(help="TOML file of each client.", show_default=False),
    ],
) -> None:
    """Try a whole federation on this machine, with a server of the trunk and all clients."""
    _needs_flower()
    from fedsea.federated.config import FederationConfig
    from fedsea.federated.joining import ClientConfig
    from fedsea.federated.simulation import simulate as simulated

    config = FederationConfig.load(settings)
    simulated(config, [ClientConfig.load(path) for path in clients], _show, screen.notice)
    _done(config.federation.folder, config.federation.rounds)


def _needs_flower() -> None:
    """Say how to install Flower where it is missing, and keep it from speaking to anybody."""
    os.environ.update(FLWR_TELEMETRY_ENABLED="0", FLWR_DISABLE_UPDATE_CHECK="1")
    if find_spec("flwr") is None:
        raise ConfigError("Flower is not installed: pip install 'fedsea[federated]'")


@contextmanager
def _until_sigterm() -> Iterator[None]:
    """Let SIGTERM end the command as Ctrl-C does, so that what was started is ended too."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _trained(number: int, scaled: float) -> None:
    line = f"round {number}: trained here"
    if scaled < 1:
        line += f"; the update was scaled by {scaled:.3g} to the clip range"
    screen.write(f"{line}\n")


def _show(report: RoundReport) -> None:
    line = f"round {report.round} of {report.rounds}: {', '.join(report.clients)}"
    if report.missing:
        line += f"; without {', '.join(report.missing)}"
    if report.scaled:
        line += f"; {report.scaled} scaled to the clip range"
    if report.loss is not None:
        line += f"; loss {report.loss:.4f}"
    screen.write(f"{line}; {report.seconds:.1f} s\n")
    if report.privacy is not None:
        screen.detail(report.privacy)


def _done(folder: Path, rounds: int) -> None:
    screen.write(f"the adapter is in {folder / 'rounds' / f'step-{rounds:08d}'}\n")
