"""What an update of linears holds of their inputs, before any search for tokens.

For a linear y = W x and inputs X [T, in] of all tokens of a step, the gradient dW = D^T X has rows in
the span of the inputs (DAGER, arXiv 2405.15586). With LoRA, y = W x + s B A x, an update shows

    dB = s D^T (X A^T)      rows in the span of the r-dimensional sketches A x of the inputs
    dA = s (D B)^T X        rows in the span of the inputs, at most r of them

A row of dA is a mixture of all T inputs. The span holds every input only when there are fewer
independent inputs than rows: T < r for one linear, T < 3 r for q, k and v, which share their inputs
and differ in D B. With more, inputs stick out of it, but less than what was no input. While B is 0,
before the first step, dA is 0 and only the sketches leak; with A frozen (FFA-LoRA) it stays so, and
r sketched inputs or more fill the space of sketches: then nothing shows. AdamW scales every number by
itself, its first step is nearly a sign: that blurs the span and does not hide it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsea.errors import ConfigError
from fedsea.model.lora import Adapter, Place

_TOLERANCE = 1e-5
_ULP = 2.0**-24
_GROUPS = {
    "q_proj": "attention",
    "k_proj": "attention",
    "v_proj": "attention",
    "gate_proj": "mlp",
    "up_proj": "mlp",
}


@dataclass(frozen=True, slots=True, eq=False)
class Leak:
    """Rows of one linear that are mixtures of its inputs, or of sketches of them.

    Attributes:
        rows: [k, in], or [k, r] behind `sketch`.
        floor: largest singular value that rounding alone may have made.
        sketch: A [r, in]; None where the inputs themselves are mixed.
    """

    rows: Tensor
    floor: float = 0.0
    sketch: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Span:
    """A subspace in which every input of a step lies, or its sketch.

    Attributes:
        basis: [rank, width], orthonormal.
        sketch: what inputs are multiplied with first.
        is_whole: whether all inputs are inside: fewer directions were seen than there could be.
            Rounding may hide some all the same.
    """

    basis: Tensor
    sketch: Tensor | None
    is_whole: bool

    @property
    def says_something(self) -> bool:
        """Whether it is not all of the space."""
        return self.basis.shape[0] < self.basis.shape[1]

    def distances(self, inputs: Tensor) -> Tensor:
        """Share (n,) of each input [n, in] that is outside, from 0 to 1."""
        seen = inputs.double()
        if self.sketch is not None:
            seen = seen @ self.sketch.T
        outside = seen - seen @ self.basis.T @ self.basis
        lengths = seen.norm(dim=1).clamp_min(torch.finfo(torch.float64).tiny)
        found: Tensor = outside.norm(dim=1) / lengths
        return found


@dataclass(frozen=True, order=True, slots=True)
class Site:
    """Linears of a block that read the same inputs; `reader` is one of them."""

    block: int
    group: str
    reader: str


Update = Mapping[Place, tuple[Leak, ...]]


def of_weights(gradients: Mapping[Place, Tensor]) -> Update:
    """Full gradients [out, in] of linears, the reference."""
    return {place: (Leak(gradient.double()),) for place, gradient in gradients.items()}


def of_gradients(adapter: Adapter) -> Update:
    """The gradients that the factors of an adapter now hold.

    Raises:
        ConfigError: there are none.
    """
    found = {
        place: _leaks(factors.a, factors.a.grad, factors.b.grad, 0.0, 0.0)
        for place, factors in adapter.factors.items()
        if factors.a.grad is not None or factors.b.grad is not None
    }
    if not found:
        raise ConfigError("the adapter has no gradients: run the loss of a batch backwards first")
    return found


def between(before: Adapter, after: Adapter, kept: float = 1.0) -> Update:
    """What changed from one release of an adapter to the next.

    Args:
        before: as everybody had it.
        after: as it was released.
        kept: what weight decay left of the old values, 1 - learning rate * decay.

    Raises:
        ConfigError: they are not of the same places.
    """
    if before.factors.keys() != after.factors.keys():
        raise ConfigError("the two adapters are of different linears: give two of the same run")
    found = {}
    for place, old in before.factors.items():
        new = after.factors[place]
        change_a = new.a.detach() - kept * old.a.detach()
        change_b = new.b.detach() - kept * old.b.detach()
        found[place] = _leaks(old.a, change_a, change_b, _rounding(new.a), _rounding(new.b))
    return found


def spans(update: Update) -> dict[Site, tuple[Span, ...]]:
    """What can be tested, by site in the order of the forward pass."""
    sites: dict[tuple[int, str], list[tuple[Place, Leak]]] = {}
    for place, leaks in sorted(update.items()):
        group = _GROUPS.get(place.target, place.target)
        sites.setdefault((place.block, group), []).extend((place, leak) for leak in leaks)
    found = {}
    for (block, group), entries in sites.items():
        mixed = [leak for _, leak in entries if leak.sketch is None]
        sketched = [leak for _, leak in entries if leak.sketch is not None]
        made = [*([_joined(mixed)] if mixed else []), *(_joined([leak]) for leak in sketched)]
        tested = tuple(span for span in made if len(span.basis) and span.says_something)
        if tested:
            found[Site(block, group, entries[0][0].path)] = tested
    return dict(sorted(found.items(), key=lambda item: (item[0].block, _depth(item[0].group))))


def _leaks(
    a: Tensor, change_a: Tensor | None, change_b: Tensor | None, floor_a: float, floor_b: float
) -> tuple[Leak, ...]:
    found = []
    if change_a is not None and bool(change_a.any()):
        found.append(Leak(change_a.detach().double(), floor_a))
    if change_b is not None and bool(change_b.any()):
        found.append(Leak(change_b.detach().double(), floor_b, a.detach().double()))
    return tuple(found)


def _joined(leaks: Iterable[Leak]) -> Span:
    """One span of the rows of linears that read the same inputs, each of the same weight."""
    parts = list(leaks)
    rows = torch.cat([leak.rows / leak.rows.norm() for leak in parts])
    floor = max(leak.floor / float(leak.rows.norm()) for leak in parts)
    _, values, basis = torch.linalg.svd(rows, full_matrices=False)
    rank = int((values > max(_TOLERANCE * float(values[0]), floor)).sum())
    return Span(basis[:rank], parts[0].sketch, rank < min(rows.shape))


def _rounding(values: Tensor) -> float:
    """Spectral norm of the rounding of fp32 numbers of this size, generously: 4 ulp rms."""
    rms = float(values.detach().double().square().mean().sqrt())
    sides = values.shape[0] ** 0.5 + values.shape[1] ** 0.5
    return float(4 * _ULP * rms * sides)


def _depth(group: str) -> int:
    order = ("attention", "o_proj", "mlp", "down_proj")
    return order.index(group) if group in order else len(order)
