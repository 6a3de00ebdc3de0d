from __future__ import annotations

import numpy as np
import pytest
from tests.federated_steps import LAYOUT, Steps

from fedsea.errors import CheckpointError, ConfigError, PermissionDenied, RemoteProtocolError
from fedsea.federated.arrays import in_order
from fedsea.federated.local import LocalClient, Policy
from fedsea.federated.requests import Requests

FIT = {"request": "fit", "round": 1, "proximal": 0.0, "unit": False, "weigh": True}


@pytest.fixture
def client(tmp_path):
    """A client that goes half of the way to 1."""
    return LocalClient("acme", Steps(1.0, 7), Policy(), tmp_path)


@pytest.fixture
def requests(client):
    """Answers for that client."""
    return Requests(client)


def numbered(client):
    """Its arrays as they travel, without names."""
    return {f"{at:06d}": array for at, array in enumerate(in_order(client.arrays()))}


def test_a_client_describes_itself_and_not_its_data(client, requests):
    """Name, layout and adapter; neither numbers of examples nor losses."""
    described, arrays = requests({"request": "describe"}, {})

    assert set(described) == {"client", "layout", "shared", "fixed", "adapter", "share_loss"}
    assert described["shared"] == {name: list(shape) for name, shape in sorted(LAYOUT.items())}
    assert arrays == {}


def test_a_round_gives_an_update(client, requests):
    """The difference to the global arrays, and the weight."""
    answer, update = requests({**FIT, "layout": client.layout}, numbered(client))

    assert answer == {"weight": 7, "scaled": 1.0}
    assert set(update) == set(LAYOUT)
    assert all((array == 0.5).all() for array in update.values())


def test_a_repeated_round_is_not_trained_again(client, requests):
    """The same request gives the same release, and costs nothing."""
    arrays = numbered(client)
    requests({**FIT, "layout": client.layout}, arrays)
    _, update = requests({**FIT, "layout": client.layout}, arrays)

    assert client._training.rounds == [1]
    assert all((array == 0.5).all() for array in update.values())


@pytest.mark.parametrize(
    "changes",
    [
        {"request": "run"},
        {"request": None},
        {"round": 0},
        {"round": True},
        {"round": 1.5},
        {"round": "1"},
        {"proximal": -1.0},
        {"proximal": float("inf")},
        {"proximal": None},
        {"unit": 1},
        {"weigh": "yes"},
        {"layout": 3},
    ],
)
def test_other_requests_are_refused(client, requests, changes):
    """Fields of other types or out of range: nothing is trained."""
    with pytest.raises(RemoteProtocolError):
        requests({**FIT, "layout": client.layout, **changes}, numbered(client))
    assert client._training.rounds == []


def test_another_layout_is_refused(client, requests):
    """An aggregator of another adapter gets nothing."""
    with pytest.raises(ConfigError, match="another adapter"):
        requests({**FIT, "layout": "0" * 16}, numbered(client))


def test_arrays_of_other_shapes_are_refused(client, requests):
    """Nothing is loaded that does not fit."""
    arrays = {**numbered(client), "000000": np.zeros((1, 1), np.float32)}
    with pytest.raises(CheckpointError):
        requests({**FIT, "layout": client.layout}, arrays)
    with pytest.raises(CheckpointError):
        requests({**FIT, "layout": client.layout}, {})


def test_the_loss_stays_at_home_unless_it_is_shared(client, requests):
    """The aggregator's wish is not enough."""
    with pytest.raises(PermissionDenied):
        requests({"request": "evaluate", "round": 0, "layout": client.layout}, numbered(client))


def test_the_end_leaves_an_adapter(client, tmp_path):
    """The final arrays are written whole, and the end is told."""
    ends: list[int] = []
    requests = Requests(client, on_finish=ends.append)

    requests({"request": "finish", "round": 3, "layout": client.layout}, numbered(client))

    assert ends == [3]
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
