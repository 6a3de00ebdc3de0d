"""The trunk as a function with a gradient: what travels, what a guard sees, and what breaks do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_models import VOCABULARY, save_tiny
from tests.unit.client.split_training import LENGTHS, Split
from tests.unsplit_training import (
    examples_of,
    factors,
    padded,
)
from torch import Tensor

from fedsea.client.training import SplitForTraining
from fedsea.errors import (
    CheckpointError,
    ConnectionLost,
    NotFinite,
    PromptTooLong,
    StaleStep,
    TrainingError,
)
from fedsea.transport.recording import Direction
from fedsea.wire.codecs import Codec, RowFormat
from fedsea.wire.messages import (
    Activations,
    Backward,
    Forward,
    Gradients,
    Opened,
    OpenTraining,
    Step,
    Stepped,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama of five blocks."""
    return save_tiny("llama", tmp_path_factory.mktemp("models") / "llama")


def test_loss_scale_changes_nothing(folder: Path) -> None:
    """Gradients made larger by a power of two, and said to be, give the same trunk."""
    ids, mask, labels = padded(examples_of(LENGTHS))
    found = []
    for scale in (1.0, 256.0):
        with Split(folder) as split:
            split.randomize()
            split.model.loss_scale = scale
            (split.model(ids, mask, labels).loss * scale).backward()
            stepped = split.model.step(1e-2, max_grad_norm=0.1)
            found.append(
                (stepped, [one.detach().clone() for one in split.adapters()[2].parameters()])
            )
    (first, one), (second, other) = found
    assert first == second
    assert all(map(torch.equal, one, other))


def test_only_rows_travel(folder: Path) -> None:
    """Every message's size is that of its rows and a few bytes: no ids, labels, masks or losses."""
    ids, mask, labels = padded(examples_of(LENGTHS))
    rows = sum(LENGTHS)
    with Split(folder) as split:
        split.randomize()
        split.model(ids, mask, labels).loss.backward()
        split.model.step(1e-3)
        events = split.wire.events
        kinds = [type(event) for _, _, event in events]

        assert kinds == [
            OpenTraining, Opened, Forward, Activations, Backward, Gradients, Step, Stepped
        ]  # fmt: skip
        assert [event.counts for event in split.wire.of(Forward)] == [LENGTHS]
        for kind in (Forward, Activations, Backward, Gradients):
            (event,) = split.wire.of(kind)
            assert len(event.rows) == rows * 48 * 4
        assert split.model.traffic.rows_up == split.model.traffic.rows_down == 2 * rows


@pytest.mark.parametrize(("codec", "itemsize"), [("fp32", 4), ("bf16", 2)])
def test_bytes_of_a_step(folder: Path, codec: str, itemsize: int) -> None:
    """A step takes 4 x rows x hidden x itemsize bytes and less than a KiB."""
    ids, mask, labels = padded(examples_of(LENGTHS))
    with Split(folder, codec=codec, gradient_codec=codec) as split:
        before = replace(split.model.traffic)
        split.model(ids, mask, labels).loss.backward()
        split.model.step(1e-3)
        used = split.model.traffic.since(before)

    payload = 4 * sum(LENGTHS) * 48 * itemsize
    assert payload <= used.bytes_up + used.bytes_down < payload + 1024


def test_large_batches_travel_in_parts(folder: Path) -> None:
    """What is too large for a message goes in several, by whole examples, to the same result."""
    ids, mask, labels = padded(examples_of(LENGTHS))
    with Split(folder) as whole, Split(folder, max_rows=11) as parts:
        for split in (whole, parts):
            split.randomize()
            split.model(ids, mask, labels).loss.backward()
        for (_, expected), (_, found) in zip(
            factors(whole.adapters()), factors(parts.adapters()), strict=True
        ):
            torch.testing.assert_close(found.grad, expected.grad, rtol=1e-5, atol=1e-6)
        assert [event.counts for event in parts.wire.of(Forward)] == [(7, 3), (11,)]
    guard = Doubler(48)
    with Split(folder, max_rows=10, guard=guard) as small:
        assert small.model.longest == 10
        with pytest.raises(PromptTooLong, match="a sequence of 11 rows"):
            small.model(ids, mask, labels)
        assert not small.wire.of(Forward)
        # Nor was anything charged.
        assert guard.told == [("begin", 1)]


