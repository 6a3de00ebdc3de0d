"""`fedsea inspect`: what a partition costs on each side and on the wire, before anything runs."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from fedsea.cli import screen
from fedsea.cli.options import AsJson, Bottom, ClientDType, Model, Top

if TYPE_CHECKING:
    import torch

    from fedsea.model.checkpoint import Checkpoint
    from fedsea.model.inspection import Inspection, Side


def inspect(
    model: Model,
    bottom: Bottom = 1,
    top: Top = 1,
    dtype: Annotated[
        ClientDType, typer.Option(help="Number format; auto is the checkpoint's.")
    ] = ClientDType.AUTO,
    context: Annotated[
        int, typer.Option(help="Tokens of the sequence that memory and prompt are sized for.")
    ] = 2048,
    as_json: AsJson = False,
) -> None:
    """Show what each side of MODEL needs, and bytes on the wire.

    Parameters, bytes on disk and peak memory are known without loading anything.
    """
    with screen.bar(f"reading {Path(model).name}"):
        from fedsea.model.checkpoint import Checkpoint
        from fedsea.model.inspection import inspect_model
        from fedsea.model.partition import Partition

        checkpoint = Checkpoint.open(model)
        found = inspect_model(
            checkpoint, Partition(bottom, top), _dtype(dtype, checkpoint), context
        )
    if as_json:
        screen.write_json(_summary(found))
        return
    screen.out.print(_header(found), soft_wrap=True, markup=False)
    screen.out.print(_sides(found))
    screen.out.print(_wire(found))


def bytes_on_wire(found: Inspection) -> dict[str, dict[str, int]]:
    """Bytes of rows per codec of floats: one token each way, and a prompt of `context` tokens.

    Of a prompt all rows come back when the top has blocks, which need them, else the last one.
    """
    from fedsea.wire.codecs import Codec

    back = found.context if found.partition.top else 1
    return {
        codec.value: {
            "token_up": codec.row_bytes(found.hidden_size),
            "token_down": codec.row_bytes(found.hidden_size),
            "prompt_up": found.context * codec.row_bytes(found.hidden_size),
            "prompt_down": back * codec.row_bytes(found.hidden_size),
        }
        for codec in Codec
        if codec is not Codec.COUNTS
    }


def _dtype(choice: ClientDType, checkpoint: Checkpoint) -> torch.dtype:
    import torch

    from fedsea.server.loading import DTYPES

    if choice is not ClientDType.AUTO:
        return DTYPES[choice.value]
    stored = getattr(checkpoint.config, "dtype", None)
    return stored if isinstance(stored, torch.dtype) else torch.float32


def _header(found: Inspection) -> str:
    return (
        f"{found.name}: {found.family}, {found.num_blocks} blocks, hidden size "
        f"{found.hidden_size}, stored as {', '.join(found.stored_dtypes)}, "
        f"fingerprint {found.fingerprint[:12]}"
    )


def _sides(found: Inspection) -> Table:
    dtype = str(found.dtype).removeprefix("torch.")
    table = screen.table(
        f"in {dtype}, one sequence of {found.context} tokens", "", "client", "server"
    )
    sides = (found.client, found.server)
    rows: list[tuple[str, list[str]]] = [
        ("blocks", [_blocks(side) for side in sides]),
        ("parameters", [f"{side.parameters:,}" for side in sides]),
        ("on disk", [screen.bytes_text(side.disk) for side in sides]),
        ("memory at peak", [screen.bytes_text(side.memory.peak) for side in sides]),
        ("  weights", [screen.bytes_text(side.memory.weights) for side in sides]),
        ("  KV cache", [screen.bytes_text(side.memory.kv) for side in sides]),
        ("  activations", [screen.bytes_text(side.memory.activations) for side in sides]),
        ("  Python and torch", [screen.bytes_text(side.memory.runtime) for side in sides]),
    ]
    for name, values in rows:
        table.add_row(name, *values)
    return table


def _blocks(side: Side) -> str:
    return ", ".join(str(span) for span in side.spans if len(span)) or "none"


def _wire(found: Inspection) -> Table:
    table = screen.table(
        f"bytes of rows on the wire; the prompt has {found.context} tokens",
        "codec",
        "token up",
        "token down",
        "prompt up",
        "prompt down",
    )
    for codec, sizes in bytes_on_wire(found).items():
        table.add_row(codec, *(screen.bytes_text(size) for size in sizes.values()))
    return table


def _summary(found: Inspection) -> dict[str, Any]:
    return {
        "name": found.name,
        "family": found.family,
        "fingerprint": found.fingerprint,
        "stored_dtypes": found.stored_dtypes,
        "num_blocks": found.num_blocks,
        "hidden_size": found.hidden_size,
        "partition": asdict(found.partition),
        "dtype": str(found.dtype).removeprefix("torch."),
        "context": found.context,
        "client": _side_summary(found.client),
        "server": _side_summary(found.server),
        "wire": bytes_on_wire(found),
    }


def _side_summary(side: Side) -> dict[str, Any]:
    return {
        "spans": [str(span) for span in side.spans],
        "parameters": side.parameters,
        "disk": side.disk,
        "memory": {**asdict(side.memory), "peak": side.memory.peak},
    }
