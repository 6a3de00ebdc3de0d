"""The sweep: every mechanism, and noise of the ratio that was asked for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedsea.errors import ConfigError
from fedsea.evaluation.sweep import published, sweep
from fedsea.privacy.noise import NoiseSource
from fedsea.privacy.registry import mechanism_from_spec, mechanism_names

ROWS = [torch.randn(400, 32, generator=torch.Generator().manual_seed(0)) * 0.3]


def test_a_sweep_has_every_mechanism():
    """No mechanism is left out, and noise that is possible for all has a setting of each."""
    names = [spec.partition(":")[0] for spec in sweep(ROWS, (8, 16))]
    assert {name: names.count(name) for name in names} == dict.fromkeys(mechanism_names(), 2)


@pytest.mark.parametrize("ratio", [0.5, 2.0, 8.0])
def test_noise_has_the_ratio_asked_for(ratio):
    """What mechanisms really do to rows is within a fifth of what the formulas say.

    Not so for outputs that are clipped, and the ternary mechanism's noise is never small.
    """
    for spec in sweep(ROWS, (ratio,)):
        mechanism = mechanism_from_spec(spec)
        assert mechanism is not None
        if mechanism.name == "metric-dp" or (mechanism.name == "ternary" and ratio < 8):
            continue
        released = mechanism.values(mechanism.protect(ROWS[0], NoiseSource(seed=b"s" * 32)))
        measured = float((released - ROWS[0]).norm() / ROWS[0].norm())
        assert measured == pytest.approx(ratio, rel=0.2), spec


@given(scale=st.floats(1e-3, 1e3), ratio=st.floats(0.05, 50))
def test_every_spec_of_a_sweep_can_be_made(scale, ratio):
    """Whatever the scale of the rows and the noise, no parameter is out of range."""
    for spec in sweep([ROWS[0] * scale], (ratio,)):
        assert mechanism_from_spec(spec) is not None


def test_published_scales_are_mechanisms():
    """The paper's scales can be made, and are not differentially private."""
    for spec in published():
        mechanism = mechanism_from_spec(spec)
        assert mechanism is not None
        assert mechanism.loss() is None


@pytest.mark.parametrize("ratio", [0, -1, float("nan"), float("inf")])
def test_ratios_must_be_positive(ratio):
    """No noise and unlimited noise are no settings of a sweep."""
    with pytest.raises(ConfigError, match="positive"):
        sweep(ROWS, (ratio,))
