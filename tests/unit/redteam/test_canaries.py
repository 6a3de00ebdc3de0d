"""Canaries: exposure and one-run audits."""

from __future__ import annotations

import math

import pytest
import torch

from fedsea.errors import ConfigError
from fedsea.redteam.canaries import audit, draw, exposure, least_epsilon


def test_exposure_is_the_rank_in_bits():
    """First of 256 gives eight bits; the middle gives one; the last gives none."""
    others = torch.arange(1, 256).double()

    assert exposure(0.0, others) == 8.0
    assert exposure(128.0, others) == pytest.approx(1.0, abs=0.02)
    assert exposure(1000.0, others) == 0.0


def test_secrets_that_were_not_trained_on_have_an_exposure_near_one_and_a_half():
    """The mean of -log2 of a uniform rank is 1 / ln 2."""
    generator = torch.Generator().manual_seed(3)
    drawn = torch.rand(400, 512, generator=generator)
    mean = sum(exposure(float(row[0]), row[1:]) for row in drawn) / len(drawn)

    assert mean == pytest.approx(1 / math.log(2), abs=0.2)


@pytest.mark.parametrize(("right", "epsilon"), [(200, 4.0), (150, 0.77), (100, 0.0)])
def test_right_guesses_prove_an_epsilon(right, epsilon):
    """Golden values without delta: q^200 = 0.025 gives ln(q / (1 - q)) = 3.98."""
    found = least_epsilon(right, 200, 200, delta=0.0, confidence=0.975)

    assert found == pytest.approx(epsilon, abs=0.03)


def test_a_larger_delta_proves_less():
    """What may fail with chance delta explains some of the guesses."""
    bounds = [least_epsilon(190, 200, 1000, delta) for delta in (0.0, 1e-6, 1e-4)]

    assert bounds == sorted(bounds, reverse=True)
    assert bounds[0] > bounds[-1]


def test_randomized_response_is_never_overstated():
    """Scores that show each coin with epsilon 1 prove at most 1 in nearly all runs."""
    generator = torch.Generator().manual_seed(8)
    keep = 1 / (1 + math.exp(-1))
    too_large = 0
    for _ in range(40):
        coins = torch.rand(400, generator=generator) < 0.5
        kept = torch.rand(400, generator=generator) < keep
        shown = torch.where(kept, coins, ~coins).double()
        scores = shown + 0.1 * torch.rand(400, generator=generator)
        too_large += audit(scores, coins, 200, delta=0.0).epsilon > 1.0
    assert too_large <= 5


def test_perfect_scores_prove_much_and_abstaining_helps():
    """The floor of the audit: with all coins known the bound grows with the guesses."""
    coins = torch.arange(100) % 2 == 0
    found = audit(coins.double(), coins, 100)

    assert found.right == found.guesses == 100
    assert found.epsilon > 3
    assert audit(coins.double(), coins, 10).epsilon < found.epsilon


def test_canaries_are_drawn_by_seed_and_differ():
    """The same seed gives the same secrets, all different, out of the given tokens."""
    made = draw((1, 2), 3, 50, tuple(range(10, 20)), seed=4)

    assert made == draw((1, 2), 3, 50, tuple(range(10, 20)), seed=4)
    assert made != draw((1, 2), 3, 50, tuple(range(10, 20)), seed=5)
    assert len({canary.secret for canary in made}) == 50
    assert all(canary.ids[:2] == (1, 2) and len(canary.ids) == 5 for canary in made)


def test_bad_input_is_refused():
    """Counts that cannot be, and canaries that do not exist."""
    with pytest.raises(ConfigError):
        exposure(1.0, torch.zeros(0))
    with pytest.raises(ConfigError):
        draw((1,), 1, 6, tuple(range(10)), seed=0)
    for right, guesses, canaries in ((11, 10, 20), (5, 30, 20), (-1, 10, 20)):
        with pytest.raises(ConfigError):
            least_epsilon(right, guesses, canaries)
    with pytest.raises(ConfigError):
        least_epsilon(1, 2, 3, delta=1.0)
    for guesses in (3, 0, 12):
        with pytest.raises(ConfigError):
            audit(torch.zeros(10), torch.zeros(10, dtype=torch.bool), guesses)
    with pytest.raises(ConfigError):
        audit(torch.zeros(10), torch.zeros(9, dtype=torch.bool), 4)
