"""Training that can be interrupted: gradient steps whose result does not depend on it.

What a step computes is a function of the parameters, the moments and the step's number. They are
saved as one file, whole or not at all, so a training that is killed and started again ends with
the numbers of one that was not, bit for bit on one machine with the same number of threads.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedsea import artifacts
from fedsea.errors import ConfigError

KIND = "training"

_SMOOTHING = 0.95
_WARMUP_SHARE = 0.05
_LAST_RATE = 0.05
_LARGEST_GRADIENT = 1.0
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True)
class Schedule:
    """How many steps, how large, and how often their state is saved.

    Raises:
        ConfigError: a value out of range.
    """

    steps: int = 1000
    learning_rate: float = 1e-3
    save_seconds: float = 30.0

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ConfigError(f"steps={self.steps}; use 0 or more")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ConfigError(f"learning rate {self.learning_rate}; use a positive number")

    def rate(self, step: int) -> float:
        """Linear warm-up, then a cosine from the learning rate to a twentieth of it."""
        warmup = max(1, round(_WARMUP_SHARE * self.steps))
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        done = (step - warmup) / max(1, self.steps - warmup)
        drop = 0.5 * (1 + math.cos(math.pi * done))
        return self.learning_rate * (_LAST_RATE + (1 - _LAST_RATE) * drop)


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a training is: steps done of all, smoothed loss, seconds left by the pace so far."""

    done: int
    steps: int
    loss: float
    seconds_left: float


OnProgress = Callable[[Progress], None]


def ignore_progress(progress: Progress) -> None:
    """Show nothing."""


class Training:
    """Adam steps on a module's parameters, saved to `file` between steps.

    Args:
        module: its parameters that take gradients are trained.
        schedule: how.
        file: where the state is kept while it is under way; None keeps none.
        identity: everything else that the result depends on; a state of another training is
            refused.
    """

    def __init__(
        self,
        module: nn.Module,
        schedule: Schedule,
        file: Path | None,
        identity: Mapping[str, Any],
    ) -> None:
        self._parameters = dict(module.named_parameters())
        self._buffers = dict(module.named_buffers())
        self._schedule, self._file = schedule, file
        kept = {**identity, "steps": schedule.steps, "learning_rate": schedule.learning_rate}
        self._identity = hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
        self._optimizer = torch.optim.Adam(self._parameters.values(), lr=schedule.learning_rate)
        self._done = 0
        self._loss = math.nan

    def resume(self) -> bool:
        """Take over the state of an interrupted training; False when there is none.

        Raises:
            ConfigError: the file is of another training.
            CheckpointError: the file is corrupt.
        """
        if self._file is None or not self._file.exists():
            return False
        state = artifacts.read(self._file, KIND)
        if state.value("identity", str) != self._identity:
            raise ConfigError(
                f"{self._file} is the state of another training (other options, text or model); "
                "go on with those, or remove the file to start anew"
            )
        self._done, self._loss = state.value("done", int), state.value("loss", float)
        with torch.no_grad():
            for name, kept in {**self._parameters, **self._buffers}.items():
                kept.copy_(state.tensor(name, tuple(kept.shape)))
        for name, parameter in self._parameters.items():
            moments = {
                moment: state.tensor(f"{name}.{moment}", tuple(parameter.shape)).clone()
                for moment in _MOMENTS
            }
            self._optimizer.state[parameter] = {"step": torch.tensor(float(self._done)), **moments}
        return True

    def run(
        self, loss_at: Callable[[int], Tensor], on_progress: OnProgress = ignore_progress
    ) -> None:
        """Take the steps that are left; `loss_at` gives the loss of a step by its number.

        Raises:
            ConfigError: the loss is not finite any more, or the state cannot be saved.
        """
        first, began = self._done, time.monotonic()
        saved = began
        while self._done < self._schedule.steps:
            self._step(loss_at(self._done))
            now = time.monotonic()
            pace = (now - began) / (self._done - first)
            left = self._schedule.steps - self._done
            if self._file is not None and now - saved >= self._schedule.save_seconds and left:
                self._save(self._file)
                saved = now
            on_progress(Progress(self._done, self._schedule.steps, self._loss, pace * left))

    def forget(self) -> None:
        """Remove the state, once the result is safe."""
        if self._file is not None:
            with contextlib.suppress(FileNotFoundError):
                self._file.unlink()

    def _step(self, loss: Tensor) -> None:
        value = loss.item()
        if not math.isfinite(value):
            raise ConfigError(
                f"the loss is not finite after {self._done} steps; use a smaller learning rate"
            )
        self._optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self._parameters.values(), _LARGEST_GRADIENT)
        for group in self._optimizer.param_groups:
            group["lr"] = self._schedule.rate(self._done)
        self._optimizer.step()
        started = self._done > 0
        self._loss = _SMOOTHING * self._loss + (1 - _SMOOTHING) * value if started else value
        self._done += 1

    def _save(self, file: Path) -> None:
        tensors = {**self._parameters, **self._buffers}
        for name, parameter in self._parameters.items():
            state = self._optimizer.state[parameter]
            tensors |= {f"{name}.{moment}": state[moment] for moment in _MOMENTS}
        description = {"identity": self._identity, "done": self._done, "loss": self._loss}
        artifacts.write(file, KIND, description, tensors)


def state_file(result: Path) -> Path:
    """Where the state of a training is kept whose result goes to `result`."""
    return result.with_name(f"{result.name}.partial")
