"""Nearest neighbours in the embedding: the measure that papers report, and a weak attack.

Each released row is compared with every row of the embedding table. Behind blocks it is compared
with rows that it never was, and no mechanism's law or prefix is used: a low rate here says little,
which is why R1 and R2 stand beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import normalize

from fedsea.privacy.mechanism import Mechanism
from fedsea.redteam.attack import Attack, TextGuess
from fedsea.redteam.knowledge import Knowledge
from fedsea.redteam.view import Chain, Repeats


class Metric(StrEnum):
    """What is near."""

    EUCLID = "euclid"
    COSINE = "cosine"


@dataclass(frozen=True, slots=True)
class Nearest(Attack):
    """The vocabulary entry whose embedding is nearest to the released row.

    `numbers` holds `mean_cosine`, the mean cosine between released rows and the embeddings of the
    guesses.
    """

    name: ClassVar[str] = "nn"

    metric: Metric = Metric.EUCLID
    repeats: Repeats = Repeats.APART

    def read(self, chain: Chain, knowledge: Knowledge, mechanism: Mechanism | None) -> TextGuess:  # noqa: ARG002 - of no use to it
        table = knowledge.weights().embedding()
        rows = knowledge.decode(chain.means())
        known = knowledge.public_prefix[: len(rows)]
        found = nearest(rows, table, self.metric)[len(known) :]
        cosine = mean_cosine(rows[len(known) :], table[found])
        return TextGuess((*known, *found.tolist()), numbers={"mean_cosine": cosine})


def nearest(rows: Tensor, table: Tensor, metric: Metric) -> Tensor:
    """Number (n,) of the entry of a table [v, hidden] nearest to each row [n, hidden]."""
    if metric is Metric.COSINE:
        return (normalize(rows, dim=1) @ normalize(table, dim=1).T).argmax(dim=1)
    # |r - t|^2 without |r|^2, which is the same for all entries.
    return (table.square().sum(dim=1) - 2 * rows @ table.T).argmin(dim=1)


def mean_cosine(rows: Tensor, others: Tensor) -> float:
    """Mean cosine between rows of equal number [n, hidden]; 1 is equality of directions."""
    if not len(rows):
        return 1.0
    return float((normalize(rows, dim=1) * normalize(others, dim=1)).sum(dim=1).mean())
