"""Screening finds what trying everything finds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.tiny_models import save_tiny
from tests.unit.redteam.conftest import chain_of

from fedsea.model.checkpoint import Checkpoint
from fedsea.model.partition import Partition
from fedsea.privacy.clipping import Clipping
from fedsea.privacy.gaussian import FedSEAGaussian, Gaussian
from fedsea.privacy.metric import MetricDP
from fedsea.privacy.noise import NoiseSource
from fedsea.redteam.knowledge import Knowledge
from fedsea.redteam.prefix import PrefixSearch
from fedsea.redteam.screening import SCREENED_FROM, Isotropic

SIZE = SCREENED_FROM


@pytest.fixture(scope="module")
def knowledge(tmp_path_factory):
    """An attacker of a tiny model with a vocabulary that is large enough to be screened."""
    folder = save_tiny("llama", tmp_path_factory.mktemp("large"), vocab_size=SIZE)
    return Knowledge.of_weights(Checkpoint.open(folder), Partition(1, 0))


@pytest.fixture(scope="module")
def text():
    """Token ids of a text."""
    return torch.randint(3, SIZE, (14,), generator=torch.Generator().manual_seed(2))


def compare(knowledge, mechanism, text):
    """Screened and exhaustive guesses of one release, which must be equal; the first of them."""
    rows = knowledge.query(text)
    sent = rows if mechanism is None else mechanism.protect(rows, NoiseSource(seed=b"screen"))
    screened = PrefixSearch().read(chain_of(sent), knowledge, mechanism)
    whole = PrefixSearch(screened=False).read(chain_of(sent), knowledge, mechanism)
    assert screened.ids == whole.ids
    return screened


def test_a_clean_channel_needs_only_shortlists(knowledge, text):
    """After one sweep at each depth every position is certified, and nothing is lost."""
    found = compare(knowledge, None, text)

    assert found.ids == tuple(text.tolist())
    assert found.numbers["positions_by_shortlist"] >= len(text) - 4


@pytest.mark.parametrize("share", [0.02, 0.1, 0.5, 1.0, 3.0])
def test_noise_changes_the_way_and_not_the_result(knowledge, text, share):
    """From weak to overwhelming noise the guess is that of the exhaustive search."""
    scale = share * float(knowledge.query(text).std())
    found = compare(knowledge, FedSEAGaussian(scale), text)

    assert sum(found.numbers.values()) == len(text)


def test_clipped_and_other_mechanisms(knowledge, text):
    """Clipping around a centre, and a law without a certificate, give equal results too."""
    rows = knowledge.query(text)
    radius = float(rows.norm(dim=1).median())
    center = rows.mean(dim=0)
    compare(knowledge, Gaussian(clip_norm=radius, mu=200.0, center=center), text)
    found = compare(knowledge, MetricDP(eta=300.0, clip_norm=radius, width=rows.shape[1]), text)

    assert found.numbers["positions_by_shortlist"] == 0


def test_what_was_learnt_serves_the_next_text(knowledge, text):
    """A second text needs no sweep at depths that are known."""
    attack = PrefixSearch()
    attack.read(chain_of(knowledge.query(text)), knowledge, None)
    again = attack.read(chain_of(knowledge.query(text.flip(0))), knowledge, None)

    assert again.ids == tuple(text.flip(0).tolist())
    assert again.numbers["positions_by_coarse_sweep"] <= 1


def test_entries_that_are_equal_do_not_hide_each_other(tmp_path, text):
    """Of vocabulary entries with one embedding the first is named, as in the whole search."""
    folder = save_tiny("llama", tmp_path, vocab_size=SIZE)
    knowledge = Knowledge.of_weights(Checkpoint.open(folder), Partition(1, 0))
    blocks: Any = knowledge.weights().span.blocks
    weight = blocks.embed_tokens.weight
    weight.data = weight.data.clone()
    weight.data[text[5]] = weight.data[text[5] - 1]

    rows = knowledge.query(text)
    found = PrefixSearch(screened=False).read(chain_of(rows), knowledge, None).ids
    assert found[5] in {int(text[5]), int(text[5]) - 1}


def test_laws_that_have_a_certificate():
    """Gaussian noise on single rows has one, everything else has none."""
    clean, noisy = Isotropic.of(None), Isotropic.of(FedSEAGaussian(0.02))

    assert clean is not None
    assert clean.sigma == 0.0
    assert noisy is not None
    assert noisy.sigma == FedSEAGaussian(0.02).sigma
    assert Isotropic.of(Gaussian(clip_norm=1.0, mu=1.0, by=Clipping.FROBENIUS)) is None
    assert Isotropic.of(MetricDP(eta=1.0, clip_norm=1.0, width=4)) is None
