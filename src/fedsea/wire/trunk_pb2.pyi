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
    __slots__ = ("open", "begin", "append", "rollback", "fork", "drop", "close", "open_training", "forward", "backward", "discard", "reset", "step", "save")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    BEGIN_FIELD_NUMBER: _ClassVar[int]
    APPEND_FIELD_NUMBER: _ClassVar[int]
    ROLLBACK_FIELD_NUMBER: _ClassVar[int]
    FORK_FIELD_NUMBER: _ClassVar[int]
    DROP_FIELD_NUMBER: _ClassVar[int]
    CLOSE_FIELD_NUMBER: _ClassVar[int]
    OPEN_TRAINING_FIELD_NUMBER: _ClassVar[int]
    FORWARD_FIELD_NUMBER: _ClassVar[int]
    BACKWARD_FIELD_NUMBER: _ClassVar[int]
    DISCARD_FIELD_NUMBER: _ClassVar[int]
    RESET_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    SAVE_FIELD_NUMBER: _ClassVar[int]
    open: Open
    begin: Begin
    append: Append
    rollback: Rollback
    fork: Fork
    drop: Drop
    close: Close
    open_training: OpenTraining
    forward: Forward
    backward: Backward
    discard: Discard
    reset: Reset
    step: Step
    save: Save
    def __init__(self, open: _Optional[_Union[Open, _Mapping]] = ..., begin: _Optional[_Union[Begin, _Mapping]] = ..., append: _Optional[_Union[Append, _Mapping]] = ..., rollback: _Optional[_Union[Rollback, _Mapping]] = ..., fork: _Optional[_Union[Fork, _Mapping]] = ..., drop: _Optional[_Union[Drop, _Mapping]] = ..., close: _Optional[_Union[Close, _Mapping]] = ..., open_training: _Optional[_Union[OpenTraining, _Mapping]] = ..., forward: _Optional[_Union[Forward, _Mapping]] = ..., backward: _Optional[_Union[Backward, _Mapping]] = ..., discard: _Optional[_Union[Discard, _Mapping]] = ..., reset: _Optional[_Union[Reset, _Mapping]] = ..., step: _Optional[_Union[Step, _Mapping]] = ..., save: _Optional[_Union[Save, _Mapping]] = ...) -> None: ...

class ServerMessage(_message.Message):
    __slots__ = ("opened", "output", "notice", "activations", "gradients", "stepped", "saved")
    OPENED_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    NOTICE_FIELD_NUMBER: _ClassVar[int]
    ACTIVATIONS_FIELD_NUMBER: _ClassVar[int]
    GRADIENTS_FIELD_NUMBER: _ClassVar[int]
    STEPPED_FIELD_NUMBER: _ClassVar[int]
    SAVED_FIELD_NUMBER: _ClassVar[int]
    opened: Opened
    output: Output
    notice: Notice
    activations: Activations
    gradients: Gradients
    stepped: Stepped
    saved: Saved
    def __init__(self, opened: _Optional[_Union[Opened, _Mapping]] = ..., output: _Optional[_Union[Output, _Mapping]] = ..., notice: _Optional[_Union[Notice, _Mapping]] = ..., activations: _Optional[_Union[Activations, _Mapping]] = ..., gradients: _Optional[_Union[Gradients, _Mapping]] = ..., stepped: _Optional[_Union[Stepped, _Mapping]] = ..., saved: _Optional[_Union[Saved, _Mapping]] = ...) -> None: ...

class Open(_message.Message):
    __slots__ = ("protocol", "fingerprint", "first_block", "end_block", "up_codec", "down_codec", "reserve_rows", "adapter", "up_width", "up_levels", "up_scale", "projection", "prompt")
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
    PROMPT_FIELD_NUMBER: _ClassVar[int]
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
    prompt: str
    def __init__(self, protocol: _Optional[int] = ..., fingerprint: _Optional[str] = ..., first_block: _Optional[int] = ..., end_block: _Optional[int] = ..., up_codec: _Optional[_Union[Codec, str]] = ..., down_codec: _Optional[_Union[Codec, str]] = ..., reserve_rows: _Optional[int] = ..., adapter: _Optional[str] = ..., up_width: _Optional[int] = ..., up_levels: _Optional[int] = ..., up_scale: _Optional[float] = ..., projection: _Optional[str] = ..., prompt: _Optional[str] = ...) -> None: ...

