"""`Trainer`: optimizer steps of both sides in one order that survives the death of either.

A step is taken at the server first and then here. Whatever happens in between, both sides can agree:

* A connection that breaks costs the step under way. It is done anew; dropout depends on the numbers
  of the step and of the forward alone, so it is the same step.
* When only the answer to a step was lost, the server is one step ahead. The gradients of this side
  are still at hand: it follows.
* A server that was restarted has the steps that it saved. Both sides go back to the newest one that
  both have. The server saves first, so every step that is saved here is saved there.
* A client that was restarted does the same.

All that a step depends on is a function of the seed and the step's number, or is saved with it. So
the losses after any of this are those of a run to which nothing happened, bit for bit in fp32.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fedsea.client.examples import Example, StepBatches
from fedsea.client.trainable import Moved, TrainableModel, answer_loss, trainable
from fedsea.client.training import SplitForTraining
from fedsea.client.training_config import SAVE_EVERY, LossScaling, TrainerConfig
from fedsea.client.training_run import (
    ADAPTER,
    CHECKPOINTS,
    State,
    Summary,
    check_run,
    described_run,
    ended_run,
    read_state,
    write_run,
    write_state,
    write_summary,
)
from fedsea.errors import (
    CheckpointError,
    ConfigError,
    Draining,
    FedseaError,
    NotFinite,
    PrivacyError,
    SessionLost,
    StaleStep,
    TransportError,
)
from fedsea.model.checkpoints import Steps, read_optimizer, write_optimizer
from fedsea.model.optimization import AdapterOptimizer
from fedsea.wire.training import MAX_SCALE

MOST_OFFERED = 64
"""Steps to go on from that the protocol lets a client offer."""

# What ends a session and can be mended by opening another one.
_BROKEN = (TransportError, SessionLost, Draining, StaleStep)
_MAX_BREAKS = 8

# Dynamic loss scaling as torch's GradScaler does it.
_FIRST_SCALE = 2.0**16
_SCALE_GROWS_AFTER = 2000

# Over so many of the last steps the speed is measured.
_SPEED_STEPS = 20
_NAMED_EXAMPLES = 8


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one step did.

    Attributes:
        step: its number, from 1.
        steps: how many there will be.
        epoch: which pass over the examples, from 0.
        loss: mean over the step's answer tokens, before the step.
        learning_rate: of this step.
        grad_norm: of all parts together, before clipping.
        tokens: tokens run since the run began.
        tokens_per_second: over the last steps.
        bytes_up: bytes sent since the run began.
        bytes_down: bytes received since the run began.
        eta_s: seconds until the last step.
    """

    step: int
    steps: int
    epoch: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    tokens_per_second: float
    bytes_up: int
    bytes_down: int
    eta_s: float


class Callback:
    """Hears what a trainer does; override what is of interest."""

    def on_start(self, step: int, steps: int) -> None:
        """Training begins behind a step, 0 for the start."""

    def on_step(self, report: StepReport) -> None:
        """A step was taken."""

    def on_evaluation(self, step: int, loss: float) -> None:
        """The loss on the examples for evaluation behind a step."""

    def on_rollback(self, step: int) -> None:
        """Training goes on behind an earlier step; what was heard of later ones is void."""

    def on_message(self, text: str) -> None:
        """Something that people should know."""


@dataclass(frozen=True, slots=True)
class _Pending:
    """A step whose gradients are complete at both sides; the server may have applied it."""

    work: StepBatches
    number: int
    loss: float


