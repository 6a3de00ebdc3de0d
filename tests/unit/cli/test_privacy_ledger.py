from __future__ import annotations

import json
from statistics import NormalDist

import pytest

from fedsea.privacy.accounts import Budget
from fedsea.privacy.gaussian import FedSEAGaussian, Gaussian
from fedsea.privacy.ledger import Ledger
from fedsea.privacy.mechanism import Unit

ONE = Gaussian(1.0, 1.0)


@pytest.fixture
def path(tmp_path):
    """A ledger with an account of each kind."""
    path = tmp_path / "privacy.ledger"
    with Ledger.open(path) as ledger:
        prompt = ledger.account("acme", Unit.PROMPT, ONE, budget=Budget(mu=10.0))
        prompt.reserve(4).settle(4)
        ledger.account("acme", Unit.RECORD, ONE, "seven").reserve(9)
        ledger.account("globex", Unit.TOKEN, FedSEAGaussian(0.02)).reserve(1).settle(1)
    return path


def test_the_report_shows_every_account(fedsea, path):
    """Releases, mu, epsilon, recovery, budget and what is left are in two tables."""
    result = fedsea("privacy", "report", "--ledger", path)

    assert result.exit_code == 0
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    # Phi(Phi^-1(prior) + mu / 2): a clipped row is half the sensitivity from the centre.
    normal = NormalDist()
    two, three = (normal.cdf(normal.inv_cdf(0.01) + mu / 2) for mu in (2, 3))
    assert f"acme, prompt 4 2 9.997 <= {two:.2%} mu 10" in lines
    assert f"acme, record, seven 9 3 16.68 <= {three:.2%} none" in lines
    assert "globex, token 1 no bound no bound <= 100.00% none" in lines
    assert f"{ONE.spec()} 4 0 96" in lines
    assert "epsilon at delta 1e-05; recovery where a guess is right 0.01 of the time" in lines
    assert "held: reserved by sessions" in result.stderr


def test_delta_and_prior_can_be_chosen(fedsea, path):
    """Both are stated in the title, and change the figures."""
    result = fedsea("privacy", "report", "--ledger", path, "--delta", "1e-3", "--prior", "0.5")

    assert "epsilon at delta 0.001; recovery where a guess is right 0.5" in result.stdout
    assert "<= 84.13%" in result.stdout


def test_the_report_is_exported(fedsea, path, tmp_path):
    """JSON goes to standard output or into a file; what has no bound is null."""
    shown = json.loads(fedsea("privacy", "report", "--ledger", path, "--json", "-").stdout)
    file = tmp_path / "report.json"
    result = fedsea("privacy", "report", "--ledger", path, "--json", file)

    assert (result.exit_code, result.stdout) == (0, "")
    assert json.loads(file.read_text(encoding="utf-8")) == shown
    acme, record, globex = shown["accounts"]
    assert acme["budget"] == {"epsilon": None, "delta": 1e-5, "mu": 10.0}
    assert acme["mechanisms"][0]["left"] == 96
    assert (record["record"], record["mechanisms"][0]["held"]) == ("seven", 9)
    assert (globex["epsilon"], globex["mu"], globex["recovery_bound"]) == (None, None, 1.0)


def test_names_are_no_markup(fedsea, tmp_path):
    """Brackets in the names of tenants and records are shown as they are."""
    path = tmp_path / "privacy.ledger"
    with Ledger.open(path) as ledger:
        ledger.account("a[red]", Unit.RECORD, ONE, "[/bold]").reserve(1)
    assert "a[red], record, [/bold]" in fedsea("privacy", "report", "--ledger", path).stdout


def test_an_empty_ledger_says_so(fedsea, tmp_path):
    """Nothing released is no empty table."""
    Ledger.open(tmp_path / "new").close()
    assert fedsea("privacy", "report", "--ledger", tmp_path / "new").stdout == (
        "nothing was released yet\n"
    )


def test_the_ledger_can_be_named_by_the_environment(fedsea, path, monkeypatch):
    """FEDSEA_LEDGER is what --ledger is."""
    monkeypatch.setenv("FEDSEA_LEDGER", str(path))
    assert "acme, prompt" in fedsea("privacy", "report").stdout


def test_a_budget_is_changed(fedsea, path):
    """Another limit, no limit, and the limit of a record."""
    change = "privacy", "budget", "acme", "--ledger", path
    shown = fedsea(*change, "--unit", "prompt", "--epsilon", "8", "--delta", "1e-6").stdout
    assert shown == "acme, prompt: epsilon 8 at delta 1e-06\n"
    assert fedsea(*change, "--unit", "record", "--record", "seven", "--mu", "3").exit_code == 0
    with Ledger.open(path) as ledger:
        budgets = [statement.budget for statement in ledger.statements()]
    assert budgets == [Budget(epsilon=8.0, delta=1e-6), Budget(mu=3.0), None]
    assert "epsilon 8 (1e-06)" in fedsea("privacy", "report", "--ledger", path).stdout
    assert fedsea(*change, "--unit", "prompt", "--unlimited").stdout == "acme, prompt: no budget\n"


@pytest.mark.parametrize(
    ("arguments", "exit_code", "words"),
    [
        (["report", "--delta", "0"], 2, "delta"),
        (["report", "--prior", "2"], 2, "prior"),
        (["report", "--json", "/"], 2, "cannot be written"),
        (["budget", "acme", "--unit", "prompt"], 2, "either --unlimited"),
        (["budget", "acme", "--unit", "prompt", "--mu", "1", "--unlimited"], 2, "either"),
        (["budget", "acme", "--unit", "prompt", "--mu", "1", "--epsilon", "1"], 2, "either"),
        (["budget", "acme", "--unit", "prompt", "--mu", "-1"], 2, "cannot be kept"),
        (["budget", "nobody", "--unit", "prompt", "--mu", "1"], 2, "no such account"),
        (["budget", "acme", "--unit", "record", "--mu", "1"], 2, "name the record"),
    ],
)
def test_bad_requests_end_with_one_line(fedsea, path, arguments, exit_code, words):
    """Numbers out of range, contradictions and unknown accounts are named; nothing changes."""
    before = path.read_bytes()
    result = fedsea("privacy", *arguments, "--ledger", path)

    assert (result.exit_code, result.stderr.count("\n")) == (exit_code, 1)
    assert words in result.stderr
    assert path.read_bytes() == before


def test_a_damaged_ledger_ends_with_one_line(fedsea, path, tmp_path):
    """Missing, foreign and damaged ledgers have the exit code of the privacy errors."""
    missing = fedsea("privacy", "report", "--ledger", tmp_path / "none")
    path.write_bytes(b"something else")
    foreign = fedsea("privacy", "report", "--ledger", path)

    for result in (missing, foreign):
        assert (result.exit_code, result.stderr.count("\n")) == (8, 1)
    assert "there is no ledger" in missing.stderr
    assert not (tmp_path / "none").exists()
