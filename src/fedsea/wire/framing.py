"""Events as protobuf messages, and back.

Protobuf's parser trusts the sender with memory: two bytes of input can become forty bytes of
objects, so a message under the size cap may still cost twenty times the cap. `_survey` therefore
walks the bytes first and lets the parser see only messages of the shape that every protobuf encoder
writes: one event, once, with a bounded number of fields. After that a parse costs little more than
the message itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, TypeVar

from google.protobuf.message import DecodeError

from fedsea.errors import LocalProtocolError, RemoteProtocolError
from fedsea.wire import trunk_pb2 as pb
from fedsea.wire.codecs import Codec
from fedsea.wire.limits import MAX_COUNT_BYTES, Limits
from fedsea.wire.messages import (
    Activations,
    AdamW,
    Append,
    Backward,
    Begin,
    Close,
    Discard,
    Drop,
    Event,
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
    Role,
    Rollback,
    Save,
    Saved,
    Segment,
    Step,
    Stepped,
    Want,
)

_T = TypeVar("_T")

MAX_PLAIN_FIELDS: Final = 32
"""Fields of one event besides its segments: today's, and room for those of later versions."""

MAX_SEGMENT_BYTES: Final = 64
"""Bytes of one serialized segment; today's fields take at most 20."""

MAX_OPENING_BYTES: Final = 16 * 2**10
"""Bytes of a message that holds an OpenTraining, whose lists are repeated fields."""

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5  # wire types of protobuf
_SEGMENTS_FIELD: Final = pb.Append.SEGMENTS_FIELD_NUMBER
_COUNTS_FIELD: Final = pb.Forward.COUNTS_FIELD_NUMBER
_MAX_VARINT_BYTES: Final = 10
_WITH_ROWS: Final = (Append, Output, Forward, Activations, Backward, Gradients)

CODEC_NUMBERS: Final[Mapping[Codec, pb.Codec]] = {
    Codec.FP32: pb.CODEC_FP32,
    Codec.BF16: pb.CODEC_BF16,
    Codec.FP16: pb.CODEC_FP16,
    Codec.INT8: pb.CODEC_INT8,
    Codec.COUNTS: pb.CODEC_COUNTS,
}
CODECS_BY_NUMBER: Final[Mapping[int, Codec]] = {
    number: codec for codec, number in CODEC_NUMBERS.items()
}
_WANTS: Final[Mapping[int, Want]] = {want.value: want for want in Want}
_NOTICE_NUMBERS: Final[Mapping[NoticeKind, pb.NoticeKind]] = {
    NoticeKind.DRAINING: pb.NOTICE_KIND_DRAINING,
}
_NOTICE_KINDS: Final[Mapping[int, NoticeKind]] = {
    number: kind for kind, number in _NOTICE_NUMBERS.items()
}


def encode_event(event: Event, limits: Limits) -> bytes:
    """Serialize an event of either side.

    Raises:
        LocalProtocolError: a field holds a value that the schema cannot carry, or the message is
            over `limits.max_message_bytes`.
    """
    try:
        if isinstance(event, _WITH_ROWS):  # before the rows are copied into a message
            _check_size(memoryview(event.rows).nbytes, limits, LocalProtocolError)
        data = _WRITERS[type(event)](event)
    except (TypeError, ValueError, AttributeError, KeyError):
        # The protobuf text may quote the value, and a value may be rows.
        raise LocalProtocolError(
            f"{type(event).__name__} holds a value of a wrong type or out of range; "
            "numbers are unsigned and fit the field, texts are Unicode"
        ) from None
    _check_size(len(data), limits, LocalProtocolError)
    return data


def decode_event(data: bytes, sender: Role, limits: Limits) -> Event:
    """Parse a message of `sender`.

    Raises:
        RemoteProtocolError: the message is over a cap, is not a protobuf message that `sender`
            may send, or holds an unknown event or enum value.
    """
    _check_size(len(data), limits, RemoteProtocolError)
    reader = _survey(data, sender, limits)
    try:
        return reader(data)
    except DecodeError:
        raise RemoteProtocolError(
            "a message is not valid protobuf of the fedsea schema; check that the peer is fedsea"
        ) from None


def _check_size(
    size: int, limits: Limits, fault: type[LocalProtocolError | RemoteProtocolError]
) -> None:
    if size > limits.max_message_bytes:
        raise fault(
            f"a message of {size} bytes is over the limit of {limits.max_message_bytes}; "
            "send fewer rows in a message or use a smaller codec"
        )


