"""Hypothesis strategies for events, descriptions and messages that went wrong on the way."""

from __future__ import annotations

from hypothesis import strategies as st

from fedsea.wire.codecs import Codec
from fedsea.wire.messages import (
    Append,
    Begin,
    Close,
    Drop,
    Fork,
    Notice,
    NoticeKind,
    Open,
    Opened,
    Output,
    Rollback,
    Segment,
    Want,
)

uint32 = st.integers(0, 2**32 - 1)
uint64 = st.integers(0, 2**64 - 1)
names = st.text(max_size=20)
codecs = st.sampled_from(Codec)


def segments(wants):
    """Tuples of segments whose want is drawn from `wants`."""
    return st.lists(st.builds(Segment, uint32, uint32, uint32, wants), max_size=5).map(tuple)


doubles = st.floats(allow_nan=False)
opens = st.builds(
    Open,
    *(names, uint32, uint32, codecs, codecs, uint32, names, uint32),
    *(uint32, uint32, doubles, names),
)
appends = st.builds(Append, uint64, segments(st.sampled_from(Want)), st.binary(max_size=64))
client_events = st.one_of(
    opens,
    st.builds(Begin, uint32, uint32),
    st.builds(Fork, uint32, uint32, uint32, uint32),
    st.builds(Rollback, uint32, uint32),
    st.builds(Drop, uint32),
    appends,
    st.just(Close()),
)
outputs = st.builds(
    Output, uint64, segments(st.just(Want.ALL)), st.binary(max_size=64), uint64, uint64
)
server_events = st.one_of(
    st.builds(Opened, names, uint32),
    outputs,
    st.builds(Notice, st.sampled_from(NoticeKind), names),
)


@st.composite
def damaged(draw: st.DrawFn, messages: st.SearchStrategy[bytes]) -> bytes:
    """A valid message with bytes changed, removed, doubled or added."""
    data = bytearray(draw(messages))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        match draw(st.sampled_from(["change", "cut", "add", "double"])):
            case "change" if at < len(data):
                data[at] = draw(st.integers(0, 255))
            case "cut":
                del data[at : at + draw(st.integers(1, 8))]
            case "add":
                data[at:at] = draw(st.binary(min_size=1, max_size=8))
            case "double":
                data += data[at:]
    return bytes(data)
