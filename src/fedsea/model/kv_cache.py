"""The tensors behind the KV pool: one row per token, one pair of stores per block."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedsea.model.kv_pool import PageCopy

_ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class KVShape:
    """Size of one row in one block: key-value heads, key head size, value head size."""

    heads: int
    key_size: int
    value_size: int

    def row_elements(self) -> int:
        """Numbers in one row of keys and values together."""
        return self.heads * (self.key_size + self.value_size)


class KVCache:
    """Keys and values of a span: `keys[i]` and `values[i]` are (rows, heads, head size).

    All rows are zero at first. On the CPU, memory is taken from the system as rows are written.
    """

    def __init__(
        self, shapes: Sequence[KVShape], num_rows: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.num_rows = num_rows
        self.keys: list[Tensor] = [
            _zeros((num_rows, shape.heads, shape.key_size), dtype, device) for shape in shapes
        ]
        self.values: list[Tensor] = [
            _zeros((num_rows, shape.heads, shape.value_size), dtype, device) for shape in shapes
        ]

    def copy_page(self, copy: PageCopy, page_rows: int) -> None:
        """Copy the first rows of one page to another."""
        source, target = copy.source * page_rows, copy.target * page_rows
        for store in (*self.keys, *self.values):
            store[target : target + copy.rows] = store[source : source + copy.rows]

    def read(self, slots: Tensor) -> list[Tensor]:
        """A copy of the rows `slots` (n,): keys and values of every block."""
        return [store[slots] for store in (*self.keys, *self.values)]

    def write(self, slots: Tensor, rows: Sequence[Tensor]) -> None:
        """Write what `read` gave to the rows `slots` (n,)."""
        for store, part in zip((*self.keys, *self.values), rows, strict=True):
            store.index_copy_(0, slots, part)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # torch writes its zeros; numpy leaves them to the system until a page is used.
    size = math.prod(shape) * dtype.itemsize
    memory = np.zeros(size + _ALIGNMENT, dtype=np.uint8)
    skipped = -memory.ctypes.data % _ALIGNMENT
    flat = torch.from_numpy(memory)[skipped : skipped + size]
    return flat.view(dtype).view(shape)
