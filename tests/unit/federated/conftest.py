"""A client whose training can be computed by hand, and federations of such clients in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedsea.federated.arrays import Arrays
from fedsea.federated.client_app import client_app
from fedsea.federated.config import FederationConfig, SecureSection, from_tables
from fedsea.federated.local import FitSettings, LocalClient, Policy
from fedsea.federated.memory import MemoryGrid, new_context
from fedsea.federated.requests import Requests
from fedsea.federated.rounds import Federation, RoundReport

STEM = "base_model.model.model.layers"
BOTTOM_A = f"{STEM}.0.self_attn.q_proj.lora_A.weight"
BOTTOM_B = f"{STEM}.0.self_attn.q_proj.lora_B.weight"
TOP_B = f"{STEM}.3.self_attn.q_proj.lora_B.weight"
LAYOUT = {BOTTOM_A: (2, 3), BOTTOM_B: (4, 2), TOP_B: (5,)}


class Steps:
    """Moves every number half of the way to a target, as often as it is told."""

    def __init__(self, target: float, examples: int, steps: int = 1, begin: float = 0.0) -> None:
        self.target = np.float32(target)
        self.examples = examples
        self.steps = steps
        self.rounds: list[int] = []
        self._arrays = {name: np.full(shape, begin, np.float32) for name, shape in LAYOUT.items()}

    @property
    def description(self) -> Mapping[str, Any]:
        return {"peft_type": "LORA", "r": 2, "lora_alpha": 4}

    def arrays(self) -> Arrays:
        return {name: array.copy() for name, array in self._arrays.items()}

    def load(self, arrays: Mapping[str, Any]) -> None:
        for name, array in arrays.items():
            assert self._arrays[name].shape == array.shape
            self._arrays[name] = np.array(array, np.float32)

    def fit(self, settings: FitSettings) -> int:
        self.rounds.append(settings.round)
        start = self.arrays()
        for _ in range(self.steps):
            for name, array in self._arrays.items():
                pull = settings.proximal * (start[name] - array)
                self._arrays[name] = (array + (self.target - array) / 2 + pull).astype(np.float32)
        return self.examples

    def evaluate(self) -> tuple[float, int]:
        away = [float(np.abs(self.target - array).mean()) for array in self._arrays.values()]
        return sum(away) / len(away), self.examples


class Simulated:
    """A federation in memory; `run` makes all rounds, or goes on with them."""

    def __init__(
        self, config: FederationConfig, clients: dict[str, LocalClient], secure: bool
    ) -> None:
        terms: SecureSection | None = config.secure if secure else None
        self.config = config
        self.clients = clients
        self.down: Callable[[int, Any], bool] = lambda node, message: False
        self.apps = {
            node: client_app(Requests(client), terms)
            for node, client in enumerate(clients.values(), start=11)
        }
        self.reports: list[RoundReport] = []
        self.notices: list[str] = []

    def run(self) -> Arrays:
        grid = MemoryGrid(self.apps, lambda node, message: not self.down(node, message))
        federation = Federation(
            grid, new_context(1), self.config, self.reports.append, self.notices.append
        )
        return federation.run()


@pytest.fixture
def simulate(tmp_path: Path) -> Callable[..., Simulated]:
    """Make a federation of clients with these targets and numbers of examples."""

    def make(
        targets: Mapping[str, tuple[float, int]],
        policy: Policy | None = None,
        **tables: dict[str, Any],
    ) -> Simulated:
        section = {
            "name": "trial",
            "clients": list(targets),
            "folder": tmp_path / "federation",
            "rounds": 1,
            "wait_s": 0.2,
            **tables.pop("federation", {}),
        }
        config = from_tables(FederationConfig, {"federation": section, **tables})
        clients = {
            name: LocalClient(name, Steps(target, examples), policy or Policy(), tmp_path / name)
            for name, (target, examples) in targets.items()
        }
        return Simulated(config, clients, secure=config.secure.enabled)

    return make
