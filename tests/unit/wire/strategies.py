"""Hypothesis strategies for events, descriptions and messages that went wrong on the way."""

from __future__ import annotations

from hypothesis import strategies as st

from fedsea.wire.codecs import Codec
from fedsea.wire.messages import (
    Activations,
    AdamW,
    Append,
    Backward,
    Begin,
    Close,
    Discard,
    Drop,
    Fork,
    Forward,
    Gradients,
    Lora,
    Notice,
    NoticeKind,
    Open,
    Opened,
    OpenTraining,
    Output,
    Reset,
    Rollback,
    Save,
    Saved,
    Segment,
    Step,
    Stepped,
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
    *(uint32, uint32, doubles, names, names),
)
appends = st.builds(Append, uint64, segments(st.sampled_from(Want)), st.binary(max_size=64))
loras = st.builds(
    Lora,
    *(uint32, doubles, doubles),
    targets=st.lists(names, max_size=4).map(tuple),
    blocks=st.lists(uint32, max_size=4).map(tuple),
    rslora=st.booleans(),
    freeze_a=st.booleans(),
)
training_opens = st.builds(
    OpenTraining,
    *(names, uint32, uint32, codecs, codecs, codecs, names),
    lora=st.none() | loras,
    prompt_rows=uint32,
    optimizer=st.builds(AdamW, doubles, doubles, doubles, doubles),
    seed=uint64,
    resume_steps=st.lists(uint64, max_size=4).map(tuple),
    weight=doubles,
    up_width=uint32,
    up_levels=uint32,
    up_scale=doubles,
    projection=names,
)
counts = st.lists(uint32, max_size=5).map(tuple)
some_rows = st.binary(max_size=64)
client_events = st.one_of(
    opens,
    st.builds(Begin, uint32, uint32),
    st.builds(Fork, uint32, uint32, uint32, uint32),
    st.builds(Rollback, uint32, uint32),
    st.builds(Drop, uint32),
    appends,
    st.just(Close()),
    training_opens,
    st.builds(Forward, uint64, counts, some_rows, st.booleans()),
    st.builds(Backward, uint64, some_rows),
    st.builds(Discard, uint64),
    st.just(Reset()),
    st.builds(Step, uint64, doubles, doubles, doubles),
    st.builds(Save, uint64),
)
outputs = st.builds(
    Output, uint64, segments(st.just(Want.ALL)), st.binary(max_size=64), uint64, uint64
)
server_events = st.one_of(
    st.builds(Opened, names, uint32, uint64),
    outputs,
    st.builds(Notice, st.sampled_from(NoticeKind), names),
    st.builds(Activations, uint64, some_rows),
    st.builds(Gradients, uint64, some_rows),
    st.builds(Stepped, uint64, doubles, st.booleans()),
    st.builds(Saved, uint64, names),
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
