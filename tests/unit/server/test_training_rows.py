"""Rows that tenants make the server hold: what is counted is given back, and bounded."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsea.errors import QuotaExceeded
from fedsea.server.training_rows import RowBudget


def test_rows_are_kept_up_to_one_bound_and_held_up_to_another():
    """A tenant's rows beyond the first are held without activations, beyond the second refused."""
    budget = RowBudget(kept=10, pending=25)
    assert budget.take("acme", 8)
    assert not budget.take("acme", 8)
    assert budget.take("globex", 10)
    assert (budget.kept, budget.pending) == (18, 26)
    with pytest.raises(QuotaExceeded, match=r"holds 16 rows.*asks for 10 more") as refused:
        budget.take("acme", 10)
    assert refused.value.retry_after is None
    assert budget.take("acme", 2)


@given(
    steps=st.lists(st.tuples(st.sampled_from("ab"), st.integers(1, 9), st.booleans()), max_size=40)
)
def test_nothing_is_left_when_all_is_given_back(steps):
    """Whatever is taken and given back in whatever order, the sums are those of what is held."""
    budget = RowBudget(kept=12, pending=20)
    held: list[tuple[str, int, bool]] = []
    for tenant, rows, gives_back in steps:
        if gives_back and held:
            owner, count, kept = held.pop()
            budget.give_back(owner, count, kept=kept)
        else:
            own = sum(count for owner, count, _ in held if owner == tenant)
            if own + rows > 20:
                with pytest.raises(QuotaExceeded):
                    budget.take(tenant, rows)
            else:
                held.append((tenant, rows, budget.take(tenant, rows)))
        assert budget.pending == sum(count for _, count, _ in held)
        assert budget.kept == sum(count for _, count, kept in held if kept)
    for owner, count, kept in held:
        budget.give_back(owner, count, kept=kept)
    assert (budget.kept, budget.pending) == (0, 0)
