"""Whose a node is: the certificate's that used its number first."""

from __future__ import annotations

import pytest
from flwr.proto.fleet_pb2 import (
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
    RegisterNodeFleetRequest,
)
from flwr.proto.message_pb2 import Message, Metadata
from flwr.proto.node_pb2 import Node
from hypothesis import given
from hypothesis import strategies as st

from fedsea.federated.nodes import Nodes, owner_in

PULL = b"/v1/fleet/pull-messages"
PUSH = b"/v1/fleet/push-messages"


@pytest.fixture
def path(tmp_path):
    """The file that the other process reads."""
    return tmp_path / "nodes.json"


def pull(node):
    """A request of a node."""
    return PullMessagesRequest(node=Node(node_id=node)).SerializeToString()


def push(node, *sources):
    """Answers that say from which nodes they are."""
    messages = [Message(metadata=Metadata(src_node_id=source)) for source in sources]
    return PushMessagesRequest(node=Node(node_id=node), messages_list=messages).SerializeToString()


def test_a_number_belongs_to_who_uses_it_first(path):
    """Each client keeps its own, several of them too."""
    nodes = Nodes(path)

    assert nodes.admits("acme", PULL, pull(1))
    assert nodes.admits("globex", PULL, pull(2))
    assert nodes.admits("acme", PULL, pull(3))
    assert not nodes.admits("globex", PULL, pull(1))
    assert not nodes.admits("acme", PULL, pull(2))
    assert [owner_in(path, node) for node in (1, 2, 3, 4)] == ["acme", "globex", "acme", None]


def test_answers_are_of_the_node_that_sends_them(path):
    """A message inside a request may not name another sender."""
    nodes = Nodes(path)

    assert nodes.admits("acme", PUSH, push(1, 1, 1))
    assert not nodes.admits("globex", PUSH, push(2, 2, 1))
    assert not nodes.admits("globex", PUSH, push(2, 0))


@pytest.mark.parametrize(
    ("path_of", "body"),
    [
        (PULL, b""),
        (PULL, b"\xff"),
        (PULL, pull(0)),
        (b"/v1/fleet/something-new", pull(1)),
        (b"/v1/fleet/deactivate-node", b""),
    ],
)
def test_what_names_no_node_is_refused(path, path_of, body):
    """Nothing is passed on that cannot be judged."""
    assert not Nodes(path).admits("acme", path_of, body)


def test_a_node_is_let_go_by_its_own_client_only(path):
    """Nobody else ends its part in the federation."""
    nodes = Nodes(path)
    nodes.admits("acme", PULL, pull(1))
    end = DeactivateNodeRequest(node_id=1).SerializeToString()

    assert not nodes.admits("globex", b"/v1/fleet/deactivate-node", end)
    assert nodes.admits("acme", b"/v1/fleet/deactivate-node", end)


def test_a_client_may_register(path):
    """Before it has a number."""
    request = RegisterNodeFleetRequest(public_key=b"key").SerializeToString()

    assert Nodes(path).admits("acme", b"/v1/fleet/register-node", request)


def test_the_oldest_numbers_of_a_name_are_forgotten(path):
    """One client that comes again and again fills nothing, and pushes nobody out."""
    nodes = Nodes(path)
    nodes.admits("globex", PULL, pull(9999))
    for node in range(1, 301):
        assert nodes.admits("acme", PULL, pull(node))

    assert owner_in(path, 44) is None
    assert owner_in(path, 45) == "acme"
    assert owner_in(path, 9999) == "globex"


@given(body=st.binary(max_size=60), call=st.sampled_from([PULL, PUSH]))
def test_any_bytes_are_judged(tmp_path_factory, body, call):
    """No bytes break the judgement, nor take over the number of another."""
    nodes = Nodes(tmp_path_factory.mktemp("nodes") / "nodes.json")
    nodes.admits("acme", PULL, pull(1))

    nodes.admits("globex", call, body)

    assert not nodes.admits("globex", PULL, pull(1))
