"""Training projections: the start is optimal, steps improve it, noise is in sight."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fedsea.errors import ConfigError
from fedsea.evaluation.frozen import FrozenModel
from fedsea.evaluation.projection_training import (
    Objective,
    Recipe,
    fidelity,
    train_projection,
)
from fedsea.evaluation.public_text import PublicText
from fedsea.evaluation.releasing import Cut
from fedsea.evaluation.training import Schedule
from fedsea.model.checkpoint import Checkpoint
from fedsea.model.partition import Partition
from fedsea.privacy.gaussian import Gaussian
from fedsea.privacy.quantization import StochasticQuantization

HIDDEN = 48
WIDTH = 6
START = Recipe(WIDTH, schedule=Schedule(0))


@pytest.fixture(scope="module")
def model(tiny_model):
    """The tiny model, one block at the client."""
    return FrozenModel(Checkpoint.open(tiny_model), Partition(1, 0))


@pytest.fixture(scope="module")
def text():
    """Tokens that repeat in a pattern, with a start."""
    chance = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 20, (1200,), generator=chance)
    return PublicText.of(ids, [1], 13)


def test_the_start_is_the_best_linear_map(model, text):
    """Without noise its error on the training rows is the sum of the small eigenvalues."""
    training = dataclasses.replace(text, held_out=text.training)
    rows = model.rows(text.training).flatten(0, 1).double()
    values = torch.linalg.eigvalsh(rows.T @ rows)
    best = values[:-WIDTH].sum() / values.sum()
    found = train_projection(model, training, START)
    assert found.start.error == pytest.approx(best.item(), rel=1e-3)
    assert found.start == found.end


def test_the_full_width_loses_nothing(model, text):
    """As many numbers as the model has, and no noise: the model itself."""
    found = train_projection(model, text, dataclasses.replace(START, width=HIDDEN))
    clean = fidelity(model, text, Cut(text.prefix))
    assert found.end.error < 1e-6
    assert found.end.agreement == 1.0
    assert found.end.perplexity == pytest.approx(clean.perplexity, rel=1e-3)


def test_the_start_carries_about_the_same_in_every_coordinate(model, text):
    """Turned at random: no coordinate has much more than its share."""
    pair = train_projection(model, text, START).projection
    power = pair.encode(model.rows(text.training).flatten(0, 1)).square().mean(0)
    assert power.max() < 3.5 * power.mean()


@pytest.mark.parametrize("objective", list(Objective))
def test_steps_lower_what_they_are_for(model, text, objective):
    """mse lowers the error of the rows under noise, nll the perplexity."""
    recipe = Recipe(WIDTH, objective, Schedule(60, 5e-3))
    found = train_projection(model, text, recipe, Gaussian(1.0, 12.0))
    assert found.start.perplexity is not None
    assert found.end.perplexity is not None
    if objective is Objective.MSE:
        assert found.end.error < 0.97 * found.start.error
    else:
        assert found.end.perplexity < 0.9 * found.start.perplexity


def test_a_projection_that_knows_the_noise_bears_it_better(model, text):
    """Against the same projection trained without it, at the same mechanism."""
    blind = train_projection(model, text, START).projection
    magnitude = blind.encode(model.rows(text.training).flatten(0, 1)).abs().max().item()
    noisy = Cut(text.prefix, StochasticQuantization(4, magnitude, 8.0, WIDTH), blind)
    own = StochasticQuantization(4, 0.05, 8.0, WIDTH)
    aware = train_projection(model, text, START, own)
    assert aware.end.error < 0.7 * fidelity(model, text, noisy).error


def test_the_start_lies_inside_the_clip(model, text):
    """The scale follows the mechanism, so that no other is needed."""
    for limit in (0.05, 7.0):
        pair = train_projection(model, text, START, Gaussian(limit, 50.0)).projection
        norms = pair.encode(model.rows(text.training)[:, 1:].flatten(0, 1)).norm(dim=1)
        assert 0.98 <= (norms <= limit * (1 + 1e-4)).float().mean() <= 1.0


def test_an_interrupted_training_gives_the_same_projection(model, text, tmp_path):
    """Killed after some steps and started again: bit for bit, noise and batches included."""
    recipe, noise = Recipe(WIDTH, schedule=Schedule(8, save_seconds=0.0)), Gaussian(1.0, 20.0)
    expected = train_projection(model, text, recipe, noise).projection

    class Killed(Exception):
        pass

    def die(progress):
        if progress.done == 5:
            raise Killed

    file = tmp_path / "state"
    with pytest.raises(Killed):
        train_projection(model, text, recipe, noise, file, die)
    found = train_projection(model, text, recipe, noise, file).projection
    assert found.fingerprint() == expected.fingerprint()
    with pytest.raises(ConfigError, match="another training"):
        train_projection(model, text, recipe, Gaussian(1.0, 21.0), file)


def test_the_result_fits_the_model_and_tells_its_recipe(model, text):
    """It names checkpoint, cut and how it was made, and nothing of the text."""
    found = train_projection(model, text, START, Gaussian(1.0, 20.0)).projection
    found.check_fits(HIDDEN, 1, model.fingerprint)
    assert found.recipe["mechanism"] == Gaussian(1.0, 20.0).spec()
    assert set(found.recipe) == {
        "objective", "steps", "learning_rate", "batch", "seed", "window", "windows", "mechanism"
    }  # fmt: skip


@pytest.mark.parametrize("width", [0, -1, HIDDEN + 1])
def test_widths_that_the_model_does_not_have_are_refused(model, text, width):
    """From one to the width of the rows."""
    with pytest.raises(ConfigError, match="width"):
        train_projection(model, text, Recipe(width))


def test_an_empty_batch_is_refused():
    """A step needs a window."""
    with pytest.raises(ConfigError, match="batch"):
        Recipe(WIDTH, batch=0)
