"""`fedsea demo`: the packaged model over two processes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from fedsea.cli import screen
from fedsea.cli.protection import PLAIN

DIFFERENT = 1


def demo(
    kill: Annotated[
        bool,
        typer.Option("--kill/--no-kill", help="Kill the server in the middle of a second answer."),
    ] = True,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 240,
    model: Annotated[
        Path | None,
        typer.Option(help="Folder of another model.", show_default="the packaged one"),
    ] = None,
    mechanism: Annotated[
        str,
        typer.Option(help="What is done to rows before they leave; plain for nothing."),
    ] = PLAIN,
) -> None:
    """Split a small model over two processes and generate through it.

    Shows what crosses the wire, and that the tokens are those of the unsplit model. With a
    mechanism they are not: then it shows how many are, and what was charged.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with screen.out.status("starting"):
        from fedsea.demo import PROMPTS, model_path
        from fedsea.demo.run import DemoOptions, run
        from fedsea.model.partition import Partition

    options = DemoOptions(
        model=model or model_path(),
        partition=Partition(1, 1),
        prompt=PROMPTS[0],
        crash_prompt=PROMPTS[1] if kill else None,
        max_new_tokens=max_new_tokens,
        mechanism=None if mechanism == PLAIN else mechanism,
    )
    if not run(options, screen.out):
        raise typer.Exit(DIFFERENT)
