"""Utility from logits: perplexity, accuracy and agreement."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedsea.errors import ConfigError
from fedsea.evaluation.utility import generation_agreement, read, utility

IDS = torch.tensor([0, 2, 1])


def test_uniform_logits_have_the_perplexity_of_the_vocabulary():
    """A model that knows nothing is as perplexed as its vocabulary is large."""
    reading = read(torch.zeros(3, 7), IDS)
    assert utility([reading], [reading]).perplexity == pytest.approx(7)


def test_certain_logits_have_perplexity_one():
    """A model that is right and certain has perplexity 1 and accuracy 1."""
    logits = torch.full((3, 4), -100.0)
    logits[0, 2] = logits[1, 1] = logits[2, 3] = 100.0
    found = utility([read(logits, IDS)], [read(logits, IDS)])
    assert found.perplexity == pytest.approx(1)
    assert (found.accuracy, found.agreement, found.generation) == (1, 1, None)


@given(st.integers(0, 2**31))
def test_perplexity_is_cross_entropy(seed):
    """The reduction equals torch's own cross entropy of the next tokens."""
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(seed))
    reading = read(logits, IDS)
    expected = torch.nn.functional.cross_entropy(logits[:-1], IDS[1:]).exp().item()
    assert utility([reading], [reading]).perplexity == pytest.approx(expected, rel=1e-5)


def test_agreement_counts_first_choices():
    """Two of three positions agree."""
    clean, noisy = torch.eye(4)[[0, 1, 2]], torch.eye(4)[[0, 1, 3]]
    found = utility([read(noisy, IDS)], [read(clean, IDS)])
    assert found.agreement == pytest.approx(2 / 3)


def test_perplexity_of_hopeless_logits_is_a_number():
    """Logits that rule the text out do not overflow."""
    logits = torch.zeros(3, 4)
    logits[:, 3] = 1e30
    reading = read(logits, IDS)
    assert math.isfinite(utility([reading], [reading]).perplexity)


def test_answers_that_end_early_disagree():
    """Positions at which only one answer goes on count as different."""
    assert generation_agreement([[1, 2]], [[1, 2, 3, 4]]) == 0.5
    assert generation_agreement([[]], [[]]) == 1.0


@pytest.mark.parametrize(
    "call",
    [
        lambda: read(torch.zeros(3, 4), IDS[:2]),
        lambda: read(torch.zeros(1, 4), IDS[:1]),
        lambda: utility([], []),
        lambda: utility([read(torch.zeros(3, 4), IDS)], []),
        lambda: utility([read(torch.zeros(3, 4), IDS)], [read(torch.zeros(2, 4), IDS[:2])]),
    ],
)
def test_what_does_not_belong_together_is_refused(call):
    """Texts of one token, other lengths, and nothing at all end in a clear error."""
    with pytest.raises(ConfigError, match="utility"):
        call()
