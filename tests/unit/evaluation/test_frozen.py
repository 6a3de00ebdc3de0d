"""The whole model in one process gives the numbers of transformers, and gradients."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from fedsea.errors import PartitionError, UnsafeRows
from fedsea.evaluation.frozen import FrozenModel, perplexity
from fedsea.model.checkpoint import Checkpoint
from fedsea.model.partition import Partition

WINDOWS = torch.randint(3, 90, (3, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("partition", [Partition(0, 0), Partition(1, 0), Partition(2, 2)])
def test_the_parts_together_are_the_model(tiny_model, partition):
    """Bottom, trunk and top in turn give the logits of the uncut model."""
    model = FrozenModel(Checkpoint.open(tiny_model), partition)
    whole = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    with torch.inference_mode():
        found = model.logits(model.outputs(model.rows(WINDOWS)))
        expected = whole(WINDOWS).logits
    assert torch.allclose(found, expected, atol=1e-4)


def test_gradients_reach_the_cut(tiny_model):
    """They are those of the model, by a difference quotient; weights get none."""
    model = FrozenModel(Checkpoint.open(tiny_model), Partition(1, 1))
    rows = model.rows(WINDOWS).requires_grad_()

    def loss(entering):
        return model.logits(model.outputs(entering)).square().mean()

    (gradient,) = torch.autograd.grad(loss(rows), rows)
    away = torch.randn(rows.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        quotient = (loss(rows + 1e-3 * away) - loss(rows - 1e-3 * away)) / 2e-3
    assert (gradient * away).sum().item() == pytest.approx(quotient.item(), rel=2e-2)
    assert not any(parameter.requires_grad for parameter in model.trunk.parameters())


def test_rows_that_are_not_finite_are_refused(tiny_model):
    """A damaged checkpoint is found before anything is learned from it."""
    model = FrozenModel(Checkpoint.open(tiny_model), Partition(1, 0))
    model.bottom.get_parameter("blocks.embed_tokens.weight").data[WINDOWS[0, 0]] = torch.nan
    with pytest.raises(UnsafeRows):
        model.rows(WINDOWS)


def test_perplexity_stays_a_number():
    """However bad the model is."""
    assert perplexity(1.0) == pytest.approx(2.718281828)
    assert perplexity(1e9) < float("inf")


def test_a_partition_without_trunk_is_refused(tiny_model):
    """Before anything is loaded."""
    with pytest.raises(PartitionError):
        FrozenModel(Checkpoint.open(tiny_model), Partition(3, 2))
