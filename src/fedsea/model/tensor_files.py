"""safetensors files as byte ranges: what a header promises, checked, and files made of ranges.

A file is 8 bytes of header length (little endian), a JSON header and the tensors' bytes, without
holes. Nothing here interprets the bytes, so every dtype is copied and sampled alike.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from fedsea.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000
DTYPE_BITS: Mapping[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip

_LENGTH_BYTES = 8
_ALIGNMENT = 8
_COPY_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies: `size` bytes from byte `offset` of `file`."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int

    @property
    def num_elements(self) -> int:
        """Numbers in the tensor."""
        return math.prod(self.shape)


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Read and check the header of a safetensors file; the tensors' bytes are not touched.

    Raises:
        CheckpointError: the file cannot be read, or its header breaks the format.
    """
    with open_file(file) as opened:
        file_size = opened.seek(0, os.SEEK_END)
        header_size = _header_size(file, opened, file_size)
        try:
            header = json.loads(opened.read(header_size))
        except (ValueError, RecursionError) as error:
            raise corrupt(file, "its header is not JSON") from error
    if not isinstance(header, dict):
        raise corrupt(file, "its header is not an object")
    start = _LENGTH_BYTES + header_size
    tensors = {
        name: _tensor_info(file, name, entry, start)
        for name, entry in header.items()
        if name != "__metadata__"
    }
    _check_layout(file, tensors, start, file_size)
    return tensors


@contextmanager
def open_file(file: Path) -> Iterator[BinaryIO]:
    """Open a file for reading.

    Raises:
        CheckpointError: it cannot be opened or read.
    """
    try:
        with file.open("rb") as opened:
            yield opened
    except OSError as error:
        raise CheckpointError(
            f"{file} cannot be read ({error.strerror}); check that it is there and its permissions"
        ) from error


def corrupt(file: Path, reason: str) -> CheckpointError:
    """The error for a file whose content breaks the format."""
    return CheckpointError(f"{file} is corrupt: {reason}; fetch the file again")


def sample(opened: BinaryIO, info: TensorInfo, runs: int, run_bytes: int) -> bytes:
    """A few runs of bytes spread evenly from its first to its last; all of a tensor that is no larger."""
    if info.size <= runs * run_bytes:
        return _read_at(opened, info, 0, info.size)
    last = info.size - run_bytes
    starts = (i * last // (runs - 1) for i in range(runs))
    return b"".join(_read_at(opened, info, start, run_bytes) for start in starts)


def file_bytes(tensors: Mapping[str, TensorInfo]) -> int:
    """Size of the file that `write_tensors` makes of these tensors."""
    return len(_encode_header(tensors)) + sum(info.size for info in tensors.values())


def write_tensors(
    target: Path,
    tensors: Mapping[str, TensorInfo],
    on_bytes: Callable[[int], None] | None = None,
) -> None:
    """Copy tensors of other files into one new file, a few megabytes at a time.

    `on_bytes` is told how many bytes each step copied.

    Raises:
        CheckpointError: a source file ends early.
        OSError: the target cannot be written.
    """
    with target.open("xb") as written:
        written.write(_encode_header(tensors))
        for info in tensors.values():
            for piece in _pieces(info):
                written.write(piece)
                if on_bytes is not None:
                    on_bytes(len(piece))


def _header_size(file: Path, opened: BinaryIO, file_size: int) -> int:
    opened.seek(0)
    size = int.from_bytes(opened.read(_LENGTH_BYTES), "little")
    if file_size < _LENGTH_BYTES:
        raise corrupt(file, f"it has only {file_size} bytes")
    if size > MAX_HEADER_BYTES:
        raise corrupt(file, f"its header claims {size} bytes, over {MAX_HEADER_BYTES}")
    if _LENGTH_BYTES + size > file_size:
        raise corrupt(file, "it ends inside its header")
    return size


def _tensor_info(file: Path, name: str, entry: Any, start: int) -> TensorInfo:
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [begin, end]} if all(
            type(number) is int and number >= 0 for number in (*shape, begin, end)
        ):
            info = TensorInfo(file, dtype, tuple(shape), start + begin, end - begin)
        case _:
            raise corrupt(file, f"the header entry of {name} is malformed")
    if dtype not in DTYPE_BITS:
        raise CheckpointError(
            f"{file} holds {name} as {dtype}, which is not known; save it in another dtype"
        )
    if info.size * 8 != info.num_elements * DTYPE_BITS[dtype]:
        raise corrupt(file, f"the bytes of {name} do not fit its shape")
    return info


def _check_layout(
    file: Path, tensors: Mapping[str, TensorInfo], start: int, file_size: int
) -> None:
    for info in sorted(tensors.values(), key=lambda info: (info.offset, info.size)):
        if info.offset != start:
            raise corrupt(file, "its tensors overlap or leave holes")
        start += info.size
    if start > file_size:
        raise corrupt(file, f"{start - file_size} bytes are missing at its end")
    if start < file_size:
        raise corrupt(file, f"{file_size - start} bytes follow its last tensor")


def _encode_header(tensors: Mapping[str, TensorInfo]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, info in tensors.items():
        entries[name] = {
            "dtype": info.dtype,
            "shape": list(info.shape),
            "data_offsets": [begin, begin + info.size],
        }
        begin += info.size
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % _ALIGNMENT)
    return len(header).to_bytes(_LENGTH_BYTES, "little") + header


def _pieces(info: TensorInfo) -> Iterator[bytes]:
    with open_file(info.file) as opened:
        for begin in range(0, info.size, _COPY_BYTES):
            yield _read_at(opened, info, begin, min(_COPY_BYTES, info.size - begin))


def _read_at(opened: BinaryIO, info: TensorInfo, begin: int, count: int) -> bytes:
    opened.seek(info.offset + begin)
    content = opened.read(count)
    if len(content) != count:
        raise corrupt(info.file, "it ends early")
    return content
