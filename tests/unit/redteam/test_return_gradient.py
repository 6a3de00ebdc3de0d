"""Labels from returned gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.tiny_models import NUM_BLOCKS
from torch import Tensor
from torch.nn.functional import cross_entropy

from fedsea.errors import ConfigError
from fedsea.model.attention import RaggedBatch
from fedsea.model.checkpoint import Checkpoint
from fedsea.model.lora import AdaptedRows, Adapter, LoraConfig
from fedsea.model.partition import Span
from fedsea.model.spans import Placement, Top, load_top
from fedsea.privacy.clipping import Clipping
from fedsea.privacy.gaussian import FedSEAGaussian, Gaussian
from fedsea.privacy.mechanism import Mechanism
from fedsea.privacy.metric import MetricDP
from fedsea.privacy.noise import NoiseSource
from fedsea.redteam.attack import UNKNOWN
from fedsea.redteam.exchange import Exchange, Scored
from fedsea.redteam.return_gradient import ClosedForm, Refined
from fedsea.redteam.top_map import TopMap

ALL_BUT_LAST = 11


@pytest.fixture(scope="module")
def tops(tiny_model: Path) -> dict[int, Top]:
    """Tops of the tiny model by their number of blocks."""
    checkpoint = Checkpoint.open(tiny_model)
    return {
        blocks: load_top(checkpoint, Span(NUM_BLOCKS - blocks, NUM_BLOCKS), Placement())
        for blocks in (0, 1, 2)
    }


def returned(
    top: Top, rows: Tensor, labels: Tensor, scored: Scored, adapter: Adapter | None = None
) -> Tensor:
    """The gradient that a client sends: of its mean loss over the scored rows of the step."""
    leaf = rows.clone().requires_grad_()
    used = () if adapter is None else (AdaptedRows(0, len(rows), adapter),)
    batch = RaggedBatch.whole([len(rows)], rows.device, adapters=used)
    logits = top.run(leaf, batch, torch.arange(len(rows)))
    loss = cross_entropy(logits[scored.rows], labels[scored.rows], reduction="sum") / scored.step
    gradient: Tensor = torch.autograd.grad(loss * scored.scale, leaf)[0]
    return gradient


@pytest.fixture(scope="module")
def labels(secret: Tensor) -> Tensor:
    """The token after each of the rows that are run."""
    return secret[1:]


@pytest.fixture(scope="module")
def rows(hidden_states, labels) -> Tensor:
    """Activations at the second cut; which block made them is of no matter."""
    states: Tensor = hidden_states[3]
    return states[: len(labels)]


def everywhere(count: int, step: int | None = None) -> Scored:
    """The loss on all rows of one sequence, alone in its step or not."""
    return Scored(torch.ones(count, dtype=torch.bool), step or count)


def hits(guess, labels: Tensor) -> int:
    """How many labels were named."""
    return sum(a == b for a, b in zip(guess.texts[0].ids, labels.tolist(), strict=True))


def test_the_closed_form_is_exact_without_blocks_in_the_top(tops, rows, labels):
    """One product each way names every label; the number of rows of the whole step counts."""
    scored = everywhere(len(rows), step=40)
    exchange = Exchange(rows, returned(tops[0], rows, labels, scored))

    assert hits(ClosedForm().run([(exchange, scored)], tops[0]), labels) == len(labels)


@pytest.mark.parametrize("blocks", [0, 1, 2])
def test_refinement_reads_through_blocks(tops, rows, labels, blocks):
    """The floor of the attack: without noise all labels are named through every top."""
    scored = everywhere(len(rows))
    exchange = Exchange(rows, returned(tops[blocks], rows, labels, scored))

    assert hits(Refined().run([(exchange, scored)], tops[blocks]), labels) == len(labels)


@pytest.mark.parametrize(
    "mechanism",
    [
        FedSEAGaussian(1e-4),
        Gaussian(0.01, 200.0, Clipping.ROW),
        Gaussian(0.01, 1000.0, Clipping.FROBENIUS),
    ],
)
def test_the_law_of_a_weak_mechanism_is_undone(tops, rows, labels, mechanism: Mechanism):
    """Clipping to a known radius and little noise hide next to nothing."""
    scored = everywhere(len(rows))
    clean = returned(tops[1], rows, labels, scored)
    released = mechanism.protect(clean, NoiseSource(seed=b"r3"))
    guess = Refined().run([(Exchange(rows, released), scored)], tops[1], mechanism)

    assert hits(guess, labels) >= len(labels) - 1


def test_much_noise_leaves_the_prior(tops, rows, labels):
    """Where the gradient says nothing, the model's own expectation is named."""
    scored = everywhere(len(rows))
    clean = returned(tops[1], rows, labels, scored)
    mechanism = Gaussian(0.01, 1e-3)
    released = mechanism.protect(clean, NoiseSource(seed=b"much"))
    guess = Refined().run([(Exchange(rows, released), scored)], tops[1], mechanism)
    expected = TopMap(tops[1], rows).expected.argmax(dim=1)

    assert guess.texts[0].ids == tuple(expected.tolist())
    assert hits(guess, labels) < len(labels) / 2


