"""One round of secure aggregation on Flower's workflow, which exists for its legacy strategies."""

from __future__ import annotations

from typing import Any

from flwr.app import ConfigRecord, Context
from flwr.common import FitIns, FitRes, NDArrays, Parameters, parameters_to_ndarrays
from flwr.compat.common import recorddict_compat as compat
from flwr.server import ClientManager, LegacyContext, ServerConfig
from flwr.server.client_proxy import ClientProxy
from flwr.server.compat.grid_client_proxy import GridClientProxy
from flwr.server.strategy import FedAvg
from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD, MAIN_PARAMS_RECORD
from flwr.server.workflow.constant import Key as WorkflowKey
from flwr.serverapp import Grid

from fedsea.federated.config import SecureSection
from fedsea.federated.members import Member
from fedsea.federated.secure import workflow


class _Capture(FedAvg):
    """Sends the given instructions to the given clients and keeps the mean that comes back."""

    def __init__(self, proxies: dict[int, ClientProxy], instructions: FitIns) -> None:
        super().__init__()
        self.mean: Parameters | None = None
        self.nodes: tuple[int, ...] = ()
        self._proxies = proxies
        self._instructions = instructions

    def configure_fit(
        self, server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> list[tuple[ClientProxy, FitIns]]:
        del server_round, parameters, client_manager
        return [(proxy, self._instructions) for proxy in self._proxies.values()]

    def aggregate_fit(
        self, server_round: int, results: list[tuple[ClientProxy, FitRes]], failures: Any
    ) -> tuple[Parameters | None, dict[str, Any]]:
        del server_round, failures
        if results:
            # Every result holds the unmasked mean in the place of its own update.
            self.mean = results[0][1].parameters
            taking_part = {id(proxy) for proxy, _ in results}
            self.nodes = tuple(
                node for node, proxy in self._proxies.items() if id(proxy) in taking_part
            )
        return None, {}


def masked_mean(
    grid: Grid,
    context: Context,
    terms: SecureSection,
    members: list[Member],
    number: int,
    instructions: FitIns,
) -> tuple[NDArrays, tuple[str, ...]] | None:
    """The weighted mean of the updates, and who is in it; None when the round fell short.

    Args:
        grid: reaches the clients.
        context: of Flower's run.
        terms: of the protocol.
        members: the cohort.
        number: of the round.
        instructions: for each of them.
    """
    proxies: dict[int, ClientProxy] = {
        member.node: GridClientProxy(member.node, grid, context.run_id) for member in members
    }
    strategy = _Capture(proxies, instructions)
    legacy = LegacyContext(context, ServerConfig(num_rounds=1), strategy)
    legacy.state.config_records[MAIN_CONFIGS_RECORD] = ConfigRecord(
        {WorkflowKey.CURRENT_ROUND: number}
    )
    legacy.state.array_records[MAIN_PARAMS_RECORD] = compat.parameters_to_arrayrecord(
        instructions.parameters, keep_input=True
    )
    if len(members) < terms.least:
        return None
    workflow(terms, len(members))(grid, legacy)
    if strategy.mean is None:
        return None
    names = {member.node: member.name for member in members}
    return (
        parameters_to_ndarrays(strategy.mean),
        tuple(sorted(names[node] for node in strategy.nodes)),
    )
