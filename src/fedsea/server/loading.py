"""From settings to blocks in memory: reads the checkpoint, sizes the KV pool."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from fedsea.errors import ConfigError, OutOfMemory, PartitionError
from fedsea.model.checkpoint import Checkpoint
from fedsea.model.compilation import compile_decode
from fedsea.model.inspection import available_memory, check_memory, trunk_weights
from fedsea.model.lora import adapt
from fedsea.model.partition import Span
from fedsea.model.projection import Projection
from fedsea.model.quantization import library_config
from fedsea.model.runner import SpanRunner
from fedsea.model.spans import BlockSpan, Placement, load_trunk
from fedsea.server.adapters import AdapterTable
from fedsea.server.config import MIN_ROWS, KVSection, ModelSection, ServerConfig, parse_bytes
from fedsea.server.prompts import PromptTable

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FREE_MEMORY_SHARE = 0.5
MAX_SEQUENCES_BY_DEFAULT = 64


@dataclass(frozen=True, slots=True)
class Trunk:
    """A loaded span with its KV pool, what it was loaded from, and what sessions may name.

    Projections are found by their fingerprint, adapters and soft prompts by name and tenant.
    """

    checkpoint: Checkpoint
    fingerprint: str
    span: Span
    runner: SpanRunner
    max_context: int
    projections: Mapping[str, Projection] = field(default_factory=dict)
    adapters: AdapterTable = field(default_factory=AdapterTable)
    prompts: PromptTable = field(default_factory=PromptTable)


def load(config: ServerConfig) -> Trunk:
    """Load the span that a configuration names.

    Raises:
        ConfigError: a setting does not fit this machine.
        ModelError: the checkpoint or the span cannot be used, or memory is too small.
    """
    placement = _placement(config.model)
    checkpoint = Checkpoint.open(config.server.model)
    span = _span(config.server.span, checkpoint)
    projections = _projections(config.model.projections, checkpoint, span, placement)
    needed = trunk_weights(checkpoint, span, placement.kept_dtype)
    check_memory(needed, f"the trunk, blocks {span},", placement.device)
    blocks = load_trunk(checkpoint, span, placement)
    context = config.kv.max_context or _trained_context(checkpoint)
    rows = _pool_rows(config.kv, blocks, placement, context)
    runner = SpanRunner(blocks, rows, placement, config.kv.page_rows)
    adapters = AdapterTable.load(config.adapters.named, blocks, placement)
    max_context = min(context, rows)
    prompts = PromptTable.load(config.prompts.named, checkpoint, span, placement, max_context)
    if config.model.compile:
        if config.training.folder is not None:
            # Adapters that come later find every linear wrapped: compiled code does not change.
            targets = sorted({place.target for place in blocks.linears()})
            adapt(blocks.blocks, span, blocks.adapters, targets)
        compile_decode(blocks)
    return Trunk(
        checkpoint=checkpoint,
        fingerprint=checkpoint.fingerprint(),
        span=span,
        runner=runner,
        max_context=max_context,
        projections=projections,
        adapters=adapters,
        prompts=prompts,
    )


def _placement(section: ModelSection) -> Placement:
    device = torch.device(section.device)
    backends = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not backends.get(device.type, True):
        raise ConfigError(f"model.device is {device}, which this machine does not have; use cpu")
    dtype = DTYPES[section.dtype]
    library_config(section.quantization, device, dtype)  # refuses what cannot be made
    return Placement(device, dtype, section.quantization)


def _span(text: str | None, checkpoint: Checkpoint) -> Span:
    """The span that was asked for, or the widest that the files hold."""
    num_blocks = checkpoint.num_blocks
    if text is not None:
        span = Span.parse(text)
    elif checkpoint.bundle is not None:
        span = checkpoint.bundle.partition.trunk_span(num_blocks)
    else:
        span = Span(0, num_blocks)
    if not len(span) or span.end > num_blocks:
        raise PartitionError(
            f"server.span {span} does not lie in a model of {num_blocks} blocks; "
            f"use FIRST:END with END at most {num_blocks}"
        )
    return span


def _projections(
    files: Sequence[Path], checkpoint: Checkpoint, span: Span, placement: Placement
) -> dict[str, Projection]:
    """The server's halves of projections, by fingerprint, on the device of the blocks.

    Raises:
        CheckpointError: a file is missing or corrupt.
        ConfigError, FingerprintMismatch: one has no decoder, or is for another model or cut.
    """
    loaded = {}
    for file in files:
        projection = Projection.load(file)
        # A session may begin at any block of the span; which one is checked when it opens.
        projection.check_fits(checkpoint.hidden_size, projection.bottom, checkpoint.fingerprint())
        if not span.first <= projection.bottom < span.end:
            raise ConfigError(
                f"{file} is for rows that enter block {projection.bottom} and this server has "
                f"{span}; serve a span that holds it"
            )
        if projection.decoder is None:
            raise ConfigError(f"{file} has no decoder; give the server's half, or the whole pair")
        loaded[projection.fingerprint()] = projection.for_server().to(placement.device)
    return loaded


def _trained_context(checkpoint: Checkpoint) -> int:
    return int(getattr(checkpoint.config, "max_position_embeddings", 0) or 4096)


def _pool_rows(section: KVSection, blocks: BlockSpan, placement: Placement, context: int) -> int:
    """Rows of the pool, in whole pages."""
    row_bytes = sum(shape.row_elements() for shape in blocks.kv_shapes()) * placement.dtype.itemsize
    free = available_memory(placement.device)
    if section.rows is not None:
        rows = section.rows
    elif section.memory is not None:
        rows = parse_bytes("kv.memory", section.memory) // row_bytes
    else:
        rows = min(int(free * FREE_MEMORY_SHARE) // row_bytes, context * MAX_SEQUENCES_BY_DEFAULT)
    rows = -(-max(rows, MIN_ROWS) // section.page_rows) * section.page_rows
    if rows * row_bytes > free:
        raise OutOfMemory(
            f"a KV pool of {rows} rows takes {_mib(rows * row_bytes)} and {_mib(free)} are free; "
            "lower kv.rows or kv.memory, or serve a narrower span"
        )
    return rows


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"
