"""Rows per second of the server itself, and what a long prompt costs those who decode."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.bench import BF16, FP32, Bench, Mode, Served
from benchmarks.client_process import ClientProcess
from benchmarks.load import Lane, Load, Step, decode_together
from benchmarks.measure import Row, Spread, Target, at_least, at_most, percentile, ratios
from benchmarks.settings import LARGE, OTHER_TENANT, SHAPES, SMALL, Shape
from fedsea.wire.codecs import Codec

CASE = "trunk"
_SESSIONS = 16
_CONTEXT = 128
# Steps of a lane before and after those that are counted.
_MARGIN_STEPS = 8
_LONG_PROMPT = 2048
_DECODING = 4
_TARGETS = {FP32: at_least(4), BF16: at_least(8)}
_KEYS = {FP32: "trunk16", BF16: "trunk16_bf16"}
_CODECS = {FP32: Codec.FP32, BF16: Codec.BF16}


@dataclass(frozen=True, slots=True)
class _Rates:
    """Rows per second: of the time in which the server computed, and of the wall clock."""

    computing: float
    wall: float
    batch: float

    @property
    def step_ms(self) -> float:
        """Milliseconds of a step."""
        return self.batch / self.computing * 1e3


def rows(bench: Bench) -> list[Row]:
    """16 sessions against one, fp32 and bf16."""
    found = []
    for shape in (LARGE,) if bench.scale.quick else SHAPES:
        model = bench.model(shape)
        for mode in (FP32, BF16):
            served = bench.served(model, mode)
            bench.say(f"{_SESSIONS} sessions on the trunk of {model.name}, {mode.name}")
            pairs = asyncio.run(_pairs(bench, served, mode))
            found += _trunk_rows(model, mode, pairs, is_key=shape is LARGE)
    return found


def stall_rows(bench: Bench) -> list[Row]:
    """Four sessions decode while another tenant's prompt of 2,048 rows is computed."""
    shapes = (SMALL,) if bench.scale.quick else SHAPES
    return [row for shape in shapes for row in _stalls_of(bench, shape)]


def _stalls_of(bench: Bench, shape: Shape) -> list[Row]:
    model = bench.model(shape)
    served = bench.served(model)
    bench.say(f"a long prompt beside decoding sessions, {model.name}")
    thin = asyncio.run(_stalls(bench, served, lambda: _thin_prompt(bench, served)))
    real = _stalls_by_client(bench, model, served)
    return [
        *_stall_rows(model, thin, "rows made before", at_most(2.0), is_key=shape is SMALL),
        *_stall_rows(model, real, "a real client", None, is_key=False),
    ]


async def _pairs(bench: Bench, served: Served, mode: Mode) -> list[tuple[_Rates, _Rates]]:
    load = Load(served.address, bench.tls, _CODECS[mode])
    steps = bench.scale.steps
    capacity = _CONTEXT + (steps + 2 * _MARGIN_STEPS) * bench.scale.pairs
    try:
        alone = await load.add(capacity, _CONTEXT)
        together = [await load.add(capacity, _CONTEXT) for _ in range(_SESSIONS)]
        found = []
        for _ in range(bench.scale.pairs):
            one = await _rates(served, [alone], steps)
            many = await _rates(served, together, steps)
            found.append((one, many))
        return found
    finally:
        await load.close()


class _Window:
    """From when the last lane is in full swing to when the first one is about to end."""

    def __init__(self, lanes: Sequence[Lane], steps: int) -> None:
        self._lanes, self._steps = lanes, steps
        self._entering = len(lanes)
        self.opened, self.closed = asyncio.Event(), asyncio.Event()

    async def run(self) -> None:
        """Decode in all lanes."""
        await asyncio.gather(*(self._decode(lane) for lane in self._lanes))

    async def _decode(self, lane: Lane) -> None:
        await lane.steps(_MARGIN_STEPS)
        self._entering -= 1
        if not self._entering:
            self.opened.set()
        await lane.steps(self._steps)
        self.closed.set()
        await lane.steps(_MARGIN_STEPS)


async def _rates(served: Served, lanes: Sequence[Lane], steps: int) -> _Rates:
    """Over `steps` steps of every lane, without those in which the lanes start and end."""
    window = _Window(lanes, steps)
    decoding = asyncio.create_task(window.run())
    await window.opened.wait()
    before, began = await asyncio.to_thread(served.counters), time.monotonic()
    await window.closed.wait()
    after, ended = await asyncio.to_thread(served.counters), time.monotonic()
    await decoding

    def grown(name: str) -> float:
        return after[name] - before[name]

    count = grown('fedsea_step_rows_total{kind="decode"}')
    computed = grown("fedsea_step_seconds_sum")
    return _Rates(count / computed, count / (ended - began), count / grown("fedsea_steps_total"))