class Opened(_message.Message):
    __slots__ = ("session_id", "idle_timeout_ms", "step")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    IDLE_TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    idle_timeout_ms: int
    step: int
    def __init__(self, session_id: _Optional[str] = ..., idle_timeout_ms: _Optional[int] = ..., step: _Optional[int] = ...) -> None: ...

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

class OpenTraining(_message.Message):
    __slots__ = ("protocol", "fingerprint", "first_block", "end_block", "up_codec", "down_codec", "gradient_codec", "up_width", "up_levels", "up_scale", "projection", "adapter", "lora", "prompt_rows", "optimizer", "seed", "resume_steps", "weight")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    FIRST_BLOCK_FIELD_NUMBER: _ClassVar[int]
    END_BLOCK_FIELD_NUMBER: _ClassVar[int]
    UP_CODEC_FIELD_NUMBER: _ClassVar[int]
    DOWN_CODEC_FIELD_NUMBER: _ClassVar[int]
    GRADIENT_CODEC_FIELD_NUMBER: _ClassVar[int]
    UP_WIDTH_FIELD_NUMBER: _ClassVar[int]
    UP_LEVELS_FIELD_NUMBER: _ClassVar[int]
    UP_SCALE_FIELD_NUMBER: _ClassVar[int]
    PROJECTION_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    LORA_FIELD_NUMBER: _ClassVar[int]
    PROMPT_ROWS_FIELD_NUMBER: _ClassVar[int]
    OPTIMIZER_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    RESUME_STEPS_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    fingerprint: str
    first_block: int
    end_block: int
    up_codec: Codec
    down_codec: Codec
    gradient_codec: Codec
    up_width: int
    up_levels: int
    up_scale: float
    projection: str
    adapter: str
    lora: Lora
    prompt_rows: int
    optimizer: AdamW
    seed: int
    resume_steps: _containers.RepeatedScalarFieldContainer[int]
    weight: float
    def __init__(self, protocol: _Optional[int] = ..., fingerprint: _Optional[str] = ..., first_block: _Optional[int] = ..., end_block: _Optional[int] = ..., up_codec: _Optional[_Union[Codec, str]] = ..., down_codec: _Optional[_Union[Codec, str]] = ..., gradient_codec: _Optional[_Union[Codec, str]] = ..., up_width: _Optional[int] = ..., up_levels: _Optional[int] = ..., up_scale: _Optional[float] = ..., projection: _Optional[str] = ..., adapter: _Optional[str] = ..., lora: _Optional[_Union[Lora, _Mapping]] = ..., prompt_rows: _Optional[int] = ..., optimizer: _Optional[_Union[AdamW, _Mapping]] = ..., seed: _Optional[int] = ..., resume_steps: _Optional[_Iterable[int]] = ..., weight: _Optional[float] = ...) -> None: ...

class Lora(_message.Message):
    __slots__ = ("rank", "alpha", "dropout", "targets", "blocks", "rslora", "freeze_a")
    RANK_FIELD_NUMBER: _ClassVar[int]
    ALPHA_FIELD_NUMBER: _ClassVar[int]
    DROPOUT_FIELD_NUMBER: _ClassVar[int]
    TARGETS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    RSLORA_FIELD_NUMBER: _ClassVar[int]
    FREEZE_A_FIELD_NUMBER: _ClassVar[int]
    rank: int
    alpha: float
    dropout: float
    targets: _containers.RepeatedScalarFieldContainer[str]
    blocks: _containers.RepeatedScalarFieldContainer[int]
    rslora: bool
    freeze_a: bool
    def __init__(self, rank: _Optional[int] = ..., alpha: _Optional[float] = ..., dropout: _Optional[float] = ..., targets: _Optional[_Iterable[str]] = ..., blocks: _Optional[_Iterable[int]] = ..., rslora: bool = ..., freeze_a: bool = ...) -> None: ...

class AdamW(_message.Message):
    __slots__ = ("beta1", "beta2", "eps", "weight_decay")
    BETA1_FIELD_NUMBER: _ClassVar[int]
    BETA2_FIELD_NUMBER: _ClassVar[int]
    EPS_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_DECAY_FIELD_NUMBER: _ClassVar[int]
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    def __init__(self, beta1: _Optional[float] = ..., beta2: _Optional[float] = ..., eps: _Optional[float] = ..., weight_decay: _Optional[float] = ...) -> None: ...

