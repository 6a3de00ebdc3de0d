from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.tiny_models import VOCABULARY, save_tiny
from tests.training_trunk import TinyTrainingTrunk

from fedsea.client.examples import Example
from fedsea.client.link import Patience
from fedsea.client.training import SplitForTraining
from fedsea.client.training_config import TrainerConfig
from fedsea.client.training_protection import TrainingProtection
from fedsea.errors import BudgetExceeded, ConfigError, NotFinite
from fedsea.federated.arrays import norm, packed
from fedsea.federated.local import FitSettings, LocalClient, Policy, write_adapter
from fedsea.federated.training import SplitTraining
from fedsea.model.adapters import read_adapter
from fedsea.model.lora import LoraConfig
from fedsea.model.partition import Partition
from fedsea.model.spans import Placement
from fedsea.privacy.accounts import Budget
from fedsea.privacy.clipping import Clipping
from fedsea.privacy.gaussian import Gaussian
from fedsea.transport.memory import MemoryChannel

LORA = LoraConfig(rank=2, alpha=4.0, dropout=0.1)
CONFIG = TrainerConfig(steps=3, batch_size=2, learning_rate=0.01, schedule="constant", seed=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama of five blocks."""
    return save_tiny("llama", tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def server(folder):
    """A small trunk in this process."""
    return TinyTrainingTrunk(folder, Partition(1, 1), Placement())


@pytest.fixture
def connect(folder, server):
    """Connect a model whose sessions end with the test."""
    opened = []

    def make(**options):
        given = {"lora": LORA, "train": ("bottom", "top"), "partition": (1, 1), **options}
        channels = {"memory": lambda: MemoryChannel(server)}
        model = SplitForTraining.connect(
            folder, channels, name="run", seed=4, patience=Patience(open=5.0), **given
        )
        opened.append(model)
        return model

    yield make
    for model in opened:
        model.close()


def some_examples(count=8):
    """Random tokens; the answer is the second half."""
    chance = random.Random(0)
    lengths = [chance.randint(4, 10) for _ in range(count)]
    return [
        Example.of([chance.randrange(VOCABULARY) for _ in range(length)], length // 2)
        for length in lengths
    ]


def settings(number=1, proximal=0.0):
    """What the aggregator says."""
    return FitSettings(round=number, layout="", proximal=proximal)


def test_a_round_moves_bottom_and_top(connect):
    """Both parts' factors are averaged under PEFT's names, and training changes both."""
    training = SplitTraining(connect(), CONFIG, some_examples())
    before = training.arrays()

    examples = training.fit(settings())

    after = training.arrays()
    assert examples == 8
    assert set(before) == training.part("bottom") | training.part("top")
    for part in ("bottom", "top"):
        assert norm({name: after[name] - before[name] for name in training.part(part)}) > 0


def test_a_round_is_a_function_of_its_number_and_arrays(connect):
    """Done anew, and by another process, it ends with the same bits; another round does not."""
    training = SplitTraining(connect(), CONFIG, some_examples())
    start = training.arrays()
    training.fit(settings())
    first = training.arrays()
    training.load(start)
    training.fit(settings())
    again = training.arrays()
    training.load(start)
    training.fit(settings(2))
    second = training.arrays()

    assert packed(first) == packed(again)
    assert packed(first) != packed(second)


def test_rounds_go_on_in_another_process(connect):
    """A client that was restarted trains round 2 as one that was not."""
    training = SplitTraining(connect(), CONFIG, some_examples())
    training.fit(settings(1))
    between = training.arrays()
    training.fit(settings(2))
    whole = training.arrays()

    later = SplitTraining(connect(), CONFIG, some_examples())
    later.load(between)
    later.fit(settings(2))

    assert packed(later.arrays()) == packed(whole)


def test_the_proximal_term_pulls_back(connect):
    """The further the pull, the shorter the way from the global arrays."""
    training = SplitTraining(connect(), replace(CONFIG, max_grad_norm=0.0), some_examples())
    start = training.arrays()
    ways = []
    for proximal in (0.0, 100.0):
        training.load(start)
        training.fit(settings(proximal=proximal))
        after = training.arrays()
        ways.append(norm({name: after[name] - start[name] for name in start}))

    assert ways[1] < ways[0]


def test_the_proximal_gradient_is_exact(connect):
    """mu (w - w_global), added to the gradient of the loss."""
    training = SplitTraining(connect(), CONFIG, some_examples())
    start = training.arrays()
    factors = training._factors()
    with torch.no_grad():
        for factor in factors.values():
            factor.add_(0.5)
            factor.grad = torch.ones_like(factor)

    training._pull(start, 3.0)

    gradients = [factor.grad for factor in factors.values() if factor.grad is not None]
    assert len(gradients) == len(start)
    assert all(torch.allclose(gradient, torch.tensor(2.5)) for gradient in gradients)


def test_the_trunk_may_be_trained_with_it(connect, server):
    """Its adapter stays at the server, takes as many steps, and is saved after every round."""
    training = SplitTraining(connect(train=("bottom", "trunk", "top")), CONFIG, some_examples())
    training.fit(settings(1))
    training.fit(settings(2))

    assert training._model.steps == 6
    assert all(".layers.0." in name or ".layers.4." in name for name in training.arrays())


@pytest.mark.parametrize("train", [("bottom", "top"), ("bottom", "trunk", "top")])
def test_a_client_may_miss_rounds(connect, train):
    """Whoever was not there in round 2 trains round 3 from where its trunk is."""
    training = SplitTraining(connect(train=train), CONFIG, some_examples())
    training.fit(settings(1))
    training.fit(settings(3))

    assert training._model.steps == (6 if "trunk" in train else 3)


def guarded(ledger, mu, budget=None):
    """A guard of both directions at a client of the tiny model."""
    mechanism = Gaussian(1e3, mu, Clipping.FROBENIUS)
    protection = TrainingProtection(
        rows=mechanism, gradients=mechanism, record="data", ledger=ledger, budget=budget
    )
    return protection.applied(48, ("bottom", "top")).guard()


def test_every_round_is_released_anew(connect, tmp_path):
    """Hardly any noise: rounds end as without it, although steps and examples are the same ones."""
    config = replace(CONFIG, steps=1)
    example = some_examples(1)
    guard = guarded(tmp_path / "ledger", 1e12)
    plain = SplitTraining(connect(), config, example, example)
    protected = SplitTraining(connect(guard=guard), config, example, example)
    for number in (1, 2, 3):
        for training in (plain, protected):
            training.fit(settings(number))
        expected, found = plain.arrays(), protected.arrays()
        for name, array in expected.items():
            np.testing.assert_allclose(found[name], array, rtol=1e-3, atol=1e-5)
    assert guard.charged == (3, 3)

    losses = [training.evaluate()[0] for training in (plain, protected)]
    protected.load({name: array + 0.1 for name, array in protected.arrays().items()})
    again = protected.evaluate()[0]

    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert again != pytest.approx(losses[1], rel=1e-4)
    assert guard.charged == (5, 3)


def test_a_budget_ends_the_rounds(connect, tmp_path):
    """What would exceed it is not sent, and the arrays of the next round can be taken over."""
    guard = guarded(tmp_path / "ledger", 0.5, Budget(5.0, 1e-5))
    training = SplitTraining(connect(guard=guard), replace(CONFIG, steps=1), some_examples(2))
    training.fit(settings(1))
    charged = guard.charged

    with pytest.raises(BudgetExceeded, match="training stops"):
        training.fit(settings(2))

    assert guard.charged == charged == (2, 2)


def test_frozen_factors_are_named(connect):
    """Under FFA-LoRA every A is frozen, and training leaves it as it is."""
    training = SplitTraining(
        connect(lora=LoraConfig(rank=2, alpha=4.0, freeze_a=True)), CONFIG, some_examples()
    )
    before = training.arrays()
    training.fit(settings())
    after = training.arrays()

    frozen = training.frozen()
    assert frozen == {name for name in before if name.endswith("lora_A.weight")}
    assert all(np.array_equal(before[name], after[name]) for name in frozen)
    client = LocalClient("acme", training, Policy(frozen=frozen))
    assert all(name.endswith("lora_B.weight") for name in client.shared())


def test_evaluation_changes_nothing(connect):
    """A mean loss over the answers of examples kept apart."""
    training = SplitTraining(connect(), CONFIG, some_examples(), some_examples(4))
    before = training.arrays()

    loss, examples = training.evaluate()

    assert loss > 0
    assert examples == 4
    assert packed(training.arrays()) == packed(before)
    with pytest.raises(ConfigError, match="evaluation"):
        SplitTraining(connect(), CONFIG, some_examples()).evaluate()


def test_nan_ends_a_round(connect):
    """A loss that is not finite stops the round before a step is taken."""
    training = SplitTraining(connect(), CONFIG, some_examples())
    training.load({name: array * np.float32(np.nan) for name, array in training.arrays().items()})

    with pytest.raises(NotFinite):
        training.fit(settings())


def test_nothing_to_average_is_refused(connect):
    """Without an adapter in bottom or top there is nothing for the aggregator."""
    with pytest.raises(ConfigError, match="nothing to average"):
        SplitTraining(connect(train=("trunk",)), CONFIG, some_examples())


def test_what_is_written_is_an_adapter(connect, tmp_path):
    """The arrays of a client are read back as the adapter of its parts."""
    training = SplitTraining(connect(), CONFIG, some_examples())
    training.fit(settings())

    write_adapter(tmp_path, training.arrays(), training.description)

    bottom = read_adapter(tmp_path, Partition(1, 1).bottom_span())
    assert bottom.config.rank == 2
    assert {place.block for place in bottom.factors} == {0}
