"""`fedsea demo` from a shell: what it promises, and what it leaves behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys

import psutil
import pytest
from typer.testing import CliRunner

from fedsea.cli.app import app
from fedsea.demo import PROMPTS, unsplit

pytestmark = pytest.mark.slow


@pytest.fixture
def temporary(monkeypatch, tmp_path):
    """A folder of its own for temporary files."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "100")
    return tmp_path


def started(*options: str) -> subprocess.Popen[str]:
    """The demo as a process."""
    return subprocess.Popen(
        [sys.executable, "-m", "fedsea", "demo", *options],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def servers(text: str) -> list[int]:
    """The server processes that the demo names."""
    return [int(pid) for pid in re.findall(r"process (\d+)", text)]


def test_the_demo_shows_a_crash_and_equal_tokens(temporary):
    """Everything is on the screen, no warning beside it, and nothing is left behind."""
    process = started()
    text, errors = process.communicate(timeout=100)

    assert (process.returncode, errors) == (0, "")
    for words in (
        *PROMPTS[0].split(),
        "what crossed the wire",
        "data minimisation",
        "kill -9",
        "rows sent again",
        "tokens/s, first token after",
        "tokens equal those of the unsplit model",
    ):
        assert words in text
    assert len(servers(text)) == 2
    assert not [pid for pid in servers(text) if psutil.pid_exists(pid)]
    assert list(temporary.iterdir()) == []


def test_different_tokens_fail_the_demo(temporary, monkeypatch):
    """The comparison is a real one: its failure is said and is the exit code."""
    monkeypatch.setattr(unsplit, "tokens", lambda *_: [(1, 2, 3)])
    result = CliRunner().invoke(app, ["demo", "--no-kill", "--max-new-tokens", "8"])

    assert result.exit_code == 1
    assert "the tokens DIFFER" in result.stdout
    assert "kill -9" not in result.stdout


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_demo_takes_its_server_with_it(temporary, number):
    """The server process and the temporary folder go when the demo is told to stop."""
    process = started("--max-new-tokens", "900")
    assert process.stdout is not None
    line = ""
    while "serves at" not in line:
        line = process.stdout.readline()
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)

    assert process.returncode == 128 + number
    assert "Traceback" not in errors
    assert not [pid for pid in servers(line) if psutil.pid_exists(pid)]
    assert list(temporary.iterdir()) == []


def test_a_model_that_is_not_there_fails_the_demo(temporary):
    """One line, and no process is started."""
    result = CliRunner().invoke(app, ["demo", "--model", os.fspath(temporary / "none")])

    assert result.exit_code == 3
    assert "there is no folder" in result.stderr
