"""What no engine on this machine can go below: reading the weights, and gRPC itself.

A token of a batch of one reads every weight once, so the memory alone bounds tokens per second. And
a message costs more when both sides have streamed weights through their caches since the last one
than it does in an idle loop. Both are measured here, without any of our engine.
"""

from __future__ import annotations

import asyncio
import statistics
import struct
import time
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.bench import Bench
from benchmarks.cases.decode import make_prompts
from benchmarks.measure import Row, Spread, interleave, ratios
from benchmarks.processes import Child
from benchmarks.settings import HOST, SHAPES, SMALL, Shape
from fedsea.model.checkpoint import Checkpoint
from fedsea.transport.grpc_client import GrpcChannel

CASE = "floors"
_COLUMNS = 1024
_FP32 = 4
_READS = 24
_ECHOES = 200


def rows(bench: Bench) -> list[Row]:
    """The floors of both shapes; of the small one in a quick run."""
    shapes = (SMALL,) if bench.scale.quick else SHAPES
    return [
        row for shape in shapes for row in (*_memory_rows(bench, shape), _echo_row(bench, shape))
    ]


def weights(numbers: int) -> Tensor:
    """A matrix of about so many fp32 numbers."""
    return torch.randn(max(1, numbers // _COLUMNS), _COLUMNS)


def read(matrix: Tensor) -> float:
    """Seconds to read all of a matrix once."""
    vector = torch.ones(_COLUMNS)
    began = time.perf_counter()
    torch.mv(matrix, vector)
    return time.perf_counter() - began


def _memory_rows(bench: Bench, shape: Shape) -> list[Row]:
    model = bench.model(shape)
    whole = bench.whole(model)
    prompts = make_prompts(model, 1, bench.scale.prompt)
    numbers = sum(_numbers_by_part(model))
    matrix = weights(numbers)
    bench.say(f"reading {shape.name}'s weights")

    def reading() -> float:
        return statistics.median(read(matrix) for _ in range(_READS))

    def token() -> float:
        run = whole.generate(prompts, _READS)
        return run.decode / run.later_tokens

    read(matrix)
    tokens, readings = zip(*interleave([token, reading], bench.scale.pairs), strict=True)
    size = numbers * _FP32
    return [
        Row(
            case=CASE,
            name=f"{shape.name}: weights that a token reads, fp32",
            unit="GB/s",
            spread=Spread.of(size / seconds / 1e9 for seconds in readings),
            note=f"{size / 1e6:.0f} MB in one product of a matrix and a vector",
        ),
        Row(
            case=CASE,
            name=f"{shape.name}, batch 1: that time / transformers' time for a token",
            spread=ratios(tokens, readings),
            note="the most that any engine with fp32 weights can be faster than transformers",
        ),
    ]


def _numbers_by_part(model: Path) -> tuple[int, int]:
    """Weights read for a token: at the server, at the client with one block at either end."""
    checkpoint = Checkpoint.open(model)
    last = checkpoint.num_blocks - 1
    server = client = 0
    for name, tensor in checkpoint.tensors.items():
        numbers = 1
        for size in tensor.shape:
            numbers *= size
        if name.startswith("model.layers."):
            block = int(name.split(".")[2])
            client += numbers if block in (0, last) else 0
            server += 0 if block in (0, last) else numbers
        elif name.startswith("lm_head"):
            client += numbers
    return server, client


def _echo_row(bench: Bench, shape: Shape) -> Row:
    server, client = _numbers_by_part(bench.model(shape))
    bench.say(f"bare messages between reading weights, {shape.name}")
    arguments = ["benchmarks.echo_process", HOST, str(bench.certificates), str(server)]
    with Child(arguments, bench.logs / "echo.log") as child:
        address = child.line()
        beyond = asyncio.run(_echoes(bench, address, weights(client), shape.hidden * _FP32))
    return Row(
        case=CASE,
        name=f"{shape.name}: a bare message and its answer over TLS, beyond reading weights",
        unit="ms",
        spread=Spread.of(_medians(beyond)),
        note="gRPC alone; each side reads its part's weights before it sends",
    )


async def _echoes(bench: Bench, address: str, matrix: Tensor, size: int) -> list[float]:
    channel = GrpcChannel(address, bench.tls)
    beyond = []
    try:
        stream = await channel.open_stream()
        for _ in range(_ECHOES):
            read(matrix)
            began = time.perf_counter()
            await stream.send(bytes(size))
            answer = await stream.receive()
            took = time.perf_counter() - began
            (at_the_server,) = struct.unpack_from("<d", answer or bytes(8))
            beyond.append((took - at_the_server) * 1e3)
        await stream.half_close()
        await stream.receive()
    finally:
        await channel.close()
    return beyond


def _medians(values: list[float]) -> list[float]:
    """Medians of five stretches, so that the spread is that of medians as everywhere."""
    stretch = len(values) // 5
    return [
        statistics.median(values[start : start + stretch])
        for start in range(0, 5 * stretch, stretch)
    ]