# The shape of a message, looked at before protobuf allocates for it


def _survey(data: bytes, sender: Role, limits: Limits) -> Callable[[bytes], Event]:
    """The reader for the one event in `data`; raise when its shape could make a parse expensive."""
    end = len(data)
    tag, at = _varint(data, 0, end)
    reader = _READERS[sender].get(tag >> 3)
    if reader is None or tag & 7 != _LENGTH:
        raise _malformed(
            f"it holds no event that a {sender.value} sends; run the same version on both sides"
        )
    length, at = _varint(data, at, end)
    if at + length != end:
        raise _malformed("it does not end with its first event; send one event in a message")
    if reader is _read_open_training and end > MAX_OPENING_BYTES:
        raise _malformed(f"an OpenTraining takes more than {MAX_OPENING_BYTES} bytes")
    if reader is _read_forward:
        return _survey_forward(data, at, end, limits)
    repeated = _SEGMENTS_FIELD if reader in _SEGMENTED else None
    fields_left = MAX_PLAIN_FIELDS if repeated is None else MAX_PLAIN_FIELDS + limits.max_segments
    while at < end:
        if fields_left == 0:
            raise _malformed("it has too many fields; send fewer segments in a message")
        fields_left -= 1
        at = _skip_field(data, at, end, repeated)
    return reader


def _survey_forward(data: bytes, at: int, end: int, limits: Limits) -> Callable[[bytes], Event]:
    """A Forward's counts are packed into one field: numbers without tags between them."""
    most = MAX_COUNT_BYTES * limits.max_segments
    for _ in range(MAX_PLAIN_FIELDS):
        if at == end:
            return _read_forward
        tag = _varint(data, at, end)[0]
        after = _skip_field(data, at, end, None)
        if tag >> 3 == _COUNTS_FIELD and after - at > most + _MAX_VARINT_BYTES:
            raise _malformed("it has too many counts; send fewer sequences in a message")
        at = after
    raise _malformed("it has too many fields; pack the counts into one")


def _skip_field(data: bytes, at: int, end: int, repeated: int | None) -> int:
    """Where the field that starts at `at` ends."""
    tag, at = _varint(data, at, end)
    wire_type = tag & 7
    if wire_type == _VARINT:
        return _varint(data, at, end)[1]
    if wire_type == _LENGTH:
        length, at = _varint(data, at, end)
        if tag >> 3 == repeated and length > MAX_SEGMENT_BYTES:
            raise _malformed(f"a segment takes more than {MAX_SEGMENT_BYTES} bytes")
        at += length
    elif wire_type == _FIXED64:
        at += 8
    elif wire_type == _FIXED32:
        at += 4
    else:
        raise _malformed("it uses groups, which the schema does not have")
    if at > end:
        raise _malformed("a field does not end")
    return at


def _varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    """The number that starts at `at`, and where it ends."""
    if at < end and (byte := data[at]) < 0x80:  # nearly all numbers on the wire are this short
        return byte, at + 1
    value = 0
    for index in range(at, min(end, at + _MAX_VARINT_BYTES)):
        byte = data[index]
        value |= (byte & 0x7F) << (7 * (index - at))
        if byte < 0x80:
            return value, index + 1
    raise _malformed("a number does not end")


def _malformed(what: str) -> RemoteProtocolError:
    return RemoteProtocolError(f"a message was refused: {what}")


# Writers: one for each event


def _write_open(event: Open) -> bytes:
    message = pb.Open(
        protocol=event.protocol,
        fingerprint=event.fingerprint,
        first_block=event.first_block,
        end_block=event.end_block,
        up_codec=CODEC_NUMBERS[event.up_codec],
        down_codec=CODEC_NUMBERS[event.down_codec],
        reserve_rows=event.reserve_rows,
        adapter=event.adapter,
        up_width=event.up_width,
        up_levels=event.up_levels,
        up_scale=event.up_scale,
        projection=event.projection,
        prompt=event.prompt,
    )
    return pb.ClientMessage(open=message).SerializeToString()


def _write_opened(event: Opened) -> bytes:
    message = pb.Opened(
        session_id=event.session_id, idle_timeout_ms=event.idle_timeout_ms, step=event.step
    )
    return pb.ServerMessage(opened=message).SerializeToString()


def _write_begin(event: Begin) -> bytes:
    message = pb.Begin(sequence=event.sequence, capacity=event.capacity)
    return pb.ClientMessage(begin=message).SerializeToString()


