"""Rows of candidate tokens behind one prefix."""

from __future__ import annotations

import pytest
import torch
from tests.tiny_models import FAMILIES, save_tiny
from transformers import AutoModelForCausalLM

from fedsea.model.checkpoint import Checkpoint
from fedsea.model.partition import Span
from fedsea.redteam.continuation import Prefix, load_continuation

# One of each kind of attention: plain, windows, soft caps, sinks, latent, with norms.
KINDS = ("llama", "gemma2", "gpt_oss", "deepseek_v3", "qwen3", "ministral")


@pytest.mark.parametrize("bottom", [0, 1, 3])
def test_rows_are_those_of_the_model(knowledge_of, hidden_states, secret, bottom):
    """A text in one go and in parts gives transformers' own rows in front of the cut."""
    blocks = knowledge_of(bottom).weights()
    begun, first = blocks.extend(Prefix(), secret[:5].tolist())
    whole, second = blocks.extend(begun, secret[5:].tolist())

    assert whole.ids == tuple(secret.tolist())
    torch.testing.assert_close(torch.cat([first, second]), hidden_states[bottom])
    torch.testing.assert_close(blocks.rows_of(secret), hidden_states[bottom])


@pytest.mark.parametrize("family", [kind for kind in KINDS if kind in FAMILIES])
def test_every_candidate_is_what_the_model_would_compute(tmp_path, family):
    """For several kinds of attention, the row of each candidate is that of the text with it."""
    folder = save_tiny(family, tmp_path)
    checkpoint = Checkpoint.open(folder)
    blocks = load_continuation(checkpoint, Span(0, 2))
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    text = list(range(3, 12))
    candidates = torch.tensor([4, 40, 77])
    prefix, _ = blocks.extend(Prefix(), text)
    found = blocks.candidate_rows(prefix, candidates)
    with torch.no_grad():
        texts = torch.tensor([[*text, token] for token in candidates.tolist()])
        expected = model(texts, output_hidden_states=True).hidden_states[2][:, -1]

    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_candidates_leave_the_prefix_as_it_was(knowledge_of, secret):
    """A sweep changes nothing: prefixes are values and may be shared by beams."""
    blocks = knowledge_of(1).weights()
    prefix, _ = blocks.extend(Prefix(), secret[:4].tolist())
    before = blocks.candidate_rows(prefix, torch.arange(7))
    blocks.extend(prefix, [9, 9])

    assert torch.equal(blocks.candidate_rows(prefix, torch.arange(7)), before)
    assert len(prefix) == 4
