"""`fedsea bench`: what a live server gives to one client."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from fedsea.cli import screen
from fedsea.cli.options import AsJson, ClientModelOptions, ConnectionOptions, Model, flattened

if TYPE_CHECKING:
    from fedsea.cli.measurement import Measurement, Spread

_KEPT_MESSAGES = 65536


@flattened
def bench(
    model: Model,
    connection: ConnectionOptions,
    parts: ClientModelOptions,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 128,
    new_tokens: Annotated[int, typer.Option(help="Tokens of each answer.")] = 64,
    rounds: Annotated[int, typer.Option(help="Answers to measure, after one to warm up.")] = 5,
    seconds: Annotated[float, typer.Option(help="Begin no further answer after so long.")] = 30.0,
    as_json: AsJson = False,
) -> None:
    """Measure a live server: speed, and where a token's time goes.

    One client, one request at a time. `make bench` in the repository measures all the rest.
    """
    from fedsea.transport.recording import Recorder

    recorder = Recorder(_KEPT_MESSAGES)
    with screen.loading(f"loading {Path(model).name}"):
        llm = parts.connect(model, connection, screen.notice, recorder)
        from fedsea.cli.measurement import measure

    with llm, screen.bar("measuring") as advance:
        for found in measure(
            llm,
            recorder,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            rounds=rounds,
            seconds=seconds,
        ):
            advance(found.rounds, rounds)
            measurement = found
    if as_json:
        screen.write_json(_summary(measurement))
    else:
        screen.out.print(_table(measurement))


def _spreads(found: Measurement) -> dict[str, tuple[str, Spread]]:
    from fedsea.cli.measurement import Spread

    return {
        "first_token_seconds": ("time to first token", Spread.of(found.first_token)),
        "token_seconds": ("each further token", found.spread(lambda step: step.total)),
        "client_seconds": ("  blocks of this side", found.spread(lambda step: step.client)),
        "server_seconds": ("  blocks of the server", found.spread(lambda step: step.server)),
        "wire_seconds": ("  queue and wire", found.spread(lambda step: step.wire)),
    }


def _summary(found: Measurement) -> dict[str, Any]:
    from fedsea.cli.measurement import Spread

    return {
        "prompt_tokens": found.prompt_tokens,
        "new_tokens": found.new_tokens,
        "rounds": found.rounds,
        "tokens_per_second": asdict(Spread.of(found.tokens_per_second)),
        **{key: asdict(spread) for key, (_, spread) in _spreads(found).items()},
        "bytes_per_token": {
            "up": found.spread(lambda step: step.bytes_up).median,
            "down": found.spread(lambda step: step.bytes_down).median,
        },
    }


def _table(found: Measurement) -> Table:
    from fedsea.cli.measurement import Spread

    table = screen.table(
        f"{found.prompt_tokens} tokens in, {found.new_tokens} out, {found.rounds} times",
        "",
        "median",
        "least",
        "greatest",
    )
    speed = Spread.of(found.tokens_per_second)
    table.add_row(
        "tokens/s", *(f"{value:.1f}" for value in (speed.median, speed.least, speed.greatest))
    )
    for name, spread in _spreads(found).values():
        times = (spread.median, spread.least, spread.greatest)
        table.add_row(name, *(screen.seconds_text(value) for value in times))
    for name, part in (
        ("bytes up per token", found.spread(lambda step: step.bytes_up)),
        ("bytes down per token", found.spread(lambda step: step.bytes_down)),
    ):
        sizes = (part.median, part.least, part.greatest)
        table.add_row(name, *(f"{value:,.0f}" for value in sizes))
    return table
