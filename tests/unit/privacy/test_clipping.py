"""Clipping: nothing longer than the radius, nothing that is not finite."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedsea.errors import ConfigError, UnsafeRows
from fedsea.privacy.clipping import Clipping, checked_rows, clip, clip_matrix, clip_rows

NUMBERS = st.floats(-1e6, 1e6, width=32)
MATRICES = st.lists(st.lists(NUMBERS, min_size=3, max_size=3), min_size=1, max_size=4)


@given(MATRICES, st.floats(1e-3, 1e3))
def test_no_row_is_longer_than_the_radius(values, radius):
    """Every row ends inside the ball; rows inside it stay as they are."""
    rows = torch.tensor(values, dtype=torch.float64)
    clipped = clip_rows(rows, radius)
    assert (clipped.norm(dim=1) <= radius * (1 + 1e-12)).all()
    inside = rows.norm(dim=1) <= radius
    assert torch.equal(clipped[inside], rows[inside])


@given(MATRICES, st.floats(1e-3, 1e3))
def test_the_matrix_is_scaled_as_a_whole(values, radius):
    """One factor for all rows brings the Frobenius norm under the radius."""
    rows = torch.tensor(values, dtype=torch.float64)
    clipped = clip_matrix(rows, radius)
    assert float(clipped.norm()) <= radius * (1 + 1e-12)
    assert torch.allclose(clipped * float(rows.norm()), rows * float(clipped.norm()))


def test_direction_is_kept():
    """A row that is clipped points where it pointed."""
    assert torch.allclose(
        clip_rows(torch.tensor([[3.0, 4.0]]).double(), 1.0), torch.tensor([[0.6, 0.8]]).double()
    )


def test_an_infinite_radius_clips_nothing():
    """No clipping is an infinite radius."""
    rows = torch.full((2, 2), 1e30, dtype=torch.float64)
    assert torch.equal(clip(rows, math.inf, Clipping.ROW), rows)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_that_are_not_finite_are_refused(bad, dtype):
    """NaN and infinity never reach a norm, and the message holds no value."""
    rows = torch.ones(3, 4, dtype=dtype)
    rows[1, 2] = bad
    with pytest.raises(UnsafeRows, match="nothing was sent"):
        checked_rows(rows)


def test_infinities_that_cancel_are_refused():
    """Opposite infinities do not hide each other."""
    with pytest.raises(UnsafeRows):
        checked_rows(torch.tensor([[math.inf, -math.inf]]))


def test_large_finite_rows_pass():
    """Finite fp32 numbers whose squares overflow fp32 are clipped, not refused."""
    rows = checked_rows(torch.full((1, 4), 3e38))
    assert float(clip_rows(rows, 1.0).norm()) == pytest.approx(1)


@pytest.mark.parametrize(
    "rows", [torch.ones(3), torch.ones(2, 0), torch.ones(2, 2, dtype=torch.int64)]
)
def test_what_is_no_matrix_of_floats_is_refused(rows):
    """Shape and dtype are checked."""
    with pytest.raises(ConfigError, match="floating tensor"):
        checked_rows(rows)
