"""What a partition of a checkpoint costs on each side, known before anything is loaded.

Sizes of weights and KV rows are exact; activations and the runtime are estimates.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import MODEL_MAPPING

from fedsea.errors import OutOfMemory, RequestError
from fedsea.model import attention
from fedsea.model.checkpoint import Checkpoint, block_of
from fedsea.model.kv_cache import KVShape
from fedsea.model.partition import Partition, Span
from fedsea.model.spans import EMBEDDING, check_family, kv_shape, span_config
from fedsea.model.tensor_files import TensorInfo

# Python with torch, transformers and gRPC loaded, before any model.
RUNTIME_BYTES = 380 << 20
# Rows of a long prompt that are computed at once.
PREFILL_ROWS = 512

_FLOATS = frozenset({"F16", "BF16", "F32", "F64"})
_PAGE = 4096


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes that one side needs.

    `loading` is the second copy of a weight that is being packed; it is gone before rows are
    computed, when `kv` and `activations` come.
    """

    runtime: int
    weights: int
    loading: int
    kv: int
    activations: int

    @property
    def peak(self) -> int:
        """The most that is held at one time."""
        return self.runtime + self.weights + max(self.loading, self.kv + self.activations)


@dataclass(frozen=True, slots=True)
class Side:
    """What one side of the cut holds: its blocks, parameters, bytes on disk and memory."""

    spans: tuple[Span, ...]
    parameters: int
    disk: int
    memory: Memory

    @property
    def num_blocks(self) -> int:
        """Decoder blocks."""
        return sum(map(len, self.spans))


@dataclass(frozen=True, slots=True)
class Inspection:
    """A partition of a checkpoint in numbers, for one dtype and a context of so many rows.

    Each cut moves `row_bytes` bytes per row when rows travel in the dtype of the computation.
    """

    name: str
    family: str
    fingerprint: str
    stored_dtypes: tuple[str, ...]
    num_blocks: int
    hidden_size: int
    partition: Partition
    dtype: torch.dtype
    context: int
    client: Side
    server: Side

    @property
    def row_bytes(self) -> int:
        """Bytes of one hidden row in the dtype of the computation."""
        return self.hidden_size * self.dtype.itemsize


def inspect_model(
    checkpoint: Checkpoint, partition: Partition, dtype: torch.dtype, context: int
) -> Inspection:
    """Size both sides of a partition for one sequence of `context` rows on a CPU.

    Raises:
        CheckpointError: the checkpoint is not complete or corrupt.
        PartitionError: the partition leaves no trunk.
        RequestError: `context` is not positive.
        UnsupportedModel: the family cannot be cut.
    """
    if context <= 0:
        raise RequestError(f"a context of {context} rows holds nothing; use a positive number")
    check_family(checkpoint.config)
    blocks = checkpoint.num_blocks
    trunk = partition.trunk_span(blocks)
    return Inspection(
        name=checkpoint.name,
        family=str(checkpoint.config.model_type),
        fingerprint=checkpoint.fingerprint(),
        stored_dtypes=tuple(sorted({info.dtype for info in checkpoint.tensors.values()})),
        num_blocks=blocks,
        hidden_size=checkpoint.hidden_size,
        partition=partition,
        dtype=dtype,
        context=context,
        client=_client(checkpoint, partition, dtype, context),
        server=_side(checkpoint, (trunk,), {}, dtype, context),
    )


def block_kv_shape(checkpoint: Checkpoint) -> KVShape:
    """KV row of one block; the blocks of a model do not differ in it."""
    attention.register()
    config: Any = checkpoint.config
    with torch.device("meta"):
        model: Any = MODEL_MAPPING[type(config)](span_config(config, Span(0, 1)))
    return kv_shape(model.layers[0].self_attn)


def client_weights(checkpoint: Checkpoint, partition: Partition, dtype: torch.dtype) -> int:
    """Bytes that bottom and top need while they are loaded, beyond the library itself."""
    memory = _client(checkpoint, partition, dtype, PREFILL_ROWS).memory
    return memory.weights + memory.loading


def trunk_weights(checkpoint: Checkpoint, span: Span, dtype: torch.dtype) -> int:
    """Bytes that a span of blocks needs while it is loaded, beyond the library itself."""
    memory = _side(checkpoint, (span,), {}, dtype, PREFILL_ROWS).memory
    return memory.weights + memory.loading


def check_memory(needed: int, what: str, device: torch.device | None = None) -> None:
    """Refuse to start what does not fit; `needed` is in bytes.

    Raises:
        OutOfMemory: less is available on the device (default: this machine's memory).
    """
    available = available_memory(device or torch.device("cpu"))
    if needed > available:
        raise OutOfMemory(
            f"{what} needs {needed / 1e9:.2f} GB of memory and {available / 1e9:.2f} GB are "
            "available; use bf16 or int8, fewer blocks or a shorter context, or free some memory"
        )


