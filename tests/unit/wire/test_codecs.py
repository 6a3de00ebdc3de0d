"""The codecs: exact layout, error bounds, and refusal of everything that is not finite rows."""

from __future__ import annotations

import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsea.errors import LocalProtocolError, RemoteProtocolError
from fedsea.wire.codecs import Codec, decode, encode

FLOATS = [(Codec.FP32, torch.float32), (Codec.BF16, torch.bfloat16), (Codec.FP16, torch.float16)]


@st.composite
def matrices(draw, magnitude: float = 1e4):
    """Float32 matrices of 0 to 4 rows, among them zeros, tiny and large values."""
    count, hidden = draw(st.integers(0, 4)), draw(st.integers(1, 9))
    value = st.floats(-magnitude, magnitude, width=32) | st.floats(-(2**-20), 2**-20, width=32)
    values = draw(st.lists(value, min_size=count * hidden, max_size=count * hidden))
    return torch.tensor(values, dtype=torch.float32).view(count, hidden)


@pytest.mark.parametrize(
    ("codec", "size"), [(Codec.FP32, 28), (Codec.BF16, 14), (Codec.FP16, 14), (Codec.INT8, 9)]
)
def test_row_bytes(codec, size):
    """A row takes hidden x itemsize bytes, and int8 two more for its scale."""
    assert codec.row_bytes(7) == size


@pytest.mark.parametrize(("codec", "dtype"), FLOATS)
@settings(max_examples=50, deadline=None)
@given(rows=matrices())
def test_floats_come_back_as_rounded_once(codec, dtype, rows):
    """A float codec is exactly one conversion to its dtype, and a second trip changes nothing."""
    data = encode(rows, codec)
    back = decode(data, codec, *rows.shape)
    assert len(data) == rows.shape[0] * codec.row_bytes(rows.shape[1])
    assert torch.equal(back, rows.to(dtype).float())
    assert encode(back, codec) == data


@settings(max_examples=200, deadline=None)
@given(rows=matrices(magnitude=8e6))
def test_int8_error_is_half_a_step(rows):
    """Every int8 value is within half a scale, and the scale is at most one fp16 step too large."""
    data = encode(rows, Codec.INT8)
    back = decode(data, Codec.INT8, *rows.shape)
    size = Codec.INT8.row_bytes(rows.shape[1])
    for index, (row, read) in enumerate(zip(rows, back, strict=True)):
        (scale,) = struct.unpack_from("<e", data, (index + 1) * size - 2)
        exact = row.abs().max().item() / 127
        assert scale <= max(exact * (1 + 2**-10), exact + 2**-24)
        assert (row - read).abs().max().item() <= scale * (0.5 + 1e-5)


def test_layout_of_every_codec():
    """The bytes are those of docs/protocol.md: little endian, rows in order, int8 with its scale last."""
    rows = torch.tensor([[1.0, -2.0], [0.0, 127.0]])
    assert encode(rows, Codec.FP32) == struct.pack("<4f", 1, -2, 0, 127)
    assert encode(rows, Codec.FP16) == struct.pack("<4e", 1, -2, 0, 127)
    assert encode(rows, Codec.BF16) == bytes.fromhex("803f 00c0 0000 fe42")
    second = encode(rows, Codec.INT8)[4:]
    assert second == struct.pack("<bbe", 0, 127, 1.0)


def test_int8_scale_is_rounded_up():
    """1/127 is no fp16 number: the scale is the next larger one, so that 1.0 stays within 127 steps."""
    step, scale = struct.unpack("<be", encode(torch.tensor([[1.0]]), Codec.INT8))
    assert step == 127
    assert scale >= 1 / 127 > scale * (1 - 2**-10)


