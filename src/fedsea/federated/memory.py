"""The same apps of Flower without a network: aggregator and clients in one process."""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Final

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedsea.errors import FedseaError

_RUN: Final = 1
_AGGREGATOR: Final = 1

_log = logging.getLogger(__name__)


class MemoryGrid(Grid):
    """Carries messages to the clients of this process, one after the other.

    Args:
        apps: by node number.
        reaches: whether a message gets to a node, asked before each; a node that is not reached
            does not answer. None: all are.
    """

    def __init__(
        self,
        apps: Mapping[int, ClientApp],
        reaches: Callable[[int, Message], bool] | None = None,
    ) -> None:
        self._apps = dict(apps)
        self._reaches = reaches
        self._contexts = {node: new_context(node) for node in apps}
        self._numbers = itertools.count(1)
        self._replies: dict[str, Message] = {}
        TaskIdentity.run_id = _RUN
        TaskIdentity.node_id = _AGGREGATOR
        TaskIdentity.task_id = _RUN

    def set_run(self, run: Run) -> None:
        """There is one run only."""

    @property
    def run(self) -> Run:
        """The only run."""
        return Run.create_empty(run_id=_RUN)

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """A message of this run."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """All nodes."""
        return list(self._apps)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Have messages answered; their numbers."""
        numbers = []
        for message in messages:
            number = str(next(self._numbers))
            numbers.append(number)
            node = message.metadata.dst_node_id
            if self._reaches is None or self._reaches(node, message):
                self._replies[number] = self._answer(node, message)
        return numbers

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The answers to messages of these numbers."""
        return [self._replies.pop(number) for number in message_ids if number in self._replies]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Ask and take the answers; nobody is waited for."""
        del timeout
        return self.pull_messages(self.push_messages(messages))

    def _answer(self, node: int, message: Message) -> Message:
        # What is sent is copied, as a network would; Flower's apps change what they are given.
        try:
            return self._apps[node](copy.deepcopy(message), self._contexts[node])
        except FedseaError as error:
            _log.warning("node %d: %s", node, error)
            reason = type(error).__name__
            return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)


def new_context(node: int) -> Context:
    """An empty context of a node."""
    return Context(run_id=_RUN, node_id=node, node_config={}, state=RecordDict(), run_config={})
