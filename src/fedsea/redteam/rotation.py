"""R6: secret linear transforms of rows, and how they break.

A client that sends R h with a secret orthogonal R (a rotation, or a permutation of coordinates)
hides every single number and nothing else: norms and inner products stay. With the public weights
an attacker matches the Gram matrix of the released rows, one position at a time, with a fresh R
and no key. A provider who is given rotated weights has even less to do: |R w| = |w| names the row
of a weight, and orthogonal Procrustes gives R. (threats, section 5; arXiv 2505.18332.)

`Rotation` is here only to show this. It is no mechanism: nothing in `privacy` offers it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from fedsea.errors import ConfigError
from fedsea.privacy.mechanism import Mechanism
from fedsea.redteam.attack import Attack, TextGuess
from fedsea.redteam.continuation import Prefix
from fedsea.redteam.knowledge import Knowledge
from fedsea.redteam.view import Chain, Repeats

_ROUNDING = 2.0**-12


@dataclass(frozen=True, slots=True, eq=False)
class Rotation:
    """A secret orthogonal matrix [hidden, hidden], for demonstrations."""

    matrix: Tensor

    @classmethod
    def random(cls, size: int, seed: int) -> Self:
        """Uniform over orthogonal matrices (QR of a normal matrix, signs fixed)."""
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(size, size, generator=generator, dtype=torch.float64)
        rotation, upper = torch.linalg.qr(drawn)
        return cls((rotation * upper.diagonal().sign()).float())

    @classmethod
    def permutation(cls, size: int, seed: int) -> Self:
        """A random order of the coordinates."""
        generator = torch.Generator().manual_seed(seed)
        return cls(torch.eye(size)[torch.randperm(size, generator=generator)])

    def apply(self, rows: Tensor) -> Tensor:
        """Rows [n, hidden] as they would be sent."""
        turned: Tensor = rows @ self.matrix.T
        return turned


@dataclass(frozen=True, slots=True)
class GramSearch(Attack):
    """Prefix search on norms and inner products, which no rotation or permutation changes.

    A candidate v at position t is scored by how well |h(v)|^2 and <h(v), h_s> for all s < t agree
    with the released rows. The inner products are brought to coordinates of the released prefix
    first (its pseudo-inverse), so that the score is a squared distance: how far h(v) is from any
    row that has these products, plus how far the lengths outside the prefix's span differ.
    """

    name: ClassVar[str] = "r6"

    repeats: Repeats = Repeats.APART

    def read(self, chain: Chain, knowledge: Knowledge, mechanism: Mechanism | None) -> TextGuess:  # noqa: ARG002 - there is no law of it
        bottom = knowledge.weights()
        seen = knowledge.decode(chain.means()).double()
        known = knowledge.public_prefix[: len(chain)]
        prefix, found = (
            bottom.extend(Prefix(), known) if known else (Prefix(), torch.empty(0, seen.shape[1]))
        )
        everything = torch.arange(bottom.vocabulary)
        for position in range(len(prefix), len(chain)):
            rows = bottom.candidate_rows(prefix, everything)
            token = int(_gram_distances(rows, found, seen[: position + 1]).argmin())
            prefix, row = bottom.extend(prefix, [token])
            found = torch.cat([found, row])
        return TextGuess(prefix.ids)


def _gram_distances(candidates: Tensor, found: Tensor, seen: Tensor) -> Tensor:
    """Squared disagreement [v] of candidates [v, hidden] with the released row seen[-1].

    Both sides are written in coordinates of their own prefix, made orthonormal by the same map of
    the released Gram matrix, and of what is left outside of it. Directions in which the prefix has
    no more than the codec's rounding count little.
    """
    target, before = seen[-1], seen[:-1]
    lengths: Tensor = candidates.double().square().sum(dim=1)
    if not len(before):
        first: Tensor = (lengths.sqrt() - target.norm()).square()
        return first
    values, vectors = torch.linalg.eigh(before @ before.T)
    basis = vectors / (values.clamp_min(0) + _ROUNDING * values[-1]).sqrt()
    expected = (before @ target) @ basis
    inside = (candidates.double() @ found.double().T) @ basis
    beyond = (target.square().sum() - expected.square().sum()).clamp_min(0).sqrt()
    outside = (lengths - inside.square().sum(dim=1)).clamp_min(0).sqrt()
    distances: Tensor = (inside - expected).square().sum(dim=1) + (outside - beyond).square()
    return distances


def recover_rotation(public: Tensor, rotated: Tensor) -> Tensor:
    """R [hidden, hidden] from a weight [n, hidden] and the rotated one, its rows in any order.

    A weight that reads rotated rows is W R^T, perhaps with its rows permuted: each row keeps its
    norm. Rows are paired by norm, and the R with the least sum of squares |W R^T - W'|^2 is
    V U^T of the singular value decomposition W^T W' = U S V^T (Schoenemann, Psychometrika 31,
    1966).

    Raises:
        ConfigError: shapes that do not fit, or fewer rows than numbers in a row.
    """
    if public.dim() != 2 or public.shape != rotated.shape or len(public) < public.shape[1]:
        raise ConfigError(
            "a rotation is found from two weights of equal shape [n, hidden] with n of at least "
            "the hidden size"
        )
    ours, theirs = (
        weight.double()[weight.double().norm(dim=1).argsort()] for weight in (public, rotated)
    )
    left, _, right = torch.linalg.svd(ours.T @ theirs)
    rotation: Tensor = (left @ right).T
    return rotation


def is_permutation(matrix: Tensor, tolerance: float = 1e-2) -> bool:
    """Whether a recovered orthogonal matrix only orders coordinates."""
    near_one = (matrix.abs() - 1).abs() < tolerance
    return bool((near_one.sum(dim=0) == 1).all() and (near_one.sum(dim=1) == 1).all())
