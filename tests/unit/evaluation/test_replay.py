"""Recordings of real traffic are attacked without the truth."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fedsea.errors import ConfigError, FingerprintMismatch
from fedsea.evaluation.replay import replay
from fedsea.evaluation.victim import Victim
from fedsea.model.checkpoint import Checkpoint
from fedsea.model.partition import Partition
from fedsea.transport.recording import Direction
from fedsea.transport.recording_file import RecordingWriter, read_recording
from fedsea.wire.framing import decode_event, encode_event
from fedsea.wire.limits import DEFAULT_LIMITS
from fedsea.wire.messages import Open, Role

IDS = (1, 7, 30, 42, 8, 15)


@pytest.fixture(scope="module")
def messages(tiny_model, tmp_path_factory):
    """A text that was sent behind one block, from a file."""
    path = tmp_path_factory.mktemp("recording") / "r"
    with Victim(tiny_model, Partition(1, 1)) as victim, RecordingWriter(path) as writer:
        for message in victim.read(IDS).messages:
            writer(message)
    return list(read_recording(path))


def test_the_text_is_read_from_the_file(tiny_model, messages):
    """R1 names every token; the cut comes from the recording itself."""
    (found,) = replay(messages, Checkpoint.open(tiny_model), public_prefix=(1,))
    assert found.texts == (IDS,)


def test_another_checkpoint_is_refused(other_model, messages):
    """Weights of another model would read nonsense."""
    with pytest.raises(FingerprintMismatch):
        replay(messages, Checkpoint.open(other_model))


def test_an_incomplete_recording_is_refused(tiny_model, messages):
    """Without the opening of the session nothing is known of its rows."""
    with pytest.raises(ConfigError):
        replay(messages[1:], Checkpoint.open(tiny_model))


def test_a_recording_with_a_projection_is_refused(tiny_model, messages):
    """Narrow rows need the projection."""
    opened = decode_event(messages[0].data, Role.CLIENT, DEFAULT_LIMITS)
    assert messages[0].direction is Direction.UP
    assert isinstance(opened, Open)
    narrow = encode_event(replace(opened, projection="a" * 64, up_width=48), DEFAULT_LIMITS)
    with pytest.raises(ConfigError, match="projection"):
        replay([replace(messages[0], data=narrow), *messages[1:]], Checkpoint.open(tiny_model))
