"""Flower's side of the aggregator: the app that its ServerApp process runs."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Final

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedsea.errors import FedseaError
from fedsea.federated.config import AggregatorConfig
from fedsea.federated.nodes import owner_in
from fedsea.federated.reports import Teller, variable
from fedsea.federated.rounds import Federation

SETTINGS: Final = "FEDSEA_FEDERATION"
REPORTS: Final = "FEDSEA_FEDERATION_REPORTS"
NODES: Final = "FEDSEA_FEDERATION_NODES"

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """All rounds of the federation that the environment names."""
    teller = Teller(variable(REPORTS))
    try:
        config = AggregatorConfig.load(variable(SETTINGS))
        owner = partial(owner_in, Path(variable(NODES)))
        Federation(grid, context, config, teller.round, teller.notice, owner).run()
        teller.end()
    except FedseaError as error:
        teller.end(error)
        raise
    finally:
        teller.close()
