"""The commands together: what `fedsea` offers, and how errors end a command."""

from __future__ import annotations

import logging
import os
import warnings
from importlib.metadata import version as version_of
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from fedsea.cli import (
    INTERRUPTED,
    adapter,
    bench,
    certs,
    chat,
    demo,
    evaluate,
    federate,
    finetune,
    generate,
    inspection,
    privacy,
    redteam,
    screen,
    serve,
    split,
)
from fedsea.errors import FedseaError

SHOWN_VERSIONS = ("fedsea", "torch", "transformers", "grpcio", "protobuf")

_EPILOG = "Begin with `fedsea demo`. Each command has its own --help."


class _Commands(TyperGroup):
    """Ends a command that fails with one line on standard error and the error's exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except FedseaError as error:
            if ctx.params["debug"]:
                raise
            screen.fail(str(error))
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None


app = typer.Typer(
    cls=_Commands,
    name="fedsea",
    help="Run a large language model of which only the outer blocks are on your own machine.",
    epilog=_EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fedsea {version_of('fedsea')}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks, warnings and details of the client.")
    ] = False,
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True),
    ] = False,
) -> None:
    """Options of all commands."""
    del version
    logging.basicConfig(handlers=[screen.Notices()])
    if debug:
        logging.getLogger("fedsea").setLevel(logging.DEBUG)
    else:
        warnings.simplefilter("ignore")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


app.command("demo")(demo.demo)
app.command("serve")(serve.serve)
app.command("generate")(generate.generate)
app.command("chat")(chat.chat)
app.command("finetune")(finetune.finetune)
app.add_typer(federate.app, name="federate")
app.add_typer(certs.app, name="certs")
app.command("inspect")(inspection.inspect)
app.command("split")(split.split)
app.add_typer(adapter.app, name="adapter")
app.command("evaluate")(evaluate.evaluate)
app.command("bench")(bench.bench)
app.command("redteam")(redteam.redteam)
app.add_typer(privacy.app, name="privacy")


@app.command("version")
def show_versions() -> None:
    """Show the versions of fedsea and of what it runs on."""
    for name in SHOWN_VERSIONS:
        typer.echo(f"{name:<13}{version_of(name)}")