def available_memory(device: torch.device) -> int:
    """Bytes that can be taken on a device without swapping."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    return min(int(psutil.virtual_memory().available), *_left_in_groups())


def _left_in_groups(system: Path = Path("/")) -> Iterator[int]:
    """What the control groups of this process leave to it, as in a container with a limit.

    Pages of files that can be dropped count as free, as they do for the machine.
    """
    yield sys.maxsize
    root = system / "sys/fs/cgroup"
    try:
        own = (system / "proc/self/cgroup").read_text(encoding="ascii")
    except OSError:
        return
    for line in own.splitlines():
        number, _, path = line.split(":", 2)
        if number == "0":
            for group in (root / path.lstrip("/"), *(root / path.lstrip("/")).parents):
                if group.is_relative_to(root):
                    yield _left_in_group(group)


def _left_in_group(group: Path) -> int:
    try:
        limit = (group / "memory.max").read_text(encoding="ascii").strip()
        used = int((group / "memory.current").read_text(encoding="ascii"))
        stat = (group / "memory.stat").read_text(encoding="ascii").split()
    except OSError:
        return sys.maxsize
    if limit == "max":
        return sys.maxsize
    droppable = int(stat[stat.index("inactive_file") + 1]) if "inactive_file" in stat else 0
    return max(0, int(limit) - used + droppable)


def _client(checkpoint: Checkpoint, partition: Partition, dtype: torch.dtype, context: int) -> Side:
    spans = partition.bottom_span(), partition.top_span(checkpoint.num_blocks)
    return _side(checkpoint, spans, checkpoint.outer_tensors(), dtype, context)


def _side(
    checkpoint: Checkpoint,
    spans: tuple[Span, ...],
    outer: dict[str, TensorInfo],
    dtype: torch.dtype,
    context: int,
) -> Side:
    tensors = dict(outer)
    for span in spans:
        tensors |= checkpoint.block_tensors(span)
    blocks = sum(map(len, spans))
    return Side(
        spans=spans,
        parameters=sum(info.num_elements for info in tensors.values()),
        disk=sum(info.size for info in tensors.values()),
        memory=Memory(
            runtime=RUNTIME_BYTES,
            weights=_weights(checkpoint, tensors, dtype, context),
            loading=_loading(tensors, dtype),
            kv=context * blocks * block_kv_shape(checkpoint).row_elements() * dtype.itemsize,
            activations=_activations(checkpoint, dtype, context, has_head=bool(outer)),
        ),
    )


def _weights(
    checkpoint: Checkpoint, tensors: dict[str, TensorInfo], dtype: torch.dtype, context: int
) -> int:
    """Bytes of the weights once loaded; a tied model holds its embedding again as the head."""
    kept = {name: _kept_bytes(info, dtype) for name, info in tensors.items()}
    embedding = tensors.get(EMBEDDING)
    if embedding is None:
        return sum(kept.values())
    head = kept[EMBEDDING] if getattr(checkpoint.config, "tie_word_embeddings", False) else 0
    if kept[EMBEDDING] == embedding.size:
        # Rows stay in the file until a token asks for them.
        rows = context * max(embedding.size // embedding.shape[0], _PAGE)
        kept[EMBEDDING] = min(embedding.size, rows)
    return sum(kept.values()) + head


def _loading(tensors: dict[str, TensorInfo], dtype: torch.dtype) -> int:
    """Bytes of the largest weight in a block; the head is loaded before the blocks."""
    return max(
        (_kept_bytes(info, dtype) for name, info in tensors.items() if block_of(name) is not None),
        default=0,
    )


def _kept_bytes(info: TensorInfo, dtype: torch.dtype) -> int:
    """Bytes of a tensor in memory: floats in `dtype`, quantized numbers as they are stored."""
    return info.num_elements * dtype.itemsize if info.dtype in _FLOATS else info.size


def _activations(checkpoint: Checkpoint, dtype: torch.dtype, context: int, has_head: bool) -> int:
    """Rows of a prefill chunk in the widest block, its mask, and the last row's logits."""
    config: Any = checkpoint.config
    rows = min(context, PREFILL_ROWS)
    inner = _largest(getattr(config, "intermediate_size", None) or 4 * checkpoint.hidden_size)
    block = rows * (8 * checkpoint.hidden_size + 3 * inner) * dtype.itemsize
    mask = rows * context * (1 + dtype.itemsize)
    logits = config.vocab_size * (dtype.itemsize + 4) if has_head else 0
    return int(block + mask + logits)


def _largest(value: int | Iterable[int]) -> int:
    return value if isinstance(value, int) else max(value)
