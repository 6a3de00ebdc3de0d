"""R1 over a large vocabulary: few candidates evaluated exactly, and proof that they suffice.

The result is that of trying all V candidates, at a small part of the cost. Three ways, cheapest
first:

shortlist   A linear model of this depth of text, row(v) ~ c + B e(v) with a residual covariance S,
            orders the vocabulary by (y - c - B e)^T (S + s^2 I)^-1 (y - c - B e). The first few are
            evaluated exactly and the best, at distance r of the release y, is accepted only under a
            certificate. Let every candidate outside the shortlist be at least rho from the best.
            If r < rho / 2, none of them is nearer to y (triangle inequality): this covers a clean
            channel. Otherwise, under Gaussian noise s, one of them wins with a chance of at most
            V Q(rho / 2s) if the truth is in the shortlist (threats 1.1), and if it is not, r is as
            small as it is with a chance of at most m P[chi2_d((rho/s)^2) <= (r/s)^2].
coarse      All candidates in bfloat16, the best of them again exactly: every one whose coarse score
            is within four times the largest error seen of the best exact one.
exact       All candidates in float32, where the coarse scores separate too few.

`rho` is measured: by a sweep over all candidates at each depth (positions 1, 2-3, 4-7, ... behind
the start), where the linear model is fitted too, and by a fixed random sample of the vocabulary at
every position. Half of what was measured is used. Mechanisms that are not Gaussian by row get no
shortlist.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from scipy.special import ndtr
from scipy.stats import ncx2
from torch import Tensor

from fedsea.privacy.clipping import Clipping, clip_rows
from fedsea.privacy.gaussian import FedSEAGaussian, Gaussian
from fedsea.privacy.mechanism import Mechanism
from fedsea.redteam.channel import Channel
from fedsea.redteam.continuation import CHUNK_ROWS, Continuation, Prefix

SCREENED_FROM = 4096
"""Vocabularies smaller than this are searched as a whole."""

SHORTLISTS = (64, 1024)
_SAMPLE = 256
_FITTED = 4096
_RECHECKED = 256
_SAFETY = 4.0
_MARGIN_SHARE = 0.5
_CHANCE = 1e-9
_RIDGE = 1e-6


@dataclass(frozen=True, slots=True, eq=False)
class Isotropic:
    """A mechanism that adds Gaussian noise of one size to clipped rows; sigma 0 is none."""

    sigma: float
    radius: float = math.inf
    center: Tensor | None = None

    @classmethod
    def of(cls, mechanism: Mechanism | None) -> Isotropic | None:
        """The law of a mechanism if it is one of these."""
        if mechanism is None:
            return cls(0.0)
        if isinstance(mechanism, FedSEAGaussian):
            return cls(mechanism.sigma, mechanism.sensitivity / 2)
        if isinstance(mechanism, Gaussian) and mechanism.by is Clipping.ROW:
            center = None if mechanism.center is None else mechanism.center.float()
            return cls(mechanism.sigma, mechanism.clip_norm, center)
        return None

    def means(self, rows: Tensor) -> Tensor:
        """What a release of each row [n, width] is on average."""
        if math.isinf(self.radius):
            return rows
        if self.center is None:
            return clip_rows(rows, self.radius)
        return self.center + clip_rows(rows - self.center, self.radius)

    def score(self, releases: Tensor, means: Tensor) -> Tensor:
        """Log-likelihood [v] of means [v, width] in float32, for coarse work."""
        mean = releases.mean(dim=0)
        spread = float((releases - mean).square().sum())
        distances = (means - mean).square().sum(dim=1).double() * len(releases)
        return (distances + spread) / (-2 * self.sigma**2)


@dataclass(frozen=True, slots=True, eq=False)
class _Depth:
    """What a sweep taught about texts of some length.

    `toward` (f, w) and `lengths` (v,) make the order of candidates; `apart` is rho.
    """

    slope: Tensor
    toward: Tensor
    lengths: Tensor
    apart: float


@dataclass(slots=True)
class Effort:
    """How positions were settled."""

    shortlist: int = 0
    coarse: int = 0
    exact: int = 0

    def numbers(self) -> dict[str, float]:
        """For reports."""
        return {
            "positions_by_shortlist": float(self.shortlist),
            "positions_by_coarse_sweep": float(self.coarse),
            "positions_by_exact_sweep": float(self.exact),
        }


@dataclass(slots=True, eq=False)
class Screen:
    """Finds the most likely candidate at one position after another; see the module.

    Args:
        channel: exact scores.
        coarse: the same blocks in bfloat16.
        use_shortlist: whether the certificate may be used.
    """

    channel: Channel
    coarse: Continuation
    use_shortlist: bool = True
    effort: Effort = field(default_factory=Effort)
    _law: Isotropic | None = field(init=False)
    _features: Tensor = field(init=False)
    _sample: Tensor = field(init=False)
    _depths: dict[int, _Depth] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._law = Isotropic.of(self.channel.mechanism) if self.use_shortlist else None
        table = self.channel.bottom.embedding()
        self._features = table - table.mean(dim=0)
        generator = torch.Generator().manual_seed(0)
        order = torch.randperm(self.channel.bottom.vocabulary, generator=generator)
        self._sample = order[:_SAMPLE].sort().values

    def best(self, prefix: Prefix, releases: Tensor) -> tuple[int, float]:
        """The most likely candidate and its log-likelihood."""
        depth = (len(prefix) - len(self.channel.knowledge.public_prefix) + 1).bit_length()
        if self._law is None:
            return self._sweep(prefix, releases)[:2]
        if depth in self._depths:
            found = self._from_shortlist(self._depths[depth], self._law, prefix, releases)
            if found is not None:
                self.effort.shortlist += 1
                return found
            return self._sweep(prefix, releases)[:2]
        best, score, rows = self._sweep(prefix, releases)
        self._depths[depth] = self._fit(self._law, rows, best, releases)
        return best, score

    def _from_shortlist(
        self, depth: _Depth, law: Isotropic, prefix: Prefix, releases: Tensor
    ) -> tuple[int, float] | None:
        target = releases.mean(dim=0)
        sampled = self._means(law, prefix, self._sample)
        constant = (sampled - self._features[self._sample] @ depth.slope).mean(dim=0)
        order = self._features @ (depth.toward @ (target - constant))
        order = (2 * order - depth.lengths).topk(SHORTLISTS[-1]).indices
        for size in SHORTLISTS:
            candidates = order[:size].sort().values
            scores = self.channel.score(prefix, releases, candidates)
            place = int(scores.argmax())
            best = int(candidates[place])
            row = self._means(law, prefix, candidates[place : place + 1])[0]
            others = sampled[~torch.isin(self._sample, candidates)]
            apart = min(depth.apart, float((others - row).norm(dim=1).min()))
            if self._is_certain(float((target - row).norm()), apart, law, releases, size):
                return best, float(scores[place])
        return None

    def _is_certain(
        self, distance: float, apart: float, law: Isotropic, releases: Tensor, size: int
    ) -> bool:
        margin = _MARGIN_SHARE * apart
        if distance < margin / 2:
            return True
        if law.sigma == 0:
            return False
        count, width = releases.shape
        sigma = law.sigma / math.sqrt(count)
        overtaken = self.channel.bottom.vocabulary * float(ndtr(-margin / (2 * sigma)))
        if overtaken > _CHANCE:
            return False
        missed = size * float(ncx2.cdf((distance / sigma) ** 2, width, (margin / sigma) ** 2))
        return missed <= _CHANCE

    def _sweep(self, prefix: Prefix, releases: Tensor) -> tuple[int, float, Tensor]:
        """The best candidate, its score, and coarse means of all rows."""
        rows, coarse = self._coarse(prefix, releases)
        chosen = torch.cat([coarse.topk(_RECHECKED).indices, self._sample]).unique()
        exact = torch.full_like(coarse, -math.inf)
        exact[chosen] = self.channel.score(prefix, releases, chosen)
        margin = _SAFETY * float((exact[chosen] - coarse[chosen]).abs().max())
        missing = ((coarse >= exact.max() - margin) & exact.isinf()).nonzero()[:, 0]
        if len(missing) > len(coarse) // 4:
            self.effort.exact += 1
            exact = self.channel.sweep(prefix, releases)
        else:
            self.effort.coarse += 1
            if len(missing):
                exact[missing] = self.channel.score(prefix, releases, missing)
        best = int(exact.argmax())
        return best, float(exact[best]), rows

    def _coarse(self, prefix: Prefix, releases: Tensor) -> tuple[Tensor, Tensor]:
        coarse_prefix = prefix.to(torch.bfloat16)
        rows, scores = [], []
        everything = torch.arange(self.channel.bottom.vocabulary)
        for chunk in everything.split(CHUNK_ROWS):
            found = self.coarse.candidate_rows(coarse_prefix, chunk).float()
            encoded = self.channel.knowledge.encode(found)
            if self._law is None or self._law.sigma == 0:
                scores.append(self.channel.likelihood(releases, encoded))
                rows.append(encoded)
            else:
                rows.append(self._law.means(encoded).float())
                scores.append(self._law.score(releases, rows[-1]))
        return torch.cat(rows), torch.cat(scores)

    def _means(self, law: Isotropic, prefix: Prefix, candidates: Tensor) -> Tensor:
        rows = self.channel.bottom.candidate_rows(prefix, candidates)
        return law.means(self.channel.knowledge.encode(rows)).float()

    def _fit(self, law: Isotropic, rows: Tensor, best: int, releases: Tensor) -> _Depth:
        """Linear model of the rows [v, width] of one sweep, and how far the others are."""
        generator = torch.Generator().manual_seed(0)
        chosen = torch.randperm(len(rows), generator=generator)[:_FITTED]
        inputs = self._features[chosen]
        outputs = rows[chosen] - rows[chosen].mean(dim=0)
        squares = inputs.T @ inputs
        ridge = _RIDGE * squares.diagonal().mean() * torch.eye(len(squares))
        slope = torch.linalg.solve(squares + ridge, inputs.T @ outputs)
        residual = outputs - inputs @ slope
        covariance = residual.T @ residual / len(chosen)
        covariance.diagonal().add_(law.sigma**2 / len(releases))
        covariance.diagonal().add_(_RIDGE * covariance.diagonal().mean() + 1e-12)
        toward = torch.linalg.solve(covariance, slope.T).T
        lengths = ((self._features @ (toward @ slope.T)) * self._features).sum(dim=1)
        constant = (rows[chosen] - inputs @ slope).mean(dim=0)
        order = self._features @ (toward @ (releases.mean(dim=0) - constant))
        shortlist = (2 * order - lengths).topk(SHORTLISTS[0]).indices
        distances = (rows - rows[best]).norm(dim=1)
        distances[shortlist] = math.inf
        distances[best] = math.inf
        return _Depth(slope, toward, lengths, float(distances.min()))
