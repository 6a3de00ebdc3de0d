"""Specs: every name, every mistake."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedsea.errors import ConfigError
from fedsea.privacy.clipping import Clipping
from fedsea.privacy.gaussian import FedSEAGaussian, Gaussian
from fedsea.privacy.metric import MetricDP
from fedsea.privacy.quantization import StochasticQuantization, Ternary
from fedsea.privacy.registry import mechanism_from_spec, mechanism_names


@pytest.mark.parametrize(
    ("text", "mechanism"),
    [
        ("plain", None),
        (" gaussian:clip_norm=1,mu=2 ", Gaussian(1.0, 2.0)),
        ("gaussian:mu=2,by=frobenius,clip_norm=1", Gaussian(1.0, 2.0, by=Clipping.FROBENIUS)),
        ("gaussian:clip_norm=1,epsilon=8,delta=1e-5", Gaussian.calibrated(8.0, 1e-5, 1.0)),
        ("fedsea:scale=0.02", FedSEAGaussian(0.02)),
        ("fedsea:scale=0.02,clip_norm=1", FedSEAGaussian(0.02, 1.0)),
        (
            "stochastic-quantization:bits=4,clip=1,mu=2,width=8",
            StochasticQuantization(4, 1.0, 2.0, 8),
        ),
        ("ternary:clip=1,mu=2,sparsity=0.5,width=8", Ternary(1.0, 2.0, 0.5, 8)),
        ("metric-dp:eta=5", MetricDP(5.0)),
        ("metric-dp:eta=5,clip_norm=1,width=8", MetricDP(5.0, 1.0, 8)),
    ],
)
def test_specs(text, mechanism):
    """What people write, in any order of keys."""
    assert mechanism_from_spec(text) == mechanism


def test_the_width_of_the_cut_fills_in():
    """A spec without width takes that of the rows; one that names it keeps its own."""
    spec = "stochastic-quantization:bits=4,clip=1,mu=2"
    assert mechanism_from_spec(spec, width=32) == StochasticQuantization(4, 1.0, 2.0, 32)
    assert mechanism_from_spec(f"{spec},width=8", width=32) == StochasticQuantization(
        4, 1.0, 2.0, 8
    )
    with pytest.raises(ConfigError, match="needs width"):
        mechanism_from_spec(spec)


def test_a_centre_must_be_the_one_that_is_named():
    """A spec with a centre is read only with that very centre."""
    center = torch.linspace(-1, 1, 4)
    mechanism = Gaussian(1.0, 2.0, center=center)
    assert mechanism_from_spec(mechanism.spec(), center) == mechanism
    assert mechanism_from_spec("gaussian:clip_norm=1,mu=2", center) == mechanism
    for other in (None, center + 1):
        with pytest.raises(ConfigError, match="pass that centre"):
            mechanism_from_spec(mechanism.spec(), other)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "known: plain, gaussian, fedsea"),
        ("laplace:scale=1", "no mechanism 'laplace'"),
        ("plain:mu=1", "no mechanism 'plain'"),
        ("gaussian", "needs clip_norm"),
        ("gaussian:clip_nrm=1,mu=1", "needs clip_norm=NUMBER; clip_nrm is not known"),
        ("gaussian:clip_norm=1", "either mu"),
        ("gaussian:clip_norm=1,mu=2,epsilon=3,delta=1e-5", "either mu"),
        ("gaussian:clip_norm=1,epsilon=3", "either mu"),
        ("gaussian:clip_norm=1,mu=two", "mu=two is not a number"),
        ("gaussian:clip_norm=1,mu=nan", "positive"),
        ("gaussian:clip_norm=1,mu=2,by=column", "row or frobenius"),
        ("gaussian:clip_norm=1,mu=2,bits=3", "knows no 'bits'; it knows clip_norm, mu"),
        ("gaussian:clip_norm=1,mu=2,mu=3", "not one key=value"),
        ("gaussian:clip_norm", "not one key=value"),
        ("gaussian:clip_norm=,mu=1", "not one key=value"),
        ("stochastic-quantization:bits=2.5,clip=1,mu=1,width=4", "bits=2.5 is not a whole number"),
        ("stochastic-quantization:bits=4,clip=1,mu=1,width=inf", "whole number"),
        ("metric-dp:eta=5,clip_norm=1", "width"),
    ],
)
def test_mistakes(text, words):
    """Every mistake is named, with what would be right."""
    with pytest.raises(ConfigError, match=words):
        mechanism_from_spec(text)


@given(st.text(max_size=40))
def test_any_text(text):
    """Whatever is typed is a mechanism or an error of ours."""
    try:
        mechanism_from_spec(text)
    except ConfigError:
        return
    assert text.strip() == "plain"


@given(st.floats(1e-6, 1e6), st.floats(1e-6, 1e6))
def test_parameters_survive_the_spec_exactly(clip_norm, mu):
    """Seventeen digits: the ledger's text is the mechanism itself."""
    again = mechanism_from_spec(Gaussian(clip_norm, mu).spec())
    assert isinstance(again, Gaussian)
    assert (again.clip_norm, again.mu) == (clip_norm, mu)


def test_names():
    """The five mechanisms."""
    assert mechanism_names() == (
        "gaussian", "fedsea", "stochastic-quantization", "ternary", "metric-dp"
    )  # fmt: skip
