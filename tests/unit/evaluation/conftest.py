"""Rows of a report with chosen numbers, and files of projections."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedsea.model.checkpoint import Checkpoint
from fedsea.model.projection import Projection
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


@pytest.fixture(name="narrowing")
def file_of_pair(tiny_model, tmp_path):
    """A function that writes a projection of the tiny model to a width: orthonormal, at random."""

    def made(width: int, bottom: int = 1, seed: int = 0) -> Path:
        chance = torch.Generator().manual_seed(seed)
        turn = torch.linalg.qr(torch.randn(48, 48, generator=chance)).Q[:width]
        fingerprint = Checkpoint.open(tiny_model).fingerprint()
        file: Path = tmp_path / f"narrow-{width}-{bottom}-{seed}"
        Projection.of(turn, turn.T.clone(), bottom, fingerprint).save(file)
        return file

    return made
