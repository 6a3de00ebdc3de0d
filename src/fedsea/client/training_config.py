"""How a model is fine-tuned: one frozen dataclass of settings, and the learning rate of each step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from fedsea.client.examples import Batches, Example
from fedsea.errors import ConfigError
from fedsea.model.optimization import AdamWConfig
from fedsea.settings import Table, check_keys, choice, need, read_toml, section, table_at
from fedsea.wire.training import MAX_LEARNING_RATE

SECTION = "training"
SAVE_EVERY = 100

_POSITIVE = ("steps", "epochs", "batch_size", "batch_rows", "accumulate", "keep", "save_every")
_POSITIVE_TOO = ("evaluate_every", "patience")


class Schedule(StrEnum):
    """How the learning rate falls after the warm-up: to zero on a line or a half cosine, or not."""

    LINEAR = "linear"
    COSINE = "cosine"
    CONSTANT = "constant"


class LossScaling(StrEnum):
    """Whether losses are multiplied before gradients are computed, so that fp16 holds them.

    `auto` does so where the blocks compute in fp16.
    """

    AUTO = "auto"
    DYNAMIC = "dynamic"
    OFF = "off"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerConfig:
    """How steps are taken, and when the model is evaluated and saved.

    Attributes:
        epochs: passes over the examples, unless `steps` says how long.
        steps: optimizer steps in all; None for as many as the epochs have.
        batch_size: most examples that are run together; 0 for no bound but `batch_rows`.
        batch_rows: most tokens that are run together; None for no bound.
        accumulate: batches of one step; the loss is the mean over all their answer tokens.
        learning_rate: the largest.
        schedule: how it falls after the warm-up: `linear` or `cosine` to zero, or `constant`.
        warmup_steps: it rises from zero during so many steps.
        max_grad_norm: a gradient of a larger norm is shrunk to it, at the client and at the server
            each for itself; 0 for never.
        beta1: decay of AdamW's mean of the gradient.
        beta2: decay of its mean of the square.
        eps: what it adds to the root of the latter.
        weight_decay: each step shrinks what is trained by learning rate times this.
        loss_scaling: `auto` scales where the blocks compute in fp16, `dynamic` and `off` say so.
        evaluate_every: steps between evaluations; None for once in an epoch. There is always one at
            the end.
        patience: training ends after so many evaluations without a better loss, and the adapter is
            that of the best one; None to train to the end. With it, the model is saved when an
            evaluation is the best so far, and only then.
        min_improvement: by how much a loss has to be lower to be better.
        save_every: steps between checkpoints; None for 100. There is always one at the end.
        keep: so many of the last checkpoints stay.
        reconnect_s: how long a server may be away, in seconds, before the run ends. The same command
            goes on later.
        seed: start of all chance: fresh adapters, order of the examples, dropout.
    """

    epochs: int = 1
    steps: int | None = None
    batch_size: int = 8
    batch_rows: int | None = None
    accumulate: int = 1
    learning_rate: float = 2e-4
    schedule: Schedule | str = Schedule.COSINE
    warmup_steps: int = 0
    max_grad_norm: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01
    loss_scaling: LossScaling | str = LossScaling.AUTO
    evaluate_every: int | None = None
    patience: int | None = None
    min_improvement: float = 0.0
    save_every: int | None = None
    keep: int = 2
    reconnect_s: float = 600.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, kind in (("schedule", Schedule), ("loss_scaling", LossScaling)):
            object.__setattr__(self, name, choice(name, kind, getattr(self, name)))
        for name in (*_POSITIVE, *_POSITIVE_TOO):
            value = getattr(self, name)
            least = 0 if name == "batch_size" else 1
            need(value is None or value >= least, f"{name} is {value}; give at least {least}")
        for name in ("warmup_steps", "min_improvement", "max_grad_norm", "reconnect_s"):
            value = getattr(self, name)
            need(0 <= value < math.inf, f"{name} is {value}; give 0 or a positive number")
        rate = self.learning_rate
        need(
            0 < rate <= MAX_LEARNING_RATE and rate * self.weight_decay <= 1,
            f"learning_rate is {rate}; give a positive number up to {MAX_LEARNING_RATE:g}, whose "
            "product with weight_decay is 1 at most",
        )
        need(
            bool(self.batch_size) or self.batch_rows is not None,
            "batch_size is 0 and batch_rows is not given; give one of them",
        )
        need(
            self.steps is None or self.warmup_steps < self.steps,
            f"warmup_steps is {self.warmup_steps} and there are {self.steps} steps; give fewer",
        )
        need(
            self.patience is None or self.save_every is None,
            "patience and save_every are both given; with patience, only the best is saved",
        )
        need(0 <= self.seed < 2**63, f"seed is {self.seed}; give a number from 0 to 2^63 - 1")
        _ = self.optimizer  # refuses what AdamW does not take

    @property
    def optimizer(self) -> AdamWConfig:
        """The settings of AdamW, the same for both sides."""
        return AdamWConfig((self.beta1, self.beta2), self.eps, self.weight_decay)

    @property
    def clip(self) -> float | None:
        """The largest norm of a gradient; None for any."""
        return self.max_grad_norm or None

    def batches(self, examples: Sequence[Example], accumulate: int | None = None) -> Batches:
        """The order in which steps see examples; `accumulate` stands in for the setting.

        Raises:
            ConfigError, DataError: as `Batches`.
        """
        return Batches(
            examples,
            batch_size=self.batch_size or None,
            rows=self.batch_rows,
            accumulate=self.accumulate if accumulate is None else accumulate,
            seed=self.seed,
        )

    @classmethod
    def load(cls, path: str | Path) -> TrainerConfig:
        """Read the section [training] of a TOML file that has no other.

        Raises:
            ConfigError: the file cannot be read, or a key or value in it cannot be used.
        """
        table = read_toml(Path(path))
        check_keys(table, (SECTION,), "the configuration")
        return cls.from_table(table_at(table, SECTION))

    @classmethod
    def from_table(cls, table: Table) -> TrainerConfig:
        """Settings out of a table, as of a TOML file.

        Raises:
            ConfigError: a key or value cannot be used.
        """
        return section(cls, SECTION, table)

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of a step, from 1 to `steps`; as the schedules of transformers.

        Raises:
            ConfigError: the warm-up is not over before the last step.
        """
        if self.warmup_steps >= steps:
            raise ConfigError(
                f"warmup_steps is {self.warmup_steps} and there are {steps} steps; give fewer"
            )
        done = step - 1
        if done < self.warmup_steps:
            return self.learning_rate * (done / self.warmup_steps)
        share = (done - self.warmup_steps) / (steps - self.warmup_steps)
        if self.schedule is Schedule.LINEAR:
            return self.learning_rate * (1 - share)
        if self.schedule is Schedule.COSINE:
            return self.learning_rate * (0.5 * (1 + math.cos(math.pi * share)))
        return self.learning_rate
