"""Text from updates of adapters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.tiny_models import NUM_BLOCKS
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from fedsea.errors import ConfigError
from fedsea.model.attention import RaggedBatch
from fedsea.model.checkpoint import Checkpoint
from fedsea.model.lora import TARGETS, AdaptedRows, Adapter, LoraConfig, Place
from fedsea.model.partition import Span
from fedsea.model.spans import BlockSpan, Placement, Top, load_bottom, load_top
from fedsea.redteam.adapter_update import between, of_gradients, of_weights, spans
from fedsea.redteam.continuation import Continuation, load_continuation
from fedsea.redteam.span_search import Spanned, SpanSearch

ATTENTION = ("q_proj", "k_proj", "v_proj")


class Trained:
    """A whole tiny model with an adapter on its first block, and gradients of a batch."""

    def __init__(self, folder: Path, config: LoraConfig, *, fresh: bool = False) -> None:
        self.checkpoint = Checkpoint.open(folder)
        self.body: BlockSpan = load_bottom(self.checkpoint, Span(0, NUM_BLOCKS), Placement())
        self.top: Top = load_top(self.checkpoint, Span(NUM_BLOCKS, NUM_BLOCKS), Placement())
        linears = {place: one for place, one in self.body.linears().items() if place.block == 0}
        generator = torch.Generator().manual_seed(3)
        self.adapter = Adapter.fresh(config, Span(0, 1), linears, generator)
        if not fresh:
            for factors in self.adapter.factors.values():
                factors.b.data.normal_(std=0.05, generator=generator)
        self.body.accept(self.adapter)
        self.before = copy.deepcopy(self.adapter)

    def backward(self, *texts: Tensor) -> None:
        """The gradient of the mean loss over the next tokens."""
        counts = [len(ids) - 1 for ids in texts]
        rows = torch.cat([ids[:-1] for ids in texts])
        used = (AdaptedRows(0, len(rows), self.adapter),)
        batch = RaggedBatch.whole(counts, rows.device, adapters=used)
        hidden = self.body.run(rows, batch)
        logits = self.top.run(
            hidden, RaggedBatch.whole(counts, rows.device), torch.arange(len(rows))
        )
        cross_entropy(logits, torch.cat([ids[1:] for ids in texts])).backward()

    def attacker(self) -> Continuation:
        """The bottom with the adapter that everybody had before the update."""
        return load_continuation(self.checkpoint, Span(0, 1), adapter=self.before)


@pytest.fixture
def trained(tiny_model: Path) -> Callable[..., Trained]:
    """Make a model to be trained."""

    def make(rank: int, targets: tuple[str, ...] = TARGETS, *, fresh: bool = False) -> Trained:
        return Trained(tiny_model, LoraConfig(rank=rank, targets=targets), fresh=fresh)

    return make


@pytest.fixture(scope="module")
def other() -> Tensor:
    """A second text of the batch."""
    return torch.cat([torch.tensor([1]), torch.arange(30, 38)])


def test_gradients_of_a_small_batch_give_both_texts(trained, secret, other):
    """The floor of the attack: every token, in order, of two texts, and no other token."""
    model = trained(24)
    model.backward(secret, other)
    found = SpanSearch().run(of_gradients(model.adapter), model.attacker(), (1,))

    assert found.tokens == {*secret[:-1].tolist(), *other[:-1].tolist()}
    for text in (secret, other):
        assert tuple(text[:-1].tolist()) in found.sequences


def test_an_update_by_plain_gradient_descent_gives_the_text(trained, secret):
    """What is released are two adapters, before and after one step."""
    model = trained(16)
    model.backward(secret)
    with torch.no_grad():
        for parameter in model.adapter.parameters():
            parameter.mul_(0.99).add_(parameter.grad, alpha=-1.0)
    update = between(model.before, model.adapter, kept=0.99)
    found = SpanSearch().run(update, model.attacker(), (1,))

    assert tuple(secret[:-1].tolist()) in found.sequences


def test_the_first_step_leaks_sketches_only_and_fewer_tokens_than_the_rank(trained, secret):
    """With B = 0 the gradient of A is 0; the sketches in dB name the tokens while T < r."""
    few, enough = trained(8, fresh=True), trained(24, fresh=True)
    for model in (few, enough):
        model.backward(secret)

    assert all(
        not factors.a.grad.any()
        for factors in few.adapter.factors.values()
        if factors.a.grad is not None
    )
    assert SpanSearch().run(of_gradients(few.adapter), few.attacker(), (1,)) == Spanned()
    found = SpanSearch().run(of_gradients(enough.adapter), enough.attacker(), (1,))
    assert tuple(secret[:-1].tolist()) in found.sequences


def test_linears_with_the_same_inputs_are_read_together(trained, secret):
    """Eleven tokens are more than a rank of 4, and fewer than the rows of q, k and v at rank 4."""
    model = trained(4, ATTENTION)
    model.backward(secret)
    found = SpanSearch().run(of_gradients(model.adapter), model.attacker(), (1,))

    assert found.tokens == {*secret[:-1].tolist()}
    assert found.sequences == ()


def test_more_tokens_than_rows_blur_and_do_not_hide(trained, secret):
    """No span holds all inputs, so none is named; the nearest tokens are still mostly true."""
    model = trained(3, ATTENTION)
    model.backward(secret)
    found = SpanSearch().run(of_gradients(model.adapter), model.attacker(), (1,))
    truth = {*secret[:-1].tolist()}

    assert not found.tokens
    assert len(truth & {*found.ranked[: len(truth)]}) >= 0.6 * len(truth)


def test_a_span_that_holds_nearly_everything_names_nobody(trained, secret):
    """Forty tokens more than the inputs have numbers: most of the vocabulary fits, so none is said."""
    model = trained(48, ATTENTION)
    generator = torch.Generator().manual_seed(6)
    drawn = torch.randint(3, 96, (8, 11), generator=generator)
    model.backward(secret, *(torch.cat([torch.tensor([1]), ids]) for ids in drawn))
    found = SpanSearch(tolerance=0.3).run(of_gradients(model.adapter), model.attacker(), (1,))

    assert not found.tokens


def test_full_gradients_are_the_reference(tiny_model, trained, secret):
    """The gradient of the weights themselves, as DAGER has it."""
    model = trained(4, ATTENTION)
    layer = model.body.linears()[Place(0, "self_attn.v_proj")]
    weight = torch.zeros(layer.out_features, layer.in_features, requires_grad=True)
    layer.register_forward_hook(lambda _, args, output: output + linear(args[0], weight))
    model.backward(secret)
    assert weight.grad is not None
    found = SpanSearch().run(
        of_weights({Place(0, "self_attn.v_proj"): weight.grad}), model.attacker(), (1,)
    )

    assert found.tokens == {*secret[:-1].tolist()}


def test_bad_input_is_refused(trained, secret):
    """No gradients, other adapters, blocks that the bottom lacks, and values out of range."""
    model = trained(2)
    with pytest.raises(ConfigError, match="no gradients"):
        of_gradients(model.adapter)
    with pytest.raises(ConfigError, match="different linears"):
        between(model.adapter, trained(2, ATTENTION).adapter)
    model.backward(secret)
    far = {Place(1, place.path): leaks for place, leaks in of_gradients(model.adapter).items()}
    with pytest.raises(ConfigError, match="blocks"):
        SpanSearch().run(far, model.attacker())
    for bad in ({"tolerance": 0.0}, {"beams": 0}, {"longest": 0}):
        with pytest.raises(ConfigError):
            SpanSearch(**bad)
    assert spans({}) == {}