def test_evaluation_leaves_nothing_behind(folder: Path) -> None:
    """Without gradients the server is told to keep nothing, and the step is as without it."""
    ids, mask, labels = padded(examples_of(LENGTHS))
    with Split(folder) as split:
        split.model.eval()
        with torch.no_grad():
            output = split.model(ids, mask, labels)

        assert output.logits is not None
        assert output.logits.shape == (*ids.shape, VOCABULARY)
        assert [event.no_grad for event in split.wire.of(Forward)] == [True]
        assert split.model.step(1e-3).grad_norm == 0


def test_a_lost_connection_is_opened_again_and_the_step_redone(folder: Path) -> None:
    """Whoever waits gets ConnectionLost; after `reopen` the redone step is that of no break."""
    ids, mask, labels = padded(examples_of(LENGTHS))

    def one_step(model: SplitForTraining) -> float:
        model.zero_grad()
        loss = model(ids, mask, labels).loss
        loss.backward()
        model.step(1e-2)
        return float(loss.item())

    with Split(folder) as calm:
        expected = [one_step(calm.model) for _ in range(3)]
    with Split(folder) as split:
        found = [one_step(split.model)]
        split.wire.cut_at = (Direction.DOWN, split.wire.counts[Direction.DOWN] + 2)
        with pytest.raises(ConnectionLost):
            one_step(split.model)
        with pytest.raises(ConnectionLost):
            split.model.step(1e-2)
        assert split.model.reopen((1,)) == 1
        found += [one_step(split.model) for _ in range(2)]

    assert found == expected


def test_a_step_whose_answer_was_lost_is_not_taken_twice(folder: Path) -> None:
    """After `reopen` with both numbers, `steps` says that the server had taken it."""
    ids, mask, labels = padded(examples_of(LENGTHS))
    with Split(folder) as split:
        split.model(ids, mask, labels).loss.backward()
        split.wire.cut_at = (Direction.DOWN, split.wire.counts[Direction.DOWN] + 1)
        with pytest.raises(ConnectionLost):
            split.model.step(1e-2)

        assert split.model.reopen((1, 0)) == 1
        assert split.model.steps == 1
        assert split.model.step(1e-2).number == 2


def test_a_gradient_after_a_break_is_refused(folder: Path) -> None:
    """A graph from before the break cannot be used: the forward is not at the server any more."""
    ids, mask, labels = padded(examples_of(LENGTHS))
    with Split(folder) as split:
        loss = split.model(ids, mask, labels).loss
        split.model.reopen((0,))
        with pytest.raises(ConnectionLost, match="do the step anew"):
            loss.backward()
        loss = split.model(ids, mask, labels).loss
        split.model.step(1e-3)
        with pytest.raises(TrainingError, match="is over"):
            loss.backward()


def test_going_on_from_saved_steps(folder: Path) -> None:
    """The highest step in common is chosen, and none in common is an error of its own."""
    ids, mask, labels = padded(examples_of(LENGTHS))
    with Split(folder) as split:
        for number in (1, 2, 3):
            split.model(ids, mask, labels).loss.backward()
            split.model.step(1e-2)
            if number < 3:
                split.model.save()
        assert split.model.reopen((1, 2, 7)) == 2
        with pytest.raises(StaleStep):
            split.model.reopen((9,))
        split.server.problem = "no room"
        split.model.reopen((2,))
        with pytest.raises(CheckpointError, match="step 2: no room"):
            split.model.save()
        assert split.model(ids, mask, labels).loss is not None


