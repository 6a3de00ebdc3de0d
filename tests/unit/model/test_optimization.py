"""Optimizer steps: equal to torch's, exact after saving, untouched by gradients that are not finite."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fedsea.errors import CheckpointError, ConfigError, NotFinite
from fedsea.model.optimization import AdamWConfig, AdapterOptimizer, part_seed, step_generator


def parameters(seed: int = 1) -> dict[str, nn.Parameter]:
    """Three small parameters, one of which takes no gradient."""
    generator = torch.Generator().manual_seed(seed)
    found = {
        name: nn.Parameter(torch.randn(shape, generator=generator))
        for name, shape in {"1/a": (2, 3), "1/b": (4, 2), "frozen": (2, 2)}.items()
    }
    found["frozen"].requires_grad_(False)
    return found


def put_gradients(kept: dict[str, nn.Parameter], step: int, times: float = 1.0) -> None:
    """Gradients that follow from the step's number."""
    generator = torch.Generator().manual_seed(step)
    for parameter in kept.values():
        if parameter.requires_grad:
            parameter.grad = torch.randn(parameter.shape, generator=generator) * times


def values(kept: dict[str, nn.Parameter]) -> list[torch.Tensor]:
    """Copies of the parameters."""
    return [parameter.detach().clone() for parameter in kept.values()]


@pytest.mark.parametrize("clip", [None, 0.5, 100.0])
def test_steps_are_those_of_torch(clip):
    """AdamW with clipping by the global norm, step after step, bit for bit."""
    ours, theirs = parameters(), parameters()
    optimizer = AdapterOptimizer(ours, AdamWConfig(weight_decay=0.1))
    reference = torch.optim.AdamW(
        [one for one in theirs.values() if one.requires_grad], weight_decay=0.1
    )
    for step in range(1, 6):
        rate = 0.1 / step
        put_gradients(ours, step)
        put_gradients(theirs, step)
        for group in reference.param_groups:
            group["lr"] = rate
        expected = nn.utils.clip_grad_norm_(theirs.values(), math.inf if clip is None else clip)
        reference.step()

        assert optimizer.apply(rate, clip) == pytest.approx(float(expected))

        torch.testing.assert_close(values(ours), values(theirs), rtol=1e-6, atol=1e-7)
    assert optimizer.steps == 5
    assert all(parameter.grad is None for parameter in ours.values())


def test_scaled_gradients_give_the_same_step():
    """Gradients that are 1024 times too large, and said to be, change nothing; nor does the norm."""
    plain, scaled = parameters(), parameters()
    one, other = (AdapterOptimizer(kept, AdamWConfig()) for kept in (plain, scaled))
    put_gradients(plain, 1)
    put_gradients(scaled, 1, 1024.0)

    assert one.apply(0.1, 0.5) == pytest.approx(other.apply(0.1, 0.5, scale=1024.0))

    assert all(map(torch.equal, values(plain), values(scaled)))


def test_saved_state_goes_on_bit_for_bit():
    """Five steps equal two, a save, a load elsewhere, and three."""
    whole, first = parameters(), parameters()
    through, begun = AdapterOptimizer(whole, AdamWConfig()), AdapterOptimizer(first, AdamWConfig())
    for step in range(1, 6):
        put_gradients(whole, step)
        through.apply(0.01, 1.0)
    for step in (1, 2):
        put_gradients(first, step)
        begun.apply(0.01, 1.0)
    second = {name: nn.Parameter(one.detach().clone()) for name, one in first.items()}
    second["frozen"].requires_grad_(False)
    resumed = AdapterOptimizer(second, AdamWConfig())
    resumed.load({name: tensor.clone() for name, tensor in begun.state().items()})
    for step in (3, 4, 5):
        put_gradients(second, step)
        resumed.apply(0.01, 1.0)

    assert resumed.steps == 5
    assert all(map(torch.equal, values(whole), values(second)))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_not_finite_gradients_change_nothing(bad):
    """The step is refused by number; parameters, moments and count stay."""
    kept = parameters()
    optimizer = AdapterOptimizer(kept, AdamWConfig())
    put_gradients(kept, 1)
    optimizer.apply(0.1)
    before = values(kept), {name: one.clone() for name, one in optimizer.state().items()}
    put_gradients(kept, 2)
    kept["1/b"].grad = torch.full((4, 2), bad)

    with pytest.raises(NotFinite, match="step 2"):
        optimizer.apply(0.1, 1.0)

    assert all(map(torch.equal, before[0], values(kept)))
    after = optimizer.state()
    assert all(torch.equal(before[1][name], after[name]) for name in after)
    assert optimizer.steps == 1


