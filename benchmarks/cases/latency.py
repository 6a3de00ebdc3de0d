"""Time to the first token, and what the split adds to a token."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from benchmarks.bench import FP32, Bench
from benchmarks.cases.decode import make_prompts
from benchmarks.engines import Split
from benchmarks.measure import Row, Spread, at_most, differences, interleave, ratios
from benchmarks.settings import SHAPES, SMALL, Shape
from fedsea.client.local import BottomJob, LocalParts, TopJob, TopResult
from fedsea.client.sampling import Sampler, SamplingParams

CASE = "latency"
_FIRST_TOKEN_PAIRS = 7


def first_token_rows(bench: Bench) -> list[Row]:
    """From the call to the first token, prompts of the same length."""
    shapes = (SMALL,) if bench.scale.quick else SHAPES
    return [row for shape in shapes for row in _first_token_rows(bench, shape)]


def _first_token_rows(bench: Bench, shape: Shape) -> list[Row]:
    model = bench.model(shape)
    (prompt,) = make_prompts(model, 1, bench.scale.prompt)
    whole, split = bench.whole(model), bench.split(model)
    bench.say(f"first tokens of {model.name}")
    pairs = interleave(
        [lambda: whole.generate([prompt], 1).first_token, lambda: split.first_token(prompt)],
        1 + _FIRST_TOKEN_PAIRS,
    )
    theirs, ours = zip(*pairs[1:], strict=True)
    return [
        _milliseconds(f"{model.name}: transformers, first token", theirs),
        _milliseconds(f"{model.name}: split over TLS, first token", ours),
        Row(
            case=CASE,
            name=f"{model.name}: first token, split over TLS / transformers",
            spread=ratios(ours, theirs),
            target=at_most(1.15),
            key=f"ttft_{model.name}" if shape is SMALL else None,
            note="the opening of the session included",
        ),
    ]


def split_rows(bench: Bench) -> list[Row]:
    """The wall time of a token less the time in which its blocks were computed."""
    shapes = (SMALL,) if bench.scale.quick else SHAPES
    return [row for shape in shapes for row in _split_rows(bench, shape)]


def _split_rows(bench: Bench, shape: Shape) -> list[Row]:
    model = bench.model(shape)
    (prompt,) = make_prompts(model, 1, bench.scale.prompt)
    probe = _Probe(bench.split(model))
    unsplit = bench.unsplit(model, FP32)
    bench.say(f"cost of the split, {model.name}")
    tokens = bench.scale.new_tokens

    def without_wire() -> list[_Token]:
        run = unsplit.generate([prompt], tokens)
        return [_Token(run.decode / run.later_tokens, 0.0)]

    pairs = interleave([lambda: probe.tokens(prompt, tokens), without_wire], bench.scale.pairs)
    beyond = [Spread.of(token.beyond_blocks for token in split).median for split, _ in pairs]
    walls = [Spread.of(token.wall for token in split).median for split, _ in pairs]
    alone = [Spread.of(token.wall for token in unsplit_).median for _, unsplit_ in pairs]
    return [
        Row(
            case=CASE,
            name=f"{model.name}: split, per token beyond the blocks' own time",
            unit="ms",
            spread=Spread.of(seconds * 1e3 for seconds in beyond),
            target=at_most(0.6),
            key="split_ms" if shape is SMALL else None,
            note="wall - (bottom + top, measured here) - compute_us of the server; median tokens",
        ),
        Row(
            case=CASE,
            name=f"{model.name}: split - our engine unsplit, per token",
            unit="ms",
            spread=differences((s * 1e3 for s in walls), (s * 1e3 for s in alone)),
            note="includes what two processes cost each other in caches and threads",
        ),
    ]


@dataclass(frozen=True, slots=True)
class _Token:
    """Seconds of one token, and of them those in which blocks were computed."""

    wall: float
    blocks: float

    @property
    def beyond_blocks(self) -> float:
        return self.wall - self.blocks


class _TimedParts(LocalParts):
    """The client's parts with a stop-watch; a lone sequence is computed inside the call."""

    def __init__(self, parts: LocalParts) -> None:
        super().__init__(parts.bottom, parts.top_runner, parts.top)
        self.seconds = 0.0

    async def run_bottom(self, job: BottomJob) -> torch.Tensor:
        began = time.perf_counter()
        try:
            return await super().run_bottom(job)
        finally:
            self.seconds += time.perf_counter() - began

    async def run_top(self, job: TopJob) -> TopResult:
        began = time.perf_counter()
        try:
            return await super().run_top(job)
        finally:
            self.seconds += time.perf_counter() - began


class _Probe:
    """Generates token by token and notes where the time of each goes."""

    def __init__(self, split: Split) -> None:
        self._llm = split.llm
        self._parts = _TimedParts(split.llm.split.parts)
        self._split = replace(split.llm.split, parts=self._parts)

    def tokens(self, prompt: Sequence[int], count: int) -> list[_Token]:
        """The tokens after the first."""
        return self._llm.background.run(self._tokens(prompt, count))

    async def _tokens(self, prompt: Sequence[int], count: int) -> list[_Token]:
        sampler = Sampler(SamplingParams(max_new_tokens=count, ignore_eos=True), prompt, ())
        session = await self._split.open([len(prompt) + count])
        try:
            sequence = session.begin(len(prompt) + count)
            result = await session.feed(sequence, torch.tensor(list(prompt)), sampler=sampler)
            found = []
            for _ in range(count - 1):
                computed = self._parts.seconds + session.traffic.compute_us / 1e6
                began = time.perf_counter()
                token = torch.tensor([result.token])
                result = await session.feed(sequence, token, sampler=sampler)
                wall = time.perf_counter() - began
                blocks = self._parts.seconds + session.traffic.compute_us / 1e6 - computed
                found.append(_Token(wall, blocks))
        finally:
            await session.close()
        return found


def _milliseconds(name: str, seconds: tuple[float, ...]) -> Row:
    return Row(case=CASE, name=name, unit="ms", spread=Spread.of(s * 1e3 for s in seconds))
