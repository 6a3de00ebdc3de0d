"""Training that can be interrupted: the same numbers, whatever happens in between."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from fedsea import artifacts
from fedsea.errors import CheckpointError, ConfigError
from fedsea.evaluation.training import Schedule, Training, state_file

SCHEDULE = Schedule(steps=12, learning_rate=0.05, save_seconds=0.0)


class _Killed(Exception):
    """Stands for whatever ends the process."""


def module():
    """A small module with a buffer, the same every time."""
    made = nn.Linear(4, 3)
    made.register_buffer("scale", torch.tensor(2.0))
    with torch.no_grad():
        made.weight.copy_(torch.arange(12.0).view(3, 4) / 10)
        made.bias.zero_()
    return made


def loss_of(trained, step):
    """A loss that depends on the step."""
    rows = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
    return (trained(rows) * trained.scale - rows[:, :3]).square().mean()


def run(file=None, stop_at=None, schedule=SCHEDULE, identity=None):
    """Train, or go on training, until a step at which the process 'dies'."""
    trained = module()
    training = Training(trained, schedule, file, identity or {"text": "a"})
    training.resume()
    steps = []

    def on_progress(progress):
        steps.append(progress)
        if progress.done == stop_at:
            raise _Killed

    try:
        training.run(lambda step: loss_of(trained, step), on_progress)
    except _Killed:
        return trained, steps
    training.forget()
    return trained, steps


def test_training_lowers_the_loss():
    """The steps go downhill."""
    start = loss_of(module(), 99).item()
    assert loss_of(run(schedule=Schedule(60, 0.05))[0], 99).item() < start / 2


@pytest.mark.parametrize("stops", [[1], [5], [11], [3, 4, 9]])
def test_an_interrupted_training_ends_with_the_same_numbers(tmp_path, stops):
    """Killed once or often, it ends bit for bit like one that was not."""
    expected, _ = run()
    file = tmp_path / "state"
    for stop in stops:
        run(file, stop)
    found, steps = run(file)
    assert steps[0].done == stops[-1] + 1
    assert torch.equal(found.weight, expected.weight)
    assert torch.equal(found.bias, expected.bias)


def test_a_kill_between_two_saves_repeats_the_steps_since(tmp_path):
    """What was not saved is computed again, with the same result."""
    expected, _ = run()
    file = tmp_path / "state"
    run(file, 4)
    run(file, 7, Schedule(12, 0.05, save_seconds=1e9))
    found, steps = run(file)
    assert steps[0].done == 5
    assert torch.equal(found.weight, expected.weight)


def test_progress_tells_steps_loss_and_time():
    """Every step is reported, with a smoothed loss and seconds that run out."""
    _, steps = run()
    assert [progress.done for progress in steps] == list(range(1, 13))
    assert all(progress.steps == 12 and progress.loss > 0 for progress in steps)
    assert steps[-1].seconds_left == 0


def test_the_state_is_gone_in_the_end(tmp_path):
    """Nothing is left once the result is there."""
    file = tmp_path / "state"
    run(file, 3)
    assert file.exists()
    run(file)
    assert not file.exists()


@pytest.mark.parametrize(
    ("schedule", "identity"),
    [(Schedule(13, 0.05), None), (Schedule(12, 0.06), None), (SCHEDULE, {"text": "b"})],
)
def test_the_state_of_another_training_is_refused(tmp_path, schedule, identity):
    """Other steps, another rate or another text: it would be no training of either."""
    file = tmp_path / "state"
    run(file, 3)
    with pytest.raises(ConfigError, match="another training"):
        run(file, None, schedule, identity)
    assert file.exists()


def test_a_corrupt_state_is_refused(tmp_path):
    """Cut off, with NaN, or without a moment."""
    file = tmp_path / "state"
    run(file, 3)
    whole = file.read_bytes()
    file.write_bytes(whole[:-5])
    with pytest.raises(CheckpointError):
        run(file)
    file.write_bytes(whole)
    state = artifacts.read(file, "training")
    for tensors in (
        {**state.tensors, "weight": torch.full((3, 4), torch.nan)},
        {name: tensor for name, tensor in state.tensors.items() if "exp_avg_sq" not in name},
    ):
        artifacts.write(file, "training", state.description, tensors)
        with pytest.raises(CheckpointError):
            run(file)


def test_a_loss_that_is_not_finite_ends_the_training():
    """Before it spoils the parameters."""
    trained = module()
    training = Training(trained, SCHEDULE, None, {})
    with pytest.raises(ConfigError, match="after 0 steps"):
        training.run(lambda _: trained(torch.full((1, 4), torch.nan)).sum())
    assert torch.equal(trained.weight, module().weight)


def test_no_steps_change_nothing():
    """Zero steps give the start."""
    assert torch.equal(run(schedule=Schedule(0))[0].weight, module().weight)


@pytest.mark.parametrize(
    "values", [{"steps": -1}, {"learning_rate": 0.0}, {"learning_rate": float("nan")}]
)
def test_impossible_schedules_are_refused(values):
    """Steps and rate are checked."""
    with pytest.raises(ConfigError):
        Schedule(**values)


def test_the_rate_rises_and_falls():
    """Warm-up to the largest, then down."""
    schedule = Schedule(100, 1.0)
    rates = [schedule.rate(step) for step in range(100)]
    top = rates.index(max(rates))
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert max(rates) == 1.0
    assert 0.05 <= rates[-1] < 0.06


def test_the_state_lies_beside_the_result(tmp_path):
    """Its name says whose it is, and it holds no text."""
    assert state_file(tmp_path / "a.safetensors").name == "a.safetensors.partial"
    run(tmp_path / "state", 3)
    description = artifacts.read(tmp_path / "state", "training").description
    assert set(json.loads(json.dumps(description))) == {"identity", "done", "loss"}
