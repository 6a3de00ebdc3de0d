"""Training denoisers: they take noise back, for exactly what they were trained for."""

from __future__ import annotations

import pytest
import torch

from fedsea.errors import ConfigError, FingerprintMismatch
from fedsea.evaluation.denoiser_training import Recipe, train_denoiser
from fedsea.evaluation.frozen import FrozenModel
from fedsea.evaluation.public_text import PublicText
from fedsea.evaluation.releasing import Cut
from fedsea.evaluation.training import Schedule
from fedsea.model.checkpoint import Checkpoint
from fedsea.model.partition import Partition
from fedsea.model.projection import Projection
from fedsea.privacy.gaussian import Gaussian
from fedsea.privacy.metric import MetricDP

HIDDEN, WIDTH = 48, 10
NOISE = Gaussian(2.0, 4.0)


def recipe(steps, **values):
    """A small denoiser, and so many steps."""
    return Recipe(16, 1, 2, 8, Schedule(steps, 3e-3, save_seconds=0.0), **values)


@pytest.fixture(scope="module")
def model(tiny_model):
    """The tiny model with a block at each end of the trunk."""
    return FrozenModel(Checkpoint.open(tiny_model), Partition(1, 1))


@pytest.fixture(scope="module")
def text():
    """Random tokens with a start."""
    ids = torch.randint(3, 20, (1200,), generator=torch.Generator().manual_seed(0))
    return PublicText.of(ids, [1], 13)


def projection(model):
    """A projection of this model to fewer numbers."""
    encoder = torch.linalg.qr(torch.randn(HIDDEN, WIDTH)).Q.T
    return Projection.of(encoder, encoder.T, 1, model.fingerprint)


@pytest.mark.parametrize("noise", [NOISE, MetricDP(4.0)], ids=lambda noise: noise.name)
def test_a_denoiser_takes_noise_back(model, text, noise):
    """Held-out error falls with the linear start, and again with training."""
    found = train_denoiser(model, text, recipe(60), Cut(text.prefix, noise))
    assert found.start.error < 0.9 * found.without.error
    assert found.end.error < found.start.error
    assert found.end.agreement > found.without.agreement


def test_a_denoiser_is_for_what_it_was_trained_for(model, text):
    """Checkpoint, cut, mechanism and projection are in its purpose; sizes fit the rows."""
    pair = projection(model)
    found = train_denoiser(model, text, recipe(0), Cut(text.prefix, NOISE, pair)).denoiser
    assert found.purpose.model == model.fingerprint
    assert (found.purpose.bottom, found.purpose.top) == (1, 1)
    assert found.purpose.mechanism == NOISE.spec()
    assert found.purpose.projection == pair.fingerprint()
    assert (found.shape.hidden, found.shape.noise) == (HIDDEN, WIDTH)


def test_an_interrupted_training_gives_the_same_denoiser(model, text, tmp_path):
    """Killed and started again, bit for bit."""
    cut, file = Cut(text.prefix, NOISE), tmp_path / "state"
    expected = train_denoiser(model, text, recipe(5), cut).denoiser

    class Killed(Exception):
        pass

    def die(progress):
        if progress.done == 3:
            raise Killed

    with pytest.raises(Killed):
        train_denoiser(model, text, recipe(5), cut, file, die)
    found = train_denoiser(model, text, recipe(5), cut, file).denoiser
    for name, weight in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], weight), name


def test_the_global_generator_is_left_alone(model, text):
    """The caller's random numbers do not depend on a training."""
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train_denoiser(model, text, recipe(0), Cut(text.prefix, NOISE))
    assert torch.equal(torch.rand(3), expected)


def test_without_a_mechanism_there_is_nothing_to_train(model, text):
    """The error says so."""
    with pytest.raises(ConfigError, match="no noise"):
        train_denoiser(model, text, recipe(0), Cut(text.prefix))


def test_a_projection_of_another_model_is_refused(model, text):
    """Before anything is computed."""
    encoder = torch.eye(HIDDEN)[:WIDTH]
    other = Projection.of(encoder, encoder.T, 1, "ab" * 32)
    with pytest.raises(FingerprintMismatch):
        train_denoiser(model, text, recipe(0), Cut(text.prefix, NOISE, other))
    deeper = Projection.of(encoder, encoder.T, 2, model.fingerprint)
    with pytest.raises(ConfigError, match="bottom"):
        train_denoiser(model, text, recipe(0), Cut(text.prefix, NOISE, deeper))


@pytest.mark.parametrize("values", [{"heads": 3}, {"layers": 0}, {"window": 0}])
def test_impossible_sizes_are_refused(model, text, values):
    """They are checked before anything is computed."""
    made = Recipe(**{"inner": 16, "heads": 2, **values})
    with pytest.raises(ConfigError):
        train_denoiser(model, text, made, Cut(text.prefix, NOISE))


def test_an_empty_batch_is_refused():
    """A step needs a window."""
    with pytest.raises(ConfigError, match="batch"):
        Recipe(batch=0)
