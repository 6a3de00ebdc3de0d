"""Training soft prompts and adapters under noise: they lower the loss, bit for bit repeatable."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from fedsea.errors import ConfigError, FingerprintMismatch
from fedsea.evaluation.frozen import FrozenModel
from fedsea.evaluation.prompt_training import (
    Part,
    Recipe,
    held_out,
    predicted,
    train_prompt,
)
from fedsea.evaluation.public_text import PublicText
from fedsea.evaluation.releasing import Cut, seeded_noise
from fedsea.evaluation.training import Schedule
from fedsea.model.adapters import read_adapter
from fedsea.model.checkpoint import Checkpoint
from fedsea.model.lora import LoraConfig
from fedsea.model.partition import Partition, Span
from fedsea.model.projection import Projection
from fedsea.model.prompts import read_prompt
from fedsea.privacy.gaussian import FedSEAGaussian, Gaussian
from fedsea.privacy.metric import MetricDP
from fedsea.privacy.quantization import StochasticQuantization, Ternary

HIDDEN, WIDTH = 48, 10
NOISE = Gaussian(2.0, 12.0)
LORA = LoraConfig(rank=2, targets=("q_proj", "v_proj"))
START = Recipe(4, schedule=Schedule(0))
STEPS = Recipe(4, schedule=Schedule(25, 2e-2))
WHOLE = Span(0, 5)


@pytest.fixture(scope="module")
def model(tiny_model):
    """The tiny model with a block at each end of the trunk."""
    return FrozenModel(Checkpoint.open(tiny_model), Partition(1, 1))


@pytest.fixture(scope="module")
def text():
    """Tokens that repeat in a pattern, with a start."""
    ids = torch.arange(1300) % 7 + 3
    return PublicText.of(ids, [1], 12)


def projection(model):
    """A projection of this model to fewer numbers."""
    chance = torch.Generator().manual_seed(0)
    encoder = torch.linalg.qr(torch.randn(HIDDEN, WIDTH, generator=chance)).Q.T
    return Projection.of(encoder, encoder.T, 1, model.fingerprint)


@pytest.mark.parametrize("narrow", [False, True], ids=["wide", "projected"])
@pytest.mark.parametrize(
    "make",
    [
        lambda width: None,
        lambda width: NOISE,
        lambda width: FedSEAGaussian(0.5),
        lambda width: StochasticQuantization(4, 0.5, 20.0, width),
        lambda width: Ternary(0.5, 20.0, 1.0, width),
        lambda width: MetricDP(6.0),
    ],
    ids=["plain", "gaussian", "fedsea", "quantization", "ternary", "metric-dp"],
)
def test_a_prompt_helps_under_every_mechanism(model, text, make, narrow):
    """Held-out perplexity falls below that without it, with and without a projection."""
    pair = projection(model) if narrow else None
    cut = Cut(text.prefix, make(WIDTH if narrow else HIDDEN), pair)
    found = train_prompt(model, text, STEPS, cut)
    assert found.end.perplexity < 0.9 * found.without.perplexity
    assert found.end.perplexity < found.start.perplexity
    assert found.without == held_out(model, text, cut)


@pytest.mark.parametrize("part", list(Part))
def test_an_adapter_learns_under_noise(model, text, part):
    """Of any part, alone; it starts as no change at all."""
    recipe = dataclasses.replace(STEPS, rows=0, lora=LORA, parts=(part,))
    found = train_prompt(model, text, recipe, Cut(text.prefix, NOISE, projection(model)))
    assert found.start == found.without
    assert found.end.perplexity < 0.97 * found.start.perplexity


def test_prompt_and_adapters_learn_together(model, text):
    """More freedom, lower loss on the text that they were trained on."""
    training = dataclasses.replace(text, held_out=text.training)
    both = dataclasses.replace(STEPS, lora=LORA, parts=tuple(Part))
    cut = Cut(text.prefix, NOISE)
    alone = train_prompt(model, training, STEPS, cut).end
    assert train_prompt(model, training, both, cut).end.perplexity < alone.perplexity


def test_all_else_is_frozen(model, text):
    """No weight of the model takes a gradient, and an unused prompt leaves no trace."""
    cut = Cut(text.prefix, NOISE)
    before = held_out(model, text, cut)
    train_prompt(model, text, STEPS, cut)
    for part in (model.bottom, model.trunk, model.top):
        assert all(weight.grad is None for weight in part.parameters())
    assert held_out(model, text, cut) == before


def test_gradients_are_those_of_the_loss(model, text):
    """Of prompt and of every adapter, the bottom's through clipping, by a difference quotient."""
    recipe = dataclasses.replace(START, lora=LORA, parts=tuple(Part))
    cut = Cut(text.prefix, Gaussian(0.7, 2000.0))  # noise on a fine grid
    tuned = train_prompt(model, text, recipe, cut).tuned
    windows = text.training[:3]
    chance = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if name.endswith("/b"):
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=chance))

    def loss():
        logits = predicted(model, cut, windows, seeded_noise(0, 0), tuned)
        return cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten())

    gradients = torch.autograd.grad(loss(), list(tuned.parameters()))
    assert len(gradients) == 1 + 2 * 2 * 5
    for parameter, gradient in zip(tuned.parameters(), gradients, strict=True):
        away = torch.randn(parameter.shape, generator=chance)
        away /= away.norm()
        with torch.no_grad():
            parameter.add_(0.02 * away)
            above = loss()
            parameter.sub_(0.04 * away)
            below = loss()
            parameter.add_(0.02 * away)
        expected = (gradient * away).sum().item()
        assert (above - below).item() / 0.04 == pytest.approx(expected, rel=0.1, abs=2e-3)