@pytest.mark.parametrize("where", ["rows", "gradient"])
def test_numbers_that_are_not_finite_stop_with_their_step(folder: Path, where: str) -> None:
    """NaN in rows or gradients is named by forward and step, and nothing of it is sent."""
    ids, mask, labels = padded(examples_of(LENGTHS))
    with Split(folder) as split:
        split.randomize()
        sent = split.wire.counts[Direction.UP]
        if where == "rows":
            assert split.model.bottom is not None
            with torch.no_grad():
                next(split.model.bottom.parameters()).fill_(torch.nan)
            with pytest.raises(NotFinite, match="rows of forward 1 of step 1"):
                split.model(ids, mask, labels)
            assert split.wire.counts[Direction.UP] == sent
        else:
            loss = split.model(ids, mask, labels).loss * torch.inf
            with pytest.raises(NotFinite, match="gradient of forward 1 of step 1"):
                loss.backward()
            assert split.wire.counts[Direction.UP] == sent + 1


def test_gradients_that_are_not_finite_at_the_server_are_reported(folder: Path) -> None:
    """The step is not taken, its number stays, and training goes on."""
    ids, mask, labels = padded(examples_of(LENGTHS))
    with Split(folder) as split:
        split.model(ids, mask, labels).loss.backward()
        assert split.server.adapter is not None
        next(split.server.adapter.parameters()).grad = None
        for one in split.server.adapter.parameters():
            one.grad = torch.full_like(one, torch.nan)

        stepped = split.model.step(1e-3)

        assert not stepped.applied
        assert split.model.steps == 0
        split.model(ids, mask, labels).loss.backward()
        assert split.model.step(1e-3).number == 1


class Doubler:
    """A guard that sends twice the rows and half the gradients, and notes what it was told."""

    def __init__(self, hidden_size: int) -> None:
        self.rows_format = self.gradients_format = RowFormat(Codec.FP32, hidden_size)
        self.told: list[tuple[object, ...]] = []
        self.description: dict[str, Any] = {"rows": "doubled"}

    def begin(self, step: int) -> None:
        """Note the step."""
        self.told.append(("begin", step))

    def forward(
        self,
        index: int,
        sequences: Sequence[Sequence[int]],
        rows: Tensor,
        *,
        no_grad: bool = False,
    ) -> bytes:
        """Twice the rows."""
        self.told.append(("forward", index, [list(one) for one in sequences], no_grad))
        return self.rows_format.encode(rows * 2)

    def gradient(self, index: int, rows: Tensor, scale: float = 1.0) -> bytes:
        """Half the gradient."""
        self.told.append(("gradient", index, scale))
        return self.gradients_format.encode(rows / 2)

    def close(self) -> None:
        """Note the end."""
        self.told.append(("close",))


def test_rows_and_gradients_leave_through_the_guard(folder: Path) -> None:
    """What the guard gives is what travels; it knows step, forward and ids, and is closed."""
    examples = examples_of(LENGTHS)
    ids, mask, labels = padded(examples)
    guard = Doubler(48)
    with Split(folder) as plain:
        plain.model(ids, mask, labels).loss.backward()
    with Split(folder, guard=guard) as split:
        split.model.loss_scale = 4.0
        split.model(ids, mask, labels).loss.backward()
        split.model.step(1e-3)
        with torch.no_grad():
            split.model(ids, mask, labels)
        sent = split.wire.of(Forward)[0].rows

    clean = RowFormat(Codec.FP32, 48).decode(plain.wire.of(Forward)[0].rows, sum(LENGTHS))
    torch.testing.assert_close(RowFormat(Codec.FP32, 48).decode(sent, sum(LENGTHS)), 2 * clean)
    sequences = [one.tolist() for one in examples]
    assert guard.told == [
        ("begin", 1),
        ("forward", 0, sequences, False),
        ("gradient", 0, 4.0),
        ("begin", 2),
        ("forward", 0, sequences, True),
        ("close",),
    ]
