"""Training through the cut under `transformers.Trainer`."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fedsea.client.training import SplitForTraining
from fedsea.errors import ConfigError, NotFinite


class TrunkCallback(TrainerCallback):
    """Lets the trunk step, save and resume together with a `transformers.Trainer`.

        model = SplitForTraining.connect(...)
        trainer = Trainer(model, arguments, callbacks=[TrunkCallback(model)], ...)

    The trunk takes each step with the learning rate in force, in front of the optimizer of bottom and
    top. Its gradient is clipped by its own norm, to the Trainer's `max_grad_norm`. It saves with the
    Trainer's checkpoints, and goes on from the one that the Trainer resumes from.

    Args:
        model: what the Trainer trains.
    """

    def __init__(self, model: SplitForTraining) -> None:
        self._model = model
        self._saved: int | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002 - transformers' signature
        **_: Any,
    ) -> None:
        """Bring the trunk to the step that the Trainer begins at.

        Raises:
            StaleStep: the server has not saved that step.
            ConfigError: the Trainer would do what the trunk cannot follow.
        """
        if args.fp16:
            raise ConfigError(
                "the Trainer's fp16 scales losses behind the trunk's back; "
                "leave it out and give dtype='bf16' or 'fp16' when you connect"
            )
        if args.load_best_model_at_end:
            raise ConfigError(
                "load_best_model_at_end would restore bottom and top without the trunk; leave it "
                "out, and resume from the checkpoint that you want"
            )
        if self._model.steps != state.global_step:
            self._model.reopen((state.global_step,))
        self._model.reset()

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002 - transformers' signature
        **kwargs: Any,
    ) -> None:
        """Let the trunk take the step.

        Raises:
            NotFinite: its gradients are NaN or infinite; the step was not taken.
            ConnectionLost: resume from the last checkpoint.
        """
        learning_rate = float(kwargs["optimizer"].param_groups[0]["lr"])
        stepped = self._model.step(learning_rate, args.max_grad_norm or None)
        if not stepped.applied:
            raise NotFinite(
                f"the trunk's gradients of step {state.global_step + 1} are NaN or infinite; "
                "resume from the last checkpoint with a smaller learning rate"
            )

    def on_step_end(
        self,
        args: TrainingArguments,  # noqa: ARG002 - transformers' signature
        state: TrainerState,  # noqa: ARG002 - transformers' signature
        control: TrainerControl,
        **_: Any,
    ) -> None:
        """Save the trunk before the Trainer's part, so that a checkpoint never lacks it."""
        if control.should_save:
            self._save()

    def on_epoch_end(
        self,
        args: TrainingArguments,  # noqa: ARG002 - transformers' signature
        state: TrainerState,  # noqa: ARG002 - transformers' signature
        control: TrainerControl,
        **_: Any,
    ) -> None:
        """As at the end of a step."""
        if control.should_save:
            self._save()

    def on_save(
        self,
        args: TrainingArguments,  # noqa: ARG002 - transformers' signature
        state: TrainerState,  # noqa: ARG002 - transformers' signature
        control: TrainerControl,  # noqa: ARG002 - transformers' signature
        **_: Any,
    ) -> None:
        """Save the trunk where the Trainer decided late to save."""
        self._save()

    def _save(self) -> None:
        if self._saved != self._model.steps:
            self._model.save()
            self._saved = self._model.steps
