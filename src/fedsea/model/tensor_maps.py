"""Tensors as views of memory-mapped files.

A mapped tensor takes memory as it is read, and gives it back when it is released: whoever makes
another copy of a weight (packed, quantized) need not hold both.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsea.errors import CheckpointError
from fedsea.model.tensor_files import TensorInfo, open_file

_DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


@dataclass(frozen=True, slots=True)
class _Run:
    """A mapped range of a file, at `address` in memory; `offset` is its place in the file."""

    map: mmap.mmap
    address: int
    offset: int


class TensorMaps:
    """Tensors by name, mapped in as few runs as their places in the files allow.

    A view keeps its run mapped, so `tensors` may outlive this object. Writing to a view changes
    memory, never a file.

    Raises:
        CheckpointError: a file cannot be mapped, or holds a dtype that torch lacks.
    """

    def __init__(self, infos: Mapping[str, TensorInfo]) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._runs: list[_Run] = []
        for name, info in infos.items():
            if not info.size:
                self.tensors[name] = torch.empty(info.shape, dtype=_dtype(name, info))
        for group in _adjacent(infos):
            self._map_run(group)

    def release(self, tensor: Tensor) -> None:
        """Give back the memory of a mapped tensor; other tensors are left alone.

        Its values stay readable: they are read from the file again.
        """
        if tensor.device.type != "cpu" or not hasattr(mmap, "MADV_DONTNEED"):
            return
        begin = tensor.data_ptr()
        end = begin + tensor.nbytes
        for run in self._runs:
            if run.address <= begin and end <= run.address + len(run.map):
                # Only pages that belong to this tensor alone.
                first = -(-(begin - run.address) // mmap.PAGESIZE) * mmap.PAGESIZE
                last = (end - run.address) // mmap.PAGESIZE * mmap.PAGESIZE
                if last > first:
                    run.map.madvise(mmap.MADV_DONTNEED, first, last - first)

    def expect_random_reads(self) -> None:
        """Tell the system not to read ahead: rows here and there are all that will be used."""
        if hasattr(mmap, "MADV_RANDOM"):
            for run in self._runs:
                run.map.madvise(mmap.MADV_RANDOM)

    def release_all(self) -> None:
        """Give back the memory of all mapped tensors."""
        for tensor in self.tensors.values():
            self.release(tensor)

    def _map_run(self, group: list[tuple[str, TensorInfo]]) -> None:
        first, last = group[0][1], group[-1][1]
        offset = first.offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        length = last.offset + last.size - offset
        with open_file(first.file) as opened:
            try:
                mapped = mmap.mmap(opened.fileno(), length, access=mmap.ACCESS_COPY, offset=offset)
            except ValueError as error:
                raise CheckpointError(
                    f"{first.file} has become shorter; fetch the file again"
                ) from error
        address = torch.frombuffer(mapped, dtype=torch.uint8).data_ptr()
        self._runs.append(_Run(mapped, address, offset))
        for name, info in group:
            self.tensors[name] = _view(mapped, offset, name, info)


def _adjacent(infos: Mapping[str, TensorInfo]) -> Iterator[list[tuple[str, TensorInfo]]]:
    """Tensors that follow each other in a file, together; empty ones need no run."""
    group: list[tuple[str, TensorInfo]] = []
    placed = sorted(infos.items(), key=lambda item: (item[1].file, item[1].offset))
    for name, info in placed:
        if not info.size:
            continue
        if group:
            last = group[-1][1]
            if info.file != last.file or info.offset - (last.offset + last.size) > mmap.PAGESIZE:
                yield group
                group = []
        group.append((name, info))
    if group:
        yield group


def _view(mapped: mmap.mmap, offset: int, name: str, info: TensorInfo) -> Tensor:
    dtype = _dtype(name, info)
    begin = info.offset - offset
    raw = torch.frombuffer(mapped, dtype=torch.uint8, count=info.size, offset=begin)
    if info.offset % dtype.itemsize:
        # Files may place a tensor anywhere; kernels want aligned numbers.
        raw = raw.clone()
    return raw.view(dtype).reshape(info.shape)


def _dtype(name: str, info: TensorInfo) -> torch.dtype:
    try:
        return _DTYPES[info.dtype]
    except KeyError:
        raise CheckpointError(
            f"{info.file} holds {name} as {info.dtype}, which torch cannot compute with; "
            "save it in another dtype"
        ) from None
