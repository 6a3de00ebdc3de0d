"""The cached protocol against the naive one, at a context of 512."""

from __future__ import annotations

from contextlib import closing

from benchmarks import checkpoints
from benchmarks.bench import Bench, Mode
from benchmarks.measure import Row, Spread, at_least, at_most, interleave, ratios
from benchmarks.naive import NaiveClient, Token
from benchmarks.processes import Child
from benchmarks.settings import SHAPES, SMALL, Shape

CASE = "naive"
_CONTEXT = 512
_LONGER = 1024
_TOKENS = 32


def rows(bench: Bench) -> list[Row]:
    """Speed and bytes of one token; the context of both grows from 512 tokens."""
    shapes = (SMALL,) if bench.scale.quick else SHAPES
    return [row for shape in shapes for row in _rows(bench, shape)]


def _rows(bench: Bench, shape: Shape) -> list[Row]:
    model = bench.model(shape)
    vocabulary = checkpoints.vocabulary_of(model)
    context, longer = (checkpoints.prompt_ids(n, vocabulary) for n in (_CONTEXT, _LONGER))
    split = bench.split(model)
    bench.say(f"the naive protocol, {model.name}")
    arguments = ["benchmarks.naive", str(model), str(bench.certificates)]
    with (
        Child(arguments, bench.logs / "server-naive.log") as server,
        closing(NaiveClient(model, server.line(), bench.tls)) as naive,
    ):
        naive.tokens(context, 1)
        pairs = interleave(
            [
                lambda: split.generate([context], _TOKENS).rate,
                lambda: _rate(naive.tokens(context, bench.scale.naive_tokens)),
            ],
            bench.scale.pairs,
        )
        (at_context,), (at_longer,) = naive.tokens(context, 1), naive.tokens(longer, 1)
    ours, theirs = zip(*pairs, strict=True)
    ours_bytes = [split.bytes_of_a_token(prompt) for prompt in (context, longer)]
    label = f"{model.name}, context {_CONTEXT}"
    growth = f"{model.name}: bytes per token, context {_LONGER} / {_CONTEXT}"
    return [
        Row(
            case=CASE,
            name=f"{label}: tokens/s, split with caches / naive protocol",
            spread=ratios(ours, theirs),
            target=at_least(8),
            key="naive_speedup" if shape is SMALL else None,
        ),
        _bytes(f"{label}: bytes per token, naive protocol", _total(at_context)),
        _bytes(f"{label}: bytes per token, ours", ours_bytes[0]),
        Row(
            case=CASE,
            name=f"{growth}, naive protocol",
            spread=Spread.of([_total(at_longer) / _total(at_context)]),
        ),
        Row(
            case=CASE,
            name=f"{growth}, ours",
            spread=Spread.of([ours_bytes[1] / ours_bytes[0]]),
            target=at_most(1.01),
            note="only the numbers of the positions grow, by a byte",
        ),
    ]


def traffic_rows(bench: Bench) -> list[Row]:
    """Bytes of the messages, both directions together, for every codec."""
    found = []
    for shape in (SMALL,) if bench.scale.quick else SHAPES:
        model = bench.model(shape)
        prompt = checkpoints.prompt_ids(bench.scale.prompt, checkpoints.vocabulary_of(model))
        bench.say(f"bytes on the wire, {model.name}")
        for codec in ("fp32", "bf16", "fp16", "int8"):
            mode = Mode(name=f"fp32, codec {codec}", options=(("codec", codec),))
            client = bench.connect(model, bench.served(model).address, mode)
            prefill, token = client.bytes_of_a_prompt(prompt), client.bytes_of_a_token(prompt)
            label = f"{model.name}, codec {codec}"
            found.append(_bytes(f"{label}: bytes for a prompt of {len(prompt)}", prefill))
            found.append(_bytes(f"{label}: bytes per token", token))
    return found


def _rate(tokens: list[Token]) -> float:
    return len(tokens) / sum(token.seconds for token in tokens)


def _total(token: Token) -> float:
    return float(token.bytes_up + token.bytes_down)


def _bytes(name: str, count: float) -> Row:
    return Row(case=CASE, name=name, unit="B", spread=Spread.of([count]))
