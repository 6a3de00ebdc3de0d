"""The way from a candidate token to the likelihood of what was released."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedsea.privacy.mechanism import Mechanism
from fedsea.redteam.attack import likelihood
from fedsea.redteam.continuation import CHUNK_ROWS, Continuation, Prefix
from fedsea.redteam.knowledge import Knowledge
from fedsea.redteam.view import Chain


@dataclass(frozen=True, slots=True, eq=False)
class Channel:
    """From a candidate to the likelihood of a release: bottom, projection, mechanism."""

    knowledge: Knowledge
    mechanism: Mechanism | None
    bottom: Continuation = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "bottom", self.knowledge.weights())

    def public_prefix(self, chain: Chain) -> Prefix:
        """The beginning that everybody knows."""
        known = self.knowledge.public_prefix[: len(chain)]
        return self.bottom.extend(Prefix(), known)[0] if known else Prefix()

    def sweep(self, prefix: Prefix, releases: Tensor) -> Tensor:
        """Log-likelihood of every vocabulary entry: [vocabulary]."""
        everything = torch.arange(self.bottom.vocabulary)
        return torch.cat(
            [self.score(prefix, releases, ids) for ids in everything.split(CHUNK_ROWS)]
        )

    def score(self, prefix: Prefix, releases: Tensor, candidates: Tensor) -> Tensor:
        """Log-likelihood of some candidates (n,): [n], float64."""
        rows = self.bottom.candidate_rows(prefix, candidates)
        return self.likelihood(releases, self.knowledge.encode(rows))

    def likelihood(self, releases: Tensor, clean: Tensor) -> Tensor:
        """Log-likelihood of rows [n, width] that the client would hand to the mechanism."""
        return likelihood(self.mechanism, releases, clean)
