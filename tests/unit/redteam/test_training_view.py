"""What a recording of a training shows."""

from __future__ import annotations

import pytest
import torch
from tests.unit.redteam.conftest import recorded
from torch import Tensor

from fedsea.errors import ConfigError
from fedsea.redteam.training_view import TrainingView
from fedsea.redteam.view import ServerView
from fedsea.transport.recording import Message
from fedsea.wire.codecs import Codec, RowFormat
from fedsea.wire.messages import (
    Activations,
    Backward,
    Close,
    Discard,
    Event,
    Forward,
    Gradients,
    Opened,
    OpenTraining,
    Reset,
    Step,
    Stepped,
)

HIDDEN = 4
FP32 = RowFormat(Codec.FP32, HIDDEN)
OPEN = OpenTraining("f" * 64, 1, 3, Codec.FP32, Codec.FP32, Codec.FP32, adapter="run")


def rows(first: float, count: int) -> Tensor:
    """Rows that can be told apart."""
    return torch.arange(count * HIDDEN, dtype=torch.float32).reshape(count, HIDDEN) + first


def data(first: float, count: int) -> bytes:
    """The same as they travel."""
    return FP32.encode(rows(first, count))


def exchange(number: int, first: float, counts: tuple[int, ...] = (2, 3)) -> list[Event]:
    """A forward with all that follows it."""
    count = sum(counts)
    return [
        Forward(number, counts, data(first, count)),
        Activations(number, data(first + 100, count)),
        Backward(number, data(first + 200, count)),
        Gradients(number, data(first + 300, count)),
    ]


def view(*events: Event) -> TrainingView:
    """What these events show, behind the opening of a session."""
    return TrainingView(recorded(OPEN, Opened("s"), *events), HIDDEN)


def test_a_step_holds_its_sequences_with_rows_activations_and_gradients():
    """Two forwards of two sequences and one; what follows the step is another one."""
    seen = view(
        *exchange(1, 0),
        *exchange(2, 1000, (1,)),
        Step(1, 1e-3, scale=8.0),
        Stepped(1, 0.5, True),
        *exchange(3, 5000),
    )

    assert [step.number for step in seen.steps] == [1, None]
    assert [len(each) for each in seen.steps[0].exchanges] == [2, 3, 1]
    assert seen.steps[0].scale == 8.0
    second = seen.steps[0].exchanges[1]
    assert torch.equal(second.activations, rows(100, 5)[2:])
    assert torch.equal(second.gradient, rows(200, 5)[2:])
    assert second.released is not None
    assert torch.equal(second.released, rows(0, 5)[2:])


def test_what_is_done_anew_counts_once():
    """A reset, a new session, and a repeated Step; rows sent again are one release."""
    seen = view(
        *exchange(1, 0),
        Reset(),
        *exchange(2, 0),
        OPEN,
        Opened("t"),
        *exchange(1, 0),
        Step(1, 1e-3),
        Stepped(1, 0.5, True),
        Step(1, 1e-3),
        Stepped(1, 0.5, True),
        Close(),
    )

    assert [len(step.exchanges) for step in seen.steps] == [2]
    assert [len(chain) for chain in seen.chains()] == [2, 3]


def test_evaluations_show_their_rows_and_no_gradient():
    """A forward without gradient, and one that was discarded, are chains and no exchanges."""
    seen = view(
        Forward(1, (2,), data(0, 2), no_grad=True),
        Activations(1, data(50, 2)),
        Forward(2, (1,), data(90, 1)),
        Discard(2),
        *exchange(3, 500),
        Step(1, 1e-3),
        Stepped(1, float("inf"), False),
    )

    assert seen.steps == ()
    assert [len(chain) for chain in seen.chains()] == [2, 1, 2, 3]
    assert torch.equal(seen.chains()[0].means(), rows(0, 2))


def test_recordings_that_cannot_be_read_are_refused():
    """Empty, begun in the middle, or of inference; and a view of inference refuses a training."""
    with pytest.raises(ConfigError, match="empty"):
        TrainingView([], HIDDEN)
    middle: list[Message] = recorded(*exchange(1, 0))
    with pytest.raises(ConfigError, match="begin"):
        TrainingView(middle, HIDDEN)
    with pytest.raises(ConfigError, match="does not hold"):
        view(Backward(7, data(0, 1)))
    with pytest.raises(ConfigError, match="--training"):
        ServerView(recorded(OPEN), HIDDEN)
