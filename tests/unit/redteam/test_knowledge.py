"""What attackers hold."""

from __future__ import annotations

import pytest
import torch

from fedsea.errors import ConfigError, PartitionError
from fedsea.model.partition import Partition
from fedsea.model.projection import Projection
from fedsea.redteam.knowledge import Knowledge, Level


def test_weights_give_the_rows_of_any_text(knowledge_of, hidden_states, secret):
    """An attacker with weights computes what the client computes."""
    knowledge = knowledge_of(2)

    torch.testing.assert_close(knowledge.clean_rows(secret), hidden_states[2])
    assert knowledge.level is Level.BASE
    assert knowledge.vocabulary == 96


def test_a_projection_is_public(knowledge_of, hidden_states, secret):
    """The attacker encodes its candidates as the client does, and decodes as the server does."""
    encoder = torch.randn(8, hidden_states[0].shape[1])
    pair = Projection.of(encoder, encoder.T.clone(), 0, "0" * 64)
    knowledge = knowledge_of(0, projection=pair)
    narrow = knowledge.clean_rows(secret)

    torch.testing.assert_close(narrow, hidden_states[0] @ encoder.T)
    torch.testing.assert_close(knowledge.decode(narrow), narrow @ encoder)


def test_what_an_attacker_does_not_have_is_said(knowledge_of):
    """A cut that leaves no trunk, a black box without weights or model."""
    with pytest.raises(PartitionError):
        knowledge_of(5)
    box = Knowledge.black_box(lambda ids: ids[:, None].float(), 96, Partition(0, 0))
    with pytest.raises(ConfigError):
        box.weights()
    with pytest.raises(ConfigError):
        _ = box.language_model


def test_an_attacker_before_a_projection_shares_what_it_has(knowledge_of):
    """Weights and language model are not loaded again for the same client behind a projection."""
    encoder = torch.randn(8, 48)
    pair = Projection.of(encoder, encoder.T.clone(), 1, "0" * 64)
    knowledge = knowledge_of(1)
    model = knowledge.language_model
    behind = knowledge.behind(pair)

    assert knowledge.projection is None
    assert behind.projection is pair
    assert behind.bottom is knowledge.bottom
    assert behind.language_model is model
