"""Tokens per second of one process and of the split, against `transformers`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from benchmarks import checkpoints
from benchmarks.bench import FP32, INT8, Bench, Mode
from benchmarks.engines import Prompts, Run, Split, Unsplit, Whole
from benchmarks.measure import Row, Spread, Target, at_least, interleave, ratios
from benchmarks.modes import FP32_COMPILED, fp32_modes, int8_modes
from benchmarks.processes import Child
from benchmarks.settings import LARGE, SHAPES, SMALL

CASE = "decode"
_WARM_UP_TOKENS = 4
_EAGER = {SMALL.name: at_least(0.95), LARGE.name: at_least(1.0)}
_COMPILED = {SMALL.name: at_least(1.25), LARGE.name: at_least(1.1)}
_BATCH = 4
# What GNU OpenMP takes when nothing is set and there are as many cores as threads.
_LIBGOMP_SPIN = 300_000

Engine = Whole | Unsplit | Split


def rows(bench: Bench) -> list[Row]:
    """Both random shapes at batch 1 and 4, then the pretrained models of a full run."""
    found = []
    for shape in SHAPES:
        model = bench.model(shape)
        found += _batch_of_one(bench, model)
        if shape is SMALL or not bench.scale.quick:
            found += _compare(bench, model, (FP32,), batch=_BATCH)
    if not bench.scale.quick:
        for model in checkpoints.pretrained().values():
            found += _compare(bench, model, (FP32,))
        found += [_spin_row(bench, bench.model(shape)) for shape in SHAPES]
    return found


def int8_rows(bench: Bench) -> list[Row]:
    """Both sides with int8 weights against `transformers` in fp32."""
    model = bench.model(LARGE)
    modes = int8_modes(bench.scale)
    targets = dict.fromkeys(modes, at_least(2.2))
    return _compare(bench, model, modes, targets, {INT8: "int8_1024x12"})


def _batch_of_one(bench: Bench, model: Path) -> list[Row]:
    """Every mode has a row; the key takes the default mode."""
    targets = {FP32: _EAGER[model.name], FP32_COMPILED: _COMPILED[model.name]}
    keys = {FP32: f"decode_{model.name}"}
    return _compare(bench, model, fp32_modes(bench.scale), targets, keys)


def _compare(
    bench: Bench,
    model: Path,
    modes: Sequence[Mode],
    targets: dict[Mode, Target] | None = None,
    keys: dict[Mode, str] | None = None,
    batch: int = 1,
) -> list[Row]:
    engines: list[Engine] = [bench.whole(model), bench.unsplit(model, modes[0])]
    engines += [bench.split(model, mode) for mode in modes]
    prompts = make_prompts(model, batch, bench.scale.prompt)
    bench.say(f"decoding {model.name}, batch {batch}, {', '.join(mode.name for mode in modes)}")
    for engine in engines:
        engine.generate(prompts, _WARM_UP_TOKENS)
    works = [partial(engine.generate, prompts, bench.scale.new_tokens) for engine in engines]
    rounds: list[tuple[Run, ...]] = interleave(works, bench.scale.pairs)
    whole, ours, *splits = zip(*rounds, strict=True)
    label = f"{model.name}, batch {batch}"
    found = [
        _rate(f"{label}: transformers fp32", whole),
        _against(f"{label}: our engine unsplit, {modes[0].name}", ours, whole),
    ]
    for mode, runs in zip(modes, splits, strict=True):
        found.append(_rate(f"{label}: split over TLS, {mode.name}", runs))
        found.append(
            _against(
                f"{label}: split over TLS / transformers fp32, {mode.name}",
                runs,
                whole,
                (targets or {}).get(mode),
                (keys or {}).get(mode),
            )
        )
    return found


def _spin_row(bench: Bench, model: Path) -> Row:
    """Whether `transformers`, alone on the machine, would rather have libgomp's own spinning."""
    bench.say(f"transformers with other spinning, {model.name}")
    arguments = ["benchmarks.whole_process", str(model), str(bench.scale.prompt)]
    log = bench.logs / "whole.log"
    with Child(arguments, log) as short, Child(arguments, log, spin=_LIBGOMP_SPIN) as own:
        children = (own, short)
        for child in children:
            child.line()

        def rate(child: Child) -> float:
            child.tell(str(bench.scale.new_tokens))
            return float(child.line())

        works = [partial(rate, child) for child in children]
        owns, shorts = zip(*interleave(works, bench.scale.pairs), strict=True)
    return Row(
        case=CASE,
        name=f"{model.name}, batch 1: transformers with libgomp's own spinning / with ours",
        spread=ratios(owns, shorts),
        note=f"{_LIBGOMP_SPIN:,} looks for work instead of those of all measurements",
    )


def make_prompts(model: Path, batch: int, count: int) -> Prompts:
    """Different prompts of equal length."""
    vocabulary = checkpoints.vocabulary_of(model)
    return [checkpoints.prompt_ids(count, vocabulary, seed) for seed in range(batch)]


def _rate(name: str, runs: Sequence[Run]) -> Row:
    return Row(case=CASE, name=name, unit="tok/s", spread=Spread.of(run.rate for run in runs))


def _against(
    name: str,
    runs: Sequence[Run],
    whole: Sequence[Run],
    target: Target | None = None,
    key: str | None = None,
) -> Row:
    return Row(
        case=CASE,
        name=name,
        spread=ratios((run.rate for run in runs), (run.rate for run in whole)),
        target=target,
        key=key,
        note=_agreement(runs[0].tokens, whole[0].tokens),
    )


def _agreement(ours: Prompts, theirs: Prompts) -> str:
    """How many tokens are equal before the first difference."""
    if ours == theirs:
        return "same tokens"
    least = min(_common(a, b) for a, b in zip(ours, theirs, strict=True))
    return f"tokens equal up to number {least}"


def _common(ours: Sequence[int], theirs: Sequence[int]) -> int:
    for number, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        if mine != other:
            return number
    return len(ours)
