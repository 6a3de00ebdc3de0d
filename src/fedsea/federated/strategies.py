"""How updates become new global arrays: FedAvg, FedProx and FedAdam of Flower, and NormFedAvg.

Clients send updates, differences to the global arrays. Flower's strategies average arrays, so an
update is added to the global arrays before they see it. Replies are taken in the order of the
clients' names and results are kept in fp32, so that a round gives the same bits in whatever order
replies come, and after a resume.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from flwr.common import (
    Code,
    FitRes,
    NDArrays,
    Parameters,
    Status,
    ndarrays_to_parameters,
    parameters_to_ndarrays,
)
from flwr.server.strategy import FedAdam, FedAvg

from fedsea.errors import CheckpointError, ConfigError
from fedsea.federated.arrays import Arrays, in_order, named, norm, plus
from fedsea.federated.config import Kind, StrategySection
from fedsea.federated.unit_update import UnitUpdate
from fedsea.privacy.noise import NoiseSource

_OK: Final = Status(Code.OK, "")
_ADAM: Final = ("m", "v")
_ROUNDING: Final = 1e-5


class Contributions(list[tuple[str, int, Arrays]]):
    """Updates of a round: client, weight, update."""

    def by_name(self) -> Contributions:
        """The same in the order of the clients' names."""
        return Contributions(sorted(self, key=lambda one: one[0]))


class Averaging(ABC):
    """Turns the updates of one round after the other into global arrays.

    Attributes:
        unit: clients divide their updates by their norms.
        weighs: clients with more examples count more.
        proximal: mu of the proximal term in the clients' losses.
    """

    unit = False
    weighs = True
    proximal = 0.0

    @abstractmethod
    def next(self, round_: int, arrays: Arrays, updates: Contributions) -> Arrays:
        """The global arrays after a round.

        Args:
            round_: its number, from 1.
            arrays: the global arrays before.
            updates: one or more; with secure aggregation a single one, their weighted mean.
        """

    def state(self) -> Arrays:
        """What the next round needs besides the arrays, to be saved."""
        return {}

    def load(self, state: Arrays) -> None:
        """Take over what `state` gave.

        Raises:
            CheckpointError: it is of another strategy.
        """
        if state:
            raise CheckpointError("the saved round is of another strategy; keep it, or begin anew")


class FlowerAveraging(Averaging):
    """FedAvg (arXiv 1602.05629) of Flower; with a proximal term at the clients, FedProx (1812.06127).

    Args:
        proximal: mu of the proximal term; 0 for FedAvg.
        weighs: weigh clients by examples.
    """

    def __init__(self, proximal: float = 0.0, *, weighs: bool = True) -> None:
        self.proximal = proximal
        self.weighs = weighs

    def next(self, round_: int, arrays: Arrays, updates: Contributions) -> Arrays:
        return _aggregated(FedAvg(fit_metrics_aggregation_fn=_no_metrics), round_, arrays, updates)


class FlowerAdam(Averaging):
    """FedAdam (arXiv 2003.00295) of Flower: Adam at the aggregator, on the mean update.

    Args:
        learning_rate: at the aggregator.
        betas: decay of the running means.
        tau: added to the root of the second.
        weighs: weigh clients by examples.
    """

    def __init__(
        self, learning_rate: float, betas: tuple[float, float], tau: float, *, weighs: bool = True
    ) -> None:
        self.weighs = weighs
        self._options: dict[str, Any] = {
            "eta": learning_rate,
            "beta_1": betas[0],
            "beta_2": betas[1],
            "tau": tau,
        }
        self._moments: tuple[Arrays, Arrays] | None = None

    def next(self, round_: int, arrays: Arrays, updates: Contributions) -> Arrays:
        strategy = FedAdam(
            initial_parameters=ndarrays_to_parameters(in_order(arrays)),
            fit_metrics_aggregation_fn=_no_metrics,
            **self._options,
        )
        if self._moments is not None:
            strategy.m_t, strategy.v_t = (in_order(moment) for moment in self._moments)
        found = _aggregated(strategy, round_, arrays, updates)
        self._moments = named(arrays, strategy.m_t or []), named(arrays, strategy.v_t or [])
        return found

    def state(self) -> Arrays:
        moments = self._moments or ({}, {})
        return {
            f"{kind}:{name}": array
            for kind, moment in zip(_ADAM, moments, strict=True)
            for name, array in moment.items()
        }

    def load(self, state: Arrays) -> None:
        found: dict[str, Arrays] = {kind: {} for kind in _ADAM}
        for key, array in state.items():
            kind, colon, name = key.partition(":")
            if kind not in found or not colon:
                raise CheckpointError(
                    "the saved round is of another strategy; keep it, or begin anew"
                )
            found[kind][name] = array
        self._moments = (found["m"], found["v"]) if state else None


