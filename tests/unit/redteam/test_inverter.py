"""The learned inverter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.tiny_models import VOCABULARY
from tests.unit.redteam.conftest import chain_of

from fedsea.errors import ConfigError
from fedsea.model.partition import Partition
from fedsea.privacy.gaussian import FedSEAGaussian
from fedsea.privacy.noise import NoiseSource
from fedsea.redteam.inverter import Architecture, Inverter, Recipe
from fedsea.redteam.knowledge import Knowledge

SMALL: dict[str, Any] = {"hidden": 48, "steps": 80, "batch": 16, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def public():
    """Public texts."""
    generator = torch.Generator().manual_seed(9)
    drawn = torch.randint(3, VOCABULARY, (64, 11), generator=generator)
    return [[1, *ids] for ids in drawn.tolist()]


@pytest.mark.parametrize("architecture", list(Architecture))
def test_it_learns_to_read_a_clean_channel(
    knowledge_of, hidden_states, secret, public, architecture
):
    """Both networks read most of an unseen text after a short training."""
    recipe = Recipe(architecture, **SMALL)
    knowledge = knowledge_of(1)
    attack = Inverter.train(knowledge, None, public, recipe)
    guess = attack.read(chain_of(hidden_states[1]), knowledge, None)

    assert sum(a == b for a, b in zip(guess.ids, secret.tolist(), strict=True)) >= 10
    assert guess.numbers["training_loss"] == attack.loss


def test_a_black_box_trains_on_rows_that_it_asks_for(knowledge_of, hidden_states, secret, public):
    """No weights are needed, also with noise of several sizes."""
    client = knowledge_of(0)
    box = Knowledge.black_box(client.query, VOCABULARY, Partition(0, 0), public_prefix=(1,))
    scales = [FedSEAGaussian(scale) for scale in (0.05, 0.2)]
    attack = Inverter.train(box, scales[0], public, Recipe(**SMALL), mixture=scales)
    sent = scales[1].protect(hidden_states[0], NoiseSource(seed=b"box"))
    guess = attack.read(chain_of(sent), box, scales[1])

    assert sum(a == b for a, b in zip(guess.ids, secret.tolist(), strict=True)) >= 10


def test_the_same_recipe_gives_the_same_inverter(knowledge_of, public):
    """A report can be made again."""
    recipe = Recipe(hidden=16, steps=3)
    knowledge = knowledge_of(0)
    state = torch.random.get_rng_state()
    losses = {Inverter.train(knowledge, None, public, recipe).loss for _ in range(2)}

    assert len(losses) == 1
    assert torch.equal(torch.random.get_rng_state(), state)


def test_bad_input_is_refused(knowledge_of):
    """No text to learn from, or a network without size."""
    with pytest.raises(ConfigError):
        Inverter.train(knowledge_of(0), None, [])
    for bad in ({"steps": 0}, {"hidden": -1}, {"learning_rate": 0.0}):
        with pytest.raises(ConfigError):
            Recipe(**bad)
