"""`fedsea evaluate`: what it refuses before it loads anything."""

from __future__ import annotations

import json

import pytest


@pytest.fixture
def boolq(tmp_path):
    """A file of two records, one of them with a label."""
    path = tmp_path / "val.jsonl"
    record = {"question": "is it", "passage": "It is."}
    path.write_text(f"{json.dumps(record)}\n{json.dumps({**record, 'label': True})}\n")
    return path


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["mnli"], "there is no task 'mnli'"),
        (["boolq", "--style", "haiku"], "no style 'haiku'; use cloze"),
        (["boolq", "--templates", "absent.toml"], "absent.toml does not exist"),
        (["boolq", "--limit", "0"], "a limit of 0 records"),
        (["boolq", "--batch", "0"], "batch is 0"),
        (["boolq", "--new-tokens", "0"], "new_tokens is 0"),
        (["boolq"], "no certificate"),
        (["boolq", "--epsilon", "1"], "--epsilon is given without a mechanism"),
        (["rte"], "line 1: there is no premise"),
    ],
)
def test_options_that_cannot_be_used(fedsea, boolq, options, words):
    """One line and exit code 2, before a model is looked for."""
    task, *more = options

    result = fedsea("evaluate", task, boolq, "--model", "absent", *more)

    assert result.exit_code == 2
    assert words in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_file_without_labels(fedsea, tmp_path):
    """There is nothing to judge by."""
    path = tmp_path / "test.jsonl"
    path.write_text(json.dumps({"question": "is it", "passage": "It is."}))

    result = fedsea("evaluate", "boolq", path, "--model", "absent")

    assert result.exit_code == 2
    assert "take a file with labels" in result.stderr


def test_the_model_is_an_option_that_must_be_given(fedsea, boolq):
    """Task and file come first, so the model has a name."""
    result = fedsea("evaluate", "boolq", boolq)

    assert result.exit_code == 2
    assert "--model" in result.stderr