class Forward(_message.Message):
    __slots__ = ("id", "counts", "rows", "no_grad")
    ID_FIELD_NUMBER: _ClassVar[int]
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    NO_GRAD_FIELD_NUMBER: _ClassVar[int]
    id: int
    counts: _containers.RepeatedScalarFieldContainer[int]
    rows: bytes
    no_grad: bool
    def __init__(self, id: _Optional[int] = ..., counts: _Optional[_Iterable[int]] = ..., rows: _Optional[bytes] = ..., no_grad: bool = ...) -> None: ...

class Activations(_message.Message):
    __slots__ = ("id", "rows")
    ID_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    id: int
    rows: bytes
    def __init__(self, id: _Optional[int] = ..., rows: _Optional[bytes] = ...) -> None: ...

class Backward(_message.Message):
    __slots__ = ("id", "rows")
    ID_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    id: int
    rows: bytes
    def __init__(self, id: _Optional[int] = ..., rows: _Optional[bytes] = ...) -> None: ...

class Gradients(_message.Message):
    __slots__ = ("id", "rows")
    ID_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    id: int
    rows: bytes
    def __init__(self, id: _Optional[int] = ..., rows: _Optional[bytes] = ...) -> None: ...

class Discard(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: int
    def __init__(self, id: _Optional[int] = ...) -> None: ...

class Reset(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Step(_message.Message):
    __slots__ = ("number", "learning_rate", "max_grad_norm", "scale")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    MAX_GRAD_NORM_FIELD_NUMBER: _ClassVar[int]
    SCALE_FIELD_NUMBER: _ClassVar[int]
    number: int
    learning_rate: float
    max_grad_norm: float
    scale: float
    def __init__(self, number: _Optional[int] = ..., learning_rate: _Optional[float] = ..., max_grad_norm: _Optional[float] = ..., scale: _Optional[float] = ...) -> None: ...

class Stepped(_message.Message):
    __slots__ = ("number", "grad_norm", "applied")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    GRAD_NORM_FIELD_NUMBER: _ClassVar[int]
    APPLIED_FIELD_NUMBER: _ClassVar[int]
    number: int
    grad_norm: float
    applied: bool
    def __init__(self, number: _Optional[int] = ..., grad_norm: _Optional[float] = ..., applied: bool = ...) -> None: ...

class Save(_message.Message):
    __slots__ = ("number",)
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    number: int
    def __init__(self, number: _Optional[int] = ...) -> None: ...

class Saved(_message.Message):
    __slots__ = ("number", "problem")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    number: int
    problem: str
    def __init__(self, number: _Optional[int] = ..., problem: _Optional[str] = ...) -> None: ...

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
    __slots__ = ("protocol", "model", "family", "fingerprint", "hidden_size", "num_blocks", "first_block", "end_block", "codecs", "max_context", "max_rows_per_message", "max_message_bytes", "dtype", "quantization", "server_version", "page_rows", "max_segments", "max_sequences", "max_pending", "projections", "max_forwards")
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
    MAX_FORWARDS_FIELD_NUMBER: _ClassVar[int]
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
    max_forwards: int
    def __init__(self, protocol: _Optional[int] = ..., model: _Optional[str] = ..., family: _Optional[str] = ..., fingerprint: _Optional[str] = ..., hidden_size: _Optional[int] = ..., num_blocks: _Optional[int] = ..., first_block: _Optional[int] = ..., end_block: _Optional[int] = ..., codecs: _Optional[_Iterable[_Union[Codec, str]]] = ..., max_context: _Optional[int] = ..., max_rows_per_message: _Optional[int] = ..., max_message_bytes: _Optional[int] = ..., dtype: _Optional[str] = ..., quantization: _Optional[str] = ..., server_version: _Optional[str] = ..., page_rows: _Optional[int] = ..., max_segments: _Optional[int] = ..., max_sequences: _Optional[int] = ..., max_pending: _Optional[int] = ..., projections: _Optional[_Iterable[str]] = ..., max_forwards: _Optional[int] = ...) -> None: ...

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
