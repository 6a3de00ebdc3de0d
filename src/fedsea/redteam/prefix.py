"""R1 and R2: prefix search, the reference attack.

Causal blocks make each row a function of the tokens up to it, so an attacker with the weights tries
tokens one position at a time: V candidates for each, not V^L (threats 1.1; SipIt, arXiv
2510.15511). R1 takes the candidate under which the released row is most likely by the mechanism's
own law. R2 adds the log-probability of a public language model and keeps a beam:

    score(v) = log p(released | row of v after the prefix) + weight * log p_LM(v | prefix)

With weight 1 it is the most probable text given what was seen; no attack can do better on average
than the exact version of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedsea.errors import ConfigError
from fedsea.privacy.mechanism import Mechanism
from fedsea.redteam.attack import Attack, TextGuess
from fedsea.redteam.channel import Channel
from fedsea.redteam.continuation import Continuation, Prefix, load_continuation
from fedsea.redteam.knowledge import Knowledge
from fedsea.redteam.language_model import Expectation, LanguageModel
from fedsea.redteam.screening import SCREENED_FROM, Effort, Screen
from fedsea.redteam.view import Chain, Repeats

DEFAULT_BEAMS = 8


class PrefixSearch(Attack):
    """R1: the most likely token at every position, given the tokens found before.

    What it learns about the channel of one attacker and mechanism is kept for the next text.

    Args:
        repeats: which releases belong to one token; their likelihoods are multiplied.
        screened: whether a large vocabulary is screened (`redteam.screening`); the result is the
            same, and False is slow.
    """

    name: ClassVar[str] = "r1"

    def __init__(self, repeats: Repeats = Repeats.APART, *, screened: bool = True) -> None:
        self.repeats = repeats
        self._screened = screened
        self._screen: Screen | None = None

    def read(self, chain: Chain, knowledge: Knowledge, mechanism: Mechanism | None) -> TextGuess:
        channel = Channel(knowledge, mechanism)
        screen = self._screen_of(channel)
        prefix = channel.public_prefix(chain)
        scores = [0.0] * len(prefix)
        for position in range(len(prefix), len(chain)):
            releases = chain.releases[position]
            if screen is None:
                found = channel.sweep(prefix, releases)
                best = int(found.argmax())
                score = float(found[best])
            else:
                best, score = screen.best(prefix, releases)
            scores.append(score)
            prefix, _ = channel.bottom.extend(prefix, [best])
        numbers = {} if screen is None else screen.effort.numbers()
        return TextGuess(prefix.ids, tuple(scores), numbers)

    def _screen_of(self, channel: Channel) -> Screen | None:
        knowledge, checkpoint = channel.knowledge, channel.knowledge.checkpoint
        small = knowledge.vocabulary < SCREENED_FROM or not channel.bottom.num_blocks
        if small or checkpoint is None or not self._screened:
            return None
        known = self._screen
        if (
            known is None
            or known.channel.knowledge is not knowledge
            or known.channel.mechanism != channel.mechanism
        ):
            span = knowledge.partition.bottom_span()
            known = Screen(channel, load_continuation(checkpoint, span, torch.bfloat16))
            self._screen = known
        known.effort = Effort()
        return known


@dataclass(frozen=True, slots=True)
class PriorSearch(Attack):
    """R2: the same with a language model's prior and a beam.

    Args:
        weight: of the prior.
        beams: texts that are kept.
        repeats: which releases belong to one token.
    """

    name: ClassVar[str] = "r2"

    weight: float = 1.0
    beams: int = DEFAULT_BEAMS
    repeats: Repeats = Repeats.APART

    def __post_init__(self) -> None:
        if self.beams < 1 or self.weight < 0:
            raise ConfigError("a search needs at least one beam and a weight of 0 or more")

    def read(self, chain: Chain, knowledge: Knowledge, mechanism: Mechanism | None) -> TextGuess:
        channel = Channel(knowledge, mechanism)
        model = knowledge.language_model
        prefix = channel.public_prefix(chain)
        beams = [_Beam(prefix, model.begin(prefix.ids), 0.0)]
        for position in range(len(prefix), len(chain)):
            totals = torch.stack(
                [
                    beam.score
                    + channel.sweep(beam.prefix, chain.releases[position])
                    + self.weight * beam.prior.log_probabilities
                    for beam in beams
                ]
            )
            beams = [
                beams[row].extended(channel.bottom, model, token, score)
                for row, token, score in _best(totals, self.beams)
            ]
        return TextGuess(beams[0].prefix.ids)


@dataclass(frozen=True, slots=True, eq=False)
class _Beam:
    """One text so far: what was found, what a language model expects next, and its score."""

    prefix: Prefix
    prior: Expectation
    score: float

    def extended(
        self, bottom: Continuation, model: LanguageModel, token: int, score: float
    ) -> _Beam:
        return _Beam(bottom.extend(self.prefix, [token])[0], model.extend(self.prior, token), score)


def _best(totals: Tensor, count: int) -> Sequence[tuple[int, int, float]]:
    """Row, column and value of the greatest entries."""
    values, places = totals.flatten().topk(min(count, totals.numel()))
    width = totals.shape[1]
    return [
        (place // width, place % width, value)
        for place, value in zip(places.tolist(), values.tolist(), strict=True)
    ]
