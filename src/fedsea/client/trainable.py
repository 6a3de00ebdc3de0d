"""What the trainer trains: a model that is cut, seen as forwards, parameters and a trunk.

`TrainableModel` is all that the trainer knows of a model: a forward from examples to logits through
whose graph gradients flow, the client's parameters, and a `Trunk` that takes, saves and remembers
steps elsewhere. `trainable` makes one of a `SplitForTraining`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedsea.client.examples import Example
from fedsea.client.training import SplitForTraining
from fedsea.errors import DataError
from fedsea.model.adapters import write_adapter
from fedsea.model.optimization import AdamWConfig
from fedsea.wire.messages import Stepped


@dataclass(frozen=True, slots=True)
class Moved:
    """Bytes of messages to the server and from it."""

    up: int = 0
    down: int = 0


class Trunk(Protocol):
    """The server's part of a training. Methods wait; what ends a session is raised."""

    @property
    def moved(self) -> Moved:
        """Bytes of all sessions so far."""

    def open(self, steps: Sequence[int], within: float) -> int:
        """Find a server and begin a session.

        Gradients that another session left behind are forgotten.

        Args:
            steps: those that the client could go on from; 0 is the start.
            within: seconds to wait for a server.

        Returns:
            The highest of them that the server has.

        Raises:
            StaleStep: it has none of them.
            FedseaError: no server in time, or one that refuses.
        """

    def reset(self) -> None:
        """Forget the gradients of the unfinished step."""

    def step(
        self, number: int, learning_rate: float, max_grad_norm: float | None, scale: float
    ) -> Stepped:
        """Apply the gradients of a step; a repeated number answers as before."""

    def save(self, number: int) -> None:
        """Make a step durable."""


class TrainableModel(Protocol):
    """A model that is cut, as the trainer needs it."""

    @property
    def trunk(self) -> Trunk:
        """The server's part."""

    @property
    def dtype(self) -> torch.dtype:
        """What the blocks compute in."""

    @property
    def optimizer(self) -> AdamWConfig | None:
        """What the trunk's optimizer was begun with; None where nothing is trained there."""

    def description(self) -> Mapping[str, Any]:
        """What a run cannot change under way, for JSON: the model, its cut, what is adapted."""

    def trained(self) -> Mapping[str, nn.Parameter]:
        """The client's parameters by name."""

    def begin_step(self, step: int, scale: float = 1.0) -> None:
        """The forwards that follow belong to a step; their losses are `scale` times too large."""

    def logits(self, batch: Sequence[Example]) -> Tensor:
        """Logits (answer tokens, vocabulary) of the rows that predict answers, in order.

        With gradients enabled it is part of the step and uses dropout, otherwise neither.
        """

    def changed(self) -> None:
        """The parameters have other values now."""

    def save(self, folder: Path) -> None:
        """Write the client's part of what is trained."""

    def load(self, folder: Path) -> None:
        """Take over what `save` wrote."""


def trainable(model: SplitForTraining | TrainableModel) -> TrainableModel:
    """What the trainer knows of a model."""
    return _Split(model) if isinstance(model, SplitForTraining) else model


def answer_loss(model: TrainableModel, batch: Sequence[Example]) -> Tensor:
    """Cross-entropy summed over the answer tokens of a batch.

    Raises:
        DataError: an answer holds a token that the model does not have.
    """
    logits = model.logits(batch).float()
    targets = torch.tensor([target for example in batch for target in example.targets])
    if int(targets.max()) >= logits.shape[-1]:
        raise DataError(
            f"an answer has a token outside the vocabulary of {logits.shape[-1]}; "
            "use this model's tokenizer"
        )
    return cross_entropy(logits, targets.to(logits.device), reduction="sum")


class _SplitTrunk:
    """The trunk of a split model, whose session may be open already."""

    def __init__(self, model: SplitForTraining) -> None:
        self._model = model
        self._is_first = True

    @property
    def moved(self) -> Moved:
        traffic = self._model.traffic
        return Moved(traffic.bytes_up, traffic.bytes_down)

    def open(self, steps: Sequence[int], within: float) -> int:
        # The model was connected with the steps that were there then: no need to ask twice.
        is_open = self._is_first and self._model.address is not None
        self._is_first = False
        if not is_open or self._model.steps not in steps:
            self._model.reopen(steps, within)
        self._model.reset()
        return self._model.steps

    def reset(self) -> None:
        self._model.reset()

    def step(
        self, number: int, learning_rate: float, max_grad_norm: float | None, scale: float
    ) -> Stepped:
        return self._model.calls.step(learning_rate, max_grad_norm, scale, number)

    def save(self, number: int) -> None:
        assert number == self._model.steps
        self._model.save()


class _Split:
    """A `SplitForTraining` with its adapters of bottom and top."""

    def __init__(self, model: SplitForTraining) -> None:
        self._model = model
        self._trunk = _SplitTrunk(model)

    @property
    def trunk(self) -> Trunk:
        return self._trunk

    @property
    def dtype(self) -> torch.dtype:
        return self._model.placement.dtype

    @property
    def optimizer(self) -> AdamWConfig | None:
        plan = self._model.calls.trunk.plan
        return plan.optimizer if plan.trains_trunk else None

    def description(self) -> Mapping[str, Any]:
        model, plan = self._model, self._model.calls.trunk.plan
        trunk = plan.expectation.trunk
        return {
            "fingerprint": plan.expectation.fingerprint,
            "trunk": [trunk.first, trunk.end],
            "dtype": str(model.placement.dtype).removeprefix("torch."),
            "rows": plan.up.codec.value,
            "gradients": plan.gradient.codec.value,
            "projection": plan.expectation.projection,
            "privacy": None if (done := model.calls.protection) is None else dict(done),
            "adapter": plan.adapter,
            "lora": None if model.lora is None else asdict(model.lora),
            "prompt_rows": plan.prompt_rows,
            "train": list(model.train_parts),
            "seed": model.seed,
        }

    def trained(self) -> Mapping[str, nn.Parameter]:
        return dict(self._model.named_parameters())

    def begin_step(self, step: int, scale: float = 1.0) -> None:
        assert step == self._model.steps + 1
        self._model.loss_scale = scale

    def logits(self, batch: Sequence[Example]) -> Tensor:
        self._model.train(torch.is_grad_enabled())
        inputs = [torch.tensor(example.inputs) for example in batch]
        return self._model.logits(inputs, [torch.tensor(example.predicting) for example in batch])

    def changed(self) -> None:
        for adapter in self._model.adapters():
            adapter.changed()

    def save(self, folder: Path) -> None:
        if adapters := self._model.adapters():
            write_adapter(folder, adapters, self._model.checkpoint.name)

    def load(self, folder: Path) -> None:
        self._model.load_adapters(folder)
