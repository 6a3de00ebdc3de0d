from __future__ import annotations

import io
import sys

import pytest

from fedsea.cli.generate import read_prompt, show_stats, summary
from fedsea.client.generation import Completion, Sample, Timing
from fedsea.client.sampling import FinishReason
from fedsea.errors import RequestError
from fedsea.transport.recording import Direction, Message, Recorder


@pytest.fixture
def completion():
    """Five tokens in, two samples out."""
    samples = (
        Sample("ab", (1, 2, 3), FinishReason.LENGTH),
        Sample("c", (4, 5, 6), FinishReason.EOS),
    )
    return Completion(samples, 5, Timing(0.25, 2.25))


@pytest.fixture
def recorder():
    """One message each way."""
    found = Recorder(kept=0)
    found(Message(Direction.UP, 0.0, b"x" * 1500))
    found(Message(Direction.DOWN, 1.0, b"y" * 10))
    return found


class Terminal(io.StringIO):
    """Standard input that is a terminal."""

    def isatty(self):
        return True


def test_prompt_is_the_argument_or_standard_input(monkeypatch):
    """An argument wins, also an empty one; otherwise all of standard input but its last newline."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("two\nlines\n"))

    assert read_prompt("given") == "given"
    assert read_prompt("") == ""
    assert read_prompt(None) == "two\nlines"


@pytest.mark.parametrize(
    ("stdin", "words"), [(Terminal(), "pipe text in"), (io.StringIO(), "empty")]
)
def test_a_missing_prompt_is_refused(monkeypatch, stdin, words):
    """A terminal is not waited for, and an empty pipe is no prompt."""
    monkeypatch.setattr(sys, "stdin", stdin)
    with pytest.raises(RequestError, match=words):
        read_prompt(None)


def test_summary_holds_answers_speed_and_traffic(completion, recorder):
    """What `--json` prints is complete."""
    found = summary(completion, recorder)

    assert (found["text"], found["finish_reason"], found["prompt_tokens"]) == ("ab", "length", 5)
    assert [sample["token_ids"] for sample in found["samples"]] == [(1, 2, 3), (4, 5, 6)]
    assert (found["first_token_seconds"], found["seconds"]) == (0.25, 2.25)
    assert found["tokens_per_second"] == 2.0
    assert found["wire"] == {
        "up": {"messages": 1, "bytes": 1500},
        "down": {"messages": 1, "bytes": 10},
    }


def test_stats_are_two_lines_on_standard_error(completion, recorder, capsys):
    """Figures do not mix with the text."""
    show_stats(completion, recorder)
    printed = capsys.readouterr()

    assert printed.out == ""
    assert printed.err == (
        "5 tokens in, 6 out (length) in 2.25 s; first token after 250.0 ms, then 2.0 tokens/s\n"
        "wire: 1 messages up with 1.5 kB, 1 down with 10 B\n"
    )


@pytest.mark.parametrize(
    ("arguments", "exit_code", "words"),
    [
        (["--plaintext", "--top-p", "7"], 2, "top_p = 7.0: it must be"),
        (["--plaintext", "--stop", ""], 2, "stop"),
        (["--plaintext", "--server", "10.0.0.1:5"], 2, "plaintext is for loopback only"),
        (["--plaintext"], 3, "there is no folder /nowhere/model"),
        ([], 2, "no certificate: give --certs DIR"),
        (["--ca", "a", "--cert", "b", "--key", "c"], 6, "a does not exist"),
    ],
)
def test_bad_input_ends_with_one_line(fedsea, arguments, exit_code, words):
    """Options are checked before files, and files before anything connects."""
    result = fedsea("generate", "/nowhere/model", "hi", *arguments)

    assert (result.exit_code, result.stderr.count("\n")) == (exit_code, 1)
    assert words in result.stderr
