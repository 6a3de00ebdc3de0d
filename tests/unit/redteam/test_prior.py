"""The guess without any observation, and its language model."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM

from fedsea.model.checkpoint import Checkpoint
from fedsea.redteam.language_model import LanguageModel
from fedsea.redteam.prior import prior_only


def test_the_prior_is_the_whole_model(tiny_model, secret):
    """Log-probabilities are those of transformers, in one go and token by token."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation="eager")
    with torch.no_grad():
        expected = torch.log_softmax(model(secret[None]).logits[0].double(), dim=-1)
    ours = LanguageModel.load(Checkpoint.open(tiny_model))
    ids = tuple(secret.tolist())
    state = ours.begin(ids[:3])

    torch.testing.assert_close(ours.expect(ids), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(state.log_probabilities, expected[2], atol=1e-4, rtol=1e-4)
    state = ours.extend(state, ids[3])
    torch.testing.assert_close(state.log_probabilities, expected[3], atol=1e-4, rtol=1e-4)


def test_nothing_before_a_token_means_nothing_is_expected(tiny_model):
    """Without a text all tokens are equally likely."""
    begun = LanguageModel.load(Checkpoint.open(tiny_model)).begin(())

    assert begun.log_probabilities.unique().numel() == 1


def test_prior_only_says_first_choices_behind_the_public_prefix(tiny_model, secret):
    """Each guess follows from the true text before it; the public prefix is known."""
    model = LanguageModel.load(Checkpoint.open(tiny_model))
    ids = tuple(secret.tolist())
    guess = prior_only(ids, 1, model).ids

    assert guess[0] == ids[0]
    assert guess[1:] == tuple(model.expect(ids).argmax(dim=-1).tolist())[:-1]
    assert len(prior_only(ids, 0, model).ids) == len(ids)
