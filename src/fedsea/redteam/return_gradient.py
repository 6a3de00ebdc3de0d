"""R3: labels from the gradients that a client sends back in training.

In a causal language model the labels are the text, shifted by one. The server made the activations
itself, and noise that the client adds to rows on the way up changes them for both sides alike: it
protects nothing here. The client's model even gives the prior: p is what it expects after the true
text.

Two forms. `ClosedForm` needs one product with J^T and one with J (threats 1.6):

    r = N g - J^T p = -J^T y,   s = J r,   y_t = argmin_v 2 s_tv + c_t |W_v gamma|^2

with c_t such that the best label satisfies s = -c |W_v gamma|^2. It takes J J^T for diagonal: exact
without blocks in the top, and less so with each. `Refined` minimizes over distributions y of labels

    0.85 |e|^2 / 2 + 0.15 |e|_1 - y log p,   e = (g - release(J^T (p - y) / N)) / sigma

the loss of TAG (arXiv 2103.06819; BiSR, arXiv 2409.00960) with the model's own prior, in the unit of
the noise. `release` is what the mechanism makes of a gradient on average; its law is public.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedsea.errors import ConfigError
from fedsea.model.lora import Adapter
from fedsea.model.spans import Top
from fedsea.privacy.clipping import Clipping
from fedsea.privacy.gaussian import FedSEAGaussian, Gaussian
from fedsea.privacy.mechanism import Mechanism
from fedsea.redteam.attack import UNKNOWN, Guess, TextGuess
from fedsea.redteam.exchange import Exchange, Scored
from fedsea.redteam.top_map import TopMap, entry_norms

# What stands for sigma where nothing but a codec's rounding is added, relative to the gradient.
_ROUNDING = 0.05
_LEAST = 1e-30


@dataclass(frozen=True, slots=True)
class NoiseLaw:
    """What a mechanism makes of gradient rows: clipped, then Gaussian noise of size sigma."""

    sigma: float
    radius: float | None = None
    by: Clipping = Clipping.ROW

    @classmethod
    def of(cls, mechanism: Mechanism | None) -> NoiseLaw:
        """The law of a mechanism for gradients.

        Raises:
            ConfigError: its noise is not Gaussian around the origin.
        """
        match mechanism:
            case None:
                return cls(0.0)
            case FedSEAGaussian():
                return cls(mechanism.sigma, mechanism.clip_norm)
            case Gaussian() if mechanism.center is None:
                return cls(mechanism.sigma, mechanism.clip_norm, mechanism.by)
        raise ConfigError(
            f"R3 knows Gaussian noise on gradients, not {mechanism.name}: use gaussian or fedsea"
        )

    def means(self, rows: Tensor) -> Tensor:
        """What the release of gradient rows [n, hidden] is on average."""
        if self.radius is None:
            return rows
        dims = 1 if self.by is Clipping.ROW else (0, 1)
        norms = torch.linalg.vector_norm(rows, dim=dims, keepdim=True)
        # Differentiable at 0 too, where rows without a loss are.
        factors: Tensor = self.radius / norms.clamp_min(self.radius)
        return rows * factors


class ReturnGradient(ABC):
    """An attack on the gradients of a step, sequence by sequence.

    A guess at a row is the token that follows it; `UNKNOWN` where no loss lies.
    """

    name: ClassVar[str]

    def run(
        self,
        exchanges: Sequence[tuple[Exchange, Scored]],
        top: Top,
        mechanism: Mechanism | None = None,
        adapter: Adapter | None = None,
    ) -> Guess:
        """Attack sequences.

        Args:
            exchanges: what crossed the wire, and where the loss lies.
            top: last blocks, norm and head, as far as the attacker knows them.
            mechanism: on gradients; public.
            adapter: the client's adapter of the top, where that leaked.

        Raises:
            ConfigError: the parts do not fit each other, or the mechanism is of another kind.
        """
        started = time.perf_counter()
        law = NoiseLaw.of(mechanism)
        texts = tuple(
            self._read(exchange, scored, top, law, adapter) for exchange, scored in exchanges
        )
        return Guess(texts, time.perf_counter() - started)

    def _read(
        self, exchange: Exchange, scored: Scored, top: Top, law: NoiseLaw, adapter: Adapter | None
    ) -> TextGuess:
        if len(scored.rows) != len(exchange):
            raise ConfigError(
                f"{len(scored.rows)} rows are marked and the sequence has {len(exchange)}: "
                "give a mark for every row"
            )
        whole = TopMap(top, exchange.activations, adapter)
        scores = self._scores(whole, exchange.gradient.float(), scored, top, law)
        if scored.choices:
            allowed = torch.zeros(scores.shape[1], dtype=torch.bool)
            allowed[list(scored.choices)] = True
            scores = scores.masked_fill(~allowed, -torch.inf)
        best, ids = scores.max(dim=1)
        named = torch.where(scored.rows, ids, UNKNOWN)
        return TextGuess(tuple(named.tolist()), tuple(best.tolist()))

    @abstractmethod
    def _scores(
        self, whole: TopMap, gradient: Tensor, scored: Scored, top: Top, law: NoiseLaw
    ) -> Tensor:
        """How good every label is at every row: [n, vocabulary]."""


@dataclass(frozen=True, slots=True)
class ClosedForm(ReturnGradient):
    """One product with the top's Jacobian and one with its transpose; clipping is not undone."""

    name: ClassVar[str] = "r3"

    def _scores(
        self, whole: TopMap, gradient: Tensor, scored: Scored, top: Top, law: NoiseLaw
    ) -> Tensor:
        del law
        count = scored.step / scored.scale
        marks = scored.rows[:, None]
        residual = count * gradient - whole.pulled(whole.probabilities * marks)
        matched = whole.pushed(residual)
        lengths = entry_norms(top)
        fitted = (-matched / lengths.clamp_min(_LEAST)).amax(dim=1, keepdim=True)
        return -(2 * matched + fitted * lengths)


