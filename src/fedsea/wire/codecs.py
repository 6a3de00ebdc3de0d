"""Hidden-state rows as bytes.

A row is `hidden_size` numbers; rows follow each other without gaps, little endian (as every
platform that torch supports). Bytes written here are kept by the client and sent again unchanged
after a failure.

    fp32, bf16, fp16    hidden_size numbers of 4, 2 or 2 bytes
    int8                hidden_size signed bytes, then one fp16 scale; value = byte * scale
    counts              whole numbers 0 .. levels of n bits each, n as few as hold `levels`;
                        value = scale * (2 * count / levels - 1)

The counts of a privacy mechanism travel as they are: there is no tensor of floats in between. A
`RowFormat` is all that both sides must know to read rows; `Open` names one for each direction.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

import numpy as np
import torch

from fedsea.errors import ConfigError, LocalProtocolError, RemoteProtocolError

_INT8_MAX = 127
_SCALE_BYTES = 2
_SMALLEST_SCALE = 2.0**-24  # the least positive fp16: a row of zeros still has a scale

MAX_LEVELS = 255
_BYTE_BITS = 8


class Codec(Enum):
    """How rows are written; the value is the name used in options and configuration files."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"
    INT8 = "int8"
    COUNTS = "counts"

    def row_bytes(self, hidden_size: int) -> int:
        """Bytes of one row of `hidden_size` numbers; for counts, `RowFormat.row_bytes` says it.

        Raises:
            ConfigError: the codec is `COUNTS`.
        """
        if self is Codec.INT8:
            return hidden_size + _SCALE_BYTES
        if self is Codec.COUNTS:
            raise _counts_need_levels()
        return hidden_size * _FLOAT_DTYPES[self].itemsize


VALUE_CODECS = (Codec.FP32, Codec.BF16, Codec.FP16, Codec.INT8)
"""The codecs that take floating rows; `COUNTS` takes what a mechanism has drawn."""

_FLOAT_DTYPES = {
    Codec.FP32: torch.float32,
    Codec.BF16: torch.bfloat16,
    Codec.FP16: torch.float16,
}

_OVERFLOW_ADVICE = {
    Codec.BF16: "use the codec fp32",
    Codec.FP16: "use the codec bf16 or fp32",
    Codec.INT8: "use the codec bf16 or fp32",
}


