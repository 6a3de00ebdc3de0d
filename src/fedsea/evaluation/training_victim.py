"""The data owner under attack in training: the real client and server, and an observer between them.

As `evaluation.victim`, for steps of training. Token ids, labels and adapters stay with the client and
serve only to score attacks, but for what an attacker is granted: a released adapter, or its update.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from fedsea.client.examples import Example
from fedsea.client.trainable import answer_loss, trainable
from fedsea.client.training import PARTS, SplitForTraining
from fedsea.client.training_protection import TrainingGuard, TrainingProtection
from fedsea.errors import TrainingError
from fedsea.evaluation.victim import SERVER, ServerHere, server_config
from fedsea.model.adapters import CONFIG, read_adapter
from fedsea.model.checkpoint import Checkpoint
from fedsea.model.lora import Adapter, LoraConfig
from fedsea.model.optimization import AdamWConfig, AdapterOptimizer
from fedsea.model.partition import Partition, Span
from fedsea.privacy.mechanism import Mechanism
from fedsea.redteam.training_view import TrainingView
from fedsea.server import loading
from fedsea.server.service import TrunkService
from fedsea.transport.recording import Recorder, RecordingChannel

_RECORDED_MESSAGES = 1 << 20
_NAME = "redteam"


@dataclass(frozen=True, slots=True)
class Guarded:
    """What stands in each direction; None for nothing."""

    rows: Mechanism | None = None
    gradients: Mechanism | None = None

    @property
    def is_plain(self) -> bool:
        """Whether nothing is protected."""
        return self.rows is None and self.gradients is None


@dataclass(frozen=True, slots=True, eq=False)
class StepTaken:
    """One step at the client.

    Attributes:
        examples: what it was of, in the order of their rows.
        bottom: its adapter before the step, with the gradients of the step.
        bottom_after: the same after the step of AdamW.
        top: that adapter before the step.
    """

    examples: tuple[Example, ...]
    bottom: Adapter
    bottom_after: Adapter
    top: Adapter


class TrainingVictim:
    """A client that trains, with a server of its own; use it as a context manager.

    Args:
        model: folder of a checkpoint.
        partition: what stays with the client.
        lora: what is trained, in all three parts.
        guarded: mechanisms in both directions.
        trunk: a loaded trunk of the same checkpoint; loaded here when it is not given.
        seed: of the first factors.

    Raises:
        ModelError, ConfigError: the model cannot be loaded or cut so.
    """

    def __init__(
        self,
        model: Path,
        partition: Partition,
        lora: LoraConfig,
        guarded: Guarded = Guarded(),
        trunk: loading.Trunk | None = None,
        seed: int = 0,
    ) -> None:
        self._checkpoint = Checkpoint.open(model)
        self._partition = partition
        self._recorder = Recorder(_RECORDED_MESSAGES)
        with ExitStack() as stack:
            self._folder = Path(stack.enter_context(TemporaryDirectory(prefix="fedsea-victim-")))
            config = server_config(model, training=self._folder / "trained")
            loaded = trunk if trunk is not None else loading.load(config)
            channel = ServerHere(lambda: TrunkService(config, loaded))
            self.model = stack.enter_context(
                SplitForTraining.connect(
                    model,
                    {SERVER: lambda: RecordingChannel(channel, self._recorder)},
                    name=_NAME,
                    partition=partition,
                    lora=lora,
                    seed=seed,
                    dtype="fp32",
                    guard=self._guard(guarded, stack),
                )
            )
            self._stack = stack.pop_all()
        self.model.train()
        parameters = dict(self.model.named_parameters())
        self._optimizer = AdapterOptimizer(parameters, AdamWConfig())

    def step(self, examples: Sequence[Example], learning_rate: float) -> StepTaken:
        """One step on the mean loss over all answer tokens, of client and server.

        Raises:
            TrainingError: the gradients are not finite.
        """
        bottom, top = self._adapters()
        before, top_before = copy.deepcopy(bottom), copy.deepcopy(top)
        answers = sum(len(example.targets) for example in examples)
        (answer_loss(trainable(self.model), examples) / answers).backward()
        for old, new in zip(before.parameters(), bottom.parameters(), strict=True):
            old.grad = None if new.grad is None else new.grad.clone()
        if not self.model.step(learning_rate).applied:
            raise TrainingError("a gradient is not finite; use a smaller learning rate")
        self._optimizer.apply(learning_rate)
        for adapter in (bottom, top):
            adapter.changed()
        return StepTaken(tuple(examples), before, copy.deepcopy(bottom), top_before)

    @torch.no_grad()
    def read(self, ids: Sequence[int]) -> Tensor:
        """Logits (n, vocabulary) after every position of a text, as the model is now."""
        self.model.eval()
        try:
            return self.model.logits([torch.tensor(list(ids))])
        finally:
            self.model.train()

    def view(self) -> TrainingView:
        """What the server saw so far."""
        return TrainingView(self._recorder.messages, self._checkpoint.hidden_size)

    def released(self) -> Adapter:
        """The adapter of the whole model as it is now, as one that is given away."""
        self.model.save()
        bottom, top = self._adapters()
        factors = {**bottom.factors, **top.factors}
        saved = sorted((self._folder / "trained").rglob(CONFIG))
        span = self._partition.trunk_span(self._checkpoint.num_blocks)
        if saved:
            factors |= read_adapter(saved[-1].parent, span).factors
        whole = Span(0, self._checkpoint.num_blocks)
        copied = {
            place: (each.a.detach().clone(), each.b.detach().clone())
            for place, each in factors.items()
        }
        return Adapter(bottom.config, whole, copied)

    def close(self) -> None:
        """Disconnect and stop the server."""
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _adapters(self) -> tuple[Adapter, Adapter]:
        bottom, top = self.model.adapters()
        return bottom, top

    def _guard(self, guarded: Guarded, stack: ExitStack) -> TrainingGuard | None:
        if guarded.is_plain:
            return None
        policy = TrainingProtection(
            rows=guarded.rows,
            gradients=guarded.gradients,
            record=_NAME,
            tenant=_NAME,
            ledger=self._folder / "ledger.sqlite",
        ).applied(self._checkpoint.hidden_size, PARTS)
        stack.callback(policy.close)
        return policy.guard()
