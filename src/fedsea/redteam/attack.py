"""What all attacks have in common: they take a view of the server and give a guess.

`likelihood` is where an attack meets a mechanism: the log law of the released row under each
candidate. Several releases of one token multiply their likelihoods. What is not protected by a
mechanism is still rounded by the codec; there the law is a narrow Gaussian.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from fedsea.errors import ConfigError
from fedsea.privacy.mechanism import Mechanism
from fedsea.redteam.knowledge import Knowledge
from fedsea.redteam.view import Chain, Repeats, ServerView

UNKNOWN = -1
"""The guess at a position that the attack says nothing about."""

# Root mean square error of a codec relative to the row, rounded up: bf16 keeps 8 bits, int8 a
# 127th of the largest number in the row.
_ROUNDING = 2.0**-6


@dataclass(frozen=True, slots=True)
class TextGuess:
    """What an attack says about one text.

    Attributes:
        ids: a token id for each position, `UNKNOWN` where there is none.
        scores: how much each guess is worth, larger is surer; what it means is the attack's own.
        numbers: further measurements, for reports.
    """

    ids: tuple[int, ...]
    scores: tuple[float, ...] | None = None
    numbers: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Guess:
    """What an attack says about every text of a view, in the order of `ServerView.chains`."""

    texts: tuple[TextGuess, ...]
    seconds: float

    @property
    def positions(self) -> int:
        """Positions in all texts together."""
        return sum(len(text.ids) for text in self.texts)


class Attack(ABC):
    """Turns what a server saw into token ids.

    `repeats` is which releases the attack takes for releases of one token. An attack on something
    else than rows, such as gradients, replaces `run`.
    """

    name: ClassVar[str]
    repeats: Repeats = Repeats.APART

    def run(self, view: ServerView, knowledge: Knowledge, mechanism: Mechanism | None) -> Guess:
        """Attack all texts of a view; `mechanism` is public, None when there is none."""
        started = time.perf_counter()
        texts = tuple(self.read(chain, knowledge, mechanism) for chain in view.chains(self.repeats))
        return Guess(texts, time.perf_counter() - started)

    @abstractmethod
    def read(self, chain: Chain, knowledge: Knowledge, mechanism: Mechanism | None) -> TextGuess:
        """Attack one text."""


def likelihood(mechanism: Mechanism | None, releases: Tensor, clean: Tensor) -> Tensor:
    """Log law of the releases [n, width] of one token for each of v rows [v, width]: [v], float64.

    Up to a constant that is the same for all rows.

    Raises:
        ConfigError: rows of another width than the releases: the projection is missing or wrong.
    """
    if releases.shape[1] != clean.shape[1]:
        raise ConfigError(
            f"releases of width {releases.shape[1]} and rows of width {clean.shape[1]} do not "
            "fit: give the attacker the projection that the client uses"
        )
    if mechanism is None:
        variance = _rounding_variance(releases)
        distances = (clean - releases.mean(dim=0)).square().sum(dim=1).double()
        return distances * (-len(releases) / (2 * variance))
    found = torch.zeros(len(clean), dtype=torch.float64)
    for released in releases:
        found += mechanism.log_likelihood(released, clean).double()
    return found


def _rounding_variance(releases: Tensor) -> float:
    size = float(releases.square().mean())
    return max(size, 1e-30) * _ROUNDING**2
