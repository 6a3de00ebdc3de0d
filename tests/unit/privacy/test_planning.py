from __future__ import annotations

import math

import pytest

from fedsea.errors import ConfigError
from fedsea.privacy.accounts import Budget
from fedsea.privacy.clipping import Clipping
from fedsea.privacy.gaussian import Gaussian
from fedsea.privacy.mechanism import Unit
from fedsea.privacy.planning import Goal, Load, plan
from fedsea.privacy.registry import mechanism_from_spec, mechanism_names

TOKEN = Load(Unit.TOKEN, tokens=64, width=128, clip_norm=1.0)
PROMPT = Load(Unit.PROMPT, tokens=64, width=128, clip_norm=1.0, sessions=2)

GOALS = [
    Goal(Budget(epsilon=8.0)),
    Goal(Budget(mu=2.0)),
    Goal(recovery=0.2, prior=0.01),
]


@pytest.mark.parametrize("goal", GOALS, ids=str)
@pytest.mark.parametrize("load", [TOKEN, PROMPT], ids=lambda load: load.unit.value)
def test_plans_keep_the_goal_and_waste_nothing(goal, load):
    """Every mechanism is planned; it keeps the goal, and 2 % less noise would not."""
    plans = list(plan(goal, load))

    assert {made.mechanism.name for made in plans} == set(mechanism_names())
    for made in plans:
        used = {
            "epsilon": made.epsilon / 8.0,
            "mu": made.mu / 2.0,
            "recovery": made.recovery(0.01) / 0.2,
        }
        limit = "recovery" if goal.budget is None else "mu" if goal.budget.mu else "epsilon"
        assert 0.97 < used[limit] <= 1.0 + 1e-9, made.mechanism.spec()


@pytest.mark.parametrize("goal", GOALS, ids=str)
def test_a_plan_can_be_pasted(goal):
    """The spec reads back as the mechanism that was planned."""
    for made in plan(goal, TOKEN):
        assert mechanism_from_spec(made.mechanism.spec()) == made.mechanism


def test_the_gaussian_plan_is_the_closed_form():
    """epsilon 8 at 1e-5 is mu 1.67 for one release, and a root less for each of many."""
    (one,) = plan(Goal(Budget(epsilon=8.0)), TOKEN, ["gaussian"])
    (many,) = plan(Goal(Budget(epsilon=8.0)), PROMPT, ["gaussian"])

    assert (one.releases, many.releases) == (1, 128)
    assert one.mu == pytest.approx(1.666, rel=2e-3)
    assert isinstance(many.mechanism, Gaussian)
    assert many.mechanism.mu == pytest.approx(1.666 / math.sqrt(128), rel=2e-3)
    # The table of noise norms for d = 128 that users are shown: 14 times the clip norm.
    assert one.noise_ratio == pytest.approx(13.6, rel=1e-2)
    assert one.epsilon_each == one.epsilon
    assert many.epsilon_each < many.epsilon


def test_training_is_planned_for_rows_and_holds_for_whole_examples():
    """Clipped whole to C sqrt(n) at mu sqrt(n), an example has the same noise and the same total."""
    uses, tokens = 30, 16
    goal, load = Goal(Budget(mu=2.0)), Load.training(uses, tokens, width=128, clip_norm=3.0)
    (made,) = plan(goal, load, ["gaussian"])
    assert isinstance(made.mechanism, Gaussian)
    whole = Gaussian(
        3.0 * math.sqrt(tokens), made.mechanism.mu * math.sqrt(tokens), Clipping.FROBENIUS
    )

    assert load.releases == 2 * uses * tokens
    assert whole.sigma == pytest.approx(made.noise)
    assert whole.loss().composed(2 * uses).mu() == pytest.approx(made.mu)


def test_only_what_is_asked_for_is_searched():
    """Names choose; the search says what it looks at."""
    looked: list[str] = []
    found = list(plan(GOALS[1], TOKEN, ["ternary", "fedsea"], looked.append))

    assert [made.mechanism.name for made in found] == looked == ["ternary", "fedsea"]


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (Goal, "give one"),
        (lambda: Goal(Budget(mu=1.0), recovery=0.5, prior=0.1), "give one"),
        (lambda: Goal(recovery=0.5), "needs the prior"),
        (lambda: Goal(recovery=0.1, prior=0.2), "above the prior"),
        (lambda: Goal(recovery=1.0, prior=0.2), "above the prior"),
        (lambda: Goal(recovery=0.5, prior=0.0), "above the prior"),
        (lambda: Load(Unit.TOKEN, 0, 8, 1.0), "0 tokens"),
        (lambda: Load(Unit.TOKEN, 1, 8, 1.0, sessions=0), "0 sessions"),
        (lambda: Load(Unit.TOKEN, 1, 1, 1.0), "width 1"),
        (lambda: Load(Unit.TOKEN, 1, 8, 0.0), "clip norm"),
        (lambda: Load(Unit.TOKEN, 1, 8, math.inf), "clip norm"),
        (lambda: list(plan(GOALS[0], TOKEN, ["magic"])), "no mechanism 'magic'"),
    ],
)
def test_bad_requests_are_refused(build, words):
    """Goals and loads without sense, and unknown mechanisms, are errors."""
    with pytest.raises(ConfigError, match=words):
        build()
