"""A 7B-shaped trunk with random weights on a GPU: 30 blocks in bf16."""

from __future__ import annotations

import time

import torch

from benchmarks.bench import Bench
from benchmarks.big import SEVEN_B, sparse_llama
from benchmarks.measure import Row, Spread
from benchmarks.settings import Shape
from fedsea.model.checkpoint import Checkpoint
from fedsea.model.partition import Partition
from fedsea.model.runner import NewRows, SpanRunner
from fedsea.model.spans import Placement, load_trunk

CASE = "gpu"
_BATCHES = (1, 4, 16)
_CONTEXT = 512
_STEPS = 32
_REPEATS = 5


def rows(bench: Bench) -> list[Row]:
    """Decoding at three batch sizes and prefill; nothing without a CUDA device."""
    if not torch.cuda.is_available():
        bench.say("no GPU here: the 7B-shaped trunk is left out")
        return []
    placement = Placement(device=torch.device("cuda"), dtype=torch.bfloat16)
    return trunk_rows(bench, SEVEN_B, placement)


def trunk_rows(bench: Bench, shape: Shape, placement: Placement) -> list[Row]:
    """The same on any device and for any shape."""
    bench.say(f"the trunk of {shape.name} on {placement.device}")
    checkpoint = Checkpoint.open(sparse_llama(bench.folder, shape))
    span = Partition(1, 1).trunk_span(checkpoint.num_blocks)
    blocks = load_trunk(checkpoint, span, placement)
    for weight in blocks.parameters():
        weight.normal_(std=0.02)
    capacity = _CONTEXT + _STEPS * (_REPEATS + 1)
    pages = -(-capacity // 16)
    runner = SpanRunner(blocks, max(_BATCHES) * pages * 16, placement)
    name = f"{shape.name}, {len(span)} blocks, {placement.dtype}".replace("torch.", "")
    found = []
    for batch in _BATCHES:
        trunk = _Trunk(runner, checkpoint.hidden_size, batch, capacity)
        seconds = trunk.prefill()
        if batch == 1:
            found.append(_row(f"{name}: prefill of {_CONTEXT}", "ms", [seconds * 1e3]))
        trunk.decode()
        times = [trunk.decode() for _ in range(_REPEATS)]
        trunk.close()
        found += [
            _row(f"{name}: step of {batch} sessions", "ms", [t * 1e3 for t in times]),
            _row(f"{name}: rows/s of {batch} sessions", "rows/s", [batch / t for t in times]),
        ]
    return found


class _Trunk:
    """Sequences of a runner that decode together."""

    def __init__(self, runner: SpanRunner, hidden: int, batch: int, capacity: int) -> None:
        self._runner, self._batch, self._hidden = runner, batch, hidden
        self._account = runner.pool.open(runner.pool.num_rows)
        for sequence in range(batch):
            runner.pool.begin(self._account, sequence, capacity)

    def prefill(self) -> float:
        """Seconds of one prompt; the other sequences get theirs untimed. The first one warms up."""
        self._seconds(_CONTEXT, [0])
        self._runner.pool.rollback(self._account, 0, 0)
        seconds = self._seconds(_CONTEXT, [0])
        for sequence in range(1, self._batch):
            self._seconds(_CONTEXT, [sequence])
        return seconds

    def decode(self) -> float:
        """Seconds of one step, as the mean of several."""
        sequences = list(range(self._batch))
        return sum(self._seconds(1, sequences) for _ in range(_STEPS)) / _STEPS

    def close(self) -> None:
        """Free the rows."""
        self._runner.pool.close(self._account)

    def _seconds(self, count: int, sequences: list[int]) -> float:
        placement = self._runner.placement
        rows = torch.randn(
            count * len(sequences), self._hidden, dtype=placement.dtype, device=placement.device
        )
        _synchronize(placement.device)
        began = time.perf_counter()
        batch = self._runner.advance([NewRows(self._account, s, count) for s in sequences])
        self._runner.run(rows, batch)
        _synchronize(placement.device)
        return time.perf_counter() - began


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _row(name: str, unit: str, values: list[float]) -> Row:
    return Row(case=CASE, name=name, unit=unit, spread=Spread.of(values))
