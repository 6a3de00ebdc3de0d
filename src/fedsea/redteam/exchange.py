"""What crosses the cuts for one sequence in one step of training, as a server holds it.

The server computed the activations that went down and got their gradients back. The loss is a mean
over the scored rows of the whole step, so the gradient of one sequence knows nothing of the others
but their number. Which rows are scored, and how many, is no secret: the recipe says it, and without
noise the gradient shows it too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedsea.errors import ConfigError


@dataclass(frozen=True, slots=True, eq=False)
class Exchange:
    """One sequence of one step; its rows by position.

    Attributes:
        activations: [n, hidden], what the trunk gave and the top went on with.
        gradient: [n, hidden], of the loss with respect to them, as it came up.
        released: [n, width], what went up as the trunk's input; None where it is not attacked.
    """

    activations: Tensor
    gradient: Tensor
    released: Tensor | None = None

    def __post_init__(self) -> None:
        if self.activations.dim() != 2 or self.activations.shape != self.gradient.shape:
            raise ConfigError(
                f"activations {list(self.activations.shape)} and gradients "
                f"{list(self.gradient.shape)} are not of the same rows: keep all messages of a step"
            )
        if self.released is not None and len(self.released) != len(self.activations):
            raise ConfigError(
                f"{len(self.released)} rows went up and {len(self.activations)} came back: "
                "keep all messages of a step"
            )

    def __len__(self) -> int:
        return len(self.activations)


@dataclass(frozen=True, slots=True, eq=False)
class Scored:
    """Where the loss of a step lies, for one of its sequences.

    Attributes:
        rows: [n] bool; True where the token that follows is a label.
        step: scored rows of all sequences of the step, over which the loss is a mean.
        scale: gradients are so many times too large, as a loss scaler makes them.
        choices: the only tokens that a label can be, as in classification; empty for all.
    """

    rows: Tensor
    step: int
    scale: float = 1.0
    choices: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        count = int(self.rows.sum())
        if self.rows.dtype != torch.bool or self.rows.dim() != 1 or not 0 < count <= self.step:
            raise ConfigError(
                f"{count} scored rows of {self.step} in the step: give a mask of at least one row, "
                "and the number of scored rows of all sequences together"
            )
        if not self.scale > 0:
            raise ConfigError(f"gradients cannot be scaled by {self.scale}: give a number above 0")
