from __future__ import annotations

import json

import numpy as np
import pytest
from flwr.common import (
    EvaluateIns,
    FitIns,
    GetParametersIns,
    GetPropertiesIns,
    ndarrays_to_parameters,
    parameters_to_ndarrays,
)

from fedsea.errors import ConfigError, TrainingError
from fedsea.federated.channel import Listener
from fedsea.federated.client_app import SOCKET, TERMS, Shim, from_environment, numbered
from fedsea.federated.memory import MemoryGrid, new_context
from fedsea.federated.rounds import Federation

ARRAYS = {"b": np.ones(2, np.float32), "a": np.zeros((1, 3), np.float32)}


class Asked:
    """Keeps what the shim asks for, and answers all of it."""

    def __init__(self):
        self.headers = []
        self.arrays = {}

    def __call__(self, header, arrays):
        self.headers.append(header)
        self.arrays = arrays
        answer = {"weight": 5, "scaled": 0.5, "loss": 1.5, "examples": 2, "client": "acme"}
        return answer, ARRAYS


@pytest.fixture
def asked():
    """The client process, as the shim sees it."""
    return Asked()


def test_a_round_is_passed_on(asked):
    """Arrays go in without names and an update comes back in the order of its names."""
    values = [np.ones((1, 3), np.float32), np.zeros(2, np.float32)]
    instructions = FitIns(ndarrays_to_parameters(values), {"round": 3, "layout": "x"})

    made = Shim(asked).fit(instructions)

    assert asked.headers == [{"request": "fit", "round": 3, "layout": "x"}]
    assert [array.shape for array in asked.arrays.values()] == [(1, 3), (2,)]
    assert (made.num_examples, made.metrics) == (5, {"scaled": 0.5})
    assert [array.shape for array in parameters_to_ndarrays(made.parameters)] == [(1, 3), (2,)]


@pytest.mark.parametrize(("finish", "request_"), [(True, "finish"), (False, "evaluate")])
def test_the_end_and_the_loss_are_passed_on(asked, finish, request_):
    """Both come as Flower's evaluation."""
    instructions = EvaluateIns(ndarrays_to_parameters([]), {"round": 3, "finish": finish})

    made = Shim(asked).evaluate(instructions)

    assert asked.headers[0]["request"] == request_
    assert (made.loss, made.num_examples) == (1.5, 2)


def test_what_a_client_is_comes_as_one_text(asked):
    """Description and first arrays."""
    described = Shim(asked).get_properties(GetPropertiesIns({})).properties["description"]
    arrays = Shim(asked).get_parameters(GetParametersIns({})).parameters

    assert json.loads(str(described))["client"] == "acme"
    assert len(parameters_to_ndarrays(arrays)) == 2
    assert list(numbered(arrays)) == ["000000", "000001"]


def test_the_environment_says_whom_to_ask(monkeypatch):
    """Without the client process there is nothing to shim."""
    monkeypatch.delenv(SOCKET, raising=False)
    with pytest.raises(ConfigError, match="fedsea federate client"):
        from_environment()
    monkeypatch.setenv(SOCKET, "/nonexistent")
    monkeypatch.setenv(TERMS, '{"least": 2}')
    with pytest.raises(ConfigError, match="fewer than 3"):
        from_environment()


def test_messages_of_errors_stay_at_home(simulate, monkeypatch, caplog):
    """The aggregator learns that a client failed; the client's own log says why."""
    federation = simulate({"acme": (1.0, 1), "globex": (1.0, 1)}, federation={"attempts": 1})
    secret = "this client has 12345 examples"

    def answer(header, arrays):
        if header["request"] == "fit":
            raise ConfigError(secret)
        return federation.asks[11](header, arrays)

    with Listener(answer) as listener:
        monkeypatch.setenv(SOCKET, listener.path)
        monkeypatch.setenv(TERMS, "")
        apps = {11: from_environment(), 12: federation.apps[12]}
        grid = MemoryGrid(apps)
        replies = []
        ask = grid.send_and_receive

        def keep(messages, *, timeout=None):
            found = list(ask(messages, timeout=timeout))
            replies.extend(found)
            return found

        monkeypatch.setattr(grid, "send_and_receive", keep)
        with pytest.raises(TrainingError, match="too few clients"):
            Federation(grid, new_context(1), federation.config, notice=print).run()

    errors = [reply.error for reply in replies if reply.has_error()]
    assert errors
    assert all("12345" not in str(error) for error in errors)
    assert secret in caplog.text
