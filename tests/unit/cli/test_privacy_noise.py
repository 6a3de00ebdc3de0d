from __future__ import annotations

import json

import pytest
from tests.broken_mechanisms import ForgottenClip

from fedsea.privacy.registry import mechanism_from_spec, mechanism_names

QUICK = "--width", "8", "--samples", "4000", "--confidence", "0.99"


def test_a_plan_names_every_mechanism(fedsea):
    """Noise, its norm, bytes and epsilon in a table, and the specs to paste below it."""
    result = fedsea("privacy", "plan", "--epsilon", "8", "--unit", "token")
    specs = [line for line in result.stdout.splitlines() if ":" in line and "=" in line]

    assert result.exit_code == 0
    assert {spec.partition(":")[0] for spec in specs} == set(mechanism_names())
    assert all(mechanism_from_spec(spec) is not None for spec in specs)
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert "gaussian sigma 1.201 13.6 512 7.994 7.994" in lines
    assert "unit token: 1 release; epsilon at delta 1e-05" in result.stdout


def test_a_plan_for_programs(fedsea):
    """--json gives the same as numbers; goal, prior and load can be chosen."""
    result = fedsea(
        *("privacy", "plan", "--recovery-bound", "0.2", "--prior", "0.05", "--tokens", "10"),
        *("--sessions", "3", "--width", "16", "--clip-norm", "2", "--mechanism", "gaussian"),
        "--json",
    )
    found = json.loads(result.stdout)
    (only,) = found["plans"]

    assert found["goal"] == "recovery 0.2 at prior 0.05"
    assert found["releases"] == 30
    assert only["recovery_bound"] == pytest.approx(0.2, rel=0.01)
    assert only["row_bytes"] == 64
    assert mechanism_from_spec(only["mechanism"]) is not None


def test_a_plan_for_training(fedsea):
    """Every use of an example releases its rows and its gradients."""
    result = fedsea(
        *("privacy", "plan", "--mu", "1", "--examples", "30", "--tokens", "10", "--width", "16"),
        *("--mechanism", "gaussian", "--json"),
    )
    found = json.loads(result.stdout)
    (only,) = found["plans"]

    assert found["releases"] == 2 * 30 * 10
    assert only["mu"] == pytest.approx(1.0, rel=1e-3)


def test_an_audit_through_the_codec(fedsea):
    """Counts and floats pass, also in codecs that round; a claim beyond the samples says so."""
    result = fedsea(
        *("privacy", "audit", *QUICK, "--codec", "bf16"),
        *("--mechanism", "gaussian:clip_norm=1,mu=2"),
        *("--mechanism", "stochastic-quantization:bits=3,clip=0.1,mu=2"),
        *("--mechanism", "gaussian:clip_norm=1,mu=30"),
    )

    assert result.exit_code == 0
    assert result.stdout.count("consistent") == 2
    assert result.stdout.count("untestable") == 1
    assert "the most that so many releases can show" in result.stderr


def test_an_audit_that_fails_ends_with_an_error(fedsea, monkeypatch):
    """The table is shown, then one line, and the exit code of the privacy errors."""
    monkeypatch.setattr(
        "fedsea.privacy.registry.mechanism_from_spec", lambda *_, **__: ForgottenClip(1.0, 2.0)
    )
    result = fedsea("privacy", "audit", *QUICK, "--mechanism", "gaussian:clip_norm=1,mu=2")

    assert result.exit_code == 8
    assert "BROKEN" in result.stdout
    assert "gives away more than it claims" in result.stderr
    assert result.stderr.count("\n") == 1


def test_an_audit_for_programs(fedsea):
    """--json holds the figures and the verdict."""
    result = fedsea(
        "privacy", "audit", *QUICK, "--mechanism", "ternary:clip=1,mu=2,sparsity=0.5", "--json"
    )
    (only,) = json.loads(result.stdout)["audits"]

    assert only["passed"] is True
    assert 1.0 < only["shown_mu"] < only["claimed_mu"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["plan"], "give one goal"),
        (["plan", "--mu", "1", "--epsilon", "1"], "give one goal"),
        (["plan", "--mu", "-1"], "cannot be kept"),
        (["plan", "--epsilon", "1", "--delta", "2"], "delta 2.0 is no probability"),
        (["plan", "--recovery-bound", "0.001"], "above the prior"),
        (["plan", "--mu", "1", "--tokens", "0"], "0 tokens"),
        (["plan", "--mu", "1", "--examples", "0"], "0 examples"),
        (["plan", "--mu", "1", "--examples", "2", "--sessions", "2"], "leave --sessions out"),
        (["plan", "--mu", "1", "--clip-norm", "0"], "clip norm"),
        (["plan", "--mu", "1", "--width", "1"], "width 1"),
        (["plan", "--mu", "1", "--mechanism", "magic"], "no mechanism 'magic'"),
        (["audit", "--mechanism", "plain"], "nothing to audit"),
        (["audit", "--mechanism", "magic"], "no mechanism 'magic'"),
        (["audit", "--mechanism", "fedsea:scale=0.02"], "not differentially private"),
        (["audit", "--mechanism", "gaussian:clip_norm=1,mu=1", "--codec", "zip"], "no codec 'zip'"),
        (["audit", "--mechanism", "gaussian:clip_norm=1,mu=1", "--codec", "counts"], "no codec"),
        (["audit", "--mechanism", "gaussian:clip_norm=1,mu=1", "--samples", "9"], "show nothing"),
        (["audit", "--mechanism", "gaussian:clip_norm=1,mu=1", "--width", "0"], "width above 0"),
    ],
)
def test_bad_requests_end_with_one_line(fedsea, arguments, words):
    """Every option out of range and every unknown name is an error of ours."""
    result = fedsea("privacy", *arguments)

    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert words in result.stderr
