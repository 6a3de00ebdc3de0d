"""One training: what is trained in the trunk, its optimizer, and the computation of a step.

A `Pass` is one forward through the blocks for one or more `Part`s, the rows of one Forward each.
Rows of different parts do not meet in the blocks, but they share the adapter, whose gradients
are added up over all passes of a step.

Called in the threads of workers, one call at a time for one run.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor, nn

from fedsea.errors import NotFinite, StaleStep
from fedsea.model.attention import RaggedBatch
from fedsea.model.lora import AdaptedRows, Adapter, LoraConfig, Place
from fedsea.model.optimization import AdamWConfig, AdapterOptimizer, step_generator
from fedsea.model.partition import Span
from fedsea.model.projection import Projection
from fedsea.model.prompts import SoftPrompt
from fedsea.model.spans import Placement
from fedsea.server.training_workers import Worker
from fedsea.wire.messages import Step, Stepped

# Step 0 has no forwards, so its generators are free for first values.
_FACTORS: Final = 0
_PROMPT: Final = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What is trained and how, as a client asked for it; a run keeps it from its first step on.

    `model` is the fingerprint of the checkpoint.
    """

    model: str
    span: Span
    lora: LoraConfig | None
    prompt_rows: int
    optimizer: AdamWConfig
    seed: int


@dataclass(slots=True, eq=False)
class Part:
    """Rows of whole sequences as they came, (T, width); their gradient goes back to the client."""

    rows: Tensor
    counts: tuple[int, ...]
    projection: Projection | None = None


@dataclass(slots=True, eq=False)
class Pass:
    """A forward that a backward may come for.

    `hidden` is its result with everything that its gradient needs; None when it is to be computed
    again. `index` numbers the pass in its step, for dropout.
    """

    parts: Sequence[Part]
    index: int
    hidden: Tensor | None


