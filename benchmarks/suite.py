"""All cases in their order."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.bench import Bench
from benchmarks.cases import (
    attack,
    concurrency,
    decode,
    floors,
    gpu,
    latency,
    memory,
    naive,
    network,
    protection,
    quality,
    training,
    trunk,
)
from benchmarks.measure import Row
from benchmarks.processes import ProcessFailed
from benchmarks.settings import THREADS, Scale
from fedsea.errors import FedseaError

Case = Callable[[Bench], list[Row]]

CASES: dict[str, Case] = {
    "decode": decode.rows,
    "int8": decode.int8_rows,
    "first-token": latency.first_token_rows,
    "split": latency.split_rows,
    "floors": floors.rows,
    "clients": concurrency.rows,
    "trunk": trunk.rows,
    "stall": trunk.stall_rows,
    "naive": naive.rows,
    "traffic": naive.traffic_rows,
    "protection": protection.rows,
    "training": training.rows,
}
FULL_ONLY: dict[str, Case] = {
    "quality": quality.rows,
    "attack": attack.rows,
    "network": network.rows,
    "memory": memory.rows,
    "gpu": gpu.rows,
}


@dataclass(slots=True)
class Outcome:
    """The rows of all cases, and remarks about cases that gave none."""

    rows: list[Row] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    failed: bool = False


def measure(scale: Scale, folder: Path, only: Sequence[str] | None = None) -> Outcome:
    """Run the cases; one that fails is reported and the others go on."""
    torch.set_num_threads(THREADS)
    cases = CASES if scale.quick else {**CASES, **FULL_ONLY}
    outcome = Outcome()
    began = time.monotonic()

    def say(line: str) -> None:
        print(f"[{time.monotonic() - began:5.0f} s] {line}", file=sys.stderr, flush=True)

    with Bench(scale, folder, say) as bench:
        for name, case in cases.items():
            if only and name not in only:
                continue
            try:
                outcome.rows += case(bench)
            except (FedseaError, ProcessFailed, OSError) as error:
                outcome.failed = True
                outcome.remarks.append(f"{name} failed: {error}")
                say(outcome.remarks[-1])
    say("done")
    return outcome
