"""Calibrations: statistics of public rows, and what does not fit them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedsea import artifacts
from fedsea.errors import CheckpointError, ConfigError, FingerprintMismatch
from fedsea.privacy.calibration import Calibration

MODEL = "ab" * 32
WIDTH = 6


def rows(count=4000, seed=0):
    """Rows with a mean of 1, 2, ... and a scale of 1."""
    chance = torch.Generator().manual_seed(seed)
    return torch.randn(count, WIDTH, generator=chance) + torch.arange(1.0, WIDTH + 1)


def calibration(projection=""):
    """Statistics of such rows, in chunks of unequal length."""
    return Calibration.of(rows().split([1, 999, 3000]), 1, MODEL, projection)


def test_mean_and_scale_are_those_of_all_rows():
    """Chunks count by their rows."""
    made, all_rows = calibration(), rows()
    assert made.rows == 4000
    assert torch.allclose(made.mean, all_rows.mean(0), atol=1e-5)
    assert torch.allclose(made.scale, all_rows.std(0, correction=0), atol=1e-5)


@pytest.mark.parametrize("centered", [True, False])
@given(share=st.floats(0, 1))
def test_at_least_the_share_lies_inside(centered, share):
    """A clip norm from a quantile leaves that share of the rows as they are, and few more."""
    made, found = calibration(), rows()
    norms = (found - made.mean if centered else found).norm(dim=1)
    inside = (norms <= made.clip_norm(share, centered) * (1 + 1e-5)).float().mean()
    assert share - 1e-3 <= inside <= share + 3e-3


def test_coordinates_are_pooled():
    """The clip of coordinates is a quantile over all of them."""
    made = calibration()
    assert made.clip(1.0) == pytest.approx(rows().abs().max().item())
    assert (rows().abs() <= made.clip(0.5)).float().mean() == pytest.approx(0.5, abs=2e-3)


def test_centering_makes_norms_smaller():
    """That is why it is done."""
    assert calibration().clip_norm() < calibration().clip_norm(centered=False)


def test_a_file_gives_the_calibration_back(tmp_path):
    """Everything survives."""
    made = calibration("cd" * 32)
    made.save(tmp_path / "file")
    found = Calibration.load(tmp_path / "file")
    assert torch.equal(found.mean, made.mean)
    assert torch.equal(found.scale, made.scale)
    assert torch.equal(found.coordinates, made.coordinates)
    assert (found.rows, found.bottom, found.model) == (4000, 1, MODEL)
    assert found.projection == "cd" * 32
    assert found.clip_norm(0.9) == made.clip_norm(0.9)


def test_a_calibration_of_something_else_is_refused():
    """Width, cut, projection and checkpoint are told apart."""
    made = calibration()
    made.check_fits(WIDTH, 1, MODEL)
    for width, bottom, model, projection, error in (
        (WIDTH + 1, 1, MODEL, "", ConfigError),
        (WIDTH, 0, MODEL, "", ConfigError),
        (WIDTH, 1, MODEL, "cd" * 32, ConfigError),
        (WIDTH, 1, "cd" * 32, "", FingerprintMismatch),
    ):
        with pytest.raises(error):
            made.check_fits(width, bottom, model, projection)


@pytest.mark.parametrize("chunks", [[], [rows(1)], [rows(3) / 0]])
def test_rows_that_say_nothing_are_refused(chunks):
    """No rows, one row, and rows that are not finite."""
    with pytest.raises(ConfigError):
        Calibration.of(chunks, 1, MODEL)


@pytest.mark.parametrize("share", [-0.01, 1.01, float("nan")])
def test_shares_are_between_none_and_all(share):
    """Anything else is no quantile."""
    with pytest.raises(ConfigError):
        calibration().clip_norm(share)


@pytest.mark.parametrize(
    ("description", "tensors"),
    [
        ({"rows": 1}, {}),
        ({"width": 0}, {}),
        ({"width": WIDTH + 1}, {}),
        ({"bottom": -1}, {}),
        ({"model": "x"}, {}),
        ({"projection": "x"}, {}),
        ({"extra": 1}, {}),
        ({}, {"mean": torch.full((WIDTH,), torch.nan)}),
        ({}, {"scale": -torch.ones(WIDTH)}),
        ({}, {"norms": torch.linspace(1, 0, 1001)}),
        ({}, {"coordinates": torch.linspace(-1, 0, 1001)}),
        ({}, {"extra": torch.ones(1)}),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, description, tensors):
    """Entries and tensors that cannot be are corrupt."""
    path = tmp_path / "file"
    calibration().save(path)
    found = artifacts.read(path, "calibration")
    artifacts.write(
        path, "calibration", {**found.description, **description}, {**found.tensors, **tensors}
    )
    with pytest.raises(CheckpointError):
        Calibration.load(path)
