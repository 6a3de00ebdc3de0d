"""A client that trains under observation."""

from __future__ import annotations

import pytest
import torch
from tests.tiny_models import NUM_BLOCKS

from fedsea.client.examples import Example
from fedsea.errors import PartitionError
from fedsea.evaluation.training_victim import Guarded, TrainingVictim
from fedsea.model.lora import LoraConfig
from fedsea.model.partition import Partition
from fedsea.privacy.gaussian import FedSEAGaussian

EXAMPLES = (Example.of((1, 20, 21, 22, 23)), Example.of((1, 30, 31, 32), 2))
LORA = LoraConfig(rank=2)


def test_the_observer_sees_every_step_and_the_adapter_is_whole(tiny_model):
    """Rows, activations and gradients of each sequence; factors in all three parts."""
    with TrainingVictim(tiny_model, Partition(1, 1), LORA) as victim:
        taken = [victim.step(EXAMPLES, 1e-2) for _ in range(2)]
        seen = victim.view().steps
        released = victim.released()
        after = victim.read((1, 20, 21))

    assert [step.number for step in seen] == [1, 2]
    assert [len(each) for each in seen[0].exchanges] == [4, 3]
    assert {place.block for place in released.factors} == set(range(NUM_BLOCKS))
    assert all(bool(factors.b.any()) for factors in released.factors.values())
    assert after.shape[0] == 3
    assert not any(factors.b.any() for factors in taken[0].bottom.factors.values())
    assert all(p.grad is not None for p in taken[0].bottom.parameters())
    for old, new in zip(
        taken[0].bottom_after.parameters(), taken[1].bottom.parameters(), strict=True
    ):
        assert torch.equal(old, new)


def test_mechanisms_stand_where_they_are_put(tiny_model):
    """Noise on gradients leaves the rows of the first step as they are, and the other way round."""
    seen = {}
    for name, guarded in {
        "plain": Guarded(),
        "rows": Guarded(rows=FedSEAGaussian(0.1)),
        "gradients": Guarded(gradients=FedSEAGaussian(0.1)),
    }.items():
        with TrainingVictim(tiny_model, Partition(1, 1), LORA, guarded) as victim:
            victim.step(EXAMPLES, 1e-2)
            exchange = victim.view().steps[0].exchanges[0]
            assert exchange.released is not None
            seen[name] = exchange.released, exchange.gradient
    plain, rows, gradients = seen["plain"], seen["rows"], seen["gradients"]

    assert torch.equal(gradients[0], plain[0])
    assert not torch.equal(gradients[1], plain[1])
    assert not torch.equal(rows[0], plain[0])
    assert float((rows[1] - plain[1]).abs().max()) < 0.05


def test_a_cut_that_leaves_no_trunk_is_refused(tiny_model):
    """And nothing stays behind."""
    with pytest.raises(PartitionError):
        TrainingVictim(tiny_model, Partition(NUM_BLOCKS, 0), LORA)
