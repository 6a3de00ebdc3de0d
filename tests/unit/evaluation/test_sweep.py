"""The sweep: every mechanism, and noise of the ratio that was asked for."""

from __future__ import annotations

import pytest
import torch

from fedsea.errors import ConfigError
from fedsea.evaluation.sweep import published, sweep
from fedsea.privacy.noise import NoiseSource
from fedsea.privacy.registry import mechanism_from_spec, mechanism_names

ROWS = [torch.randn(400, 32, generator=torch.Generator().manual_seed(0)) * 0.3]


def test_a_sweep_has_every_mechanism():
    """No mechanism is left out, and each has as many settings as there are ratios."""
    names = [spec.partition(":")[0] for spec in sweep(ROWS, (0.5, 8))]
    assert {name: names.count(name) for name in names} == dict.fromkeys(mechanism_names(), 2)


@pytest.mark.parametrize("spec", sweep(ROWS, (2.0, 8.0)))
def test_noise_has_the_ratio_asked_for(spec):
    """What a mechanism really does to rows is within a fifth of what the formula says."""
    ratio = 2.0 if spec in sweep(ROWS, (2.0,)) else 8.0
    mechanism = mechanism_from_spec(spec)
    assert mechanism is not None
    released = mechanism.values(mechanism.protect(ROWS[0], NoiseSource(seed=b"s" * 32)))
    measured = float((released - ROWS[0]).square().mean().sqrt() / ROWS[0].square().mean().sqrt())
    assert measured == pytest.approx(ratio, rel=0.2)


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
