"""What a server sees, decoded from recorded bytes."""

from __future__ import annotations

import pytest
import torch
from tests.unit.redteam.conftest import recorded

from fedsea.errors import ConfigError, RemoteProtocolError
from fedsea.redteam.view import Repeats, ServerView
from fedsea.transport.recording import Direction, Message
from fedsea.wire.codecs import Codec, RowFormat, encode
from fedsea.wire.messages import (
    Append,
    Begin,
    Drop,
    Fork,
    Open,
    Opened,
    Output,
    Rollback,
    Segment,
    Want,
)

HIDDEN = 3
OPEN = Open("f00d", 1, 2, Codec.FP32, Codec.FP32)


def rows(*values: float) -> torch.Tensor:
    """One row for each number."""
    return torch.tensor([[value, 0.0, -value] for value in values])


def append(number: int, sequence: int, start: int, *values: float) -> Append:
    """Rows for one sequence."""
    segment = Segment(sequence, start, len(values), Want.LAST)
    return Append(number, (segment,), encode(rows(*values), Codec.FP32))


def output(number: int, sequence: int, start: int, *values: float) -> Output:
    """Rows that come back for one sequence."""
    return Output(
        number, (Segment(sequence, start, len(values)),), encode(rows(*values), Codec.FP32)
    )


def texts(view: ServerView, repeats: Repeats = Repeats.APART) -> list[list[list[float]]]:
    """First number of every release, by text and position."""
    return [[found[:, 0].tolist() for found in chain.releases] for chain in view.chains(repeats)]


def test_rows_of_one_sequence_in_order_and_what_came_back():
    """Appends follow each other; the row that came back stands at its position."""
    view = ServerView(
        recorded(
            OPEN,
            Opened("s"),
            Begin(0, 8),
            append(0, 0, 0, 1, 2),
            output(0, 0, 1, 20),
            append(1, 0, 2, 3),
            output(1, 0, 2, 30),
        ),
        HIDDEN,
    )
    (chain,) = view.chains()

    assert texts(view) == [[[1], [2], [3]]]
    assert {place: row[0].item() for place, row in chain.returned.items()} == {1: 20, 2: 30}
    assert torch.equal(chain.means(), rows(1, 2, 3))


def test_a_rollback_is_another_text_unless_the_attacker_supposes_otherwise():
    """What stood behind a rollback stays seen, apart or together with what came after it."""
    messages = recorded(
        OPEN, Begin(0, 8), append(0, 0, 0, 1, 2, 3), Rollback(0, 1), append(1, 0, 1, 7)
    )
    view = ServerView(messages, HIDDEN)

    assert texts(view) == [[[1], [2], [3]], [[1], [7]]]
    assert texts(view, Repeats.SEQUENCE) == [[[1], [2, 7], [3]]]


def test_the_same_bytes_sent_again_are_one_release():
    """A replay in another session, and a fork, add nothing to what is known."""
    view = ServerView(
        recorded(
            OPEN,
            Begin(0, 8),
            append(0, 0, 0, 1, 2),
            OPEN,
            Begin(4, 8),
            append(0, 4, 0, 1, 2),
            Fork(4, 5, 1, 8),
            append(1, 5, 1, 9),
        ),
        HIDDEN,
    )

    assert texts(view) == [[[1], [2]], [[1], [9]]]


def test_releases_of_a_session_are_joined_on_request():
    """A client that begins again for each token releases each position many times."""
    view = ServerView(
        recorded(
            OPEN,
            Begin(0, 8),
            append(0, 0, 0, 1, 2),
            Drop(0),
            Begin(0, 8),
            append(1, 0, 0, 1.5, 2.5, 3),
        ),
        HIDDEN,
    )
    (chain,) = view.chains(Repeats.SESSION)

    assert [found[:, 0].tolist() for found in chain.releases] == [[1, 1.5], [2, 2.5], [3]]
    assert chain.means()[:, 0].tolist() == [1.25, 2.25, 3]
    assert len(view.chains(Repeats.SEQUENCE)) == 2


def test_several_segments_of_a_message_belong_to_their_sequences():
    """A message for a batch is taken apart."""
    both = Append(
        0,
        (Segment(0, 0, 1, Want.NONE), Segment(1, 0, 2, Want.ALL)),
        encode(rows(1, 2, 3), Codec.FP32),
    )
    view = ServerView(recorded(OPEN, Begin(0, 4), Begin(1, 4), both), HIDDEN)

    assert texts(view) == [[[1]], [[2], [3]]]


def test_counts_stay_counts_and_mean_their_values():
    """Counts are kept as the mechanism drew them, and read as a server reads them."""
    written = RowFormat(Codec.COUNTS, 2, levels=3, scale=6.0)
    opened = Open(
        "f00d", 1, 2, Codec.COUNTS, Codec.FP32, up_width=2, up_levels=3, up_scale=6.0,
        projection="beef",
    )  # fmt: skip
    counts = torch.tensor([[0, 3], [1, 2]], dtype=torch.uint8)
    sent = Append(0, (Segment(0, 0, 2),), written.encode(counts))
    (chain,) = ServerView(recorded(opened, Begin(0, 4), sent), HIDDEN).chains()

    assert torch.equal(torch.cat(chain.releases), counts)
    assert torch.equal(chain.means(), written.values(counts))


def test_a_recording_without_its_beginning_is_refused():
    """Rows that refer to what was not recorded cannot be placed."""
    for messages in ([], recorded(Begin(0, 4)), recorded(OPEN, append(0, 3, 0, 1))):
        with pytest.raises(ConfigError):
            ServerView(messages, HIDDEN)


def test_sessions_of_different_formats_are_refused():
    """One attack reads rows of one kind."""
    other = Open("f00d", 1, 2, Codec.BF16, Codec.FP32)
    with pytest.raises(ConfigError):
        ServerView(recorded(OPEN, other), HIDDEN)


def test_foreign_bytes_are_refused():
    """What is not a message of the protocol is said to be none."""
    with pytest.raises(RemoteProtocolError):
        ServerView([Message(Direction.UP, 0.0, b"\xff\xff\xff")], HIDDEN)
