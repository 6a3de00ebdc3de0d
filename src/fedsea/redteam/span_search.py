"""R7: text from a released update of the bottom's linears or of their adapter (DAGER, threats 1.7).

The first test needs no order: what the first block's attention reads is a function of the token
alone, so each vocabulary entry is tried against the span of the update. Then prefixes grow: what
deeper linears read depends on all tokens before, and a token is accepted after a prefix when its
input is in every deeper span. Where several are accepted, the batch had several sequences.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedsea.errors import ConfigError
from fedsea.redteam.adapter_update import Site, Span, Update, spans
from fedsea.redteam.continuation import Continuation, Prefix

Spans = dict[Site, tuple[Span, ...]]


@dataclass(frozen=True, slots=True)
class Spanned:
    """What an update gave away.

    Attributes:
        ranked: all token ids, those first whose inputs are nearest to the span; empty when the
            update says nothing.
        tokens: those inside of the span, where it holds all inputs: the tokens of the batch, in no
            order, and rarely others.
        sequences: texts of the batch, each as far as it could be followed; none without a deeper
            span that holds all inputs.
    """

    ranked: tuple[int, ...] = ()
    tokens: frozenset[int] = frozenset()
    sequences: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class SpanSearch:
    """The span test, then the growth of prefixes.

    Args:
        tolerance: largest share of an input outside of a span that still counts as inside.
        beams: prefixes that are followed at most.
        longest: rows of a sequence at most.

    Raises:
        ConfigError: a value out of range.
    """

    name: ClassVar[str] = "r7"

    tolerance: float = 0.05
    beams: int = 16
    longest: int = 512

    def __post_init__(self) -> None:
        if not 0 < self.tolerance < 1 or min(self.beams, self.longest) < 1:
            raise ConfigError("R7 needs a tolerance between 0 and 1, a beam and a row")

    def run(self, update: Update, bottom: Continuation, prefix: Sequence[int] = ()) -> Spanned:
        """Search.

        Args:
            update: of the bottom's linears.
            bottom: embedding and blocks with the adapter as it was before the update.
            prefix: ids with which every sequence begins, known to everybody.

        Raises:
            ConfigError: the update is of other blocks than the bottom has.
        """
        found = spans(update)
        if any(site.block >= bottom.num_blocks for site in found):
            raise ConfigError("the update is of blocks that this bottom does not have")
        first = {site: made for site, made in found.items() if _is_first(site)}
        deeper = _whole({site: made for site, made in found.items() if not _is_first(site)})
        if not first:
            return Spanned()
        everything = torch.arange(bottom.vocabulary)
        whole = _whole(first)
        distances = _distances(whole or first, bottom, Prefix(), everything)
        order = distances.argsort()
        ranked = tuple(order.tolist())
        if not whole:
            return Spanned(ranked)
        inside = order[distances[order] < self.tolerance]
        # Different tokens are independent inputs: where more fit than there are directions, the
        # span is nearly all of the space.
        if len(inside) > _directions(whole):
            return Spanned(ranked)
        tokens = frozenset(inside.tolist()) | {*prefix}
        if not deeper:
            return Spanned(ranked, tokens)
        return Spanned(ranked, tokens, self._grown(deeper, bottom, prefix, tokens))

    def _grown(
        self, deeper: Spans, bottom: Continuation, prefix: Sequence[int], tokens: frozenset[int]
    ) -> tuple[tuple[int, ...], ...]:
        candidates = torch.tensor(sorted(tokens))
        # Rows of a text are independent of each other, so there are no more than directions.
        longest = min(self.longest, _directions(deeper))
        living = [bottom.extend(Prefix(), prefix)[0] if prefix else Prefix()]
        ended = []
        while living:
            grown: list[Prefix] = []
            for before in living:
                distances = _distances(deeper, bottom, before, candidates)
                order = distances.argsort()[: self.beams]
                fitting = candidates[order[distances[order] < self.tolerance]].tolist()
                if not fitting or len(before) >= longest:
                    ended.append(before.ids)
                    continue
                grown += [bottom.extend(before, [token])[0] for token in fitting]
            living = grown[: self.beams]
        return tuple(sorted(ended, key=len, reverse=True))


def _is_first(site: Site) -> bool:
    return site.block == 0 and site.group == "attention"


def _directions(tested: Spans) -> int:
    return max(len(span.basis) for made in tested.values() for span in made)


def _whole(tested: Spans) -> Spans:
    """Only the spans that hold all inputs."""
    kept = {site: tuple(span for span in made if span.is_whole) for site, made in tested.items()}
    return {site: made for site, made in kept.items() if made}


def _distances(tested: Spans, bottom: Continuation, before: Prefix, candidates: Tensor) -> Tensor:
    """How far (n,) each candidate after the prefix is outside of the span that fits it least."""
    worst = torch.zeros(len(candidates), dtype=torch.float64)
    with _inputs(bottom, tested) as seen:
        bottom.candidate_rows(before, candidates)
    for site, made in tested.items():
        read = torch.cat(seen[site])
        for span in made:
            worst = torch.maximum(worst, span.distances(read))
    return worst


@contextmanager
def _inputs(bottom: Continuation, sites: Spans) -> Iterator[dict[Site, list[Tensor]]]:
    """What the linears of these sites read while the context is open, in parts."""
    seen: dict[Site, list[Tensor]] = {site: [] for site in sites}
    blocks: Any = bottom.span.blocks
    hooks = []
    for site, parts in seen.items():
        reader = blocks.layers[site.block].get_submodule(site.reader)
        hooks.append(
            reader.register_forward_pre_hook(
                lambda _module, args, parts=parts: parts.append(args[0][0].clone())
            )
        )
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
