from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Codec(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CODEC_UNSPECIFIED: _ClassVar[Codec]
    CODEC_FP32: _ClassVar[Codec]
    CODEC_BF16: _ClassVar[Codec]
    CODEC_FP16: _ClassVar[Codec]
    CODEC_INT8: _ClassVar[Codec]
    CODEC_COUNTS: _ClassVar[Codec]

class Want(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    WANT_UNSPECIFIED: _ClassVar[Want]
    WANT_LAST: _ClassVar[Want]
    WANT_ALL: _ClassVar[Want]
    WANT_NONE: _ClassVar[Want]

class NoticeKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    NOTICE_KIND_UNSPECIFIED: _ClassVar[NoticeKind]
    NOTICE_KIND_DRAINING: _ClassVar[NoticeKind]
CODEC_UNSPECIFIED: Codec
CODEC_FP32: Codec
CODEC_BF16: Codec
CODEC_FP16: Codec
CODEC_INT8: Codec
CODEC_COUNTS: Codec
WANT_UNSPECIFIED: Want
WANT_LAST: Want
WANT_ALL: Want
WANT_NONE: Want
NOTICE_KIND_UNSPECIFIED: NoticeKind
NOTICE_KIND_DRAINING: NoticeKind

class ClientMessage(_message.Message):
    __slots__ = ("open", "begin", "append", "rollback", "fork", "drop", "close")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    BEGIN_FIELD_NUMBER: _ClassVar[int]
    APPEND_FIELD_NUMBER: _ClassVar[int]
    ROLLBACK_FIELD_NUMBER: _ClassVar[int]
    FORK_FIELD_NUMBER: _ClassVar[int]
    DROP_FIELD_NUMBER: _ClassVar[int]
    CLOSE_FIELD_NUMBER: _ClassVar[int]
    open: Open
    begin: Begin
    append: Append
    rollback: Rollback
    fork: Fork
    drop: Drop
    close: Close
    def __init__(self, open: _Optional[_Union[Open, _Mapping]] = ..., begin: _Optional[_Union[Begin, _Mapping]] = ..., append: _Optional[_Union[Append, _Mapping]] = ..., rollback: _Optional[_Union[Rollback, _Mapping]] = ..., fork: _Optional[_Union[Fork, _Mapping]] = ..., drop: _Optional[_Union[Drop, _Mapping]] = ..., close: _Optional[_Union[Close, _Mapping]] = ...) -> None: ...

class ServerMessage(_message.Message):
    __slots__ = ("opened", "output", "notice")
    OPENED_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    NOTICE_FIELD_NUMBER: _ClassVar[int]
    opened: Opened
    output: Output
    notice: Notice
    def __init__(self, opened: _Optional[_Union[Opened, _Mapping]] = ..., output: _Optional[_Union[Output, _Mapping]] = ..., notice: _Optional[_Union[Notice, _Mapping]] = ...) -> None: ...

class Open(_message.Message):
    __slots__ = ("protocol", "fingerprint", "first_block", "end_block", "up_codec", "down_codec", "reserve_rows", "adapter", "up_width", "up_levels", "up_scale", "projection")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    FIRST_BLOCK_FIELD_NUMBER: _ClassVar[int]
    END_BLOCK_FIELD_NUMBER: _ClassVar[int]
    UP_CODEC_FIELD_NUMBER: _ClassVar[int]
    DOWN_CODEC_FIELD_NUMBER: _ClassVar[int]
    RESERVE_ROWS_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    UP_WIDTH_FIELD_NUMBER: _ClassVar[int]
    UP_LEVELS_FIELD_NUMBER: _ClassVar[int]
    UP_SCALE_FIELD_NUMBER: _ClassVar[int]
    PROJECTION_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    fingerprint: str
    first_block: int
    end_block: int
    up_codec: Codec
    down_codec: Codec
    reserve_rows: int
    adapter: str
    up_width: int
    up_levels: int
    up_scale: float
    projection: str
    def __init__(self, protocol: _Optional[int] = ..., fingerprint: _Optional[str] = ..., first_block: _Optional[int] = ..., end_block: _Optional[int] = ..., up_codec: _Optional[_Union[Codec, str]] = ..., down_codec: _Optional[_Union[Codec, str]] = ..., reserve_rows: _Optional[int] = ..., adapter: _Optional[str] = ..., up_width: _Optional[int] = ..., up_levels: _Optional[int] = ..., up_scale: _Optional[float] = ..., projection: _Optional[str] = ...) -> None: ...

class Opened(_message.Message):
    __slots__ = ("session_id", "idle_timeout_ms")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    IDLE_TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    idle_timeout_ms: int
    def __init__(self, session_id: _Optional[str] = ..., idle_timeout_ms: _Optional[int] = ...) -> None: ...

class Begin(_message.Message):
    __slots__ = ("sequence", "capacity")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    capacity: int
    def __init__(self, sequence: _Optional[int] = ..., capacity: _Optional[int] = ...) -> None: ...

class Fork(_message.Message):
    __slots__ = ("source", "target", "length", "capacity")
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_FIELD_NUMBER: _ClassVar[int]
    source: int
    target: int
    length: int
    capacity: int
    def __init__(self, source: _Optional[int] = ..., target: _Optional[int] = ..., length: _Optional[int] = ..., capacity: _Optional[int] = ...) -> None: ...

class Rollback(_message.Message):
    __slots__ = ("sequence", "length")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    length: int
    def __init__(self, sequence: _Optional[int] = ..., length: _Optional[int] = ...) -> None: ...

class Drop(_message.Message):
    __slots__ = ("sequence",)
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    def __init__(self, sequence: _Optional[int] = ...) -> None: ...

class Append(_message.Message):
    __slots__ = ("id", "segments", "rows")
    ID_FIELD_NUMBER: _ClassVar[int]
    SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    id: int
    segments: _containers.RepeatedCompositeFieldContainer[Segment]
    rows: bytes
    def __init__(self, id: _Optional[int] = ..., segments: _Optional[_Iterable[_Union[Segment, _Mapping]]] = ..., rows: _Optional[bytes] = ...) -> None: ...

class Segment(_message.Message):
    __slots__ = ("sequence", "start", "count", "want")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    WANT_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    start: int
    count: int
    want: Want
    def __init__(self, sequence: _Optional[int] = ..., start: _Optional[int] = ..., count: _Optional[int] = ..., want: _Optional[_Union[Want, str]] = ...) -> None: ...

class Output(_message.Message):
    __slots__ = ("id", "segments", "rows", "queue_us", "compute_us")
    ID_FIELD_NUMBER: _ClassVar[int]
    SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_US_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_US_FIELD_NUMBER: _ClassVar[int]
    id: int
    segments: _containers.RepeatedCompositeFieldContainer[RowRange]
    rows: bytes
    queue_us: int
    compute_us: int
    def __init__(self, id: _Optional[int] = ..., segments: _Optional[_Iterable[_Union[RowRange, _Mapping]]] = ..., rows: _Optional[bytes] = ..., queue_us: _Optional[int] = ..., compute_us: _Optional[int] = ...) -> None: ...

class RowRange(_message.Message):
    __slots__ = ("sequence", "start", "count")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    start: int
    count: int
    def __init__(self, sequence: _Optional[int] = ..., start: _Optional[int] = ..., count: _Optional[int] = ...) -> None: ...

class Close(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Notice(_message.Message):
    __slots__ = ("kind", "message")
    KIND_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    kind: NoticeKind
    message: str
    def __init__(self, kind: _Optional[_Union[NoticeKind, str]] = ..., message: _Optional[str] = ...) -> None: ...

class DescribeRequest(_message.Message):
    __slots__ = ("protocol",)
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    def __init__(self, protocol: _Optional[int] = ...) -> None: ...

class Description(_message.Message):
    __slots__ = ("protocol", "model", "family", "fingerprint", "hidden_size", "num_blocks", "first_block", "end_block", "codecs", "max_context", "max_rows_per_message", "max_message_bytes", "dtype", "quantization", "server_version", "page_rows", "max_segments", "max_sequences", "max_pending", "projections")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    FAMILY_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    FIRST_BLOCK_FIELD_NUMBER: _ClassVar[int]
    END_BLOCK_FIELD_NUMBER: _ClassVar[int]
    CODECS_FIELD_NUMBER: _ClassVar[int]
    MAX_CONTEXT_FIELD_NUMBER: _ClassVar[int]
    MAX_ROWS_PER_MESSAGE_FIELD_NUMBER: _ClassVar[int]
    MAX_MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    QUANTIZATION_FIELD_NUMBER: _ClassVar[int]
    SERVER_VERSION_FIELD_NUMBER: _ClassVar[int]
    PAGE_ROWS_FIELD_NUMBER: _ClassVar[int]
    MAX_SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    MAX_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    MAX_PENDING_FIELD_NUMBER: _ClassVar[int]
    PROJECTIONS_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    model: str
    family: str
    fingerprint: str
    hidden_size: int
    num_blocks: int
    first_block: int
    end_block: int
    codecs: _containers.RepeatedScalarFieldContainer[Codec]
    max_context: int
    max_rows_per_message: int
    max_message_bytes: int
    dtype: str
    quantization: str
    server_version: str
    page_rows: int
    max_segments: int
    max_sequences: int
    max_pending: int
    projections: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, protocol: _Optional[int] = ..., model: _Optional[str] = ..., family: _Optional[str] = ..., fingerprint: _Optional[str] = ..., hidden_size: _Optional[int] = ..., num_blocks: _Optional[int] = ..., first_block: _Optional[int] = ..., end_block: _Optional[int] = ..., codecs: _Optional[_Iterable[_Union[Codec, str]]] = ..., max_context: _Optional[int] = ..., max_rows_per_message: _Optional[int] = ..., max_message_bytes: _Optional[int] = ..., dtype: _Optional[str] = ..., quantization: _Optional[str] = ..., server_version: _Optional[str] = ..., page_rows: _Optional[int] = ..., max_segments: _Optional[int] = ..., max_sequences: _Optional[int] = ..., max_pending: _Optional[int] = ..., projections: _Optional[_Iterable[str]] = ...) -> None: ...

class AttestRequest(_message.Message):
    __slots__ = ("nonce",)
    NONCE_FIELD_NUMBER: _ClassVar[int]
    nonce: bytes
    def __init__(self, nonce: _Optional[bytes] = ...) -> None: ...

class Attestation(_message.Message):
    __slots__ = ("token",)
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    token: str
    def __init__(self, token: _Optional[str] = ...) -> None: ...
