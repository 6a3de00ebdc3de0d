"""Rows of a report with chosen numbers."""

from __future__ import annotations

import pytest

from fedsea.redteam.report import Row, Utility


def make_row(**changed):
    """A row of R1 on a clean channel; `accuracy` is the protected model's."""
    accuracy = changed.pop("accuracy", 0.5)
    values = {
        "attack": "r1",
        "model": "tiny",
        "bottom": 1,
        "top": 1,
        "mechanism": "plain",
        "parameters": "plain",
        "knowledge": "base",
        "recovery": 1.0,
        "low": 0.99,
        "high": 1.0,
        "tokens": 400,
        "prior": 0.3,
        "clean": 1.0,
        "utility": Utility(perplexity=5.0, accuracy=accuracy, agreement=0.9),
        "clean_utility": Utility(perplexity=4.0, accuracy=0.5, agreement=1.0),
    }
    return Row(**{**values, **changed})


@pytest.fixture(name="make_row")
def row_maker():
    """A function that makes a row with chosen fields."""
    return make_row
