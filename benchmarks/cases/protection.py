"""What a mechanism costs a token: protecting, charging and writing its row, and reading it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from benchmarks.bench import FP32, Bench
from benchmarks.cases.decode import make_prompts
from benchmarks.measure import Row, Spread, at_most, interleave
from benchmarks.settings import LARGE, Shape
from fedsea.client.llm import load_tokenizer
from fedsea.client.protection import Cut, Protection
from fedsea.client.protector import Protector
from fedsea.client.releases import ReleaseStore
from fedsea.model.checkpoint import Checkpoint
from fedsea.model.projection import Projection
from fedsea.wire.codecs import Codec

CASE = "protection"
NARROWING = 32
"""How much narrower a projection makes rows, as in DEL."""
LIMIT = 5.0
"""Per cent of a decoding step."""
_ROWS = 192


def specs(width: int) -> Mapping[str, str]:
    """One of each mechanism, for rows of a width."""
    return {
        "gaussian": "gaussian:clip_norm=10,mu=1",
        "fedsea": "fedsea:scale=0.05",
        "metric-dp": f"metric-dp:eta=100,clip_norm=10,width={width}",
        "ternary": f"ternary:clip=0.5,mu=5,sparsity=0.5,width={width}",
        "stochastic-quantization": f"stochastic-quantization:bits=4,clip=0.5,mu=5,width={width}",
    }


def rows(bench: Bench) -> list[Row]:
    """The share of a decoding step that each mechanism takes, on whole and on narrow rows."""
    model = bench.model(LARGE)
    unsplit = bench.unsplit(model, FP32)
    (prompt,) = make_prompts(model, 1, bench.scale.prompt)
    bench.say(f"mechanisms at hidden {LARGE.hidden}")

    def step() -> float:
        run = unsplit.generate([prompt], bench.scale.new_tokens)
        return run.decode / run.later_tokens

    paths = [
        _Path(model, LARGE, name, narrow, bench.logs)
        for narrow in (False, True)
        for name in specs(LARGE.hidden)
    ]
    works = [step, *(path.seconds for path in paths)]
    steps, *each = zip(*interleave(works, bench.scale.pairs), strict=True)
    for path in paths:
        path.close()
    shares = [
        Spread.of(100 * taken / whole for taken, whole in zip(seconds, steps, strict=True))
        for seconds in each
    ]
    dearest = max(range(len(paths)), key=lambda number: shares[number].median)
    return [
        *(
            Row(
                case=CASE,
                name=f"{LARGE.name}: {path.name}",
                unit="µs",
                spread=Spread.of(value * 1e6 for value in seconds),
                note=f"{share.median:.2f} % of a decoding step of all blocks",
            )
            for path, seconds, share in zip(paths, each, shares, strict=True)
        ),
        Row(
            case=CASE,
            name=f"{LARGE.name}: the dearest of these / a decoding step of all blocks",
            unit="%",
            spread=shares[dearest],
            target=at_most(LIMIT),
            key="mechanism_1024x12",
            note=paths[dearest].name,
        ),
    ]


class _Path:
    """A row on its way from the bottom to the trunk, under one mechanism, with its ledger."""

    def __init__(self, model: Path, shape: Shape, name: str, narrow: bool, folder: Path) -> None:
        self.name = f"{name}, narrow rows" if narrow else name
        checkpoint = Checkpoint.open(model)
        width = shape.hidden // NARROWING if narrow else shape.hidden
        self._pair = _pair(checkpoint, width) if narrow else None
        privacy = Protection(
            mechanism=specs(width)[name],
            ledger=folder / f"{name}-{width}.ledger",
            public_prefix=0,
            projection=self._pair,
        )
        cut = Cut(checkpoint.fingerprint(), shape.hidden, 1, 1)
        self._policy = privacy.applied(cut, Codec.FP32, load_tokenizer(checkpoint))
        self._rows = torch.randn(_ROWS, 1, shape.hidden)

    @torch.inference_mode()
    def seconds(self) -> float:
        """The mean time of a row of an answer, the writes to the ledger included."""
        protector = Protector(self._policy, ReleaseStore())
        protector.begin(0)
        taken = []
        for token, row in enumerate(self._rows):
            began = time.perf_counter()
            data = protector.release(0, (token,), row)
            values = self._policy.rows.decode(data, 1)
            if self._pair is not None:
                self._pair.decode(values)
            taken.append(time.perf_counter() - began)
        protector.close()
        return statistics.mean(taken)

    def close(self) -> None:
        """Close its ledger."""
        self._policy.close()


def _pair(checkpoint: Checkpoint, width: int) -> Projection:
    hidden = checkpoint.hidden_size
    encoder, decoder = torch.randn(width, hidden), torch.randn(hidden, width)
    return Projection.of(encoder, decoder, 1, checkpoint.fingerprint())
