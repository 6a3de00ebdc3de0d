"""What is measured: sizes of the models, lengths, repeats, threads."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

THREADS = 2
HOST = "127.0.0.1"
TENANT = "hospital"
OTHER_TENANT = "clinic"

# Threads of two processes on the same cores must not spin while the other process computes. All
# measured processes get the same setting, transformers' included. Both are read when torch is
# imported.
_ENVIRONMENT = {
    "GOMP_SPINCOUNT": "5000",
    "OMP_NUM_THREADS": str(THREADS),
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama with random weights."""

    name: str
    hidden: int
    blocks: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int = 32000
    positions: int = 4096


SMALL = Shape("512x8", 512, 8, 1408, 8, 4)
LARGE = Shape("1024x12", 1024, 12, 2816, 16, 8)
SHAPES = (SMALL, LARGE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How much is measured.

    Attributes:
        pairs: interleaved repeats of cheap measurements.
        prompt: tokens of a prompt.
        new_tokens: tokens that follow it.
        steps: steps of a thin load, for each session.
        naive_tokens: tokens of the naive protocol, each of which computes the whole context.
        processes: numbers of client processes at the same time, ascending.
    """

    quick: bool
    pairs: int
    prompt: int = 256
    new_tokens: int
    steps: int
    naive_tokens: int
    processes: tuple[int, ...]


QUICK = Scale(quick=True, pairs=3, new_tokens=64, steps=40, naive_tokens=4, processes=(4,))
FULL = Scale(quick=False, pairs=5, new_tokens=128, steps=100, naive_tokens=8, processes=(1, 4, 16))


def environment(given: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment of every measured process; what the caller set stays."""
    return {**_ENVIRONMENT, **given}
