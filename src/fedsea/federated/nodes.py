"""Whose certificate each of Flower's nodes belongs to.

Flower knows its nodes by numbers and believes what a request says. A node's number is drawn at random
and told to nobody but the client that registers it, until that client has used it; so a number belongs
to the certificate that uses it first, and no other may use it from then on. What a node says about
itself is believed only where it is the name in that certificate.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from flwr.proto import fab_pb2, fleet_pb2, heartbeat_pb2, message_pb2, run_pb2
from google.protobuf.message import DecodeError

FLEET: Final = b"/v1/fleet/"

_MOST_OF_A_NAME: Final = 256

# Requests that come before a client has a number.
_WITHOUT_NODE: Final = {b"register-node", b"activate-node"}

_WITH_NODE: Final[dict[bytes, Callable[[], Any]]] = {
    b"deactivate-node": fleet_pb2.DeactivateNodeRequest,
    b"unregister-node": fleet_pb2.UnregisterNodeFleetRequest,
    b"send-node-heartbeat": heartbeat_pb2.SendNodeHeartbeatRequest,
    b"pull-messages": fleet_pb2.PullMessagesRequest,
    b"push-messages": fleet_pb2.PushMessagesRequest,
    b"get-run": run_pb2.GetRunRequest,
    b"get-fab": fab_pb2.GetFabRequest,
    b"push-object": message_pb2.PushObjectRequest,
    b"pull-object": message_pb2.PullObjectRequest,
    b"confirm-message-received": message_pb2.ConfirmMessageReceivedRequest,
}


class Nodes:
    """The numbers in use, by name; kept in a file for the process that computes rounds.

    A name has a number for each time that its client came anew; the oldest of very many are forgotten.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._owners: dict[int, str] = {}
        self._write()

    def admits(self, name: str, path: bytes, body: bytes) -> bool:
        """Whether a request of a client with the certificate of `name` may pass."""
        call = path.removeprefix(FLEET)
        if call in _WITHOUT_NODE:
            return True
        node = _node_of(call, body)
        if node is None:
            return False
        if node not in self._owners:
            self._own(node, name)
        return self._owners[node] == name

    def _own(self, node: int, name: str) -> None:
        self._owners[node] = name
        mine = [number for number, owner in self._owners.items() if owner == name]
        for number in mine[:-_MOST_OF_A_NAME]:
            del self._owners[number]
        self._write()

    def _write(self) -> None:
        """All at once: the other process never reads half of it."""
        made = self._path.with_suffix(".new")
        made.write_text(json.dumps(self._owners), encoding="utf-8")
        made.replace(self._path)


def owner_in(path: Path, node: int) -> str | None:
    """The name to which a node belongs, as `Nodes` has written it; None for nobody."""
    owners = json.loads(path.read_text(encoding="utf-8"))
    found = owners.get(str(node))
    return found if isinstance(found, str) else None


def _node_of(call: bytes, body: bytes) -> int | None:
    """The number that a request is made for; None when it cannot be told, or there are several."""
    kind = _WITH_NODE.get(call)
    if kind is None:
        return None
    request = kind()
    try:
        request.ParseFromString(body)
    except DecodeError:
        return None
    node = int(request.node.node_id if hasattr(request, "node") else request.node_id)
    pushed = request.messages_list if call == b"push-messages" else ()
    others = {int(message.metadata.src_node_id) for message in pushed} - {node}
    return None if others or not node else node