@pytest.mark.parametrize("noise", [NOISE, StochasticQuantization(2, 0.5, 20.0, HIDDEN)])
def test_an_interrupted_training_gives_the_same(model, text, tmp_path, noise):
    """Killed after some steps and started again: bit for bit, noise and batches included."""
    schedule = Schedule(6, save_seconds=0.0)
    recipe = dataclasses.replace(STEPS, lora=LORA, parts=tuple(Part), schedule=schedule)
    cut, file = Cut(text.prefix, noise), tmp_path / "state"
    expected = train_prompt(model, text, recipe, cut).tuned

    class Killed(Exception):
        pass

    def die(progress):
        if progress.done == 4:
            raise Killed

    with pytest.raises(Killed):
        train_prompt(model, text, recipe, cut, file, die)
    found = train_prompt(model, text, recipe, cut, file).tuned
    for name, parameter in expected.named_parameters():
        assert torch.equal(found.get_parameter(name), parameter), name
    with pytest.raises(ConfigError, match="another training"):
        train_prompt(model, text, recipe, Cut(text.prefix, Gaussian(2.0, 13.0)), file)


def test_files_are_in_the_format_of_peft(tiny_model, text, tmp_path):
    """A prompt at block 0 and adapters of all blocks, each loaded by PEFT, give the same logits."""
    model = FrozenModel(Checkpoint.open(tiny_model), Partition(0, 1))
    windows, cut = text.training[:2], Cut(text.prefix)
    for recipe in (
        STEPS,
        dataclasses.replace(STEPS, rows=0, lora=LORA, parts=(Part.TRUNK, Part.TOP)),
    ):
        folder = tmp_path / str(recipe.rows)
        tuned = train_prompt(model, text, recipe, cut).tuned
        (written,) = tuned.save(folder, "tiny")
        if tuned.prompt is not None:
            assert torch.equal(read_prompt(written).rows, tuned.prompt.rows)
            continue
        whole = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
        peft = PeftModel.from_pretrained(whole, written).eval()
        with torch.no_grad():
            found = predicted(model, cut, windows, seeded_noise(0, 0), tuned)
            torch.testing.assert_close(found, peft(windows).logits, rtol=1e-4, atol=1e-4)
        assert len(read_adapter(written, WHOLE).factors) == 10


def test_a_later_prompt_names_cut_and_checkpoint(model, text, tmp_path):
    """So that a server can refuse it elsewhere."""
    tuned = train_prompt(model, text, START, Cut(text.prefix, NOISE)).tuned
    folders = dataclasses.replace(START, lora=LORA)
    assert [folder.name for folder in tuned.save(tmp_path, "tiny")] == ["prompt"]
    found = read_prompt(tmp_path / "prompt")
    found.check_fits(HIDDEN, 1, model.fingerprint)
    both = train_prompt(model, text, folders, Cut(text.prefix, NOISE)).tuned
    assert [folder.name for folder in both.save(tmp_path, "tiny")] == ["prompt", "adapter"]


def test_the_global_generator_is_left_alone(model, text):
    """The caller's random numbers do not depend on a training."""
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train_prompt(model, text, dataclasses.replace(START, lora=LORA), Cut(text.prefix, NOISE))
    assert torch.equal(torch.rand(3), expected)


def test_other_noise_gives_other_figures(model, text):
    """The seed of an evaluation draws its noise and nothing else."""
    cut = Cut(text.prefix, NOISE)
    assert held_out(model, text, cut).perplexity != held_out(model, text, cut, seed=1).perplexity
    clean = Cut(text.prefix)
    assert held_out(model, text, clean) == held_out(model, text, clean, seed=1)
    assert held_out(model, text, clean).agreement == 1.0


@pytest.mark.parametrize(
    "values", [{"rows": -1}, {"batch": 0}, {"rows": 0}, {"rows": 0, "lora": LORA, "parts": ()}]
)
def test_recipes_that_train_nothing_are_refused(values):
    """Before anything is loaded."""
    with pytest.raises(ConfigError):
        Recipe(**values)


def test_what_does_not_fit_is_refused(tiny_model, model, text):
    """A part without blocks, a linear that there is not, a foreign projection."""
    bare = FrozenModel(Checkpoint.open(tiny_model), Partition(0, 0))
    cut = Cut(text.prefix, NOISE)
    for part in (Part.BOTTOM, Part.TOP):
        recipe = dataclasses.replace(START, lora=LORA, parts=(part,))
        with pytest.raises(ConfigError, match=f"the {part.value} has no blocks"):
            train_prompt(bare, text, recipe, cut)
    recipe = dataclasses.replace(START, lora=LoraConfig(targets=("w_proj",)))
    with pytest.raises(ConfigError, match="w_proj"):
        train_prompt(model, text, recipe, cut)
    encoder = torch.eye(HIDDEN)[:WIDTH]
    other = Projection.of(encoder, encoder.T, 1, "ab" * 32)
    with pytest.raises(FingerprintMismatch):
        train_prompt(model, text, START, Cut(text.prefix, NOISE, other))
