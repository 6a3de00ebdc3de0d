"""Bundles: a checkpoint written as folders that hold one side's tensors each.

For those who must not hold the rest: the provider gets the trunk's blocks and the configuration,
never the embedding, the head or a tokenizer file; the data owner gets everything else. A bundle
opens like any checkpoint and has the fingerprint of the one that it was cut from.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsea.errors import CheckpointError, ConfigError
from fedsea.model.checkpoint import (
    BUNDLE_FILE,
    BUNDLE_FORMAT,
    CONFIG_FILE,
    INDEX_FILE,
    PARTS,
    SINGLE_FILE,
    Checkpoint,
)
from fedsea.model.partition import Partition, Span
from fedsea.model.spans import check_family
from fedsea.model.tensor_files import TensorInfo, file_bytes, write_tensors

DEFAULT_SHARD_BYTES = 4 << 30
# What only the data owner needs, by name; everything not named here stays behind.
TEXT_FILES = (
    "tokenizer*", "vocab.*", "merges.txt", "*.model", "*.tiktoken", "tekken.json",
    "special_tokens_map.json", "added_tokens.json", "chat_template*", "generation_config.json",
)  # fmt: skip
LICENCE_FILES = ("LICENSE*", "LICENCE*", "NOTICE*")


@dataclass(frozen=True, slots=True)
class Bundle:
    """A written bundle: `part` is 'client' or 'trunk', `spans` are the blocks that it holds."""

    part: str
    folder: Path
    spans: tuple[Span, ...]
    num_tensors: int
    size: int


@dataclass(frozen=True, slots=True)
class _Plan:
    """What goes into one bundle; `shards` are the tensors of each file."""

    part: str
    spans: tuple[Span, ...]
    shards: tuple[dict[str, TensorInfo], ...]

    @property
    def size(self) -> int:
        """Bytes of all tensor files."""
        return sum(map(file_bytes, self.shards))


def split_checkpoint(
    checkpoint: Checkpoint,
    partition: Partition,
    out: Path,
    parts: Collection[str] = PARTS,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    on_bytes: Callable[[int], None] | None = None,
) -> tuple[Bundle, ...]:
    """Write ``out/client`` and ``out/trunk``, or one of them.

    `out` appears only once it is complete. `on_bytes` is told how many bytes each step copied.

    Raises:
        CheckpointError: the checkpoint is a bundle itself, not complete, or corrupt.
        ConfigError: `out` exists, cannot be written or has too little space; unknown parts.
        PartitionError: the partition leaves no trunk.
        UnsupportedModel: the family cannot be cut.
    """
    _check_options(parts, max_shard_bytes, out)
    _check_source(checkpoint)
    plans = [_plan(checkpoint, partition, part, max_shard_bytes) for part in PARTS if part in parts]
    record = _record(checkpoint, partition)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _check_space(out, sum(plan.size for plan in plans))
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as unfinished:
            folder = Path(unfinished) / out.name
            for plan in plans:
                _write(plan, checkpoint, record, folder / plan.part, on_bytes)
            folder.rename(out)
    except OSError as error:
        raise ConfigError(
            f"{out} cannot be written ({error.strerror}); choose another folder"
        ) from error
    return tuple(
        Bundle(plan.part, out / plan.part, plan.spans, sum(map(len, plan.shards)), plan.size)
        for plan in plans
    )


def _check_options(parts: Collection[str], max_shard_bytes: int, out: Path) -> None:
    unknown = sorted(set(parts) - set(PARTS))
    if unknown or not parts:
        raise ConfigError(f"parts {', '.join(unknown) or 'are missing'}; use {' and '.join(PARTS)}")
    if max_shard_bytes <= 0:
        raise ConfigError(f"shards of {max_shard_bytes} bytes hold nothing; use a positive size")
    if out.exists():
        raise ConfigError(f"{out} exists already; choose a new folder, nothing is overwritten")


def _check_source(checkpoint: Checkpoint) -> None:
    check_family(checkpoint.config)
    if checkpoint.bundle is not None:
        raise CheckpointError(
            f"{checkpoint.folder} is {checkpoint.bundle}; split the whole checkpoint instead"
        )
    checkpoint.block_tensors(Span(0, checkpoint.num_blocks))


def _check_space(out: Path, needed: int) -> None:
    free = shutil.disk_usage(out.parent).free
    if needed > free:
        raise ConfigError(
            f"the bundles take {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free at "
            f"{out.parent}; choose another folder or split one part at a time"
        )


def _plan(checkpoint: Checkpoint, partition: Partition, part: str, max_bytes: int) -> _Plan:
    blocks = checkpoint.num_blocks
    trunk = partition.trunk_span(blocks)
    if part == "trunk":
        return _Plan(part, (trunk,), _shards(checkpoint.block_tensors(trunk), max_bytes))
    spans = partition.bottom_span(), partition.top_span(blocks)
    tensors = checkpoint.outer_tensors()
    for span in spans:
        tensors |= checkpoint.block_tensors(span)
    return _Plan(part, spans, _shards(tensors, max_bytes))


def _shards(tensors: Mapping[str, TensorInfo], max_bytes: int) -> tuple[dict[str, TensorInfo], ...]:
    """Tensors in files of at most `max_bytes`; a larger tensor gets a file of its own."""
    shards: list[dict[str, TensorInfo]] = [{}]
    size = 0
    for name, info in tensors.items():
        if shards[-1] and size + info.size > max_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = info
        size += info.size
    return tuple(shards)


def _record(checkpoint: Checkpoint, partition: Partition) -> dict[str, Any]:
    return {
        "format": BUNDLE_FORMAT,
        "source": checkpoint.name,
        "fingerprint": checkpoint.fingerprint(),
        "partition": {"bottom": partition.bottom, "top": partition.top},
        "digests": checkpoint.digests(),
    }


def _write(
    plan: _Plan,
    checkpoint: Checkpoint,
    record: Mapping[str, Any],
    folder: Path,
    on_bytes: Callable[[int], None] | None,
) -> None:
    folder.mkdir(parents=True)
    _copy_files(checkpoint.folder, folder, (CONFIG_FILE, *LICENCE_FILES))
    if plan.part == "client":
        _copy_files(checkpoint.folder, folder, TEXT_FILES)
    spans = [str(span) for span in plan.spans]
    _write_json(folder / BUNDLE_FILE, {"part": plan.part, "spans": spans, **record})
    names = _file_names(len(plan.shards))
    for name, tensors in zip(names, plan.shards, strict=True):
        write_tensors(folder / name, tensors, on_bytes)
    if len(names) > 1:
        _write_json(folder / INDEX_FILE, _index(dict(zip(names, plan.shards, strict=True))))


def _copy_files(source: Path, target: Path, patterns: Collection[str]) -> None:
    found = {path for pattern in patterns for path in source.glob(pattern) if path.is_file()}
    for path in sorted(found):
        shutil.copyfile(path, target / path.name)


def _file_names(count: int) -> list[str]:
    if count == 1:
        return [SINGLE_FILE]
    return [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]


def _index(shards: Mapping[str, Mapping[str, TensorInfo]]) -> dict[str, Any]:
    total = sum(info.size for tensors in shards.values() for info in tensors.values())
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    return {"metadata": {"total_size": total}, "weight_map": weight_map}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
