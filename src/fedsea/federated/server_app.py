"""Flower's side of the aggregator: the app that its ServerApp process runs."""

from __future__ import annotations

from typing import Final

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedsea.errors import FedseaError
from fedsea.federated.config import AggregatorConfig
from fedsea.federated.reports import Teller, variable
from fedsea.federated.rounds import Federation

SETTINGS: Final = "FEDSEA_FEDERATION"
REPORTS: Final = "FEDSEA_FEDERATION_REPORTS"

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """All rounds of the federation that the environment names."""
    teller = Teller(variable(REPORTS))
    try:
        config = AggregatorConfig.load(variable(SETTINGS))
        Federation(grid, context, config, teller.round, teller.notice).run()
        teller.end()
    except FedseaError as error:
        teller.end(error)
        raise
    finally:
        teller.close()
