"""The aggregator: rounds over whoever is there, a checkpoint after each, and going on after a stop.

Clients are known by their names. A node of Flower says under which name it comes; names that the
configuration does not list are left out, and the latest node of a name is the one that counts. A
round that too few clients finish is begun again with those that still answer.

    FOLDER/rounds/step-00000003/adapter_model.safetensors, adapter_config.json   the global adapter
                                strategy.safetensors                             what goes with it
    FOLDER/rounds.jsonl                                                          a line for each round
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from flwr.app import Context, Message, RecordDict
from flwr.app.message_type import MessageType
from flwr.common import (
    EvaluateIns,
    FitIns,
    GetParametersIns,
    GetPropertiesIns,
    ndarrays_to_parameters,
    parameters_to_ndarrays,
)
from flwr.common.constant import MessageTypeLegacy
from flwr.compat.common import recorddict_compat as compat
from flwr.serverapp import Grid

from fedsea import artifacts
from fedsea.errors import CheckpointError, ConfigError, FedseaError, TrainingError
from fedsea.federated.arrays import Arrays, in_order, named, unpacked
from fedsea.federated.config import FederationConfig
from fedsea.federated.local import write_adapter
from fedsea.federated.members import Member, member_of
from fedsea.federated.secure_round import masked_mean
from fedsea.federated.strategies import Contributions, averaging
from fedsea.federated.unit_update import account_of, mechanism_of
from fedsea.model.adapters import TENSORS
from fedsea.model.checkpoints import Steps
from fedsea.privacy.ledger import Ledger, default_path

_STATE: Final = "strategy.safetensors"
_KIND: Final = "federation"
_LINES: Final = "rounds.jsonl"
_ASK_S: Final = 60.0
_ASK_AGAIN_S: Final = 20.0
_POLL_S: Final = 0.5

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundReport:
    """What a round was like; it holds nothing of what was trained on.

    Attributes:
        round: its number.
        rounds: of the federation.
        clients: who finished it.
        missing: who did not.
        scaled: how many updates were scaled to fit the clip range, where that is told.
        seconds: it took.
        loss: mean loss of the clients that share it.
        privacy: mechanism, unit and what was spent, in words.
    """

    round: int
    rounds: int
    clients: tuple[str, ...]
    missing: tuple[str, ...]
    scaled: int
    seconds: float
    loss: float | None = None
    privacy: str | None = None


@dataclass(frozen=True, slots=True)
class _Collected:
    updates: Contributions
    clients: tuple[str, ...]
    scaled: int = 0


class Federation:
    """All rounds of one federation.

    Args:
        grid: reaches the clients.
        context: of Flower's run.
        config: settings.
        report: is told of every round.
        notice: is told in words of everything else.
        owner: the name to which a node belongs; None where nodes cannot be other than they say.

    Raises:
        ConfigError: the settings do not fit together.
        LedgerError: rounds are to be charged and the ledger cannot be opened.
    """

    def __init__(
        self,
        grid: Grid,
        context: Context,
        config: FederationConfig,
        report: Callable[[RoundReport], None] = lambda _: None,
        notice: Callable[[str], None] = _log.warning,
        owner: Callable[[int], str | None] | None = None,
    ) -> None:
        self._grid = grid
        self._owner = owner
        self._context = context
        self._config = config
        self._report = report
        self._notice = notice
        self._members: dict[int, Member | None] = {}
        self._doubted: set[int] = set()
        self._steps = Steps(config.federation.folder / "rounds", config.federation.keep)
        self._mechanism = mechanism_of(config.privacy)
        expected = len(config.federation.clients)
        self._averaging = averaging(config.strategy, expected, self._mechanism)
        self._fixed: Arrays = {}

    def run(self) -> Arrays:
        """All rounds that are not done yet; the global arrays at the end.

        Raises:
            TrainingError: too few clients are there, or finish a round.
            ConfigError: the clients train different adapters.
            CheckpointError: a round could not be saved or read.
            BudgetExceeded: the ledger has too little left for another round.
        """
        members = self._cohort(len(self._config.federation.clients))
        saved = self._steps.steps()
        arrays = self._resumed(saved[-1], members[0]) if saved else self._begun(members[0])
        for number in range((saved or [0])[-1] + 1, self._config.federation.rounds + 1):
            arrays = self._round(number, arrays)
        self._finish(arrays)
        return arrays

    def _round(self, number: int, arrays: Arrays) -> Arrays:
        started = time.monotonic()
        found, members = self._finished(number, arrays)
        cost = self._charged()
        made = self._averaging.next(number, arrays, found.updates)
        self._save(number, made, members[0])
        report = RoundReport(
            round=number,
            rounds=self._config.federation.rounds,
            clients=found.clients,
            missing=tuple(sorted(set(self._config.federation.clients) - set(found.clients))),
            scaled=found.scaled,
            loss=self._loss(number, made, members),
            seconds=time.monotonic() - started,
            privacy=cost,
        )
        _append(self._config.federation.folder / _LINES, asdict(report))
        self._report(report)
        return made

    def _finished(self, number: int, arrays: Arrays) -> tuple[_Collected, list[Member]]:
        """Begin a round until enough clients finish it."""
        least = self._config.least
        for _ in range(self._config.federation.attempts):
            members = self._cohort(least)
            collected = self._masked if self._config.secure.enabled else self._clear
            found = collected(number, arrays, members)
            if len(found.clients) >= least:
                self._doubt(member for member in members if member.name not in found.clients)
                return found, members
            self._notice(
                f"round {number}: {len(found.clients)} clients finished it and {least} are needed; "
                "it is begun again"
            )
            self._members.clear()
        raise TrainingError(
            f"round {number} was begun {self._config.federation.attempts} times and too few clients "
            "finished it; see to them, and start again: it goes on from here"
        )

    def _clear(self, number: int, arrays: Arrays, members: list[Member]) -> _Collected:
        """Updates that the aggregator sees one by one."""
        nodes = {member.node: member for member in members}
        instructions = FitIns(self._parameters(arrays), self._fit_config(number, members[0]))
        content = compat.fitins_to_recorddict(instructions, keep_input=True)
        timeout = self._config.federation.round_timeout_s
        updates, scaled = Contributions(), 0
        for reply in self._ask(list(nodes), content, MessageType.TRAIN, number, timeout):
            member = nodes[reply.metadata.src_node_id]
            made = compat.recorddict_to_fitres(reply.content, keep_input=False)
            try:
                update = named(arrays, parameters_to_ndarrays(made.parameters))
            except FedseaError as error:
                self._notice(f"round {number}: the update of {member.name} is left out: {error}")
                continue
            weight = made.num_examples if self._averaging.weighs else 1
            if weight < 1:
                self._notice(f"round {number}: {member.name} has no examples; it is left out")
                continue
            updates.append((member.name, weight, update))
            scaled += float(made.metrics.get("scaled", 1.0)) < 1.0
        return _Collected(updates, tuple(sorted(name for name, _, _ in updates)), scaled)

    def _masked(self, number: int, arrays: Arrays, members: list[Member]) -> _Collected:
        """The weighted mean of updates that the aggregator does not see."""
        instructions = FitIns(self._parameters(arrays), self._fit_config(number, members[0]))
        # A sum of fewer is not unmasked at all: with that of the round begun again, which holds the
        # same updates and one more, it would tell that one.
        terms = replace(self._config.secure, least=self._config.least)
        found = masked_mean(self._grid, self._context, terms, members, number, instructions)
        if found is None:
            return _Collected(Contributions(), ())
        values, clients = found
        mean = named(arrays, values)
        return _Collected(Contributions([("mean", len(clients), mean)]), clients)

    def _fit_config(self, number: int, member: Member) -> dict[str, Any]:
        return {
            "round": number,
            "layout": member.layout,
            "proximal": self._averaging.proximal,
            "unit": self._averaging.unit,
            "weigh": self._averaging.weighs,
        }

    def _loss(self, number: int, arrays: Arrays, members: list[Member]) -> float | None:
        sharing = [member for member in members if member.share_loss]
        if not (self._config.federation.evaluate and sharing):
            return None
        replies = self._evaluate(number, arrays, sharing, finish=False)
        found = [compat.recorddict_to_evaluateres(reply.content) for reply in replies]
        examples = sum(made.num_examples for made in found)
        return sum(made.loss * made.num_examples for made in found) / examples if examples else None

    def _finish(self, arrays: Arrays) -> None:
        members = self._present()
        if members:
            replies = self._evaluate(self._config.federation.rounds, arrays, members, finish=True)
            told = {reply.metadata.src_node_id for reply in replies}
            for member in members:
                if member.node not in told:
                    self._notice(f"{member.name} did not take the final adapter; hand it over")

    def _evaluate(
        self, number: int, arrays: Arrays, members: list[Member], *, finish: bool
    ) -> list[Message]:
        config: dict[str, Any] = {
            "round": number,
            "layout": members[0].layout,
            "finish": finish,
        }
        content = compat.evaluateins_to_recorddict(
            EvaluateIns(self._parameters(arrays), config), keep_input=True
        )
        nodes = [member.node for member in members]
        timeout = self._config.federation.round_timeout_s
        return self._ask(nodes, content, MessageType.EVALUATE, number, timeout)

    def _cohort(self, wanted: int) -> list[Member]:
        """Members by name: `wanted` of them, or when the time is up, enough for a round.

        Raises:
            TrainingError: too few are there.
            ConfigError: they train different adapters.
        """
        section, least = self._config.federation, self._config.least
        deadline = time.monotonic() + section.wait_s
        while True:
            members = self._present()
            late = time.monotonic() >= deadline
            if len(members) >= wanted or (late and len(members) >= least):
                break
            if late:
                raise TrainingError(
                    f"{len(members)} of {len(section.clients)} clients are there and {least} are "
                    "needed; start them, or raise federation.wait_s"
                )
            time.sleep(_POLL_S)
        if len({member.layout for member in members}) > 1:
            layouts = ", ".join(f"{member.name}: {member.layout}" for member in members)
            raise ConfigError(
                f"the clients train different adapters ({layouts}); agree on model, lora options, "
                "seed, and on what is personal"
            )
        return members

    def _present(self) -> list[Member]:
        nodes = list(self._grid.get_node_ids())
        self._members = {node: self._members[node] for node in nodes if node in self._members}
        unknown = [node for node in nodes if node not in self._members]
        content = compat.getpropertiesins_to_recorddict(GetPropertiesIns({}))
        asked = (
            ([node for node in unknown if node not in self._doubted], _ASK_S),
            ([node for node in unknown if node in self._doubted], _ASK_AGAIN_S),
        )
        for some, timeout in asked:
            for reply in self._ask(some, content, MessageTypeLegacy.GET_PROPERTIES, 0, timeout):
                member = self._believed(reply)
                self._members[reply.metadata.src_node_id] = member
                self._doubted.discard(reply.metadata.src_node_id)
        latest = {member.name: member for member in self._members.values() if member is not None}
        return [latest[name] for name in sorted(latest)]

    def _believed(self, reply: Message) -> Member | None:
        """Who a node is, unless it is nobody of this federation or says that it is another."""
        member = member_of(reply, self._config.federation.clients)
        if member is None:
            self._notice("a node that federation.clients does not name is left out")
            return None
        if self._owner is None or (owner := self._owner(member.node)) == member.name:
            return member
        self._notice(
            f"a node says that it is {member.name} and shows the certificate of {owner}; it is left "
            "out: client.name has to be the name in the client's certificate"
        )
        return None

    def _doubt(self, members: Iterable[Member]) -> None:
        """Ask these again, and not for long, before they are counted on."""
        for member in members:
            self._members.pop(member.node, None)
            self._doubted.add(member.node)

    def _ask(
        self, nodes: list[int], content: RecordDict, kind: str, number: int, timeout: float
    ) -> list[Message]:
        """The answers that came in time and are no errors."""
        messages = [
            Message(content=content, dst_node_id=node, message_type=kind, group_id=str(number))
            for node in nodes
        ]
        if not messages:
            return []
        replies = list(self._grid.send_and_receive(messages, timeout=timeout))
        for reply in replies:
            if reply.has_error():
                member = self._members.get(reply.metadata.src_node_id)
                name = "a node" if member is None else member.name
                self._notice(f"round {number}: {name} answered with an error; see its own log")
        return [reply for reply in replies if not reply.has_error()]

    def _begun(self, first: Member) -> Arrays:
        """The arrays of the first client; of one seed they are the same at all."""
        content = compat.getparametersins_to_recorddict(GetParametersIns({}))
        replies = self._ask([first.node], content, MessageTypeLegacy.GET_PARAMETERS, 0, _ASK_S)
        if not replies:
            raise TrainingError(f"{first.name} did not send the arrays to begin with; start again")
        found = compat.recorddict_to_getparametersres(replies[0].content, keep_input=False)
        everything = first.named(parameters_to_ndarrays(found.parameters))
        arrays = {name: everything[name] for name in first.shared}
        self._fixed = {name: everything[name] for name in first.fixed}
        self._save(0, arrays, first)
        return arrays

    def _resumed(self, number: int, first: Member) -> Arrays:
        """The arrays of a saved round."""
        folder = self._steps.path(number)
        try:
            everything = unpacked((folder / TENSORS).read_bytes())
        except OSError as error:
            raise CheckpointError(f"{folder} cannot be read ({error.strerror})") from error
        state = artifacts.read(folder / _STATE, _KIND)
        if state.value("layout", str) != first.layout:
            raise CheckpointError(
                f"{folder} is of another adapter than the clients train; keep it, and give "
                "federation.folder another place"
            )
        self._averaging.load({name: array.numpy() for name, array in state.tensors.items()})
        self._fixed = {name: everything[name] for name in first.fixed}
        self._notice(f"going on after round {number}")
        return {name: everything[name] for name in first.shared}

    def _save(self, number: int, arrays: Arrays, member: Member) -> None:
        state = {name: torch.from_numpy(array) for name, array in self._averaging.state().items()}

        def write(folder: Path) -> None:
            write_adapter(folder, {**arrays, **self._fixed}, member.adapter)
            artifacts.write(folder / _STATE, _KIND, {"layout": member.layout}, state)

        self._steps.save(number, write)

    def _charged(self) -> str | None:
        """Charge a round to the ledger, before anything of it is kept; mechanism, unit, spent."""
        if self._mechanism is None:
            return None
        with Ledger.open(self._config.privacy.ledger or default_path()) as ledger:
            account = account_of(
                ledger, self._config.federation.name, self._config.privacy, self._mechanism
            )
            account.reserve(1).settle(1)
            spent = account.statement().spending()
        return (
            f"{self._mechanism.spec()}, unit client: mu {spent.mu():.4g} so far "
            f"(epsilon {spent.epsilon(1e-5):.4g} at delta 1e-05)"
        )

    def _parameters(self, arrays: Arrays) -> Any:
        return ndarrays_to_parameters(in_order(arrays))


def _append(path: Path, line: Mapping[str, Any]) -> None:
    try:
        with path.open("a", encoding="utf-8") as opened:
            opened.write(json.dumps(line, sort_keys=True) + "\n")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written ({error.strerror}); make room") from error
