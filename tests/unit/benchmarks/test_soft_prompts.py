"""The page of soft prompts, from chosen numbers, and its controls."""

from __future__ import annotations

import math

import pytest
import torch
from benchmarks.soft_prompts import (
    OTHER_MU,
    Budget,
    Cell,
    Line,
    Measured,
    Recovery,
    _cell,
    _plain,
    frequencies,
    page,
)

from fedsea.evaluation.public_text import PublicText
from fedsea.model.checkpoint import Checkpoint

CELL = Cell(12.34, 11.0, 13.9, 0.5)
RECOVERY = Recovery("r2", 0.75, 0.7, 0.8, 0.3)
BUDGET = Budget(150, 100, 0.05, 0.005, 20, 4, 4, 65)


def line(mu):
    """One setting."""
    return Line("tiny", 16, mu, RECOVERY, {"no prompt": CELL, "prompt of this mu": CELL})


def test_the_page_shows_every_setting_with_its_interval_and_its_attack():
    """Controls, both tables, and the spread over seeds."""
    unknown = Cell(99.0, 98.0, 100.0, math.nan)
    measured = Measured(
        {"tiny": {"frequencies": unknown, "no noise": CELL}},
        [line(8.0), line(60.0)],
        [CELL, CELL],
        [line(20.0)],
    )
    text = "\n".join(page("command", BUDGET, measured, 2.0))
    assert "| frequencies | 99.0 (98.0 – 100.0) |" in text
    assert "| no noise | 12.3 (11.0 – 13.9), agreement 50.0% |" in text
    for mu in (8, 20, 60):
        row = f"| tiny | 16 | {mu} | 75.0% (70.0% – 80.0%), r2 | 12.3 (11.0 – 13.9) |"
        assert row in text
    assert f"at mu = {OTHER_MU:g}, from 2 seeds: 12.3, 12.3." in text


def test_numbers_become_json():
    """What is not a number is nothing; mu is kept."""
    kept = _plain({"cells": [Cell(1.0, 0.5, 2.0, math.nan)], "line": line(8.0)})
    assert kept["cells"] == [{"perplexity": 1.0, "low": 0.5, "high": 2.0, "agreement": None}]
    assert kept["line"]["mu"] == 8.0


def test_the_interval_is_that_of_the_mean_over_windows():
    """In nats, and then as perplexities."""
    nats = torch.tensor([1.0, 2.0, 3.0, 2.0], dtype=torch.float64)
    found = _cell(nats, 0.1)
    away = 1.96 * nats.std().item() / 2
    assert found.perplexity == pytest.approx(math.exp(2.0))
    assert (found.low, found.high) == pytest.approx((math.exp(2 - away), math.exp(2 + away)))


def test_frequencies_predict_a_text_of_equal_tokens(tiny_model):
    """Seven tokens in turn: no better than about one in seven."""
    text = PublicText.of(torch.arange(7000) % 7 + 3, [1], 15)
    found = frequencies(text, Checkpoint.open(tiny_model))
    assert found.perplexity == pytest.approx(7.0, rel=0.05)
