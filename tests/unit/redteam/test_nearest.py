"""Nearest neighbours."""

from __future__ import annotations

import pytest
import torch
from tests.unit.redteam.conftest import chain_of

from fedsea.redteam.nearest import Metric, Nearest, mean_cosine, nearest


@pytest.mark.parametrize("metric", list(Metric))
def test_embedding_rows_are_their_own_neighbours(knowledge_of, hidden_states, secret, metric):
    """Without blocks before the cut the baseline reads everything."""
    guess = Nearest(metric).read(chain_of(hidden_states[0]), knowledge_of(0), None)

    assert guess.ids == tuple(secret.tolist())
    assert guess.numbers["mean_cosine"] == pytest.approx(1.0)


def test_length_matters_to_one_metric_only():
    """A row of another length keeps its nearest direction and may lose its nearest point."""
    table = torch.tensor([[1.0, 0.0], [3.0, 3.0]])
    row = torch.tensor([[5.0, 0.5]])

    assert nearest(row, table, Metric.COSINE).item() == 0
    assert nearest(row, table, Metric.EUCLID).item() == 1


def test_mean_cosine_of_opposite_rows():
    """It is -1 for opposite directions and 1 for none at all."""
    rows = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))

    assert mean_cosine(rows, -2 * rows) == pytest.approx(-1.0)
    assert mean_cosine(rows[:0], rows[:0]) == 1.0