@dataclass(frozen=True, slots=True)
class Refined(ReturnGradient):
    """TAG's loss over distributions of labels, with the prior of the client's own model.

    Args:
        steps: of AdamW; each is one product with J and one with its transpose.
        learning_rate: of AdamW.
        prior: weight of log p; 1 is that of probability, 0 is TAG alone.

    Raises:
        ConfigError: a value out of range.
    """

    name: ClassVar[str] = "r3t"

    steps: int = 150
    learning_rate: float = 0.09
    prior: float = 1.0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.learning_rate <= 0 or self.prior < 0:
            raise ConfigError("R3 needs a step, a learning rate above 0 and a prior of 0 or more")

    def _scores(
        self, whole: TopMap, gradient: Tensor, scored: Scored, top: Top, law: NoiseLaw
    ) -> Tensor:
        del top
        count = scored.step / scored.scale
        marks = scored.rows[:, None]
        probabilities = whole.probabilities
        prior = self.prior * whole.expected
        unit = law.sigma or _ROUNDING * float(gradient.square().mean().sqrt()) or 1.0
        allowed = torch.zeros_like(prior)
        if scored.choices:
            allowed += -torch.inf
            allowed[:, list(scored.choices)] = 0.0
        labels = (prior + allowed).requires_grad_()
        optimizer = torch.optim.AdamW([labels], lr=self.learning_rate, weight_decay=0.0)
        for _ in range(self.steps):
            guessed = torch.softmax(labels, dim=1)
            with torch.no_grad():
                pulled = whole.pulled((probabilities - guessed) * marks) / count
            slope = _mismatch_slope(pulled, gradient, law, unit)
            along = -whole.pushed(slope) / count - prior
            optimizer.zero_grad()
            (guessed * (along * marks)).sum().backward()
            optimizer.step()
        return labels.detach()


def _mismatch_slope(pulled: Tensor, gradient: Tensor, law: NoiseLaw, unit: float) -> Tensor:
    """Derivative [n, hidden] of TAG's loss in the gradient before it was released."""
    clean = pulled.detach().requires_grad_()
    error = (gradient - law.means(clean)) / unit
    loss = 0.85 * error.square().sum() / 2 + 0.15 * error.abs().sum()
    (slope,) = torch.autograd.grad(loss, clean)
    return slope