def test_missing_gradients_count_as_zero():
    """A parameter that had no part in the loss moves as with a gradient of zeros."""
    missing, zero = parameters(), parameters()
    for kept in (missing, zero):
        put_gradients(kept, 1)
    missing["1/a"].grad = None
    zero["1/a"].grad = torch.zeros(2, 3)
    for kept in (missing, zero):
        AdapterOptimizer(kept, AdamWConfig()).apply(0.1)

    assert all(map(torch.equal, values(missing), values(zero)))


def test_nothing_to_train_counts_steps():
    """A part without parameters keeps step with the others."""
    optimizer = AdapterOptimizer({}, AdamWConfig())
    assert optimizer.apply(0.1, 1.0) == 0
    other = AdapterOptimizer({}, AdamWConfig())
    other.load(optimizer.state())
    assert other.steps == 1


def test_clear_forgets_gradients():
    """After `clear` the norm is zero."""
    kept = parameters()
    optimizer = AdapterOptimizer(kept, AdamWConfig())
    put_gradients(kept, 1)
    optimizer.clear()
    assert optimizer.gradient_norm() == 0


def test_state_of_other_parameters_is_refused():
    """Names and shapes are compared before anything is taken over."""
    optimizer = AdapterOptimizer(parameters(), AdamWConfig())
    state = optimizer.state()
    for change in (
        {name: one for name, one in state.items() if name != "steps"},
        state | {"1/a.exp_avg": torch.zeros(5)},
        state | {"2/a.exp_avg": torch.zeros(2)},
    ):
        with pytest.raises(CheckpointError, match="other parameters"):
            optimizer.load(change)


def test_parameters_of_another_dtype_are_refused():
    """What is trained is kept in fp32."""
    with pytest.raises(ConfigError, match="fp32"):
        AdapterOptimizer({"a": nn.Parameter(torch.ones(2).bfloat16())}, AdamWConfig())


@pytest.mark.parametrize(
    "options",
    [
        {"betas": (1.0, 0.9)},
        {"betas": (0.9, -0.1)},
        {"eps": 0.0},
        {"eps": math.nan},
        {"weight_decay": -1.0},
        {"weight_decay": math.inf},
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(options):
    """Every value says its range."""
    with pytest.raises(ConfigError, match=next(iter(options))):
        AdamWConfig(**options)


@pytest.mark.parametrize(
    "step", [(math.nan, None, 1.0), (-1.0, None, 1.0), (0.1, 0.0, 1.0), (0.1, 1.0, 0.0)], ids=str
)
def test_steps_out_of_range_change_nothing(step):
    """A rate, clip or scale that makes no sense is refused before the step."""
    kept = parameters()
    put_gradients(kept, 1)
    before = values(kept)
    optimizer = AdapterOptimizer(kept, AdamWConfig())
    with pytest.raises(ConfigError):
        optimizer.apply(*step)
    assert all(map(torch.equal, before, values(kept)))
    assert optimizer.steps == 0


def test_generators_follow_from_seed_step_and_forward():
    """The same three numbers give the same draws, any other ones others."""

    def draw(seed: int, step: int, index: int) -> torch.Tensor:
        return torch.rand(8, generator=step_generator(seed, step, index))

    assert torch.equal(draw(1, 2, 3), draw(1, 2, 3))
    for other in ((0, 2, 3), (1, 3, 3), (1, 2, 4), (12, 3, 0)):
        assert not torch.equal(draw(1, 2, 3), draw(*other))


def test_parts_have_seeds_of_their_own():
    """Bottom, trunk and top draw different numbers from one seed, which fit in 63 bits."""
    seeds = {part_seed(seed, part) for seed in (0, 1) for part in ("bottom", "trunk", "top")}
    assert len(seeds) == 6
    assert all(0 <= seed < 2**63 for seed in seeds)
