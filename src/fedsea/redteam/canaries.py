"""R8: canaries, texts that are put into training data to see what comes out.

*Exposure* (Carlini et al., arXiv 1802.08232) ranks the secret of a canary among all secrets that it
could have had, by the loss of the released model: exposure = log2 |R| - log2 rank. It is 1 on average
for a secret that was not trained on, and log2 |R| for one that is found first.

*One run audits* (Steinke, Nasr, Jagielski, arXiv 2305.08846): m canaries are put in or left out by m
coins. An attacker who guesses r of the coins and is right v times refutes every (epsilon, delta) for
which so many right guesses have a chance of at most beta:

    P[V >= v] <= P[Bin(r, e^eps / (1 + e^eps)) >= v] + 2 m delta alpha
    alpha = max_{1 <= i <= v} P[v - i <= Bin(r, e^eps / (1 + e^eps)) < v] / i
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from scipy.stats import binom
from torch import Tensor

from fedsea.errors import ConfigError

_LARGEST_EPSILON = 64.0
_ROUNDS = 60


@dataclass(frozen=True, slots=True)
class Canary:
    """Token ids that lead up to a secret, and the secret."""

    lead: tuple[int, ...]
    secret: tuple[int, ...]

    @property
    def ids(self) -> tuple[int, ...]:
        """The text."""
        return (*self.lead, *self.secret)


@dataclass(frozen=True, slots=True)
class Audit:
    """What guesses about canaries prove.

    Attributes:
        epsilon: the training has at least this epsilon; 0 when nothing was proved.
        right: guesses that were right.
        guesses: how many were made.
        canaries: in and out together.
    """

    epsilon: float
    right: int
    guesses: int
    canaries: int


def draw(
    lead: tuple[int, ...], tokens: int, count: int, vocabulary: tuple[int, ...], seed: int
) -> tuple[Canary, ...]:
    """Canaries with secrets drawn at random.

    Args:
        lead: how every canary begins.
        tokens: of a secret.
        count: how many canaries; all different.
        vocabulary: ids that secrets are made of.
        seed: the same gives the same canaries.

    Raises:
        ConfigError: so many different ones do not exist.
    """
    if tokens < 1 or count < 1 or len(set(vocabulary)) ** tokens < 2 * count:
        raise ConfigError(
            f"{count} canaries of {tokens} tokens out of {len(set(vocabulary))} are too many; "
            "give longer secrets or more tokens"
        )
    generator = torch.Generator().manual_seed(seed)
    known = torch.tensor(sorted(set(vocabulary)))
    found: dict[tuple[int, ...], None] = {}
    while len(found) < count:
        drawn = known[torch.randint(len(known), (tokens,), generator=generator)]
        found[tuple(drawn.tolist())] = None
    return tuple(Canary(lead, secret) for secret in found)


def exposure(loss: float, others: Tensor) -> float:
    """Exposure of a secret among others (n,) that it could have been, by their losses.

    With fewer than all of them it is at most log2 (n + 1), and that is what "found first" says.

    Raises:
        ConfigError: there are no others.
    """
    if not len(others):
        raise ConfigError("exposure needs secrets to compare with: draw some")
    rank = 1 + int((others < loss).sum())
    return math.log2(len(others) + 1) - math.log2(rank)


def audit(
    scores: Tensor, is_in: Tensor, guesses: int, delta: float = 1e-5, confidence: float = 0.95
) -> Audit:
    """Guess the coins of canaries from their scores, and say what that proves.

    The highest `guesses` / 2 scores are called in, the lowest as many out; of the rest nothing is
    said.

    Args:
        scores: [m]; larger says that a canary was trained on.
        is_in: [m] bool, the coins. They must have been fair, and thrown for each canary.
        guesses: r, an even number.
        delta: of the claim that is refuted.
        confidence: 1 - beta.

    Raises:
        ConfigError: numbers that do not fit each other.
    """
    half, odd = divmod(guesses, 2)
    if scores.shape != is_in.shape or odd or half < 1 or guesses > len(scores):
        raise ConfigError(
            f"{guesses} guesses about {len(scores)} canaries with {len(is_in)} coins cannot be; "
            "give an even number of guesses, and a coin for each canary"
        )
    order = scores.argsort(descending=True)
    right = int(is_in[order[:half]].sum()) + int((~is_in[order[len(order) - half :]]).sum())
    epsilon = least_epsilon(right, guesses, len(scores), delta, confidence)
    return Audit(epsilon, right, guesses, len(scores))


def least_epsilon(
    right: int, guesses: int, canaries: int, delta: float = 1e-5, confidence: float = 0.95
) -> float:
    """The largest epsilon that so many right guesses refute; 0 when they refute none.

    Raises:
        ConfigError: counts, a delta or a confidence that cannot be.
    """
    possible = 0 <= right <= guesses <= canaries and 0 <= delta < 1 and 0 < confidence < 1
    if not possible:
        raise ConfigError(
            "an audit needs right <= guesses <= canaries, delta and confidence in 0..1"
        )
    low, high = 0.0, _LARGEST_EPSILON
    if _chance(low, right, guesses, canaries, delta) > 1 - confidence:
        return 0.0
    for _ in range(_ROUNDS):
        middle = (low + high) / 2
        if _chance(middle, right, guesses, canaries, delta) > 1 - confidence:
            high = middle
        else:
            low = middle
    return low


def _chance(epsilon: float, right: int, guesses: int, canaries: int, delta: float) -> float:
    """Largest chance of so many right guesses under (epsilon, delta)."""
    share = 1 / (1 + math.exp(-epsilon))
    found = float(binom.sf(right - 1, guesses, share))
    between, alpha = 0.0, 0.0
    for steps in range(1, right + 1):
        between += float(binom.pmf(right - steps, guesses, share))
        alpha = max(alpha, between / steps)
    return min(1.0, found + 2 * canaries * delta * alpha)
