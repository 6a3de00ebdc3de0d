"""Secret rotations and permutations, and how they break."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.redteam.conftest import chain_of

from fedsea.errors import ConfigError
from fedsea.redteam.prefix import PrefixSearch
from fedsea.redteam.rotation import GramSearch, Rotation, is_permutation, recover_rotation


@given(st.integers(0, 1000))
def test_a_rotation_keeps_norms_and_products(seed):
    """It is orthogonal."""
    rotation = Rotation.random(9, seed)

    torch.testing.assert_close(rotation.matrix @ rotation.matrix.T, torch.eye(9))


@pytest.mark.parametrize("bottom", [0, 2])
@pytest.mark.parametrize("make", [Rotation.random, Rotation.permutation])
def test_a_secret_transform_hides_no_token(knowledge_of, hidden_states, secret, bottom, make):
    """A fresh rotation and no key: the text is read, though R1 as it is reads nothing."""
    rows = hidden_states[bottom]
    sent = chain_of(make(rows.shape[1], 7).apply(rows))
    guess = GramSearch().read(sent, knowledge_of(bottom), None)

    assert guess.ids == tuple(secret.tolist())
    assert PrefixSearch().read(sent, knowledge_of(bottom), None).ids != guess.ids


def test_rotated_weights_give_the_rotation_away():
    """From a public weight and the rotated one with its rows shuffled, R comes back."""
    weight = torch.randn(40, 12, generator=torch.Generator().manual_seed(1))
    rotation = Rotation.random(12, 3)
    shuffled = rotation.apply(weight)[torch.randperm(40)]

    found = recover_rotation(weight, shuffled)
    torch.testing.assert_close(found.float(), rotation.matrix, atol=1e-5, rtol=0)
    assert not is_permutation(found)


def test_a_permutation_is_recognised():
    """A recovered permutation is named as one."""
    weight = torch.randn(40, 12, generator=torch.Generator().manual_seed(1))
    order = Rotation.permutation(12, 3)

    assert is_permutation(recover_rotation(weight, order.apply(weight)))


def test_weights_that_do_not_fit_are_refused():
    """Fewer rows than numbers in a row leave the rotation open."""
    with pytest.raises(ConfigError):
        recover_rotation(torch.ones(3, 5), torch.ones(3, 5))
    with pytest.raises(ConfigError):
        recover_rotation(torch.ones(6, 5), torch.ones(7, 5))
