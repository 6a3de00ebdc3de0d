"""How fast the red team's prefix search reads tokens, and that its shortlists lose nothing."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import checkpoints
from benchmarks.bench import Bench
from benchmarks.measure import Row, Spread, at_least
from benchmarks.settings import SMALL
from fedsea.model.checkpoint import Checkpoint
from fedsea.model.partition import Partition
from fedsea.privacy.gaussian import FedSEAGaussian
from fedsea.privacy.noise import NoiseSource
from fedsea.redteam.attack import TextGuess
from fedsea.redteam.knowledge import Knowledge
from fedsea.redteam.prefix import PrefixSearch
from fedsea.redteam.view import Chain
from fedsea.wire.codecs import Codec, RowFormat

CASE = "attack"
_SCALES = (0.0, 0.02, 0.05, 0.1)
_TOKENS = 64
_SWEPT = 6


@dataclass(frozen=True, slots=True)
class _Reading:
    guess: TextGuess
    rate: float


def rows(bench: Bench) -> list[Row]:
    """One block at the client and 32,000 tokens, clean and at the paper's noise."""
    model = bench.model(SMALL)
    knowledge = Knowledge.of_weights(Checkpoint.open(model), Partition(1, 0))
    ids = torch.tensor(checkpoints.prompt_ids(_TOKENS, SMALL.vocabulary, seed=1))
    clean = knowledge.query(ids)
    return [row for scale in _SCALES for row in _rows_of(bench, knowledge, ids, clean, scale)]


def _rows_of(
    bench: Bench, knowledge: Knowledge, ids: Tensor, clean: Tensor, scale: float
) -> list[Row]:
    mechanism = FedSEAGaussian(scale) if scale else None
    released = clean if mechanism is None else mechanism.protect(clean, NoiseSource())
    chain = Chain(RowFormat(Codec.FP32, clean.shape[1]), tuple(row[None] for row in released), {})
    label = f"{SMALL.name}, one block, vocabulary {SMALL.vocabulary:,}, FedSEA scale {scale:g}"
    bench.say(f"prefix search, scale {scale:g}")

    def read(attack: PrefixSearch, length: int) -> _Reading:
        part = Chain(chain.format, chain.releases[:length], {})
        began = time.perf_counter()
        guess = attack.read(part, knowledge, mechanism)
        return _Reading(guess, length / (time.perf_counter() - began))

    screened = read(PrefixSearch(), _TOKENS)
    swept = read(PrefixSearch(screened=False), _SWEPT)
    same = tuple(screened.guess.ids[:_SWEPT]) == tuple(swept.guess.ids)
    found = sum(a == b for a, b in zip(screened.guess.ids, ids.tolist(), strict=True))
    return [
        Row(
            case=CASE,
            name=f"{label}: prefix search",
            unit="tok/s",
            spread=Spread.of([screened.rate]),
            target=None if scale else at_least(5),
            note=f"{found} of {_TOKENS} recovered; {'equal to' if same else 'UNLIKE'} the whole "
            f"sweep on {_SWEPT} tokens",
        ),
        Row(
            case=CASE,
            name=f"{label}: sweep of the whole vocabulary",
            unit="tok/s",
            spread=Spread.of([swept.rate]),
        ),
    ]