@dataclass(slots=True, eq=False)
class TrainingRun:
    """The state of one training.

    Attributes:
        recipe: what it trains.
        placement: where the blocks compute.
        adapter: low-rank factors, fp32; None when none are trained.
        prompt: rows at the entrance of the span; None when none are trained.
        optimizer: of both.
        prompt_drawn: whether the prompt has values yet; the first forward draws them from its rows.
        last: the answer to the last step that was done.
        is_broken: after a defect, when the values can no longer be trusted.
    """

    recipe: Recipe
    placement: Placement
    adapter: Adapter | None
    prompt: SoftPrompt | None
    optimizer: AdapterOptimizer
    prompt_drawn: bool = False
    last: Stepped | None = None
    is_broken: bool = False
    _passes: int = 0
    _not_finite: bool = field(default=False)

    @classmethod
    def fresh(
        cls,
        recipe: Recipe,
        linears: Mapping[Place, nn.Module],
        hidden_size: int,
        factor: float,
        placement: Placement,
    ) -> TrainingRun:
        """A run of which no step is done; its adapter changes nothing yet.

        Args:
            recipe: what to train.
            linears: of the blocks.
            hidden_size: numbers in a row of the trunk.
            factor: of the model's embeddings, see `SoftPrompt`.
            placement: where the blocks compute.

        Raises:
            ConfigError: the adapter names what the blocks do not have.
        """
        adapter = prompt = None
        if recipe.lora is not None:
            own = {
                place: one
                for place, one in linears.items()
                if recipe.span.first <= place.block < recipe.span.end
            }
            chance = step_generator(recipe.seed, 0, _FACTORS)
            adapter = Adapter.fresh(recipe.lora, recipe.span, own, chance).to(placement.device)
        if recipe.prompt_rows:
            zeros = torch.zeros(recipe.prompt_rows, hidden_size)
            prompt = SoftPrompt(zeros, recipe.span.first, recipe.model, factor)
            prompt = prompt.to(placement.device)
        optimizer = AdapterOptimizer(parameters_of(adapter, prompt), recipe.optimizer)
        return cls(recipe, placement, adapter, prompt, optimizer)

    @property
    def steps(self) -> int:
        """Steps that are done."""
        return self.optimizer.steps

    def forward(
        self, worker: Worker, parts: Sequence[Part], *, trains: bool, keeps: bool = True
    ) -> tuple[Pass | None, list[Tensor]]:
        """Run parts through the blocks.

        Args:
            worker: computes.
            parts: at least one.
            trains: a backward may come; without, there is no dropout either.
            keeps: keep what the backward needs; without, it computes the pass again.

        Returns:
            The pass, None when nothing is trained; the rows (T, hidden) of each part.
        """
        if not trains:
            with torch.no_grad():
                return None, _divided(self._computed(worker, parts, None), parts)
        index = self._passes
        self._passes += 1
        if not keeps:
            with torch.no_grad():
                hidden = self._computed(worker, parts, index)
            return Pass(parts, index, None), _divided(hidden, parts)
        hidden = self._computed(worker, _as_leaves(parts), index)
        return Pass(parts, index, hidden), _divided(hidden.detach(), parts)

    def backward(
        self,
        worker: Worker,
        passed: Pass,
        gradients: Sequence[Tensor | None],
        *,
        counts: bool = True,
    ) -> list[Tensor]:
        """Gradients of the rows of each part; those of what is trained are added up.

        Args:
            worker: computes, when the pass has to be computed again.
            passed: what `forward` gave; it can be used once.
            gradients: for each part, of the rows that `forward` gave; None for zeros.
            counts: whether what is trained gets gradients.
        """
        hidden, passed.hidden = passed.hidden, None
        if hidden is None:
            hidden = self._computed(worker, _as_leaves(passed.parts), passed.index)
        sizes = [sum(part.counts) for part in passed.parts]
        given = [
            hidden.new_zeros(size, hidden.shape[1])
            if gradient is None
            else gradient.to(hidden.device, hidden.dtype)
            for size, gradient in zip(sizes, gradients, strict=True)
        ]
        trained = self._trained() if counts else []
        rows = [part.rows for part in passed.parts]
        found = torch.autograd.grad(hidden, [*rows, *trained], torch.cat(given), allow_unused=True)
        for parameter, gradient in zip(trained, found[len(rows) :], strict=True):
            if gradient is not None:
                parameter.grad = (
                    gradient if parameter.grad is None else parameter.grad.add_(gradient)
                )
        return [
            torch.zeros_like(part) if gradient is None else gradient
            for part, gradient in zip(rows, found, strict=False)
        ]

    def step(self, event: Step, members: int = 1) -> Stepped:
        """Change what is trained, once for each number.

        Args:
            event: what to do.
            members: the gradients are the sum of so many members', whose mean is taken.

        Raises:
            StaleStep: the number is neither the next nor the last.
        """
        if event.number == self.steps and self.last is not None:
            return self.last
        self.check_number(event.number)
        norm = math.inf
        if not self._not_finite:
            clip, scale = event.max_grad_norm or None, event.scale * members
            with contextlib.suppress(NotFinite):
                norm = self.optimizer.apply(event.learning_rate, clip, scale)
        if norm == math.inf:
            self.clear()
            return Stepped(event.number, math.inf, applied=False)
        if self.adapter is not None:
            self.adapter.changed()
        self.clear()
        self.last = Stepped(event.number, norm, applied=True)
        return self.last

    def check_number(self, number: int) -> None:
        """Refuse a step that is neither the next nor a repeat of the last.

        Raises:
            StaleStep: it is another.
        """
        if number == self.steps + 1 or (number == self.steps and self.last is not None):
            return
        raise StaleStep(
            f"step {number} was asked for and {self.steps} are done here; open the training again "
            "and go on from the step that it says"
        )

    def clear(self) -> None:
        """Forget the gradients of the unfinished step; its passes are numbered anew."""
        self.optimizer.clear()
        self._passes = 0
        self._not_finite = False

    def spoil(self) -> None:
        """Note that a gradient of this step could not be sent: the step will not be applied."""
        self._not_finite = True

    def _trained(self) -> list[nn.Parameter]:
        named = parameters_of(self.adapter, self.prompt)
        return [parameter for parameter in named.values() if parameter.requires_grad]

    def _computed(self, worker: Worker, parts: Sequence[Part], index: int | None) -> Tensor:
        """The rows of all parts behind the blocks; `index` is the pass's, None for no dropout."""
        rows = torch.cat([self._entering(part) for part in parts])
        counts = [count for part in parts for count in part.counts]
        if self.prompt is not None:
            self._draw_prompt(rows)
            rows = self.prompt.prepended(rows, counts)
        whole = [count + self.recipe.prompt_rows for count in counts]
        hidden = self._through_blocks(worker, rows, whole, index)
        return hidden if self.prompt is None else self.prompt.stripped(hidden, counts)

    def _through_blocks(
        self, worker: Worker, rows: Tensor, counts: Sequence[int], index: int | None
    ) -> Tensor:
        adapters: tuple[AdaptedRows, ...] = ()
        if self.adapter is not None:
            worker.accept(self.adapter)
            adapters = (AdaptedRows(0, len(rows), self.adapter),)
        batch = RaggedBatch.whole(counts, self.placement.device, adapters)
        context = worker.blocks.adapters
        if index is not None:
            context.generator = step_generator(
                self.recipe.seed, self.steps + 1, index, self.placement.device
            )
        try:
            return worker.blocks.run(rows, batch, self.recipe.span)
        finally:
            context.generator, context.rows = None, ()
            worker.blocks.context.batch = None

    def _entering(self, part: Part) -> Tensor:
        rows = part.rows
        if part.projection is not None:
            rows = part.projection.decode(rows)
        return rows.to(self.placement.dtype)

    @torch.no_grad()
    def _draw_prompt(self, rows: Tensor) -> None:
        """Give a new prompt the values of some of the rows that come first.

        Rows of that size are what the blocks expect; the client has released them already.
        """
        if self.prompt is None or self.prompt_drawn:
            return
        chance = step_generator(self.recipe.seed, 0, _PROMPT)
        chosen = torch.randint(len(rows), (self.prompt.count,), generator=chance)
        self.prompt.rows.copy_(rows[chosen.to(rows.device)] / self.prompt.factor)
        self.prompt_drawn = True


def parameters_of(adapter: Adapter | None, prompt: SoftPrompt | None) -> dict[str, nn.Parameter]:
    """What is trained, by the names under which an optimizer keeps its state."""
    named: dict[str, nn.Parameter] = {}
    if adapter is not None:
        named |= {f"adapter/{name}": one for name, one in adapter.named_parameters()}
    if prompt is not None:
        named["prompt/rows"] = prompt.rows
    return named


def _as_leaves(parts: Sequence[Part]) -> Sequence[Part]:
    for part in parts:
        part.rows.requires_grad_()
    return parts


def _divided(hidden: Tensor, parts: Sequence[Part]) -> list[Tensor]:
    return list(hidden.split([sum(part.counts) for part in parts]))
