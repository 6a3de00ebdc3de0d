"""Membership inference."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.tiny_models import NUM_BLOCKS, VOCABULARY
from torch.nn.functional import cross_entropy

from fedsea.errors import ConfigError
from fedsea.model.attention import RaggedBatch
from fedsea.model.checkpoint import Checkpoint
from fedsea.model.lora import AdaptedRows, Adapter, LoraConfig
from fedsea.model.partition import Span
from fedsea.model.spans import Placement, load_bottom, load_top
from fedsea.redteam.language_model import LanguageModel
from fedsea.redteam.membership import losses, membership


def tuned(folder: Path, texts: torch.Tensor, steps: int) -> Adapter:
    """An adapter of all blocks that was trained on texts (n, length)."""
    checkpoint = Checkpoint.open(folder)
    body = load_bottom(checkpoint, Span(0, NUM_BLOCKS), Placement())
    top = load_top(checkpoint, Span(NUM_BLOCKS, NUM_BLOCKS), Placement())
    generator = torch.Generator().manual_seed(0)
    adapter = Adapter.fresh(LoraConfig(rank=16), body.span, body.linears(), generator)
    body.accept(adapter)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    counts = [texts.shape[1] - 1] * len(texts)
    rows = texts[:, :-1].flatten()
    for _ in range(steps):
        used = (AdaptedRows(0, len(rows), adapter),)
        hidden = body.run(rows, RaggedBatch.whole(counts, rows.device, adapters=used))
        plain = RaggedBatch.whole(counts, rows.device)
        logits = top.run(hidden, plain, torch.arange(len(rows)))
        optimizer.zero_grad()
        cross_entropy(logits, texts[:, 1:].flatten()).backward()
        optimizer.step()
    return adapter


def test_an_adapter_that_learnt_its_texts_by_heart_names_them(tiny_model):
    """The floor of the attack: on an overtrained adapter members and others part."""
    generator = torch.Generator().manual_seed(4)
    drawn = torch.randint(3, VOCABULARY, (24, 10), generator=generator)
    checkpoint = Checkpoint.open(tiny_model)
    base = LanguageModel.load(checkpoint)
    after = LanguageModel.load(checkpoint, tuned(tiny_model, drawn[:8], steps=40))
    texts = drawn.tolist()
    scores = losses(base, texts) - losses(after, texts)
    found = membership(scores[:8], scores[8:])

    assert found.auc > 0.95
    assert found.found > 0.8
    assert found.found in found.found_interval


def test_losses_are_those_of_the_model(tiny_model, secret):
    """Mean nats per token, from the first position that counts."""
    model = LanguageModel.load(Checkpoint.open(tiny_model))
    expected = model.expect(tuple(secret.tolist()))
    each = -expected[:-1].gather(1, secret[1:, None])[:, 0]
    ids = secret.tolist()

    torch.testing.assert_close(losses(model, [ids]), each.mean()[None])
    torch.testing.assert_close(losses(model, [ids], first=4), each[3:].mean()[None])


def test_scores_that_say_nothing_are_a_guess():
    """The area is near one half and its interval holds it; ties count half."""
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randn(2, 400, generator=generator)
    found = membership(drawn[0], drawn[1])

    assert 0.5 in found.auc_interval
    assert 0.01 in found.found_interval
    assert membership(torch.zeros(5), torch.zeros(5)).auc == 0.5


def test_the_threshold_lets_as_many_others_through_as_allowed():
    """With 200 others and 1 % two of them may be above it; with none allowed it is the largest."""
    others = torch.arange(200.0)
    members = torch.tensor([197.5, 198.5, 250.0, -1.0])

    assert membership(members, others).found == 0.75
    assert membership(members, others, false_positives=0.0).found == 0.25


def test_bad_input_is_refused(tiny_model):
    """Too few texts, an impossible share, and texts without a token that counts."""
    model = LanguageModel.load(Checkpoint.open(tiny_model))
    with pytest.raises(ConfigError):
        membership(torch.zeros(1), torch.zeros(9))
    with pytest.raises(ConfigError):
        membership(torch.zeros(9), torch.zeros(9), false_positives=1.0)
    with pytest.raises(ConfigError):
        losses(model, [[1]])
    with pytest.raises(ConfigError):
        losses(model, [[1, 2, 3]], first=0)
