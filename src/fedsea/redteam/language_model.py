"""A whole public checkpoint as a language model: how probable each next token is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedsea.model.checkpoint import Checkpoint
from fedsea.model.lora import Adapter
from fedsea.model.partition import Span
from fedsea.model.spans import Placement, Top, load_top
from fedsea.redteam.continuation import Continuation, Prefix, load_continuation


@dataclass(frozen=True, slots=True, eq=False)
class Expectation:
    """A text and the log-probability [vocabulary] of each next token, float64."""

    prefix: Prefix
    log_probabilities: Tensor


class LanguageModel:
    """A whole public checkpoint that says how probable the next token is."""

    def __init__(self, blocks: Continuation, top: Top) -> None:
        self._blocks = blocks
        self._top = top

    @classmethod
    def load(cls, checkpoint: Checkpoint, adapter: Adapter | None = None) -> LanguageModel:
        """All blocks, the norm and the head of a checkpoint, with an adapter or without.

        Raises:
            ModelError: it is not complete.
            ConfigError: the adapter does not fit it.
        """
        last = checkpoint.num_blocks
        blocks = load_continuation(checkpoint, Span(0, last), adapter=adapter)
        return cls(blocks, load_top(checkpoint, Span(last, last), Placement()))

    def begin(self, ids: tuple[int, ...]) -> Expectation:
        """The expectation after a text; uniform after none."""
        if not ids:
            size = self._blocks.vocabulary
            return Expectation(Prefix(), torch.full((size,), -1.0, dtype=torch.float64))
        prefix, rows = self._blocks.extend(Prefix(), ids)
        return Expectation(prefix, self._log_probabilities(rows[-1:])[0])

    def extend(self, before: Expectation, token: int) -> Expectation:
        """The expectation after one more token."""
        prefix, rows = self._blocks.extend(before.prefix, [token])
        return Expectation(prefix, self._log_probabilities(rows)[0])

    @torch.inference_mode()
    def expect(self, ids: tuple[int, ...]) -> Tensor:
        """Log-probabilities [n, vocabulary] of the token after each of n tokens."""
        return self._log_probabilities(self._blocks.extend(Prefix(), ids)[1])

    @torch.inference_mode()
    def _log_probabilities(self, rows: Tensor) -> Tensor:
        norm = self._top.span.blocks.norm
        return torch.log_softmax(self._top.logits(norm(rows)).double(), dim=-1)  # type: ignore[operator]
