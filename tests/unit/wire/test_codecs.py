"""The codecs: exact layout, error bounds, and refusal of everything that is not finite rows."""

from __future__ import annotations

import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsea.errors import ConfigError, LocalProtocolError, RemoteProtocolError
from fedsea.wire.codecs import MAX_LEVELS, VALUE_CODECS, Codec, RowFormat, decode, encode

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
@settings(max_examples=50)
@given(rows=matrices())
def test_floats_come_back_as_rounded_once(codec, dtype, rows):
    """A float codec is exactly one conversion to its dtype, and a second trip changes nothing."""
    data = encode(rows, codec)
    back = decode(data, codec, *rows.shape)
    assert len(data) == rows.shape[0] * codec.row_bytes(rows.shape[1])
    assert torch.equal(back, rows.to(dtype).float())
    assert encode(back, codec) == data


@settings(max_examples=200)
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
@pytest.mark.parametrize("codec", VALUE_CODECS)
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


@pytest.mark.parametrize("codec", VALUE_CODECS)
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


@pytest.mark.parametrize("codec", VALUE_CODECS)
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


@settings(max_examples=100)
@given(data=st.binary(max_size=64), codec=st.sampled_from(VALUE_CODECS), count=st.integers(0, 8))
def test_any_bytes_are_finite_rows_or_refused(data, codec, count):
    """Whatever comes, decode gives finite rows of the asked shape or a remote error."""
    try:
        rows = decode(data, codec, count, 3)
    except RemoteProtocolError:
        return
    assert rows.shape == (count, 3)
    assert bool(rows.isfinite().all())


@st.composite
def counted(draw):
    """A format of counts, and counts of 0 to 5 rows in it."""
    levels, width = draw(st.integers(1, MAX_LEVELS)), draw(st.integers(1, 23))
    chosen = RowFormat(Codec.COUNTS, width, levels, draw(st.floats(0.001, 100.0)))
    rows = draw(
        st.lists(st.lists(st.integers(0, levels), min_size=width, max_size=width), max_size=5)
    )
    return chosen, torch.tensor(rows, dtype=torch.uint8).view(len(rows), width)


@settings(max_examples=200)
@given(drawn=counted())
def test_counts_come_back_exactly(drawn):
    """Counts of any levels and width are read as they were drawn, and as the values they stand for."""
    chosen, counts = drawn
    data = chosen.encode(counts)
    assert len(data) == len(counts) * -(-chosen.width * chosen.bits // 8)
    assert torch.equal(chosen.counts(data, len(counts)), counts)
    expected = chosen.scale * (2 * counts.double() / chosen.levels - 1)
    assert torch.equal(chosen.decode(data, len(counts)), expected.float())


@pytest.mark.parametrize(
    ("levels", "bits"), [(1, 1), (2, 2), (3, 2), (7, 3), (15, 4), (16, 5), (127, 7), (255, 8)]
)
def test_bits_of_a_count(levels, bits):
    """A count takes as few bits as hold the greatest one."""
    assert RowFormat(Codec.COUNTS, 1, levels, 1.0).bits == bits


def test_layout_of_counts():
    """Least significant bit first, each row in bytes of its own: as in docs/protocol.md."""
    three_bits = RowFormat(Codec.COUNTS, 3, 7, 1.0)
    rows = torch.tensor([[1, 2, 7], [5, 0, 0]], dtype=torch.uint8)
    assert three_bits.encode(rows) == bytes([0b11010001, 0b1, 0b101, 0])
    whole_bytes = RowFormat(Codec.COUNTS, 3, 200, 1.0)
    assert whole_bytes.encode(rows) == bytes([1, 2, 7, 5, 0, 0])


def test_values_of_counts():
    """No count is -scale, all of them are +scale, half of them are zero."""
    ternary = RowFormat(Codec.COUNTS, 3, 2, 0.5)
    assert ternary.values(torch.tensor([[0, 1, 2]], dtype=torch.uint8)).tolist() == [[-0.5, 0, 0.5]]


@pytest.mark.parametrize(
    "rows",
    [
        torch.zeros(2, 3),
        torch.zeros(3, dtype=torch.uint8),
        torch.zeros(2, 4, dtype=torch.uint8),
        torch.zeros(2, 3, dtype=torch.int64),
        torch.full((2, 3), 3, dtype=torch.uint8),
    ],
    ids=["floats", "one row", "too wide", "int64", "above the levels"],
)
def test_wrong_counts_are_not_sent(rows):
    """A mechanism that draws something else than was agreed is stopped here."""
    with pytest.raises(LocalProtocolError):
        RowFormat(Codec.COUNTS, 3, 2, 1.0).encode(rows)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"\x00", "1 bytes came"),
        (b"\x03\x00", "above 2"),
        (b"\x00\x30", "above 2"),
        (b"\x00\x40", "behind its last"),
    ],
)
def test_wrong_counts_are_refused(data, match):
    """Counts above the levels and bits that mean nothing are a fault of the peer."""
    chosen = RowFormat(Codec.COUNTS, 3, 2, 1.0)
    with pytest.raises(RemoteProtocolError, match=match):
        chosen.decode(data, 2)


def test_no_rows_of_counts():
    """Nothing is written as nothing."""
    chosen = RowFormat(Codec.COUNTS, 3, 2, 1.0)
    assert chosen.encode(torch.empty(0, 3, dtype=torch.uint8)) == b""
    assert chosen.decode(b"", 0).shape == (0, 3)


def test_counts_too_large_for_the_dtype_are_refused():
    """A server that computes in fp16 hears of a scale beyond it before anything is computed."""
    chosen = RowFormat(Codec.COUNTS, 1, 1, 1e6)
    with pytest.raises(RemoteProtocolError, match="not finite"):
        chosen.decode(b"\x01", 1, torch.float16)


@pytest.mark.parametrize(
    "fields",
    [
        (Codec.COUNTS, 0, 1, 1.0),
        (Codec.COUNTS, 4, 0, 1.0),
        (Codec.COUNTS, 4, 256, 1.0),
        (Codec.COUNTS, 4, 1, 0.0),
        (Codec.COUNTS, 4, 1, -1.0),
        (Codec.COUNTS, 4, 1, float("nan")),
        (Codec.COUNTS, 4, 1, float("inf")),
        (Codec.COUNTS, 4, 1, 1e39),
        (Codec.FP32, 4, 1, 0.0),
        (Codec.FP32, 4, 0, 1.0),
        (Codec.FP32, 0, 0, 0.0),
    ],
)
def test_formats_that_cannot_be(fields):
    """Every field of a format is checked when it is made."""
    with pytest.raises(ConfigError):
        RowFormat(*fields)


def test_formats_of_floats_write_what_the_codec_writes():
    """A format of floats is its codec at one width."""
    rows = torch.randn(3, 5)
    for codec in VALUE_CODECS:
        chosen = RowFormat(codec, 5)
        data = chosen.encode(rows)
        assert data == encode(rows, codec)
        assert len(data) == 3 * chosen.row_bytes
        assert torch.equal(chosen.decode(data, 3), decode(data, codec, 3, 5))
    with pytest.raises(LocalProtocolError, match="5 numbers"):
        RowFormat(Codec.FP32, 4).encode(rows)


def test_counts_are_no_codec_of_floats():
    """Without levels nothing can be written or read as counts."""
    for use in (
        lambda: encode(torch.ones(1, 2), Codec.COUNTS),
        lambda: decode(b"", Codec.COUNTS, 0, 2),
        lambda: Codec.COUNTS.row_bytes(2),
    ):
        with pytest.raises(ConfigError, match="mechanism"):
            use()
