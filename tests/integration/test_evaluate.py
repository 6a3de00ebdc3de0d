"""`fedsea evaluate` against a server process: the same answers as the unsplit model, over TLS."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.conftest import character_tokenizer
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from fedsea.cli.app import app
from fedsea.client.answering import ByLogits, answers
from fedsea.tasks.catalogue import TASKS
from fedsea.tasks.loading import load
from fedsea.tasks.metrics import judged

WORDS = ("red", "blue", "warm", "cold", "near", "far")


@pytest.fixture
def boolq(tmp_path: Path) -> Path:
    """Twelve records of our own."""
    path = tmp_path / "val.jsonl"
    records = [
        {
            "passage": f"The {one} sea is {other}.",
            "question": f"is the {one} sea {other}",
            "label": bool(at % 2),
        }
        for at, (one, other) in enumerate(zip(WORDS * 2, WORDS[3:] * 4, strict=True))
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture
def evaluate(shared_server, certificates, tiny_model, boolq):
    """Run the command on the file; the result has exit_code, stdout and stderr."""

    def run(*options: str):
        where = ["--server", shared_server.address, "--certs", certificates, "--tenant", "acme"]
        arguments = ["evaluate", "boolq", boolq, "--model", tiny_model, *where, *options]
        return CliRunner(env={"NO_COLOR": "1", "COLUMNS": "120"}).invoke(
            app, [str(argument) for argument in arguments]
        )

    return run


class Whole:
    """The unsplit model."""

    def __init__(self, folder: Path) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(folder).eval()

    def logits(self, examples, keep=None):
        """Logits of the rows to keep."""
        return torch.cat(
            [
                self._model(ids[None]).logits[0][rows]
                for ids, rows in zip(examples, keep, strict=True)
            ]
        )


def test_measures_are_those_of_the_unsplit_model(evaluate, boolq, tiny_model) -> None:
    """As JSON, with what was asked and what crossed the wire."""
    records = load("boolq", boolq)
    unsplit = ByLogits(Whole(tiny_model), character_tokenizer(), {2})
    expected = judged(
        TASKS["boolq"].metric, answers(unsplit, character_tokenizer(), records).predictions, records
    )

    result = evaluate("--json")

    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["metrics"] == expected
    assert (found["task"], found["records"], found["cut"], found["mode"]) == (
        "boolq",
        12,
        0,
        "plain",
    )
    assert found["wire"]["up"] > 0


def test_the_table(evaluate) -> None:
    """For people: each measure in percent, the mode, and notices beside it."""
    result = evaluate("--limit", "4", "--method", "generation", "--max-tokens", "40")

    assert result.exit_code == 0, result.stderr
    assert "boolq: 4 records" in result.stdout
    assert "accuracy" in result.stdout
    assert "mode plain" in result.stderr
    assert "4 prompts were over --max-tokens" in result.stderr


def test_under_a_mechanism(evaluate, tmp_path) -> None:
    """Rows leave through a mechanism and are charged; the mode says so."""
    result = evaluate(
        "--limit", "2", "--json", "--mechanism", "gaussian:clip_norm=8,mu=1", "--ledger",
        str(tmp_path / "ledger.db"),
    )  # fmt: skip

    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["mode"] == "noisy"
