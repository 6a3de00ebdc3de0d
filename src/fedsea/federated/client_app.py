"""Flower's side of a client: a thin shim that passes every message on to the client process.

Flower starts a process for each message and ends it with the answer. Model, adapter and optimizer
live in the client process; this one holds arrays for as long as a message takes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any, Final

from flwr.app import Context
from flwr.client import Client
from flwr.clientapp import ClientApp
from flwr.common import (
    Code,
    EvaluateIns,
    EvaluateRes,
    FitIns,
    FitRes,
    GetParametersIns,
    GetParametersRes,
    GetPropertiesIns,
    GetPropertiesRes,
    Parameters,
    Status,
    ndarrays_to_parameters,
    parameters_to_ndarrays,
)

from fedsea import settings
from fedsea.errors import ConfigError, FedseaError
from fedsea.federated import secure
from fedsea.federated.arrays import Arrays, in_order
from fedsea.federated.channel import call
from fedsea.federated.config import SecureSection

SOCKET: Final = "FEDSEA_CLIENT_SOCKET"
TERMS: Final = "FEDSEA_CLIENT_TERMS"

Ask = Callable[[dict[str, Any], Arrays], tuple[dict[str, Any], Arrays]]

_OK: Final = Status(Code.OK, "")


class Shim(Client):
    """Passes on what Flower asks for.

    Args:
        ask: asks the client process.
    """

    def __init__(self, ask: Ask) -> None:
        self._ask = ask

    def get_properties(self, ins: GetPropertiesIns) -> GetPropertiesRes:
        """Who this is and what it trains."""
        del ins
        described, _ = self._ask({"request": "describe"}, {})
        return GetPropertiesRes(_OK, {"description": json.dumps(described, sort_keys=True)})

    def get_parameters(self, ins: GetParametersIns) -> GetParametersRes:
        """The arrays with which a federation begins, and their names."""
        del ins
        _, arrays = self._ask({"request": "arrays"}, {})
        return GetParametersRes(_OK, ndarrays_to_parameters(in_order(arrays)))

    def fit(self, ins: FitIns) -> FitRes:
        """One round of local training: the update."""
        made, update = self._ask({"request": "fit", **ins.config}, numbered(ins.parameters))
        parameters = ndarrays_to_parameters(in_order(update))
        return FitRes(_OK, parameters, int(made["weight"]), {"scaled": float(made["scaled"])})

    def evaluate(self, ins: EvaluateIns) -> EvaluateRes:
        """The mean loss, if this client shares it; or the end of the federation."""
        finish = bool(ins.config.get("finish", False))
        request = "finish" if finish else "evaluate"
        made, _ = self._ask({"request": request, **ins.config}, numbered(ins.parameters))
        return EvaluateRes(_OK, float(made.get("loss", 0.0)), int(made.get("examples", 1)), {})


def client_app(ask: Ask, terms: SecureSection | None) -> ClientApp:
    """The app of one client: the shim behind the client's side of secure aggregation."""

    def client(context: Context) -> Client:
        del context
        return Shim(ask)

    return ClientApp(client_fn=client, mods=[secure.guard(terms)])


def from_environment() -> ClientApp:
    """The app that a process of Flower runs: socket and terms come from its environment.

    Raises:
        ConfigError: it was not started by `fedsea federate client`.
    """
    path = os.environ.get(SOCKET)
    if not path:
        raise ConfigError("no client process is named; start with `fedsea federate client`")
    text = os.environ.get(TERMS, "")
    terms = settings.section(SecureSection, "secure", json.loads(text)) if text else None

    def ask(header: dict[str, Any], arrays: Arrays) -> tuple[dict[str, Any], Arrays]:
        try:
            return call(path, header, arrays)
        except FedseaError as error:
            # Flower passes messages of errors on to the aggregator, whom they do not concern.
            raise type(error)("this client did not answer; its own log says why") from None

    return client_app(ask, terms)


def numbered(parameters: Parameters) -> Arrays:
    """Arrays as they came, under numbers; the client process knows their names."""
    values = parameters_to_ndarrays(parameters)
    return {f"{index:06d}": value for index, value in enumerate(values)}
