"""A client whose training can be computed by hand, and federations of such clients in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from tests.federated_steps import Steps

from fedsea.federated.arrays import Arrays
from fedsea.federated.client_app import client_app
from fedsea.federated.config import FederationConfig, SecureSection
from fedsea.federated.local import LocalClient, Policy
from fedsea.federated.memory import MemoryGrid, new_context
from fedsea.federated.requests import Requests
from fedsea.federated.rounds import Federation, RoundReport
from fedsea.settings import from_tables


class Simulated:
    """A federation in memory; `run` makes all rounds, or goes on with them."""

    def __init__(
        self, config: FederationConfig, clients: dict[str, LocalClient], secure: bool
    ) -> None:
        terms: SecureSection | None = config.secure if secure else None
        self.config = config
        self.clients = clients
        self.down: Callable[[int, Any], bool] = lambda node, message: False
        self.owner: Callable[[int], str | None] | None = None
        self.asks = {
            node: Requests(client) for node, client in enumerate(clients.values(), start=11)
        }
        self.apps = {node: client_app(ask, terms) for node, ask in self.asks.items()}
        self.reports: list[RoundReport] = []
        self.notices: list[str] = []

    def run(self) -> Arrays:
        grid = MemoryGrid(self.apps, lambda node, message: not self.down(node, message))
        federation = Federation(
            grid, new_context(1), self.config, self.reports.append, self.notices.append, self.owner
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