def test_only_scored_rows_are_named_and_choices_bind(tops, rows, labels):
    """Answers at the end of a text; of two possible labels the true one is found."""
    marks = torch.zeros(len(rows), dtype=torch.bool)
    marks[-2:] = True
    wrong = (labels[-2:] + 1) % 90
    scored = Scored(marks, 2, scale=1024.0, choices=tuple({*labels[-2:].tolist(), *wrong.tolist()}))
    exchange = Exchange(rows, returned(tops[1], rows, labels, scored))
    for attack in (ClosedForm(), Refined()):
        (guess,) = attack.run([(exchange, scored)], tops[1]).texts

        assert guess.ids[:-2] == (UNKNOWN,) * (len(rows) - 2)
        assert guess.ids[-2:] == tuple(labels[-2:].tolist())


def test_a_leaked_adapter_of_the_top_is_used(tops, rows, labels, tiny_model):
    """With the fine-tuned top the gradient is that of the attacker's own map."""
    checkpoint = Checkpoint.open(tiny_model)
    span = Span(NUM_BLOCKS - 1, NUM_BLOCKS)
    top = load_top(checkpoint, span, Placement())
    generator = torch.Generator().manual_seed(1)
    adapter = Adapter.fresh(LoraConfig(rank=4), span, top.span.linears(), generator)
    for factors in adapter.factors.values():
        factors.b.data.normal_(std=0.05, generator=generator)
    top.span.accept(adapter)
    scored = everywhere(len(rows))
    gradient = returned(top, rows, labels, scored, adapter)
    mapped = TopMap(top, rows, adapter)
    onehot = torch.nn.functional.one_hot(labels, mapped.expected.shape[1])

    torch.testing.assert_close(
        mapped.pulled(mapped.probabilities - onehot) / len(rows), gradient, rtol=1e-4, atol=1e-7
    )
    found = Refined().run([(Exchange(rows, gradient), scored)], top, adapter=adapter)
    assert hits(found, labels) == len(labels)


def test_both_products_are_those_of_the_jacobian(tops, rows):
    """<J r, w> = <r, J^T w>, and J r is a difference quotient of the logits."""
    mapped = TopMap(tops[2], rows)
    generator = torch.Generator().manual_seed(2)
    along = torch.randn(rows.shape, generator=generator)
    weights = torch.randn(mapped.expected.shape, generator=generator)
    pushed = mapped.pushed(along)

    torch.testing.assert_close(
        (pushed * weights).sum(), (along * mapped.pulled(weights)).sum(), rtol=1e-4, atol=1e-3
    )
    batch = RaggedBatch.whole([len(rows)], rows.device)
    with torch.no_grad():
        ends = [
            tops[2].run(rows + step * along, batch, torch.arange(len(rows)))
            for step in (1e-3, -1e-3)
        ]
    torch.testing.assert_close((ends[0] - ends[1]) / 2e-3, pushed, rtol=2e-2, atol=2e-2)


def test_bad_input_is_refused(tops, rows):
    """Parts that do not belong together, and mechanisms whose law is not Gaussian."""
    count = len(rows)
    with pytest.raises(ConfigError):
        Exchange(rows, rows[1:])
    with pytest.raises(ConfigError):
        Exchange(rows, rows, rows[1:])
    with pytest.raises(ConfigError):
        Scored(torch.zeros(count, dtype=torch.bool), 1)
    with pytest.raises(ConfigError):
        Scored(torch.ones(count, dtype=torch.bool), count - 1)
    with pytest.raises(ConfigError):
        Scored(torch.ones(count), count)
    with pytest.raises(ConfigError):
        Scored(torch.ones(count, dtype=torch.bool), count, scale=0.0)
    exchange = Exchange(rows, rows)
    with pytest.raises(ConfigError, match="mark for every row"):
        ClosedForm().run([(exchange, everywhere(count - 1))], tops[0])
    with pytest.raises(ConfigError, match="Gaussian"):
        Refined().run([(exchange, everywhere(count))], tops[0], MetricDP(1.0))
    for bad in ({"steps": 0}, {"learning_rate": 0.0}, {"prior": -1.0}):
        with pytest.raises(ConfigError):
            Refined(**bad)
