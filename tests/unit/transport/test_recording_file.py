"""Recordings on disk: what is written is read, and damage is found."""

from __future__ import annotations

import stat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsea.errors import ConfigError
from fedsea.transport.recording import Direction, Message
from fedsea.transport.recording_file import MAGIC, RecordingWriter, read_recording

MESSAGES = [
    Message(Direction.UP, 1.5, b"rows"),
    Message(Direction.DOWN, 2.5, b""),
    Message(Direction.UP, 3.25, bytes(300)),
]


def written(path, messages=MESSAGES):
    """A recording of messages."""
    with RecordingWriter(path) as writer:
        for message in messages:
            writer(message)
    return path


messages = st.builds(Message, st.sampled_from(Direction), st.floats(0, 1e9), st.binary(max_size=50))


@given(st.lists(messages, max_size=6))
def test_a_recording_is_read_as_it_was_written(tmp_path_factory, found):
    """All messages, in order, with direction, time and bytes."""
    path = written(tmp_path_factory.mktemp("recording") / "r", found)
    assert list(read_recording(path)) == found


def test_only_the_owner_may_read_it(tmp_path):
    """A recording holds what text can be read from."""
    path = written(tmp_path / "r")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_file_is_never_overwritten(tmp_path):
    """A second recording needs another name."""
    path = written(tmp_path / "r")
    with pytest.raises(ConfigError, match="exists"):
        RecordingWriter(path)


def test_every_cut_is_found(tmp_path):
    """A file that ends within a message is damaged; at its end a message may be missing."""
    whole = written(tmp_path / "r").read_bytes()
    ends = {len(MAGIC)}
    for message in MESSAGES:
        ends.add(max(ends) + 13 + len(message.data))
    path = tmp_path / "cut"
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        if size in ends:
            list(read_recording(path))
        else:
            with pytest.raises(ConfigError):
                list(read_recording(path))


@pytest.mark.parametrize(
    "data",
    [b"", b"something else\n", MAGIC + b"\x02" + bytes(12), MAGIC + bytes(9) + b"\xff\xff\xff\xff"],
)
def test_what_is_no_recording_is_refused(tmp_path, data):
    """Other files, unknown directions and sizes that no transport carries."""
    path = tmp_path / "r"
    path.write_bytes(data)
    with pytest.raises(ConfigError):
        list(read_recording(path))


def test_a_missing_file_and_a_missing_folder(tmp_path):
    """Both are one clear line."""
    with pytest.raises(ConfigError, match="cannot be read"):
        list(read_recording(tmp_path / "absent"))
    with pytest.raises(ConfigError, match="cannot be written"):
        RecordingWriter(tmp_path / "absent" / "r")
