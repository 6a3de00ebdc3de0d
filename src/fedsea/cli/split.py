"""`fedsea split`: a checkpoint as two folders, for those who must not hold the rest."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from fedsea.cli import screen
from fedsea.cli.options import Bottom, Top

_OWNERS = {
    "client": "the data owner: bottom, top, embedding, head, tokenizer",
    "trunk": "the provider: the trunk's blocks and nothing of the text",
}


class Part(StrEnum):
    """Which bundles are written."""

    BOTH = "both"
    CLIENT = "client"
    TRUNK = "trunk"


def split(
    model: Annotated[
        str, typer.Argument(help="Folder of a whole checkpoint, or a hub id.", show_default=False)
    ],
    out: Annotated[
        Path, typer.Argument(help="New folder, which gets client/ and trunk/.", show_default=False)
    ],
    bottom: Bottom = 1,
    top: Top = 1,
    part: Annotated[Part, typer.Option(help="Write both bundles, or only one.")] = Part.BOTH,
) -> None:
    """Write one bundle of MODEL for each side.

    Neither side then holds what belongs to the other. A bundle is used like a checkpoint:
    `fedsea serve OUT/trunk`, `fedsea generate OUT/client`.
    """
    with screen.bar(f"splitting {Path(model).name}") as advance:
        from fedsea.model.bundles import split_checkpoint
        from fedsea.model.checkpoint import PARTS, Checkpoint
        from fedsea.model.partition import Partition

        checkpoint = Checkpoint.open(model)
        total = sum(tensor.size for tensor in checkpoint.tensors.values())
        copied = 0

        def count(size: int) -> None:
            nonlocal copied
            copied += size
            advance(copied, max(copied, total))

        bundles = split_checkpoint(
            checkpoint,
            Partition(bottom, top),
            out,
            parts=PARTS if part is Part.BOTH else (part.value,),
            on_bytes=count,
        )
    for bundle in bundles:
        blocks = ", ".join(str(span) for span in bundle.spans if len(span))
        screen.write(
            f"{bundle.folder}: blocks {blocks or 'none'}, {bundle.num_tensors} tensors, "
            f"{screen.bytes_text(bundle.size)}\n"
        )
        screen.detail(f"  -> {_OWNERS[bundle.part]}")