@dataclass(frozen=True, slots=True)
class RowFormat:
    """How the rows of one direction of a session are written.

    Attributes:
        codec: how one number is written.
        width: numbers in a row.
        levels: the greatest count, 1 to 255; 0 unless the codec is `COUNTS`.
        scale: of the value of a count; 0 unless the codec is `COUNTS`.

    Raises:
        ConfigError: values that do not belong together or are out of range.
    """

    codec: Codec
    width: int
    levels: int = 0
    scale: float = 0.0

    def __post_init__(self) -> None:
        """Check the values."""
        if self.width < 1:
            raise ConfigError(f"a row of {self.width} numbers cannot be sent; give a width above 0")
        if self.codec is not Codec.COUNTS:
            if self.levels or self.scale:
                raise ConfigError(
                    f"levels and scale belong to the codec counts, not to {self.codec.value}; "
                    "leave them out"
                )
            return
        if not 1 <= self.levels <= MAX_LEVELS:
            raise ConfigError(f"{self.levels} levels cannot be counted; use 1 to {MAX_LEVELS}")
        # The values of counts are fp32 numbers up to the scale itself.
        if not 0.0 < self.scale <= torch.finfo(torch.float32).max:
            raise ConfigError("the scale of counts must be positive and finite; fix the mechanism")

    @property
    def bits(self) -> int:
        """Bits of one count; 0 for other codecs."""
        return self.levels.bit_length()

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        if self.codec is Codec.COUNTS:
            return -(-self.width * self.bits // _BYTE_BITS)
        return self.codec.row_bytes(self.width)

    def encode(self, rows: torch.Tensor) -> bytes:
        """Write floating rows, or counts [n, width] in uint8, as n * row_bytes bytes.

        Raises:
            LocalProtocolError: the rows have another shape or dtype, a count is above `levels`,
                or a value is not finite or too large for the codec.
        """
        if rows.dim() == 2 and rows.shape[1] != self.width:
            raise LocalProtocolError(
                f"rows of {rows.shape[1]} numbers cannot be sent where {self.width} were agreed; "
                "check the projection and the mechanism"
            )
        if self.codec is Codec.COUNTS:
            return self._pack(rows)
        return encode(rows, self.codec)

    def decode(
        self, data: bytes | memoryview, count: int, dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """Read `count` rows as numbers: [count, width] on the CPU, every value finite.

        Raises:
            RemoteProtocolError: as the function `decode`, and for a count above `levels`.
        """
        if self.codec is Codec.COUNTS:
            rows = self.values(self.counts(data, count)).to(dtype)
            if not _all_finite(rows):
                raise RemoteProtocolError(
                    f"counts of this scale are not finite in {dtype}; use a smaller scale"
                )
            return rows
        return decode(data, self.codec, count, self.width, dtype)

    def counts(self, data: bytes | memoryview, count: int) -> torch.Tensor:
        """Read the counts of `count` rows as they were drawn: [count, width] uint8.

        Raises:
            RemoteProtocolError: the length is wrong, a count is above `levels`, or a bit that
                belongs to no count is set.
        """
        _check_length(memoryview(data).nbytes, self.codec, count, self.row_bytes)
        packed = np.frombuffer(data, dtype=np.uint8).reshape(count, self.row_bytes)
        if count == 0:
            return torch.empty((0, self.width), dtype=torch.uint8)
        return torch.from_numpy(self._unpack(packed))

    def values(self, counts: torch.Tensor) -> torch.Tensor:
        """What counts stand for: scale * (2 * count / levels - 1), rounded once to fp32."""
        table = self.scale * (2.0 * np.arange(self.levels + 1) / self.levels - 1.0)
        return torch.from_numpy(table.astype(np.float32))[counts.int()]

    def _pack(self, counts: torch.Tensor) -> bytes:
        if counts.dim() != 2 or counts.dtype is not torch.uint8:
            raise LocalProtocolError(
                f"counts of shape {list(counts.shape)} and {counts.dtype} cannot be sent; "
                "pass a uint8 tensor of shape [n, width]"
            )
        numbers = counts.cpu().contiguous().numpy()
        if numbers.size and int(numbers.max()) > self.levels:
            raise LocalProtocolError(
                f"a count is above {self.levels}, the greatest that was agreed; fix the mechanism"
            )
        if self.bits == _BYTE_BITS:
            return numbers.tobytes()
        bits = np.unpackbits(numbers[..., None], axis=2, count=self.bits, bitorder="little")
        rows = bits.reshape(len(numbers), self.width * self.bits)
        return np.packbits(rows, axis=1, bitorder="little").tobytes()

    def _unpack(self, packed: np.ndarray) -> np.ndarray:
        used = self.width * self.bits
        spare = packed.shape[1] * _BYTE_BITS - used
        if spare and (packed[:, -1] >> (_BYTE_BITS - spare)).any():
            raise RemoteProtocolError(
                "a row of counts has bits behind its last count; check the width and the levels"
            )
        if self.bits == _BYTE_BITS:
            numbers = packed.copy()
        else:
            bits = np.unpackbits(packed, axis=1, count=used, bitorder="little")
            grouped = bits.reshape(len(packed), self.width, self.bits)
            numbers = np.packbits(grouped, axis=2, bitorder="little")[..., 0]
        if int(numbers.max()) > self.levels:
            raise RemoteProtocolError(
                f"a count is above {self.levels}, the greatest that was agreed; "
                "check that both sides use the same mechanism"
            )
        return numbers


def encode(rows: torch.Tensor, codec: Codec) -> bytes:
    """Write rows as bytes.

    Args:
        rows: [n, hidden_size], any floating dtype, on any device.
        codec: how to write them; not `COUNTS`, which `RowFormat.encode` writes.

    Returns:
        n * codec.row_bytes(hidden_size) bytes.

    Raises:
        LocalProtocolError: the rows are not a floating matrix, hold NaN or infinity, or exceed
            what the codec can represent.
        ConfigError: the codec is `COUNTS`.
    """
    if codec is Codec.COUNTS:
        raise _counts_need_levels()
    if rows.dim() != 2 or rows.shape[1] == 0 or not rows.is_floating_point():
        raise LocalProtocolError(
            f"rows of shape {list(rows.shape)} and {rows.dtype} cannot be sent; "
            "pass a floating tensor of shape [n, hidden_size]"
        )
    if rows.requires_grad:
        rows = rows.detach()
    if codec is Codec.INT8:
        packed, witness = _quantize(rows)
    else:
        packed = witness = rows.to(_FLOAT_DTYPES[codec]).cpu().contiguous()
    if not _all_finite(witness):
        raise _unencodable(rows, codec)
    return packed.view(torch.uint8).numpy().tobytes()


def decode(
    data: bytes | memoryview,
    codec: Codec,
    count: int,
    hidden_size: int,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Read `count` rows; the result owns its memory.

    Args:
        data: exactly count * codec.row_bytes(hidden_size) bytes.
        codec: how they were written.
        count: number of rows; 0 is allowed.
        hidden_size: numbers in a row.
        dtype: floating dtype of the result.

    Returns:
        [count, hidden_size] on the CPU, every value finite.

    Raises:
        RemoteProtocolError: the length is wrong, or a value is not finite in `dtype`. The length
            is checked before anything is allocated.
        ConfigError: the codec is `COUNTS`.
    """
    _check_length(memoryview(data).nbytes, codec, count, codec.row_bytes(hidden_size))
    if count == 0:
        return torch.empty((0, hidden_size), dtype=dtype)
    # torch may write to a tensor's memory, which `bytes` forbids, so the one copy is made here.
    buffer = bytearray(data)
    if codec is Codec.INT8:
        rows = _dequantize(buffer, count, hidden_size).to(dtype)
    else:
        flat = torch.frombuffer(buffer, dtype=_FLOAT_DTYPES[codec])
        rows = flat.view(count, hidden_size).to(dtype)
    if not _all_finite(rows):
        raise RemoteProtocolError(
            f"rows in {codec.value} hold a value that is not finite in {dtype}; "
            "use the codec bf16 or fp32, or compute in a wider dtype"
        )
    return rows


def _check_length(size: int, codec: Codec, count: int, row_bytes: int) -> None:
    expected = count * row_bytes
    if count < 0 or size != expected:
        raise RemoteProtocolError(
            f"{size} bytes came for {count} rows in {codec.value}, which take {expected}; "
            "check that both sides run the same model and codec"
        )


def _counts_need_levels() -> ConfigError:
    return ConfigError(
        "the codec counts belongs to a mechanism that draws counts; use fp32, bf16, fp16 or int8"
    )


def _quantize(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed rows [n, hidden_size + 2] as bytes, and their scales [n, 1] in fp16.

    The scale is the least fp16 that is no smaller than absmax / 127. Rounding it up keeps every
    value within 127 steps, so the error is at most half a step even where fp16 is coarse. The steps
    are counted with the rounded scale, which is the one the peer multiplies by.
    """
    values = rows.float()
    exact = (values.abs().amax(dim=1, keepdim=True) / _INT8_MAX).clamp_min(_SMALLEST_SCALE)
    nearest = exact.half()
    too_small = nearest.float() < exact
    # Among positive fp16 numbers the next larger one has the next larger bit pattern.
    scale = (nearest.view(torch.int16) + too_small.to(torch.int16)).view(torch.float16)
    steps = (values / scale.float()).round_().to(torch.int8)
    packed = torch.cat((steps.view(torch.uint8), scale.view(torch.uint8)), dim=1)
    return packed.cpu(), scale.cpu()


def _dequantize(buffer: bytearray, count: int, hidden_size: int) -> torch.Tensor:
    packed = torch.frombuffer(buffer, dtype=torch.uint8).view(count, hidden_size + _SCALE_BYTES)
    steps = packed[:, :hidden_size].view(torch.int8)
    # A copy is aligned; the bytes of a single row of odd hidden size are not.
    scale = packed[:, hidden_size:].clone(memory_format=torch.contiguous_format).view(torch.float16)
    return steps.float().mul_(scale.float())


def _all_finite(values: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite.

    A sum is finite only if all its terms are, and one reduction costs a fraction of
    `isfinite().all()`. Large finite terms may overflow the sum, so only then each term is looked
    at.
    """
    accumulator = torch.float64 if values.dtype is torch.float64 else torch.float32
    if math.isfinite(values.sum(dtype=accumulator).item()):
        return True
    return bool(values.isfinite().all())


def _unencodable(rows: torch.Tensor, codec: Codec) -> LocalProtocolError:
    if not _all_finite(rows):
        return LocalProtocolError(
            "rows hold NaN or infinity and cannot be sent; check the dtype the model is computed in"
        )
    advice = _OVERFLOW_ADVICE.get(codec, "compute the model in float32")
    return LocalProtocolError(f"a value is too large for the codec {codec.value}; {advice}")
