"""Rounding to a grid of powers of two."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from fedsea.privacy.grid import grid_step, on_grid


@given(st.floats(1e-6, 1e6))
def test_the_step_is_a_power_of_two_near_sigma_over_256(sigma):
    """A power of two above sigma / 512 and at most sigma / 256."""
    step = grid_step(sigma)
    assert math.frexp(step)[0] == 0.5
    assert sigma / 512 < step <= sigma / 256


@given(st.lists(st.floats(-1e3, 1e3), min_size=1), st.floats(1e-2, 1e3))
def test_values_are_multiples_of_the_step(values, sigma):
    """Every value is a whole number of steps, at most half a step from where it was."""
    step = grid_step(sigma)
    exact = torch.tensor(values, dtype=torch.float64)
    rounded = on_grid(exact, step)
    steps = rounded.double() / step
    assert rounded.dtype == torch.float32
    assert torch.equal(steps, steps.round())
    assert ((rounded.double() - exact).abs() <= step / 2 + exact.abs() * 2**-24).all()