def _write_fork(event: Fork) -> bytes:
    message = pb.Fork(
        source=event.source, target=event.target, length=event.length, capacity=event.capacity
    )
    return pb.ClientMessage(fork=message).SerializeToString()


def _write_rollback(event: Rollback) -> bytes:
    message = pb.Rollback(sequence=event.sequence, length=event.length)
    return pb.ClientMessage(rollback=message).SerializeToString()


def _write_drop(event: Drop) -> bytes:
    return pb.ClientMessage(drop=pb.Drop(sequence=event.sequence)).SerializeToString()


def _write_close(_: Close) -> bytes:
    return pb.ClientMessage(close=pb.Close()).SerializeToString()


def _write_append(event: Append) -> bytes:
    message = pb.ClientMessage()
    body = message.append
    body.id = event.id
    body.rows = bytes(event.rows)
    for segment in event.segments:
        body.segments.add(
            sequence=segment.sequence,
            start=segment.start,
            count=segment.count,
            want=segment.want.value,
        )
    body.SetInParent()
    return message.SerializeToString()


def _write_output(event: Output) -> bytes:
    message = pb.ServerMessage()
    body = message.output
    body.id = event.id
    body.rows = bytes(event.rows)
    body.queue_us = event.queue_us
    body.compute_us = event.compute_us
    for segment in event.segments:
        body.segments.add(sequence=segment.sequence, start=segment.start, count=segment.count)
    body.SetInParent()
    return message.SerializeToString()


def _write_notice(event: Notice) -> bytes:
    message = pb.Notice(kind=_NOTICE_NUMBERS[event.kind], message=event.message)
    return pb.ServerMessage(notice=message).SerializeToString()


def _write_open_training(event: OpenTraining) -> bytes:
    message = pb.OpenTraining(
        protocol=event.protocol,
        fingerprint=event.fingerprint,
        first_block=event.first_block,
        end_block=event.end_block,
        up_codec=CODEC_NUMBERS[event.up_codec],
        down_codec=CODEC_NUMBERS[event.down_codec],
        gradient_codec=CODEC_NUMBERS[event.gradient_codec],
        up_width=event.up_width,
        up_levels=event.up_levels,
        up_scale=event.up_scale,
        projection=event.projection,
        adapter=event.adapter,
        lora=None if event.lora is None else _lora_message(event.lora),
        prompt_rows=event.prompt_rows,
        optimizer=pb.AdamW(
            beta1=event.optimizer.beta1,
            beta2=event.optimizer.beta2,
            eps=event.optimizer.eps,
            weight_decay=event.optimizer.weight_decay,
        ),
        seed=event.seed,
        resume_steps=event.resume_steps,
        weight=event.weight,
    )
    data = pb.ClientMessage(open_training=message).SerializeToString()
    if len(data) > MAX_OPENING_BYTES:
        raise LocalProtocolError(
            f"OpenTraining takes {len(data)} bytes, over the limit of {MAX_OPENING_BYTES}; "
            "name fewer targets, blocks or steps"
        )
    return data


def _lora_message(lora: Lora) -> pb.Lora:
    return pb.Lora(
        rank=lora.rank,
        alpha=lora.alpha,
        dropout=lora.dropout,
        targets=lora.targets,
        blocks=lora.blocks,
        rslora=lora.rslora,
        freeze_a=lora.freeze_a,
    )


def _write_forward(event: Forward) -> bytes:
    message = pb.Forward(
        id=event.id, counts=event.counts, rows=bytes(event.rows), no_grad=event.no_grad
    )
    return pb.ClientMessage(forward=message).SerializeToString()


def _write_activations(event: Activations) -> bytes:
    message = pb.Activations(id=event.id, rows=bytes(event.rows))
    return pb.ServerMessage(activations=message).SerializeToString()


def _write_backward(event: Backward) -> bytes:
    message = pb.Backward(id=event.id, rows=bytes(event.rows))
    return pb.ClientMessage(backward=message).SerializeToString()


def _write_gradients(event: Gradients) -> bytes:
    message = pb.Gradients(id=event.id, rows=bytes(event.rows))
    return pb.ServerMessage(gradients=message).SerializeToString()


def _write_discard(event: Discard) -> bytes:
    return pb.ClientMessage(discard=pb.Discard(id=event.id)).SerializeToString()


def _write_reset(_: Reset) -> bytes:
    return pb.ClientMessage(reset=pb.Reset()).SerializeToString()


def _write_step(event: Step) -> bytes:
    message = pb.Step(
        number=event.number,
        learning_rate=event.learning_rate,
        max_grad_norm=event.max_grad_norm,
        scale=event.scale,
    )
    return pb.ClientMessage(step=message).SerializeToString()