class Trainer:
    """Fine-tunes a model that is cut.

    Args:
        model: what is trained.
        config: how.
        train: examples to learn from.
        evaluation: examples to evaluate on; None for none.
        callbacks: hear of every step.
        folder: where the client's part, its checkpoints and `run.json` are kept. A folder that holds
            a run of the same settings goes on with it. None keeps nothing: then a server that loses
            its steps ends the training.

    Raises:
        ConfigError: settings that do not fit the examples, or a folder with another run.
        DataError: there are no examples.
    """

    def __init__(
        self,
        model: SplitForTraining | TrainableModel,
        config: TrainerConfig,
        train: Sequence[Example],
        evaluation: Sequence[Example] | None = None,
        callbacks: Sequence[Callback] = (),
        folder: Path | None = None,
    ) -> None:
        self._model = model = trainable(model)
        self._config = config
        self._callbacks = tuple(callbacks)
        self._train = train
        self._batches = config.batches(train)
        self._evaluation = None if not evaluation else config.batches(evaluation, accumulate=1)
        if config.patience is not None and (self._evaluation is None or folder is None):
            raise ConfigError(
                "patience needs examples to evaluate on, and a folder that keeps the best step; "
                "give both, or leave it out"
            )
        if model.optimizer not in {None, config.optimizer}:
            raise ConfigError(
                "the trunk's optimizer has other constants than the trainer's; connect with "
                "optimizer=config.optimizer"
            )
        self._steps = config.steps or self._batches.steps(config.epochs)
        config.rate(1, self._steps)  # refuses a warm-up that never ends
        self._evaluate_every = config.evaluate_every or self._batches.steps(1)
        self._optimizer = AdapterOptimizer(model.trained(), config.optimizer)
        self._state = State(scale=_FIRST_SCALE if self._scales else 1.0)
        self._folder = folder
        self._kept = None if folder is None else Steps(folder / CHECKPOINTS, config.keep)
        self._described = described_run(model, config, train, evaluation)
        if folder is not None:
            check_run(folder, self._described)
        self._saved = -1
        self._connected = False
        self._breaks = 0
        self._pending: _Pending | None = None
        self._coming: tuple[int, Iterator[StepBatches]] = (-1, iter(()))
        self._stopping = False
        self._speed = _Speed()
        self._moved = Moved()
        self._clock = 0.0

    def stop(self) -> None:
        """End behind the step under way, saved; may be called from a signal handler."""
        self._stopping = True

    def run(self) -> Summary:
        """Train to the end, from where the folder's run is.

        Raises:
            NotFinite: a loss or gradient is NaN or infinite; nothing of that step was applied.
            PrivacyError: the next batch may not leave, as when a budget is spent; the steps before it
                are saved.
            CheckpointError: a checkpoint could not be written; earlier ones are untouched.
            FedseaError: no server in time, or one that refuses.
        """
        if self._folder is not None and (ended := ended_run(self._folder)) is not None:
            self._say("this run has ended already; nothing was done")
            return ended
        self._start()
        while True:
            if not self._connected:
                self._connect()
            try:
                if not self._advance():
                    break
            except _BROKEN as error:
                self._note_break(error)
            except PrivacyError:
                self._keep_steps()
                raise
        return self._finish()

    def _advance(self) -> bool:
        """Do what comes next; False when nothing does."""
        if self._pending is not None:
            self._complete(self._pending)
        elif self._is_evaluation_due():
            self._evaluate()
        elif self._is_save_due():
            self._save()
        elif self._is_over:
            return False
        else:
            self._take(self._next())
        return True

    @property
    def _is_over(self) -> bool:
        return self._stopping or self._state.step >= self._steps or self._is_out_of_patience

    @property
    def _is_out_of_patience(self) -> bool:
        return self._config.patience is not None and self._state.stale >= self._config.patience

    @property
    def _scales(self) -> bool:
        chosen = self._config.loss_scaling
        if chosen is LossScaling.AUTO:
            return self._model.dtype == torch.float16
        return chosen is LossScaling.DYNAMIC

    # ---- Sessions

    def _start(self) -> None:
        """Take over the newest step that is saved here, or save the start."""
        self._moved, self._clock = self._model.trunk.moved, time.perf_counter()
        if self._kept is not None and self._folder is not None:
            if saved := self._kept.steps():
                self._restore(saved[-1])
            else:
                write_run(self._folder, self._described)
                self._save_here()
        for callback in self._callbacks:
            callback.on_start(self._state.step, self._steps)

    def _connect(self) -> None:
        """Open a session at a step that both sides have."""
        here = {self._state.step} | set(self._kept.steps() if self._kept else ())
        if self._pending is not None:
            here.add(self._pending.number)
        offered = sorted(here)[-MOST_OFFERED:]
        found = self._model.trunk.open(offered, self._config.reconnect_s)
        self._connected = True
        self._measure()
        if self._pending is not None and found == self._pending.number:
            return
        self._forget_gradients()
        if found != self._state.step:
            self._say(f"the server is behind: going back from step {self._state.step} to {found}")
            self._restore(found)
            for callback in self._callbacks:
                callback.on_rollback(found)

    def _note_break(self, error: FedseaError) -> None:
        self._connected = False
        self._breaks += 1
        if self._breaks > _MAX_BREAKS:
            raise error
        self._say(f"{error}; connecting again")

    # ---- Steps

    def _next(self) -> StepBatches:
        """What the next step works on."""
        number, coming = self._coming
        if number != self._state.step:
            coming = self._batches.from_step(self._state.step)
        self._coming = (self._state.step + 1, coming)
        return next(coming)

    def _take(self, work: StepBatches) -> None:
        number = self._state.step + 1
        self._model.begin_step(number, self._state.scale)
        try:
            loss = self._gradients(work, number)
        except _Overflow:
            self._model.trunk.reset()
            self._lower_scale(number, work)
        except BaseException:
            self._forget_gradients()
            raise
        else:
            self._pending = _Pending(work, number, loss)
            self._complete(self._pending)

    def _gradients(self, work: StepBatches, number: int) -> float:
        """Forward and backward of all batches of a step; its loss.

        Raises:
            NotFinite: the loss of a batch is not.
            _Overflow: a gradient is not.
        """
        total = 0.0
        for at, batch in enumerate(work.batches):
            part = self._finite_loss(batch, number, work, at) / work.answer_tokens
            value = float(part.detach())
            total += value
            try:
                (part * self._state.scale).backward()
            except NotFinite as error:
                raise _Overflow from error
        try:
            self._optimizer.gradient_norm()
        except NotFinite as error:
            raise _Overflow from error
        return total

    def _finite_loss(
        self, batch: Sequence[Example], number: int, work: StepBatches, at: int
    ) -> Tensor:
        """The summed loss of batch number `at` of a step.

        Raises:
            NotFinite: the loss is not, or a row on the way to it.
        """
        cause: NotFinite | None = None
        try:
            found = answer_loss(self._model, batch)
            if math.isfinite(float(found.detach())):
                return found
        except NotFinite as error:
            cause = error
        self._model.trunk.reset()
        what = "the loss" if cause is None else "a row"
        raise _not_finite(what, number, work, at, self._train) from cause

    def _complete(self, pending: _Pending) -> None:
        """Apply a step there and then here."""
        number, work, state = pending.number, pending.work, self._state
        rate, clip = self._config.rate(number, self._steps), self._config.clip
        stepped = self._model.trunk.step(number, rate, clip, state.scale)
        self._pending = None
        if not stepped.applied:
            self._lower_scale(number, work)
            return
        own = self._optimizer.apply(rate, clip, state.scale)
        self._model.changed()
        state.step, state.loss = number, pending.loss
        state.tokens += work.rows
        state.answer_tokens += work.answer_tokens
        self._raise_scale()
        seconds = self._measure()
        self._breaks = 0
        self._report(work, rate, math.hypot(own, stepped.grad_norm), seconds)

    def _forget_gradients(self) -> None:
        self._pending = None
        self._optimizer.clear()

    def _lower_scale(self, number: int, work: StepBatches) -> None:
        """Take the step anew with smaller gradients, if they were made larger at all.

        Raises:
            NotFinite: they were not.
        """
        self._forget_gradients()
        if self._state.scale <= 1:
            raise _not_finite("a gradient", number, work, None, self._train)
        self._state.scale /= 2
        self._state.scaled = 0

    def _raise_scale(self) -> None:
        self._state.scaled += 1
        if self._scales and self._state.scaled >= _SCALE_GROWS_AFTER:
            self._state.scale = min(2 * self._state.scale, MAX_SCALE)
            self._state.scaled = 0

    # ---- Evaluation

    def _is_evaluation_due(self) -> bool:
        state = self._state
        if self._evaluation is None or self._stopping or state.evaluated == state.step:
            return False
        over = state.step >= self._steps
        return over or (state.step > 0 and state.step % self._evaluate_every == 0)

    def _evaluate(self) -> None:
        assert self._evaluation is not None
        state, total, tokens = self._state, 0.0, 0
        with torch.no_grad():
            for work in self._evaluation.epoch(0):
                total += sum(float(answer_loss(self._model, batch)) for batch in work.batches)
                tokens += work.answer_tokens
        loss = total / tokens
        if not math.isfinite(loss):
            raise NotFinite(
                f"the evaluation behind step {state.step} is NaN or infinite: go on from an earlier "
                "checkpoint with a smaller learning rate"
            )
        state.evaluated, state.evaluation_loss = state.step, loss
        if state.best_loss is None or loss < state.best_loss - self._config.min_improvement:
            state.best_step, state.best_loss, state.stale = state.step, loss, 0
        else:
            state.stale += 1
        self._measure()
        self._breaks = 0
        for callback in self._callbacks:
            callback.on_evaluation(state.step, loss)

    # ---- Checkpoints

    def _is_save_due(self) -> bool:
        state = self._state
        if self._kept is None or self._saved == state.step:
            return False
        if self._config.patience is not None:
            return state.best_step == state.step
        return self._is_over or state.step % (self._config.save_every or SAVE_EVERY) == 0

    def _save(self) -> None:
        self._model.trunk.save(self._state.step)
        self._measure()
        self._save_here()
        self._breaks = 0

    def _keep_steps(self) -> None:
        """Save the steps that are done, where nothing more may leave."""
        if self._kept is None or self._config.patience is not None:
            return
        try:
            self._model.trunk.reset()
            if self._saved != self._state.step:
                self._save()
            assert self._folder is not None
            self._model.save(self._folder / ADAPTER)
        except FedseaError as error:
            self._say(f"{error}; what stays is the checkpoint of step {self._saved}")

    def _save_here(self) -> None:
        assert self._kept is not None
        self._kept.save(self._state.step, self._write)
        self._saved = self._state.step

    def _write(self, folder: Path) -> None:
        self._model.save(folder)
        write_optimizer(folder, self._optimizer)
        write_state(folder, self._state)

    def _restore(self, step: int) -> None:
        if self._kept is None:
            raise CheckpointError(
                f"the server is at step {step} and nothing is kept here; train with a folder"
            )
        folder = self._kept.path(step)
        state = read_state(folder, step)
        self._model.load(folder)
        read_optimizer(folder, self._optimizer)
        self._model.changed()
        self._kept.forget_after(step)
        self._state, self._saved = state, step

    # ---- The end, and what is told

    def _finish(self) -> Summary:
        state = self._state
        ended = not self._stopping or state.step >= self._steps
        if self._config.patience is not None and state.best_step != state.step:
            # The server has saved the best step only: the adapter here has to be of the same.
            which = "was the best" if ended else "is the best so far"
            self._say(f"step {state.best_step} {which}: its adapter stays")
            self._model.trunk.open([state.best_step], self._config.reconnect_s)
            self._restore(state.best_step)
        summary = self._summary(state)
        if self._folder is not None:
            self._model.save(self._folder / ADAPTER)
            if ended:
                write_summary(self._folder, summary)
        return summary

    def _summary(self, last: State) -> Summary:
        patience = self._config.patience
        stopped = None
        if last.step < self._steps:
            out = patience is not None and last.stale >= patience
            stopped = "patience" if out else "request"
        return Summary(
            step=self._state.step,
            steps=self._steps,
            loss=last.loss,
            evaluation_loss=last.best_loss if patience else last.evaluation_loss,
            tokens=last.tokens,
            answer_tokens=last.answer_tokens,
            bytes_up=last.bytes_up,
            bytes_down=last.bytes_down,
            seconds=last.seconds,
            stopped=stopped,
        )

    def _measure(self) -> float:
        """Add what was sent and how long it took since the last time; the seconds."""
        moved, clock, state = self._model.trunk.moved, time.perf_counter(), self._state
        seconds = clock - self._clock
        state.bytes_up += moved.up - self._moved.up
        state.bytes_down += moved.down - self._moved.down
        state.seconds += seconds
        self._moved, self._clock = moved, clock
        return seconds

    def _report(self, work: StepBatches, rate: float, norm: float, seconds: float) -> None:
        state = self._state
        assert state.loss is not None
        self._speed.add(seconds, work.rows)
        report = StepReport(
            step=state.step,
            steps=self._steps,
            epoch=work.epoch,
            loss=state.loss,
            learning_rate=rate,
            grad_norm=norm,
            tokens=state.tokens,
            tokens_per_second=self._speed.tokens_per_second,
            bytes_up=state.bytes_up,
            bytes_down=state.bytes_down,
            eta_s=self._speed.seconds_per_step * (self._steps - state.step),
        )
        for callback in self._callbacks:
            callback.on_step(report)

    def _say(self, text: str) -> None:
        for callback in self._callbacks:
            callback.on_message(text)