def test_int8_row_of_zeros():
    """Zeros come back as zeros, not as a division by zero."""
    assert torch.equal(
        decode(encode(torch.zeros(2, 3), Codec.INT8), Codec.INT8, 2, 3), torch.zeros(2, 3)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("codec", Codec)
def test_any_floating_dtype_is_taken_and_given(codec, dtype):
    """Rows may be computed in any floating dtype on either side."""
    rows = torch.tensor([[0.5, -1.0, 2.0]], dtype=dtype)
    back = decode(encode(rows, codec), codec, 1, 3, dtype)
    assert back.dtype is dtype
    assert torch.allclose(back, rows, atol=0.02)


def test_rows_of_a_graph_and_rows_that_are_not_contiguous():
    """Rows under autograd and strided views are written like any others."""
    rows = torch.arange(6.0).view(3, 2).t()
    plain = encode(rows.contiguous(), Codec.FP32)
    assert encode(rows, Codec.FP32) == plain
    assert encode(rows.clone().requires_grad_(), Codec.FP32) == plain


def test_decoded_rows_own_their_memory():
    """Writing to decoded rows leaves the message as it was."""
    data = struct.pack("<2f", 1, 2)
    decode(data, Codec.FP32, 1, 2).zero_()
    assert data == struct.pack("<2f", 1, 2)


def test_decode_takes_a_memoryview():
    """A part of a larger buffer is read without being cut out first."""
    data = struct.pack("<4f", 1, 2, 3, 4)
    assert decode(memoryview(data)[8:], Codec.FP32, 1, 2).tolist() == [[3, 4]]


@pytest.mark.parametrize("codec", Codec)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_encode_refuses_what_is_not_finite(codec, bad):
    """NaN and infinity are a fault of this side, whatever the codec."""
    rows = torch.ones(2, 3)
    rows[1, 2] = bad
    with pytest.raises(LocalProtocolError, match="NaN or infinity"):
        encode(rows, codec)


@pytest.mark.parametrize(
    ("codec", "value", "dtype", "advice"),
    [
        (Codec.FP16, 7e4, torch.float32, "bf16 or fp32"),
        (Codec.INT8, 1e7, torch.float32, "bf16 or fp32"),
        (Codec.BF16, 3.4028e38, torch.float32, "codec fp32"),
        (Codec.FP32, 1e39, torch.float64, "float32"),
    ],
)
def test_encode_refuses_overflow_and_names_the_fix(codec, value, dtype, advice):
    """A value that the codec cannot hold is an error with the codec that can, not an infinity."""
    with pytest.raises(LocalProtocolError, match=advice):
        encode(torch.tensor([[1.0, value]], dtype=dtype), codec)


def test_large_finite_rows_are_not_mistaken_for_infinite():
    """Rows whose sum overflows are still finite rows."""
    rows = torch.full((1, 4), 3e38)
    assert torch.equal(decode(encode(rows, Codec.FP32), Codec.FP32, 1, 4), rows)


@pytest.mark.parametrize(
    "rows",
    [torch.ones(3), torch.ones(1, 2, 3), torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 0)],
)
def test_encode_refuses_what_is_no_matrix_of_floats(rows):
    """Wrong rank, integers and empty rows are refused by shape and dtype."""
    with pytest.raises(LocalProtocolError, match="hidden_size"):
        encode(rows, Codec.FP32)


@pytest.mark.parametrize("codec", Codec)
@pytest.mark.parametrize(("count", "extra"), [(2, -1), (2, 1), (0, 1), (-1, 0), (10**12, 0)])
def test_decode_refuses_a_wrong_length_before_allocating(codec, count, extra):
    """The number of bytes must be that of the rows; nothing is sized by the peer's claim."""
    size = (2 if count in (2, 10**12) else 0) * codec.row_bytes(3) + extra
    with pytest.raises(RemoteProtocolError, match="bytes came for"):
        decode(bytes(max(size, 0)), codec, count, 3)


@pytest.mark.parametrize(
    ("codec", "data"),
    [
        (Codec.FP32, struct.pack("<2f", 1, float("nan"))),
        (Codec.FP16, struct.pack("<2e", float("-inf"), 1)),
        (Codec.BF16, bytes.fromhex("803f 807f")),
        (Codec.INT8, struct.pack("<bbe", 1, 2, float("inf"))),
        (Codec.INT8, struct.pack("<bbe", 0, 0, float("nan"))),
    ],
)
def test_decode_refuses_what_is_not_finite(codec, data):
    """A peer cannot plant NaN or infinity in a batch that others share."""
    with pytest.raises(RemoteProtocolError, match="not finite"):
        decode(data, codec, 1, 2)


def test_decode_refuses_overflow_of_the_wanted_dtype():
    """Finite fp32 rows that are infinite in fp16 are refused too."""
    with pytest.raises(RemoteProtocolError, match=r"torch\.float16"):
        decode(struct.pack("<f", 1e6), Codec.FP32, 1, 1, torch.float16)


@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=64), codec=st.sampled_from(Codec), count=st.integers(0, 8))
def test_any_bytes_are_finite_rows_or_refused(data, codec, count):
    """Whatever comes, decode gives finite rows of the asked shape or a remote error."""
    try:
        rows = decode(data, codec, count, 3)
    except RemoteProtocolError:
        return
    assert rows.shape == (count, 3)
    assert bool(rows.isfinite().all())