def _write_stepped(event: Stepped) -> bytes:
    message = pb.Stepped(number=event.number, grad_norm=event.grad_norm, applied=event.applied)
    return pb.ServerMessage(stepped=message).SerializeToString()


def _write_save(event: Save) -> bytes:
    return pb.ClientMessage(save=pb.Save(number=event.number)).SerializeToString()


def _write_saved(event: Saved) -> bytes:
    message = pb.Saved(number=event.number, problem=event.problem)
    return pb.ServerMessage(saved=message).SerializeToString()


_WRITERS: Final[Mapping[type[Event], Callable[[Any], bytes]]] = {
    Open: _write_open,
    Opened: _write_opened,
    Begin: _write_begin,
    Fork: _write_fork,
    Rollback: _write_rollback,
    Drop: _write_drop,
    Append: _write_append,
    Output: _write_output,
    Close: _write_close,
    Notice: _write_notice,
    OpenTraining: _write_open_training,
    Forward: _write_forward,
    Activations: _write_activations,
    Backward: _write_backward,
    Gradients: _write_gradients,
    Discard: _write_discard,
    Reset: _write_reset,
    Step: _write_step,
    Stepped: _write_stepped,
    Save: _write_save,
    Saved: _write_saved,
}


# Readers: one for each event


def _read_open(data: bytes) -> Open:
    body = pb.ClientMessage.FromString(data).open
    return Open(
        fingerprint=body.fingerprint,
        first_block=body.first_block,
        end_block=body.end_block,
        up_codec=_known(CODECS_BY_NUMBER, body.up_codec, "codec"),
        down_codec=_known(CODECS_BY_NUMBER, body.down_codec, "codec"),
        reserve_rows=body.reserve_rows,
        adapter=body.adapter,
        protocol=body.protocol,
        up_width=body.up_width,
        up_levels=body.up_levels,
        up_scale=body.up_scale,
        projection=body.projection,
        prompt=body.prompt,
    )


def _read_opened(data: bytes) -> Opened:
    body = pb.ServerMessage.FromString(data).opened
    return Opened(body.session_id, body.idle_timeout_ms, body.step)


def _read_begin(data: bytes) -> Begin:
    body = pb.ClientMessage.FromString(data).begin
    return Begin(sequence=body.sequence, capacity=body.capacity)


def _read_fork(data: bytes) -> Fork:
    body = pb.ClientMessage.FromString(data).fork
    return Fork(source=body.source, target=body.target, length=body.length, capacity=body.capacity)


def _read_rollback(data: bytes) -> Rollback:
    body = pb.ClientMessage.FromString(data).rollback
    return Rollback(sequence=body.sequence, length=body.length)


def _read_drop(data: bytes) -> Drop:
    return Drop(sequence=pb.ClientMessage.FromString(data).drop.sequence)


def _read_close(data: bytes) -> Close:
    pb.ClientMessage.FromString(data)
    return Close()


def _read_append(data: bytes) -> Append:
    body = pb.ClientMessage.FromString(data).append
    segments = tuple(
        [
            Segment(item.sequence, item.start, item.count, _known(_WANTS, item.want, "want"))
            for item in body.segments
        ]
    )
    return Append(body.id, segments, body.rows)


def _read_output(data: bytes) -> Output:
    body = pb.ServerMessage.FromString(data).output
    segments = tuple([Segment(item.sequence, item.start, item.count) for item in body.segments])
    return Output(body.id, segments, body.rows, body.queue_us, body.compute_us)


def _read_notice(data: bytes) -> Notice:
    body = pb.ServerMessage.FromString(data).notice
    return Notice(_known(_NOTICE_KINDS, body.kind, "notice kind"), body.message)


def _read_open_training(data: bytes) -> OpenTraining:
    body = pb.ClientMessage.FromString(data).open_training
    optimizer = body.optimizer
    return OpenTraining(
        fingerprint=body.fingerprint,
        first_block=body.first_block,
        end_block=body.end_block,
        up_codec=_known(CODECS_BY_NUMBER, body.up_codec, "codec"),
        down_codec=_known(CODECS_BY_NUMBER, body.down_codec, "codec"),
        gradient_codec=_known(CODECS_BY_NUMBER, body.gradient_codec, "codec"),
        adapter=body.adapter,
        lora=_lora_of(body.lora) if body.HasField("lora") else None,
        prompt_rows=body.prompt_rows,
        optimizer=AdamW(optimizer.beta1, optimizer.beta2, optimizer.eps, optimizer.weight_decay),
        seed=body.seed,
        resume_steps=tuple(body.resume_steps),
        weight=body.weight,
        protocol=body.protocol,
        up_width=body.up_width,
        up_levels=body.up_levels,
        up_scale=body.up_scale,
        projection=body.projection,
    )


