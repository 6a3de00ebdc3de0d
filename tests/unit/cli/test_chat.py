from __future__ import annotations

import io
import sys
from concurrent.futures import CancelledError
from types import SimpleNamespace

import pytest

from fedsea.cli.chat import _Repl
from fedsea.client.generation import Completion, Sample, Timing
from fedsea.client.sampling import FinishReason, SamplingParams
from fedsea.errors import PromptTooLong, Unreachable
from fedsea.transport.recording import Recorder


class Answer:
    """A stream of pieces that may end in an exception."""

    def __init__(self, pieces, error=None):
        self._pieces = pieces
        self._error = error
        self.cancelled = False

    def __iter__(self):
        yield from self._pieces
        if self._error is not None:
            raise self._error

    def cancel(self):
        self.cancelled = True

    def result(self):
        sample = Sample("".join(self._pieces), (1, 2), FinishReason.EOS)
        return Completion((sample,), 3, Timing(0.1, 0.2))


class Conversation:
    """Answers with what was said, in two pieces."""

    def __init__(self):
        self.messages = []
        self.session = SimpleNamespace(position=11)
        self.answer = None

    def send(self, text, params):
        self.messages += [text, text]
        return self.answer or Answer([text.upper(), "!"])

    def undo(self):
        del self.messages[-2:]

    def reset(self):
        self.messages.clear()


@pytest.fixture
def conversation():
    """A conversation with a fake model."""
    return Conversation()


@pytest.fixture
def talk(conversation, monkeypatch, capsys):
    """Pipe lines into a chat; returns what it wrote to both outputs."""

    def run(*lines):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        _Repl(conversation, SamplingParams(), Recorder(kept=0)).run()
        return capsys.readouterr()

    return run


def test_answers_are_all_that_standard_output_gets(talk):
    """In a pipe there is no prompt and no decoration, and empty lines are no turns."""
    assert talk("one", "", "two").out == "ONE!\nTWO!\n"


def test_commands_change_the_conversation(talk, conversation):
    """/undo takes a turn back, /reset all of them, /quit ends before the next line."""
    talk("one", "two", "/undo")
    assert conversation.messages == ["one", "one"]
    talk("three", "/reset", "/quit", "four")
    assert conversation.messages == []


def test_stats_tell_speed_context_and_traffic(talk):
    """/stats shows the figures of the last answer."""
    printed = talk("one", "/stats")

    assert "3 new tokens in, 2 out" in printed.err
    assert "11 tokens of context" in printed.err


def test_unknown_commands_are_named(talk, conversation):
    """A typing error is not sent to the model."""
    assert "/rest is no command" in talk("/rest now").err
    assert conversation.messages == []


def test_ctrl_c_stops_an_answer_and_not_the_chat(talk, conversation):
    """The answer is cancelled; the next line is read."""
    conversation.answer = stopped = Answer(["so"], KeyboardInterrupt())
    printed = talk("one", "/stats")

    assert stopped.cancelled
    assert "stopped; the turn is not kept" in printed.err
    assert "nothing was said yet" in printed.err


def test_a_cancelled_answer_is_no_error(talk, conversation):
    """The client's own cancellation ends the turn quietly."""
    conversation.answer = Answer(["so"], CancelledError())

    assert talk("one").out == "so\n"


def test_a_full_context_is_said_with_the_way_out(talk, conversation):
    """The chat goes on after a prompt that does not fit."""
    conversation.answer = Answer([], PromptTooLong("the session would grow too long"))
    printed = talk("one", "/stats")

    assert "error: the session would grow too long (/undo or /reset makes room)" in printed.err


def test_other_errors_end_the_chat(talk, conversation):
    """An absent server is reported by the command, with its exit code."""
    conversation.answer = Answer([], Unreachable("nobody is there"))
    with pytest.raises(Unreachable):
        talk("one", "two")