class _Overflow(Exception):
    """A gradient of this side is not finite; raised and caught within a step."""


class _Speed:
    """Seconds and tokens of the last steps."""

    def __init__(self) -> None:
        self._steps: deque[tuple[float, int]] = deque(maxlen=_SPEED_STEPS)

    def add(self, seconds: float, tokens: int) -> None:
        self._steps.append((seconds, tokens))

    @property
    def seconds_per_step(self) -> float:
        return sum(seconds for seconds, _ in self._steps) / max(1, len(self._steps))

    @property
    def tokens_per_second(self) -> float:
        seconds = sum(seconds for seconds, _ in self._steps)
        return sum(tokens for _, tokens in self._steps) / seconds if seconds else 0.0


def _not_finite(
    what: str, number: int, work: StepBatches, batch: int | None, examples: Sequence[Example]
) -> NotFinite:
    """The error that says where it happened, by numbers that count from 1."""
    batches = work.batches if batch is None else work.batches[batch : batch + 1]
    numbers = sorted(examples.index(example) + 1 for batch in batches for example in batch)
    named = ", ".join(map(str, numbers[:_NAMED_EXAMPLES]))
    more = " and others" if len(numbers) > _NAMED_EXAMPLES else ""
    which = "" if batch is None else f", batch {batch + 1} of {len(work.batches)}"
    return NotFinite(
        f"{what} of step {number} is NaN or infinite (epoch {work.epoch + 1}{which}: examples "
        f"{named}{more}); nothing was applied: lower the learning rate, compute in fp32, or leave "
        "these examples out"
    )
