"""Hidden-state rows as bytes.

A row is `hidden_size` numbers; rows follow each other without gaps, little endian (as every
platform that torch supports). Bytes written here are kept by the client and sent again unchanged
after a failure.

    fp32, bf16, fp16    hidden_size numbers of 4, 2 or 2 bytes
    int8                hidden_size signed bytes, then one fp16 scale; value = byte * scale
"""

from __future__ import annotations

import math
from enum import Enum

import torch

from fedsea.errors import LocalProtocolError, RemoteProtocolError

_INT8_MAX = 127
_SCALE_BYTES = 2
_SMALLEST_SCALE = 2.0**-24  # the least positive fp16: a row of zeros still has a scale


class Codec(Enum):
    """How rows are written; the value is the name used in options and configuration files."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"
    INT8 = "int8"

    def row_bytes(self, hidden_size: int) -> int:
        """Bytes of one row of `hidden_size` numbers."""
        if self is Codec.INT8:
            return hidden_size + _SCALE_BYTES
        return hidden_size * _FLOAT_DTYPES[self].itemsize


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


def encode(rows: torch.Tensor, codec: Codec) -> bytes:
    """Write rows as bytes.

    Args:
        rows: [n, hidden_size], any floating dtype, on any device.
        codec: how to write them.

    Returns:
        n * codec.row_bytes(hidden_size) bytes.

    Raises:
        LocalProtocolError: the rows are not a floating matrix, hold NaN or infinity, or exceed
            what the codec can represent.
    """
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
    """
    size = memoryview(data).nbytes
    expected = count * codec.row_bytes(hidden_size)
    if count < 0 or size != expected:
        raise RemoteProtocolError(
            f"{size} bytes came for {count} rows in {codec.value}, which take {expected}; "
            "check that both sides run the same model and codec"
        )
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
