from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsea.errors import ConfigError
from fedsea.privacy.accounts import Budget, Charge, Frontier, Spending, Statement
from fedsea.privacy.losses import GaussianLoss
from fedsea.privacy.mechanism import Unit
from fedsea.privacy.metric_loss import metric_loss


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "either epsilon at a delta, or mu"),
        ({"epsilon": 1.0, "mu": 1.0}, "either epsilon at a delta, or mu"),
        ({"epsilon": 0.0}, "cannot be kept"),
        ({"epsilon": math.inf}, "cannot be kept"),
        ({"mu": math.nan}, "cannot be kept"),
        ({"mu": -1.0}, "cannot be kept"),
        ({"mu": 1.0, "delta": 0.0}, "no probability"),
        ({"epsilon": 1.0, "delta": 1.0}, "no probability"),
    ],
)
def test_budgets_that_make_no_sense_are_refused(values, words):
    """Neither or both limits, and numbers out of range, are errors."""
    with pytest.raises(ConfigError, match=words):
        Budget(**values)


@given(st.lists(st.tuples(st.floats(0.01, 5), st.integers(0, 1000)), max_size=6))
def test_gaussian_charges_add_in_squares(parts):
    """mu of all releases is the root of the sum of their squares."""
    spent = Spending.of(Charge("gaussian", GaussianLoss(mu), n) for mu, n in parts)

    assert spent.mu() == pytest.approx(math.sqrt(sum(mu * mu * n for mu, n in parts)))


def test_a_release_without_a_guarantee_has_no_bound():
    """One release that is not differentially private makes epsilon, mu and recovery unbounded."""
    spent = Spending.of([Charge("gaussian", GaussianLoss(1.0), 3), Charge("fedsea", None, 1)])

    assert (spent.mu(), spent.epsilon(1e-5), spent.recovery(0.01)) == (math.inf, math.inf, 1.0)
    assert not Budget(mu=100).allows(spent)


def test_nothing_released_costs_nothing():
    """Charges of no release leave the prior as it is."""
    spent = Spending.of([Charge("fedsea", None, 0)])

    assert (spent.mu(), spent.epsilon(1e-5), spent.recovery(0.25)) == (0.0, 0.0, 0.25)


@given(
    mu=st.floats(0.01, 3),
    limit=st.floats(0.1, 30),
    asked=st.lists(st.integers(1, 10**6), min_size=1, max_size=8),
)
def test_a_frontier_says_what_composition_says(mu, limit, asked):
    """Whatever is asked in whatever order, exactly those numbers fit whose total mu fits."""
    frontier = Frontier(Budget(mu=limit), (), GaussianLoss(mu))
    for releases in asked:
        assert frontier.allows(releases) == (mu * math.sqrt(releases) <= limit * (1 + 1e-9))
    most = frontier.most()
    assert mu * math.sqrt(most) <= limit * (1 + 1e-9) < mu * math.sqrt(most + 1)


def test_few_compositions_answer_many_questions():
    """Asking for one release more each time composes a logarithmic number of times."""
    composed = []

    class Counting(GaussianLoss):
        def composed(self, times):
            composed.append(times)
            return GaussianLoss(self.mu_total).composed(times)

    frontier = Frontier(Budget(mu=100.0), (), Counting(1.0))
    assert [frontier.allows(n) for n in range(1, 10_002)] == [True] * 10_000 + [False]
    assert len(composed) < 40


def test_epsilon_budgets_are_exact():
    """The last number of releases that fits has delta(epsilon) within delta; one more has not."""
    budget, loss = Budget(epsilon=8.0), GaussianLoss(0.05)
    most = Frontier(budget, (), loss).most()

    assert loss.composed(most).delta(8.0) <= 1e-5 < loss.composed(most + 1).delta(8.0)


def test_what_cannot_be_composed_does_not_fit():
    """More releases than the grid holds are refused like any others, not with an error."""
    frontier = Frontier(Budget(epsilon=1e9), (), metric_loss(3.0, 1.0, 64))
    assert frontier.allows(1000)
    assert not frontier.allows(2**39)


def test_what_is_left_counts_other_mechanisms():
    """Releases of another mechanism take their share of the budget."""
    loss = GaussianLoss(1.0)
    charges = (Charge("a", loss, 4), Charge("b", loss, 5), Charge("c", None, 0))
    statement = Statement("acme", Unit.PROMPT, "", Budget(mu=10.0), charges)

    assert (statement.releases, statement.left("a"), statement.left("c")) == (9, 91, 0)
    assert Statement("acme", Unit.PROMPT, "", None, charges).left("a") is None
