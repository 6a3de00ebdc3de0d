"""`fedsea adapter`: LoRA adapters in parts, one for each side, and whole again."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from fedsea.cli import screen
from fedsea.cli.options import Bottom, Top

# More blocks than any model has: reads all of an adapter.
_ALL_BLOCKS = 1 << 16

app = typer.Typer(
    name="adapter", no_args_is_help=True, help="Cut LoRA adapters into parts, and join parts."
)


class Part(StrEnum):
    """Whose part of an adapter is written."""

    CLIENT = "client"
    TRUNK = "trunk"


@app.command()
def export(
    adapter: Annotated[
        Path, typer.Argument(help="Folder of a LoRA adapter in PEFT's format.", show_default=False)
    ],
    out: Annotated[Path, typer.Argument(help="Folder for the part.", show_default=False)],
    model: Annotated[
        str, typer.Option(help="The model that it is for: folder or hub id.", show_default=False)
    ],
    part: Annotated[
        Part, typer.Option(help="Whose blocks: those of the client, or the trunk's.")
    ] = Part.TRUNK,
    bottom: Bottom = 1,
    top: Top = 1,
) -> None:
    """Write the part of ADAPTER that one side needs.

    Give the provider the trunk's part and keep the rest.
    """
    from fedsea.model.adapters import read_adapter, write_adapter
    from fedsea.model.checkpoint import Checkpoint
    from fedsea.model.partition import Partition

    blocks = Checkpoint.open(model).num_blocks
    partition = Partition(bottom, top)
    trunk = partition.trunk_span(blocks)
    spans = (
        (trunk,) if part is Part.TRUNK else (partition.bottom_span(), partition.top_span(blocks))
    )
    parts = [read_adapter(adapter, span) for span in spans]
    write_adapter(out, parts, Path(model).name)
    changed = sum(len(each.factors) for each in parts)
    names = ", ".join(str(span) for span in spans if len(span)) or "none"
    screen.write(f"{out}: {changed} linears of blocks {names}\n")


@app.command()
def merge(
    out: Annotated[Path, typer.Argument(help="Folder for the whole.", show_default=False)],
    parts: Annotated[
        list[Path], typer.Argument(help="Folders of the parts, of any number.", show_default=False)
    ],
) -> None:
    """Join PARTS of one adapter, which PEFT then loads on the unsplit model."""
    from fedsea.model.adapters import base_model, read_adapter, write_adapter
    from fedsea.model.partition import Span

    whole = [read_adapter(part, Span(0, _ALL_BLOCKS)) for part in parts]
    write_adapter(out, whole, base_model(parts[0]))
    screen.write(f"{out}: {sum(len(part.factors) for part in whole)} linears\n")
