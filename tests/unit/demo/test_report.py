from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console

from fedsea.client.protection import PLAIN
from fedsea.demo import report
from fedsea.transport.recording import Direction, Message, Recorder
from fedsea.wire.codecs import Codec, encode
from fedsea.wire.framing import encode_event
from fedsea.wire.limits import DEFAULT_LIMITS
from fedsea.wire.messages import Append, Close, Open, Output, Segment


@pytest.fixture
def console():
    """A screen of 20 columns whose content can be read."""
    return Console(file=io.StringIO(), width=20)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_lines_are_broken_between_words(console, size):
    """Whatever pieces a text comes in, no line is wider than the screen and no word is cut."""
    text = "One two three four five six seven.\n\nEight nine:  ten\neleven"
    page = report.Typewriter(console)
    for start in range(0, len(text), size):
        page.write(text[start : start + size])
    page.end()

    assert console.file.getvalue() == (
        "One two three four\nfive six seven.\n\nEight nine:  ten\neleven\n"
    )


def test_a_word_of_full_width_is_no_empty_line(console):
    """A line that is exactly full is followed by the next one, not by a gap."""
    page = report.Typewriter(console)
    page.write("a " + "b" * 18 + " c")
    page.end()

    assert console.file.getvalue() == "a " + "b" * 18 + "\nc\n"


def test_a_text_can_be_interrupted(console):
    """After `end` the text goes on at the start of a line."""
    page = report.Typewriter(console)
    page.write("one tw")
    page.end()
    page.write("o three")
    page.end()

    assert console.file.getvalue() == "one tw\no three\n"


@pytest.fixture
def recorder():
    """An answer: a prompt of two rows, one row, and their outputs, of 4 numbers each."""
    found = Recorder()
    greeting = Open("f", 0, 1, Codec.FP32, Codec.FP32)
    found(Message(Direction.UP, 0.0, encode_event(greeting, DEFAULT_LIMITS)))
    rows = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    for index, part in enumerate((rows[:2], rows[2:])):
        data = encode(part, Codec.FP32)
        segment = Segment(0, 2 * index, len(part))
        append = Append(index + 1, (segment,), data)
        output = Output(index + 1, (segment,), encode(-part, Codec.FP32))
        found(Message(Direction.UP, 0.0, encode_event(append, DEFAULT_LIMITS)))
        found(Message(Direction.DOWN, 0.0, encode_event(output, DEFAULT_LIMITS)))
    found(Message(Direction.UP, 0.0, encode_event(Close(), DEFAULT_LIMITS)))
    return found


def test_the_last_row_is_read_from_the_wire(recorder):
    """Values and bytes per token are those of the last message with rows, not of a later one."""
    up = report.flow(recorder, Direction.UP, 4)
    down = report.flow(recorder, Direction.DOWN, 4)

    assert (up.messages, down.messages) == (4, 2)
    assert up.row.tolist() == [8.0, 9.0, 10.0, 11.0]
    assert down.row.tolist() == [-8.0, -9.0, -10.0, -11.0]
    assert 16 < up.bytes_per_token < 40
    assert up.bytes_per_token < up.bytes


def test_the_panel_shows_values_and_the_honest_sentence(recorder):
    """What crossed is shown in numbers, what did not and what that is worth in words."""
    screen = io.StringIO()
    report.wire(Console(file=screen, width=80), recorder, 4, f"mode plain: {PLAIN}")
    shown = screen.getvalue()

    assert "[8.00, 9.00, 10.00, 11.00, … 4]" in shown
    assert "Never on the wire: text, token ids, logits" in shown
    assert "Mode plain: no confidentiality against the server" in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_an_empty_recording_has_no_rows():
    """Asking for rows where none went is an error of the caller."""
    with pytest.raises(LookupError):
        report.last_rows([], Direction.UP)
