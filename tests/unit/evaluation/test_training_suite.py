"""The suite for training on a tiny random model: from a real run to rows of a report."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fedsea.client.examples import Example
from fedsea.errors import ConfigError
from fedsea.evaluation.finding import Finding, Score, rate_of, rates_by_class
from fedsea.evaluation.training_suite import TrainingData, TrainingPlan, evaluate_training
from fedsea.evaluation.training_victim import Guarded
from fedsea.evaluation.verdict import floor, settings
from fedsea.model.lora import LoraConfig
from fedsea.model.partition import Partition
from fedsea.privacy.gaussian import FedSEAGaussian
from fedsea.redteam.inverter import Recipe
from fedsea.redteam.return_gradient import Refined

BOS = 1


def texts(count: int, length: int, seed: int) -> tuple[tuple[int, ...], ...]:
    """Token ids behind a beginning of text."""
    drawn = torch.randint(5, 60, (count, length), generator=torch.Generator().manual_seed(seed))
    return tuple((BOS, *row) for row in drawn.tolist())


@pytest.fixture
def plan(tiny_model) -> TrainingPlan:
    """Two steps of two short texts behind one block."""
    data = TrainingData(
        tuple(Example.of(ids) for ids in texts(6, 8, 0)), texts(8, 8, 1), texts(12, 8, 2), (BOS,)
    )
    return TrainingPlan(
        model=tiny_model,
        partition=Partition(1, 1),
        data=data,
        lora=LoraConfig(rank=4),
        batch=2,
        steps=2,
        attacked=1,
        learning_rate=5e-3,
        recipe=Recipe(hidden=32, steps=30, learning_rate=1e-2),
        refined=Refined(steps=50, learning_rate=0.2),
    )


def rows_of(plan: TrainingPlan, attack: str):
    """The rows of one attack."""
    return [row for row in evaluate_training(plan) if row.attack == attack]


def test_noise_on_rows_alone_leaves_the_labels_to_read(plan):
    """R3 reads all labels of the clean run and of one whose rows are noisy; the rest stand beside."""
    rows = evaluate_training(replace(plan, guards=(Guarded(rows=FedSEAGaussian(0.5)),)))
    first = [row for row in rows if row.exposed == "gradients"]
    clean = [row for row in first if row.is_clean]

    assert [row.attack for row in clean] == ["prior", "r3", "r3t"]
    assert [row.attack for row in first if not row.is_clean] == ["r3", "r3t"]
    for row in first:
        if row.attack == "r3t":
            assert row.recovery == 1.0
            assert row.low <= row.recovery <= row.high
            assert row.clean == 1.0
            assert row.prior < 0.3
            assert row.noise == 0.0
    assert not floor(rows)
    assert {setting.strongest.attack for setting in settings(rows)} >= {"r3t"}


def test_a_later_step_is_attacked_with_the_public_and_the_leaked_top(plan):
    """The top has moved by then; with its adapter all labels are read."""
    late = [row for row in rows_of(plan, "r3t") if "step 2" in row.exposed]

    assert [row.knowledge for row in late] == ["base", "leaked"]
    assert [row.exposed for row in late] == [
        "gradients of step 2",
        "gradients of step 2, top leaked",
    ]
    assert late[1].recovery == 1.0


def test_noise_on_gradients_is_measured_and_stops_the_attack(plan):
    """Sizes are in units of the gradient; much of it leaves a guess; mu comes with a bound."""
    rows = rows_of(replace(plan, gradient_noise=(0.5, 40.0), gradient_mu=(0.5,)), "r3t")
    found = [row for row in rows if not row.is_clean]

    assert [round(row.noise, 1) for row in found[:2]] == [
        pytest.approx(0.5, abs=0.1),
        pytest.approx(40, rel=0.2),
    ]
    assert found[0].recovery > 0.9
    assert found[1].recovery < 0.4
    assert found[0].mu is None
    assert found[2].mu == pytest.approx(0.5)
    assert found[2].recovery < 0.4
    assert found[2].bound is None or found[2].bound < 0.6


def test_answers_of_classification_are_found_by_class(plan):
    """One answer token of two that there can be, by the name of its class."""
    labels = (40, 41, 40, 41)
    examples = tuple(
        Example.of((*ids, label), len(ids))
        for ids, label in zip(texts(4, 6, 5), labels, strict=True)
    )
    kinds = tuple(("yes",) if label == 40 else ("no",) for label in labels)
    data = replace(plan.data, examples=examples, kinds=kinds, choices=(40, 41))
    (row,) = (row for row in rows_of(replace(plan, data=data), "r3t") if row.exposed == "gradients")

    assert row.tokens == 2
    assert {kind: rate.recovery for kind, rate in row.by_class.items()} == {"yes": 1.0, "no": 1.0}


def test_rows_of_training_are_read_and_their_text_is_scored(plan):
    """The prefix search reads all; a decoder is scored by ROUGE and BLEU beside those of a guess."""

    def decode(ids):
        return " ".join(f"word{number}" for number in ids)

    rows = evaluate_training(replace(plan, attacks=("r1", "r4t"), decode=decode))

    assert [row.attack for row in rows] == ["r1", "r4t"]
    assert rows[0].recovery == 1.0
    assert rows[0].details["rougeL"] == 1.0
    assert rows[1].details["guess_rougeL"] < 0.5
    assert not floor(rows)


def test_updates_of_the_bottom_are_attacked_by_rank_and_batch(plan):
    """A gradient of enough rank gives every token; the sketches of a first step do not."""
    rows = rows_of(replace(plan, attacks=("r7",), ranks=(8,)), "r7")
    by_name = {row.exposed: row for row in rows}

    assert len(rows) == 8
    assert by_name["gradient, rank 8, 1 text, step 8"].recovery == 1.0
    assert by_name["gradient, rank 8, 1 text, step 8"].details["in_order"] == 1.0
    assert by_name["gradient, rank 8, 2 texts, step 1"].details["named"] == 0


def test_an_overtrained_adapter_gives_its_members_away(plan):
    """Membership, canaries and an audit, each with what a guess would get."""
    rows = evaluate_training(
        replace(plan, attacks=("r8",), steps=40, learning_rate=2e-2, canaries=12, batch=6)
    )
    by_name = {row.attack: row for row in rows}

    assert list(by_name) == ["auc", "r8", "canary", "audit"]
    assert by_name["r8"].recovery > 0.8
    assert by_name["auc"].recovery > 0.9
    assert by_name["r8"].prior == 0.01
    assert by_name["canary"].details["mean_exposure"] > 4
    assert by_name["audit"].recovery > 0.8
    assert by_name["audit"].prior == 0.5


def test_findings_hold_rates_by_kind_and_nothing_of_nothing():
    """Shares with intervals; scores without a kind count in the whole only."""
    scores = [Score("a", True), Score("a", False), Score("", True)]
    found = Finding.of("r3", "gradients", scores, 0.2)

    assert found.rate.recovery == pytest.approx(2 / 3)
    assert rates_by_class(scores)["a"].recovery == 0.5
    assert rate_of([]).tokens == 0
    assert (rate_of([]).low, rate_of([]).high) == (0.0, 1.0)


def test_bad_input_is_refused(plan):
    """Plans and data that cannot be run, before anything runs."""
    data = plan.data
    with pytest.raises(ConfigError, match="not known for training"):
        replace(plan, attacks=("r2",))
    for bad in (
        {"attacks": ()},
        {"steps": 0},
        {"attacked": 3},
        {"batch": 7},
        {"gradient_noise": (0.0,)},
        {"gradient_mu": (-1.0,)},
        {"attacks": ("r7",), "partition": Partition(0, 1)},
    ):
        with pytest.raises(ConfigError):
            replace(plan, **bad)
    with pytest.raises(ConfigError):
        replace(data, examples=())
    with pytest.raises(ConfigError):
        replace(data, held_out=())
    with pytest.raises(ConfigError, match="kind"):
        replace(data, kinds=(("x",),))