def _lora_of(body: pb.Lora) -> Lora:
    return Lora(
        rank=body.rank,
        alpha=body.alpha,
        dropout=body.dropout,
        targets=tuple(body.targets),
        blocks=tuple(body.blocks),
        rslora=body.rslora,
        freeze_a=body.freeze_a,
    )


def _read_forward(data: bytes) -> Forward:
    body = pb.ClientMessage.FromString(data).forward
    return Forward(body.id, tuple(body.counts), body.rows, body.no_grad)


def _read_activations(data: bytes) -> Activations:
    body = pb.ServerMessage.FromString(data).activations
    return Activations(body.id, body.rows)


def _read_backward(data: bytes) -> Backward:
    body = pb.ClientMessage.FromString(data).backward
    return Backward(body.id, body.rows)


def _read_gradients(data: bytes) -> Gradients:
    body = pb.ServerMessage.FromString(data).gradients
    return Gradients(body.id, body.rows)


def _read_discard(data: bytes) -> Discard:
    return Discard(pb.ClientMessage.FromString(data).discard.id)


def _read_reset(data: bytes) -> Reset:
    pb.ClientMessage.FromString(data)
    return Reset()


def _read_step(data: bytes) -> Step:
    body = pb.ClientMessage.FromString(data).step
    return Step(body.number, body.learning_rate, body.max_grad_norm, body.scale)


def _read_stepped(data: bytes) -> Stepped:
    body = pb.ServerMessage.FromString(data).stepped
    return Stepped(body.number, body.grad_norm, body.applied)


def _read_save(data: bytes) -> Save:
    return Save(pb.ClientMessage.FromString(data).save.number)


def _read_saved(data: bytes) -> Saved:
    body = pb.ServerMessage.FromString(data).saved
    return Saved(body.number, body.problem)


def _known(members: Mapping[int, _T], number: int, what: str) -> _T:
    member = members.get(number)
    if member is None:
        raise RemoteProtocolError(
            f"{what} {number} is unknown here; run the same version on both sides"
        )
    return member


_READERS: Final[Mapping[Role, Mapping[int, Callable[[bytes], Event]]]] = {
    Role.CLIENT: {
        pb.ClientMessage.OPEN_FIELD_NUMBER: _read_open,
        pb.ClientMessage.BEGIN_FIELD_NUMBER: _read_begin,
        pb.ClientMessage.APPEND_FIELD_NUMBER: _read_append,
        pb.ClientMessage.ROLLBACK_FIELD_NUMBER: _read_rollback,
        pb.ClientMessage.FORK_FIELD_NUMBER: _read_fork,
        pb.ClientMessage.DROP_FIELD_NUMBER: _read_drop,
        pb.ClientMessage.CLOSE_FIELD_NUMBER: _read_close,
        pb.ClientMessage.OPEN_TRAINING_FIELD_NUMBER: _read_open_training,
        pb.ClientMessage.FORWARD_FIELD_NUMBER: _read_forward,
        pb.ClientMessage.BACKWARD_FIELD_NUMBER: _read_backward,
        pb.ClientMessage.DISCARD_FIELD_NUMBER: _read_discard,
        pb.ClientMessage.RESET_FIELD_NUMBER: _read_reset,
        pb.ClientMessage.STEP_FIELD_NUMBER: _read_step,
        pb.ClientMessage.SAVE_FIELD_NUMBER: _read_save,
    },
    Role.SERVER: {
        pb.ServerMessage.OPENED_FIELD_NUMBER: _read_opened,
        pb.ServerMessage.OUTPUT_FIELD_NUMBER: _read_output,
        pb.ServerMessage.NOTICE_FIELD_NUMBER: _read_notice,
        pb.ServerMessage.ACTIVATIONS_FIELD_NUMBER: _read_activations,
        pb.ServerMessage.GRADIENTS_FIELD_NUMBER: _read_gradients,
        pb.ServerMessage.STEPPED_FIELD_NUMBER: _read_stepped,
        pb.ServerMessage.SAVED_FIELD_NUMBER: _read_saved,
    },
}
_SEGMENTED: Final = frozenset({_read_append, _read_output})
