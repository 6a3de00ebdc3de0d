"""Settings of a training: what is refused, and the learning rate of each step."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from fedsea.client.training_config import Schedule, TrainerConfig
from fedsea.errors import ConfigError

ORACLES = {
    Schedule.LINEAR: get_linear_schedule_with_warmup,
    Schedule.COSINE: get_cosine_schedule_with_warmup,
    Schedule.CONSTANT: lambda optimizer, warmup, _: get_constant_schedule_with_warmup(
        optimizer, warmup
    ),
}


@pytest.mark.parametrize("schedule", list(Schedule))
@pytest.mark.parametrize("warmup", [0, 1, 7])
def test_rates_are_those_of_transformers(schedule, warmup):
    """Every step has the learning rate that transformers' schedule gives it."""
    steps = 20
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    oracle = ORACLES[schedule](optimizer, warmup, steps)
    expected = []
    for _ in range(steps):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        oracle.step()
    config = TrainerConfig(learning_rate=0.3, schedule=schedule, warmup_steps=warmup)
    rates = [config.rate(step, steps) for step in range(1, steps + 1)]
    assert rates == pytest.approx(expected, rel=1e-12, abs=1e-12)


@given(st.sampled_from(list(Schedule)), st.integers(1, 300), st.data())
def test_rates_rise_and_then_fall(schedule, steps, data):
    """Rates are never negative or above the largest; they rise in the warm-up and never after."""
    warmup = data.draw(st.integers(0, steps - 1))
    config = TrainerConfig(learning_rate=0.5, schedule=schedule, warmup_steps=warmup)
    rates = [config.rate(step, steps) for step in range(1, steps + 1)]
    assert all(0 <= rate <= 0.5 for rate in rates)
    assert rates[: warmup + 1] == sorted(rates[: warmup + 1])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)


def test_reads_toml(tmp_path):
    """A file sets what it names; whole numbers are numbers too."""
    path = tmp_path / "run.toml"
    path.write_text('[training]\nsteps = 30\nlearning_rate = 1\nschedule = "linear"\n')
    config = TrainerConfig.load(path)
    assert config == TrainerConfig(steps=30, learning_rate=1.0, schedule=Schedule.LINEAR)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[training]\nlearningrate = 1e-3\n", "did you mean learning_rate"),
        ("[trainig]\n", "did you mean training"),
        ("training = 3\n", "write a section"),
        ("[training]\nsteps = true\n", "steps is of type bool"),
        ("[training]\nsteps = 1.5\n", "steps is of type float"),
        ('[training]\nschedule = "step"\n', "choose one of linear, cosine, constant"),
        ("[training]\nschedule = 1\n", "choose one of"),
        ("[training\n", "not valid TOML"),
    ],
)
def test_refuses_bad_files(tmp_path, text, expected):
    """Unknown keys and sections name the nearest known one; wrong values say what fits."""
    path = tmp_path / "run.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=expected):
        TrainerConfig.load(path)


@pytest.mark.parametrize(
    "options",
    [
        {"epochs": 0},
        {"steps": 0},
        {"batch_size": -1},
        {"batch_size": 0},
        {"batch_rows": 0},
        {"accumulate": 0},
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"learning_rate": float("inf")},
        {"schedule": "stairs"},
        {"loss_scaling": "yes"},
        {"warmup_steps": -1},
        {"warmup_steps": 5, "steps": 5},
        {"max_grad_norm": -1.0},
        {"beta1": 1.0},
        {"eps": 0.0},
        {"weight_decay": -0.1},
        {"patience": 0},
        {"patience": 2, "save_every": 10},
        {"evaluate_every": 0},
        {"min_improvement": -1.0},
        {"save_every": 0},
        {"keep": 0},
        {"seed": -1},
    ],
)
def test_refuses_bad_values(options):
    """Values out of range and settings that exclude each other are refused."""
    with pytest.raises(ConfigError):
        TrainerConfig(**options)


def test_warmup_over_the_end():
    """How many steps epochs have is known late: a warm-up that never ends is refused then."""
    config = TrainerConfig(warmup_steps=10)
    with pytest.raises(ConfigError, match="there are 10 steps"):
        config.rate(1, 10)


def test_words_are_enough():
    """Choices may be given as words."""
    assert TrainerConfig(schedule="linear").schedule is Schedule.LINEAR
