"""The trunk at a server as a function with a gradient, for code without an event loop.

    rows -> guard -> bytes -> |server| -> rows             TrunkCalls.forward
    gradients <- bytes <- |server| <- bytes <- guard       TrunkCalls.backward

`RemoteBlocks` puts both into autograd: its forward sends rows, its backward the gradient of what
came back. Whatever leaves does so through a `RowGuard`, where there is one.

Shapes: T rows of all examples of a batch one after the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fedsea.client.background import Background
from fedsea.client.connecting import close_all
from fedsea.client.servers import Endpoint
from fedsea.client.training_trunk import TrainingTrunk
from fedsea.errors import LocalProtocolError, NotFinite
from fedsea.model.spans import Placement
from fedsea.wire.codecs import RowFormat
from fedsea.wire.messages import Stepped


class RowGuard(Protocol):
    """What stands between rows or gradients and the wire; it decides in what form they leave."""

    @property
    def rows_format(self) -> RowFormat:
        """How rows go up."""
        ...

    @property
    def gradients_format(self) -> RowFormat:
        """How gradients go up."""
        ...

    @property
    def description(self) -> Mapping[str, Any]:
        """What is done to rows and gradients, for JSON; a run goes on with the same only."""
        ...

    def begin(self, step: int) -> None:
        """Step number `step`, from 1 on, is done now, for the first time or anew; 0 is none."""
        ...

    def forward(
        self,
        index: int,
        sequences: Sequence[Sequence[int]],
        rows: Tensor,
        *,
        no_grad: bool = False,
    ) -> bytes:
        """What goes up for the rows (T, width) of forward `index` of the step."""
        ...

    def gradient(self, index: int, rows: Tensor, scale: float = 1.0) -> bytes:
        """What goes up for the gradient (T, hidden) at the outputs of forward `index`."""
        ...

    def close(self) -> None:
        """Nothing more will leave."""
        ...


@dataclass(frozen=True, slots=True)
class Passage:
    """One forward on its way back: its number in the step, its messages, rows of each sequence."""

    index: int
    messages: tuple[int, ...]
    counts: tuple[int, ...]


class TrunkCalls:
    """The trunk for code without an event loop: encodes, guards, sends, waits, decodes.

    One thread at a time.

    Args:
        trunk: the session; its loop is that of `background`.
        background: where it lives.
        guard: through which rows and gradients leave; None sends them as they are.
        placement: device and dtype of what comes back.

    Attributes:
        loss_scale: gradients are so many times too large, on purpose.
    """

    def __init__(
        self,
        trunk: TrainingTrunk,
        background: Background,
        guard: RowGuard | None,
        placement: Placement,
    ) -> None:
        self.trunk = trunk
        self.loss_scale = 1.0
        self._background = background
        self._guard = guard
        self._placement = placement
        self._steps = 0
        self._forwards = 0
        self._evaluations = 0

    @property
    def steps(self) -> int:
        """Optimizer steps that are done."""
        return self._steps

    @property
    def protection(self) -> Mapping[str, Any] | None:
        """What the guard says it does; None without one."""
        return None if self._guard is None else self._guard.description

    @property
    def next_forward(self) -> int:
        """The number in its step of the forward that comes next."""
        return self._forwards

    def open(self, resume_steps: Sequence[int], within: float | None = None) -> int:
        """Open the session, or open it again; see `TrainingTrunk.open`."""
        self._at(self._background.run(self.trunk.open(resume_steps, within)))
        return self._steps

    def forward(
        self, rows: Tensor, sequences: Sequence[Tensor], no_grad: bool
    ) -> tuple[Passage, Tensor]:
        """Rows (T, width) of whole sequences to rows (T, hidden).

        Raises:
            PromptTooLong: a sequence has more rows than the server takes; nothing was sent.
            NotFinite: a row is NaN or infinite; nothing was sent.
            ConnectionLost: the session can be opened again.
        """
        counts = tuple(len(sequence) for sequence in sequences)
        index = self._evaluations if no_grad else self._forwards
        what = f"the rows of forward {index + 1} of step {self._steps + 1}"
        self.trunk.check(counts)  # before anything is charged
        if self._guard is None:
            data = _encoded(self.trunk.plan.up, rows, what)
        else:
            ids = [sequence.tolist() for sequence in sequences]
            data = self._guard.forward(index, ids, rows.detach(), no_grad=no_grad)
        messages, back = self._background.run(self.trunk.forward(data, counts, no_grad))
        if no_grad:
            self._evaluations += 1
        else:
            self._forwards += 1
        found = self.trunk.plan.down.decode(back, sum(counts), self._placement.dtype)
        return Passage(index, messages, counts), found.to(self._placement.device)

    def backward(self, passage: Passage, gradient: Tensor) -> Tensor:
        """Gradients (T, hidden) at what came back to gradients (T, width) at what was sent.

        Raises:
            NotFinite: a number is NaN, infinite, or too large for the codec; nothing was sent.
            ConnectionLost: the session can be opened again; the step has to be done anew.
        """
        what = f"the gradient of forward {passage.index + 1} of step {self._steps + 1}"
        if self._guard is None:
            data = _encoded(self.trunk.plan.gradient, gradient, what)
        else:
            data = self._guard.gradient(passage.index, gradient, self.loss_scale)
        back = self._background.run(self.trunk.backward(passage.messages, passage.counts, data))
        found = self.trunk.plan.returned.decode(back, sum(passage.counts))
        return found.to(self._placement.device)

    def step(
        self,
        learning_rate: float,
        max_grad_norm: float | None,
        scale: float,
        number: int | None = None,
    ) -> Stepped:
        """Let the server take its optimizer step; `number` may repeat the last one's."""
        number = self._steps + 1 if number is None else number
        stepped = self._background.run(self.trunk.step(number, learning_rate, max_grad_norm, scale))
        self._at(stepped.number if stepped.applied else self._steps)
        return stepped

    def reset(self) -> None:
        """Forget what was done of the step that is not finished."""
        self._background.run(self.trunk.reset())
        self._at(self._steps)

    def forget_releases(self) -> None:
        """What is done next of this step starts from other weights: nothing is sent a second time."""
        if self._guard is not None:
            self._guard.begin(0)
            self._guard.begin(self._steps + 1)

    def save(self) -> None:
        """Let the server save its part of the last step."""
        self._background.run(self.trunk.save(self._steps))

    def close(self, endpoints: Sequence[Endpoint]) -> None:
        """End the session and disconnect."""

        async def end() -> None:
            await self.trunk.close()
            await close_all(endpoints)

        try:
            self._background.stop(end())
        finally:
            if self._guard is not None:
                self._guard.close()

    def _at(self, steps: int) -> None:
        self._steps = steps
        self._forwards = self._evaluations = 0
        if self._guard is not None:
            self._guard.begin(steps + 1)


class RemoteBlocks(torch.autograd.Function):
    """The trunk as a function of its input rows (T, width) to rows (T, hidden)."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        anchor: Tensor,  # noqa: ARG004 - takes a gradient, so that there is a backward
        calls: TrunkCalls,
        sequences: Sequence[Tensor],
    ) -> Tensor:
        """Send rows and wait for what comes back."""
        ctx.calls = calls
        ctx.passage, found = calls.forward(rows, sequences, no_grad=False)
        ctx.dtype = rows.dtype
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        """Send the gradient and wait for that of the rows."""
        return ctx.calls.backward(ctx.passage, gradient).to(ctx.dtype), None, None, None


def _encoded(form: RowFormat, rows: Tensor, what: str) -> bytes:
    """Rows as bytes; numbers that cannot be sent are named by their step."""
    try:
        return form.encode(rows)
    except LocalProtocolError as error:
        if bool(torch.isfinite(rows).all()) and form.codec.value == "fp32":
            raise
        raise NotFinite(f"{what} cannot be sent: {error}") from error
