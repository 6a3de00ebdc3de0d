"""Recordings of real traffic are attacked without the truth."""

from __future__ import annotations

import pytest

from fedsea.errors import ConfigError, FingerprintMismatch
from fedsea.evaluation.replay import replay
from fedsea.evaluation.victim import Victim
from fedsea.model.checkpoint import Checkpoint
from fedsea.model.partition import Partition
from fedsea.model.projection import Projection
from fedsea.transport.recording_file import RecordingWriter, read_recording

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


def test_narrow_rows_are_read_with_their_projection(tiny_model, narrowing):
    """The attacker computes what the client's encoder would have made of each token."""
    file = narrowing(16)
    with Victim(tiny_model, Partition(1, 1), projection=file) as victim:
        sent = victim.read(IDS).messages
    checkpoint, pair = Checkpoint.open(tiny_model), Projection.load(file)
    (found,) = replay(sent, checkpoint, public_prefix=(1,), projection=pair)
    assert found.texts == (IDS,)
    with pytest.raises(ConfigError, match=pair.fingerprint()[:12]):
        replay(sent, checkpoint)
    with pytest.raises(FingerprintMismatch, match="projection"):
        replay(sent, checkpoint, projection=Projection.load(narrowing(16, seed=1)))


def test_a_projection_that_was_not_used_is_refused(tiny_model, messages, narrowing):
    """Rows of the model's own width are not narrow ones."""
    with pytest.raises(ConfigError, match="without a projection"):
        replay(messages, Checkpoint.open(tiny_model), projection=Projection.load(narrowing(48)))
