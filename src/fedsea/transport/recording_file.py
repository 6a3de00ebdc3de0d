"""Recordings on disk: every message of a client, as it crossed the wire.

A recording holds rows from which text can be read; only its owner may read the file. The format:

    magic       "fedsea recording 1" and a line feed
    messages    direction (1 byte: 0 up, 1 down), seconds (8 bytes, IEEE 754), size (4 bytes), data

Numbers are little endian. A message is never larger than a transport carries, so that a damaged
file cannot ask for memory.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Self

from fedsea.errors import ConfigError
from fedsea.transport.recording import Direction, Message
from fedsea.wire.limits import LARGEST_MESSAGE

MAGIC = b"fedsea recording 1\n"
_HEAD = struct.Struct("<BdI")
_DIRECTIONS = (Direction.UP, Direction.DOWN)
_OWNER_ONLY = 0o600


class RecordingWriter:
    """An observer that writes all messages to a new file; use it as a context manager.

    Raises:
        ConfigError: the file exists already or cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, _OWNER_ONLY)
        except FileExistsError:
            raise ConfigError(f"{path} exists: give another file for the recording") from None
        except OSError as error:
            raise ConfigError(f"{path} cannot be written ({error.strerror})") from error
        self._file: BinaryIO = os.fdopen(opened, "wb")
        self._file.write(MAGIC)

    def __call__(self, message: Message) -> None:
        """Write a message."""
        direction = _DIRECTIONS.index(message.direction)
        self._file.write(_HEAD.pack(direction, message.seconds, len(message.data)))
        self._file.write(message.data)

    def close(self) -> None:
        """Finish the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_recording(path: Path) -> Iterator[Message]:
    """The messages of a file, in order.

    Raises:
        ConfigError: it cannot be read, is no recording, or ends within a message.
    """
    try:
        with path.open("rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                raise ConfigError(
                    f"{path} is no recording: make one with `fedsea generate --recording`"
                )
            while head := file.read(_HEAD.size):
                yield _message(path, file, head)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror})") from error


def _message(path: Path, file: BinaryIO, head: bytes) -> Message:
    damaged = ConfigError(f"{path} is damaged: record again")
    if len(head) < _HEAD.size:
        raise damaged
    direction, seconds, size = _HEAD.unpack(head)
    if direction >= len(_DIRECTIONS) or size > LARGEST_MESSAGE:
        raise damaged
    data = file.read(size)
    if len(data) < size:
        raise damaged
    return Message(_DIRECTIONS[direction], seconds, data)
