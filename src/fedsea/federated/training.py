"""Local training of a federation on a split model: rows go to the trunk's server as ever.

A round is a fixed number n of optimizer steps from the global arrays, with a fresh optimizer. Data
and dropout depend on its number alone, so a round that is done anew ends with the same bits.

Where nothing is trained in the trunk, every round has the trunk's steps 1 to n. Otherwise rounds
follow each other there, and the server saves its part at the end of each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeVar

import torch

from fedsea.client.examples import Example, StepBatches
from fedsea.client.trainable import answer_loss, trainable
from fedsea.client.training import SplitForTraining
from fedsea.client.training_config import TrainerConfig
from fedsea.errors import ConfigError, Draining, NotFinite, SessionLost, TransportError
from fedsea.federated.arrays import Arrays
from fedsea.federated.local import FitSettings
from fedsea.model.adapters import description, tensor_names
from fedsea.model.optimization import AdapterOptimizer, part_seed

_BROKEN: Final = (TransportError, SessionLost, Draining)
_MOST_BREAKS: Final = 8
_MOST_OFFERED: Final = 64
_T = TypeVar("_T")


class SplitTraining:
    """Trains the adapters of bottom and top, and with the trunk's, if there is one, at the server.

    Args:
        model: connected; it has an adapter in bottom or top.
        config: of the steps. `steps`, or the steps of `epochs`, are those of one round, and the
            schedule of the learning rate is that of a round.
        train: examples to learn from.
        evaluation: examples kept apart.

    Raises:
        ConfigError: bottom and top have no adapter, so that there is nothing to average.
        DataError: there are no examples.
    """

    def __init__(
        self,
        model: SplitForTraining,
        config: TrainerConfig,
        train: Sequence[Example],
        evaluation: Sequence[Example] = (),
    ) -> None:
        if model.lora is None or not any(adapter.factors for adapter in model.adapters()):
            raise ConfigError(
                "bottom and top have no adapter, so there is nothing to average: name them in "
                "lora.train"
            )
        self._model = model
        self._split = trainable(model)
        self._config = config
        self._examples = len(train)
        self._batches = config.batches(train)
        self._evaluation = config.batches(evaluation) if evaluation else None
        self._steps = config.steps or self._batches.steps(config.epochs)
        self._description = description(model.lora, model.checkpoint.name)
        self._trains_trunk = model.calls.trunk.plan.trains_trunk
        self._is_open = True

    @property
    def description(self) -> Mapping[str, Any]:
        return self._description

    def part(self, part: str) -> frozenset[str]:
        """The names of all arrays of "bottom" or "top"."""
        adapters = dict(zip(("bottom", "top"), self._model.adapters(), strict=True))
        return frozenset(name for place in adapters[part].factors for name in tensor_names(place))

    def frozen(self) -> frozenset[str]:
        """The names of arrays that are not trained."""
        return frozenset(
            name for name, factor in self._factors().items() if not factor.requires_grad
        )

    def arrays(self) -> Arrays:
        return {
            name: factor.detach().cpu().numpy().copy() for name, factor in self._factors().items()
        }

    def load(self, arrays: Mapping[str, Any]) -> None:
        factors = self._factors()
        with torch.no_grad():
            for name, array in arrays.items():
                factors[name].copy_(torch.from_numpy(array))
        self._split.changed()

    def fit(self, settings: FitSettings) -> int:
        start = self.arrays()

        def work() -> None:
            self.load(start)
            self._round(settings, start)

        self._persistently(work)
        return self._examples

    def evaluate(self) -> tuple[float, int]:
        if self._evaluation is None:
            raise ConfigError("there are no examples to evaluate on; give run.evaluation")
        return self._persistently(self._evaluated)

    def _persistently(self, work: Callable[[], _T]) -> _T:
        """Do something again while sessions break; a client is idle for long between rounds."""
        for _ in range(_MOST_BREAKS):
            try:
                return work()
            except _BROKEN:
                self._is_open = False
        return work()

    def _evaluated(self) -> tuple[float, int]:
        assert self._evaluation is not None
        self._opened([self._model.steps])
        total, tokens, examples = 0.0, 0, 0
        with torch.no_grad():
            for work in self._evaluation.epoch(0):
                for batch in work.batches:
                    total += float(answer_loss(self._split, batch))
                    examples += len(batch)
                tokens += work.answer_tokens
        return total / tokens, examples

    def _round(self, settings: FitSettings, start: Arrays) -> None:
        base = self._begun(settings.round)
        optimizer = AdapterOptimizer(self._split.trained(), self._config.optimizer)
        coming = self._batches.from_step((settings.round - 1) * self._steps)
        for step in range(1, self._steps + 1):
            rate, clip = self._config.rate(step, self._steps), self._config.clip
            self._gradients(base + step, next(coming))
            if settings.proximal:
                self._pull(start, settings.proximal)
            optimizer.gradient_norm()
            if not self._split.trunk.step(base + step, rate, clip, 1.0).applied:
                raise NotFinite(
                    f"a gradient of the trunk in round {settings.round} is NaN or infinite; "
                    "lower the learning rate"
                )
            optimizer.apply(rate, clip)
            self._split.changed()
        if self._trains_trunk:
            self._split.trunk.save(base + self._steps)

    def _begun(self, number: int) -> int:
        """Have the trunk where a round begins; the number of steps that it has taken."""
        self._model.seed = part_seed(self._config.seed, f"round {number}")
        if not self._trains_trunk:
            return self._opened([0])
        # A client that missed rounds goes on from the last one that it did not miss.
        offers = range(max(0, number - _MOST_OFFERED), number)
        return self._opened([round_ * self._steps for round_ in offers])

    def _opened(self, steps: Sequence[int]) -> int:
        """Have the trunk at the highest of these steps, of whose successor nothing is done.

        The arrays may be others than before, so what a mechanism released for that step is forgotten.
        """
        if not self._is_open or self._model.steps != steps[-1]:
            self._model.reopen(steps)
            self._is_open = True
        self._split.trunk.reset()
        self._model.forget_releases()
        return self._model.steps

    def _gradients(self, number: int, work: StepBatches) -> None:
        """Gradients of the mean loss over the answer tokens of a step."""
        self._split.begin_step(number)
        for batch in work.batches:
            loss = answer_loss(self._split, batch) / work.answer_tokens
            if not bool(torch.isfinite(loss)):
                raise NotFinite(
                    f"the loss of step {number} is NaN or infinite; lower the learning rate"
                )
            loss.backward()

    @torch.no_grad()
    def _pull(self, start: Arrays, proximal: float) -> None:
        """Add the gradient of proximal/2 |w - start|^2 (FedProx, arXiv 1812.06127)."""
        for name, factor in self._factors().items():
            if factor.grad is not None:
                away = factor - torch.from_numpy(start[name]).to(factor.device)
                factor.grad.add_(away, alpha=proximal)

    def _factors(self) -> dict[str, torch.nn.Parameter]:
        return {
            name: factor
            for adapter in self._model.adapters()
            for place, factors in adapter.factors.items()
            for name, factor in zip(tensor_names(place), (factors.a, factors.b), strict=True)
        }
