"""The split over networks with delay and bandwidth."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.bench import Bench, Mode
from benchmarks.cases.decode import make_prompts
from benchmarks.measure import Row, Spread
from benchmarks.processes import Child
from benchmarks.settings import SHAPES, Shape

CASE = "network"
_NEW_TOKENS = 32
_REPEATS = 3


@dataclass(frozen=True, slots=True)
class _Network:
    """One-way delay in ms and megabits per second."""

    name: str
    delay_ms: float
    megabits: float


_NETWORKS = (
    _Network("5 ms one way, 1 Gbit/s", 5, 1000),
    _Network("25 ms one way, 100 Mbit/s", 25, 100),
)
_CODECS = ("fp32", "int8")


def rows(bench: Bench) -> list[Row]:
    """Both shapes over every network and two codecs."""
    return [
        row
        for shape in SHAPES
        for network in _NETWORKS
        for codec in _CODECS
        for row in _rows(bench, shape, network, codec)
    ]


def _rows(bench: Bench, shape: Shape, network: _Network, codec: str) -> list[Row]:
    model = bench.model(shape)
    (prompt,) = make_prompts(model, 1, bench.scale.prompt)
    bench.say(f"{model.name} over {network.name}, codec {codec}")
    target = bench.served(model).address
    arguments = ["benchmarks.shaping", target, str(network.delay_ms), str(network.megabits)]
    mode = Mode(name=codec, options=(("codec", codec),))
    with Child(arguments, bench.logs / "proxy.log") as proxy:
        split = bench.connect(model, proxy.line(), mode)
        split.generate([prompt], 2)
        runs = [split.generate([prompt], _NEW_TOKENS) for _ in range(_REPEATS)]
        firsts = [split.first_token(prompt) for _ in range(_REPEATS)]
        split.llm.close()
    label = f"{model.name}, {network.name}, codec {codec}"
    return [
        Row(
            case=CASE,
            name=f"{label}: decoding",
            unit="tok/s",
            spread=Spread.of(run.rate for run in runs),
            note=f"each token takes at least the round trip of {2 * network.delay_ms:g} ms",
        ),
        Row(
            case=CASE,
            name=f"{label}: first token",
            unit="ms",
            spread=Spread.of(seconds * 1e3 for seconds in firsts),
            note=f"prompt {len(prompt)}; the opening of the session takes one round trip",
        ),
    ]