class NormFedAvg(Averaging):
    """The mean of unit updates, with noise (DP-NormFedAvg, arXiv 2106.07094).

        w <- w + learning_rate (sum_i u_i + N(0, sigma^2)) / m

    Every client weighs the same, and an update that comes longer than 1 is shortened. (One of many
    under secure aggregation cannot be: there the clients are trusted with that.) m is the number of
    updates, or, where neighbours differ by a client, the number of clients that were expected,
    which is public.

    Args:
        learning_rate: length of the step along the mean.
        expected: clients of the federation.
        mechanism: noise of the aggregator; None adds none (the clients may have added theirs).
        noise: where it comes from.
    """

    unit = True
    weighs = False

    def __init__(
        self,
        learning_rate: float,
        expected: int,
        mechanism: UnitUpdate | None = None,
        noise: NoiseSource | None = None,
    ) -> None:
        self._learning_rate = learning_rate
        self._expected = expected
        self._mechanism = mechanism
        self._noise = noise or NoiseSource()

    def next(self, round_: int, arrays: Arrays, updates: Contributions) -> Arrays:
        del round_
        total = {name: np.zeros_like(array) for name, array in arrays.items()}
        for _, weight, update in updates.by_name():
            total = plus(total, self._bounded(update), weight)
        count = sum(weight for _, weight, _ in updates)
        if self._mechanism is not None:
            total = self._mechanism.noised(total, self._noise)
            if self._mechanism.sensitivity < 2:  # the count itself tells who took part
                count = self._expected
        return plus(arrays, total, self._learning_rate / count)

    def _bounded(self, update: Arrays) -> Arrays:
        """An update, or a mean of updates, of norm 1 at most, as the noise takes it to be."""
        longer = self._mechanism is not None and norm(update) > 1 + _ROUNDING
        return UnitUpdate.normalized(update) if longer else update


def averaging(
    section: StrategySection,
    expected: int,
    mechanism: UnitUpdate | None = None,
    noise: NoiseSource | None = None,
) -> Averaging:
    """The strategy that a configuration names.

    Raises:
        ConfigError: noise is asked for with another strategy than NormFedAvg.
    """
    if mechanism is not None and section.kind is not Kind.NORMFEDAVG:
        raise ConfigError(
            f"noise is calibrated to unit updates and strategy.kind is {section.kind}; "
            "use normfedavg, or leave the [privacy] table out"
        )
    match section.kind:
        case Kind.FEDAVG:
            return FlowerAveraging(weighs=section.weigh)
        case Kind.FEDPROX:
            return FlowerAveraging(section.proximal, weighs=section.weigh)
        case Kind.FEDADAM:
            betas = section.beta1, section.beta2
            return FlowerAdam(section.learning_rate, betas, section.tau, weighs=section.weigh)
        case Kind.NORMFEDAVG:
            return NormFedAvg(section.learning_rate, expected, mechanism, noise)


def _aggregated(strategy: FedAvg, round_: int, arrays: Arrays, updates: Contributions) -> Arrays:
    """What a strategy of Flower makes of arrays + update of every client."""
    # Flower's strategies look at what came, not at whom it came from.
    results: list[Any] = [
        (None, FitRes(_OK, _parameters(plus(arrays, update)), weight, {}))
        for _, weight, update in updates.by_name()
    ]
    parameters, _ = strategy.aggregate_fit(round_, results, [])
    if parameters is None:
        raise CheckpointError("a round without updates cannot be averaged")
    return named(arrays, _arrays(parameters))


def _parameters(arrays: Arrays) -> Parameters:
    return ndarrays_to_parameters(in_order(arrays))


def _arrays(parameters: Parameters) -> NDArrays:
    return parameters_to_ndarrays(parameters)


def _no_metrics(found: Sequence[tuple[int, Mapping[str, Any]]]) -> dict[str, Any]:
    return {"clients": json.dumps(len(found))}
