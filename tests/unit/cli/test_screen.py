from __future__ import annotations

import io
import logging

import pytest
from rich.console import Console

from fedsea.cli import screen


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (1_234_567, "1.2 MB"), (5e12, "5.0 TB")],
)
def test_sizes_are_written_for_people(size, text):
    """Sizes have the unit that keeps them short."""
    assert screen.bytes_text(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.00043, "430 µs"), (0.0123, "12.3 ms"), (4.561, "4.56 s")]
)
def test_durations_are_written_for_people(seconds, text):
    """Durations have the unit that keeps them short."""
    assert screen.seconds_text(seconds) == text


def test_log_records_are_notices(capsys):
    """A warning of the library is one line like any other notice."""
    record = logging.makeLogRecord({"msg": "%s expires on %s", "args": ("a.pem", "Monday")})
    screen.Notices().handle(record)

    assert capsys.readouterr() == ("", "note: a.pem expires on Monday\n")


@pytest.fixture
def terminal(monkeypatch):
    """Standard error as a terminal whose content can be read."""
    monkeypatch.setenv("TERM", "xterm")
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    monkeypatch.setattr(screen, "err", console)
    return console


def test_a_short_prompt_shows_no_bar(terminal):
    """A prompt that is read in one step leaves the screen alone."""
    screen.PromptBar()(5, 5)

    assert terminal.file.getvalue() == ""


def test_a_long_prompt_shows_a_bar_until_it_is_read(terminal):
    """The bar appears with the first part and is gone with the last one."""
    progress = screen.PromptBar()
    progress(256, 1024)
    assert "reading the prompt" in terminal.file.getvalue()
    progress(1024, 1024)

    assert terminal.file.getvalue().endswith("\x1b[2K")


def test_a_training_shows_loss_and_time_left(terminal):
    """Steps, loss and an estimate while it runs; nothing is left of them."""
    with screen.training_bar("training") as advance:
        advance(1, 4, 1.25)
        advance(2, 4, 1.125)

    shown = terminal.file.getvalue()
    assert "training" in shown
    assert "loss 1.1250" in shown
    assert "50%" in shown
    assert shown.endswith("\x1b[2K")


def test_bars_stay_out_of_pipes(capsys):
    """Without a terminal nothing at all is written."""
    with screen.bar("working") as advance:
        advance(1, 2)
    with screen.training_bar("working") as advance_training:
        advance_training(1, 2, 0.5)
    progress = screen.PromptBar()
    progress(1, 2)
    progress.close()

    assert capsys.readouterr() == ("", "")


def test_loading_follows_the_tensors(terminal):
    """While a model is loaded, transformers' own progress feeds our bar and prints nothing."""
    from transformers.utils import logging as transformers_logging

    with screen.loading("loading it"):
        items = transformers_logging.tqdm([1, 2, 3], desc="Loading weights")
        assert list(items) == [1, 2, 3]
        items.set_postfix(a=1)
        items.close()

    assert "loading it" in terminal.file.getvalue()
    assert "Loading weights" not in terminal.file.getvalue()
    assert not isinstance(transformers_logging.tqdm([1]), screen._Watched)