def _trunk_rows(
    model: Path, mode: Mode, pairs: Sequence[tuple[_Rates, _Rates]], *, is_key: bool
) -> list[Row]:
    label = f"{model.name}, {mode.name}"
    batch = statistics.median(many.batch for _, many in pairs)
    steps = [
        statistics.median(rates.step_ms for rates in side) for side in zip(*pairs, strict=True)
    ]

    def row(name: str, spread: Spread, target: Target | None = None, key: str | None = None) -> Row:
        return Row(
            case=CASE,
            name=f"{label}: {name}",
            spread=spread,
            target=target,
            key=key,
            note=f"a step of 1 session {steps[0]:.1f} ms, of {_SESSIONS} {steps[1]:.1f} ms with "
            f"{batch:.1f} rows; context {_CONTEXT}",
        )

    return [
        row(
            "rows/s of computing time, 16 sessions / 1",
            ratios((many.computing for _, many in pairs), (one.computing for one, _ in pairs)),
            _TARGETS[mode],
            _KEYS[mode] if is_key else None,
        ),
        row(
            "rows/s by the wall clock, 16 sessions / 1",
            ratios((many.wall for _, many in pairs), (one.wall for one, _ in pairs)),
        ),
    ]


@dataclass(frozen=True, slots=True)
class _Stall:
    """Steps of the decoding sessions in seconds, before and while the prompt was computed."""

    normal: Sequence[float]
    during: Sequence[float]

    def ratio(self, of: Callable[[Sequence[float]], float]) -> float:
        return of(self.during) / of(self.normal)


async def _stalls(
    bench: Bench, served: Served, prompt: Callable[[], Coroutine[None, None, tuple[float, float]]]
) -> list[_Stall]:
    load = Load(served.address, bench.tls, Codec.FP32)
    try:
        lanes = [await load.add(_LONG_PROMPT, _CONTEXT) for _ in range(_DECODING)]
        await decode_together(lanes, 4)
        return [await _stall(lanes, bench.scale.steps, prompt) for _ in range(bench.scale.pairs)]
    finally:
        await load.close()


async def _stall(
    lanes: Sequence[Lane],
    steps: int,
    prompt: Callable[[], Coroutine[None, None, tuple[float, float]]],
) -> _Stall:
    calm = await asyncio.gather(*(lane.steps(steps) for lane in lanes))
    finished = asyncio.Event()
    decoding = [asyncio.create_task(_until(lane, finished)) for lane in lanes]
    try:
        began, ended = await prompt()
    finally:
        finished.set()
        busy = await asyncio.gather(*decoding)
    return _Stall(
        [step.seconds for steps_ in calm for step in steps_],
        [
            step.seconds
            for steps_ in busy
            for step in steps_
            if step.at - step.seconds >= began and step.at <= ended
        ],
    )


async def _until(lane: Lane, finished: asyncio.Event) -> list[Step]:
    found = []
    while not finished.is_set():
        found.append(await lane.step())
    return found


async def _thin_prompt(bench: Bench, served: Served) -> tuple[float, float]:
    load = Load(served.address, bench.other_tls, Codec.FP32)
    try:
        lane = await load.add(_LONG_PROMPT)
        began = time.monotonic()
        await lane.prefill(_LONG_PROMPT)
        return began, time.monotonic()
    finally:
        await load.close()


def _stalls_by_client(bench: Bench, model: Path, served: Served) -> list[_Stall]:
    with ClientProcess(model, served.address, bench.certificates, OTHER_TENANT) as client:

        async def prompt() -> tuple[float, float]:
            return await asyncio.to_thread(client.first_token, _LONG_PROMPT)

        return asyncio.run(_stalls(bench, served, prompt))


def _stall_rows(
    model: Path, stalls: Sequence[_Stall], source: str, target: Target | None, *, is_key: bool
) -> list[Row]:
    def tail(seconds: Sequence[float]) -> float:
        return percentile(seconds, 0.95)

    normal = statistics.median(statistics.median(stall.normal) for stall in stalls)
    steps = statistics.median(len(stall.during) for stall in stalls)
    note = f"normal step {normal * 1e3:.1f} ms; {steps:.0f} steps beside the prompt"
    if target is None:
        note += "; the client's own blocks compute on the cores that the server needs"
    return [
        Row(
            case=CASE,
            name=f"{model.name}: step beside a prompt of {_LONG_PROMPT} ({source}) / normal, median",
            spread=Spread.of(stall.ratio(statistics.median) for stall in stalls),
            target=target,
            key="prefill_stall" if is_key else None,
            note=note,
        ),
        Row(
            case=CASE,
            name=f"{model.name}: the same, 95th percentile / normal median",
            spread=Spread.of(tail(s.during) / statistics.median(s.normal) for s in stalls),
            note="a step that waits for one with a chunk of the prompt in it",
        ),
    ]
