"""How a process of Flower reaches the client process: one request and one answer on a Unix socket.

    request, answer   4 bytes  length of the header, little endian
                      8 bytes  length of the body
                      header   a JSON object
                      body     arrays as safetensors, or nothing

The socket lies in a folder of its owner (0700) and is readable by nobody else (0600). Lengths are
checked before memory is taken. No pickle, and one request at a time is computed.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import struct
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from fedsea.errors import (
    ConfigError,
    ConnectionLost,
    FedseaError,
    RemoteProtocolError,
    Unreachable,
    error_classes,
)
from fedsea.federated.arrays import Arrays, packed, unpacked

MAX_HEADER: Final = 1 << 18
MAX_BODY: Final = 1 << 31

_LENGTHS: Final = struct.Struct("<IQ")
_LONGEST_PATH: Final = 100
_IDLE_S: Final = 30.0

_log = logging.getLogger(__name__)

Header = dict[str, Any]
Handler = Callable[[Header, Arrays], tuple[Header, Arrays]]


def encode(header: Mapping[str, Any], arrays: Arrays) -> bytes:
    """One message."""
    head = json.dumps(dict(header), sort_keys=True).encode()
    body = packed(arrays) if arrays else b""
    return _LENGTHS.pack(len(head), len(body)) + head + body


def decode(read: Callable[[int], bytes]) -> tuple[Header, Arrays]:
    """Read one message.

    Args:
        read: gives exactly so many bytes, or raises ConnectionLost.

    Raises:
        RemoteProtocolError: a length beyond the caps, or another content.
    """
    head_length, body_length = _LENGTHS.unpack(read(_LENGTHS.size))
    if head_length > MAX_HEADER or body_length > MAX_BODY:
        raise RemoteProtocolError("a message beyond its caps came; end the connection")
    try:
        header = json.loads(read(head_length))
    except (ValueError, RecursionError) as error:
        raise RemoteProtocolError("a header is no JSON; end the connection") from error
    if not isinstance(header, dict):
        raise RemoteProtocolError("a header is no object; end the connection")
    body = read(body_length)
    return header, unpacked(body) if body else {}


def call(path: str, header: Mapping[str, Any], arrays: Arrays) -> tuple[Header, Arrays]:
    """Ask the client process, and wait as long as it takes.

    Raises:
        Unreachable: nobody listens there.
        ConnectionLost: it went away before it answered.
        FedseaError: what it raised, by its code.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as opened:
        try:
            opened.connect(path)
        except OSError as error:
            raise Unreachable(
                f"the client process does not answer ({error.strerror}); start it again"
            ) from error
        try:
            opened.sendall(encode(header, arrays))
            answer, found = decode(lambda length: _exactly(opened, length))
        except OSError as error:
            raise ConnectionLost("the client process went away; start it again") from error
    if "error" in answer:
        cls = error_classes().get(str(answer.get("code")), FedseaError)
        raise cls(str(answer["error"]))
    return answer, found


class Listener:
    """Answers requests on a socket of its own until it is closed.

    Args:
        handler: computes an answer; called by one thread, one request after the other.

    Attributes:
        path: of the socket.
    """

    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        self._folder = tempfile.mkdtemp(prefix="fedsea-")
        self.path = str(Path(self._folder) / "client.sock")
        if len(self.path) > _LONGEST_PATH:
            raise ConfigError(f"{self.path} is too long for a socket; set TMPDIR to a shorter one")
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        previous = os.umask(0o177)
        try:
            self._socket.bind(self.path)
        finally:
            os.umask(previous)
        self._socket.listen(8)
        self._thread = threading.Thread(target=self._serve, name="federated-client", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop listening and remove the socket; a request that is being computed is let go."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        with contextlib.suppress(OSError):
            Path(self.path).unlink()
            Path(self._folder).rmdir()

    def _serve(self) -> None:
        while True:
            try:
                opened, _ = self._socket.accept()
            except OSError:
                return
            with opened:
                opened.settimeout(_IDLE_S)
                # Whoever asked may be gone when the answer is ready.
                with contextlib.suppress(OSError, ConnectionLost):
                    opened.sendall(self._answer(opened))

    def _answer(self, opened: socket.socket) -> bytes:
        try:
            header, arrays = decode(lambda length: _exactly(opened, length))
            return encode(*self._handler(header, arrays))
        except ConnectionLost:
            raise
        except FedseaError as error:
            _log.warning("a request was not answered: %s", error)
            return encode({"error": str(error), "code": error.code}, {})


def _exactly(opened: socket.socket, length: int) -> bytes:
    parts = bytearray()
    while len(parts) < length:
        part = opened.recv(min(1 << 20, length - len(parts)))
        if not part:
            raise ConnectionLost("the other process went away in the middle of a message")
        parts += part
    return bytes(parts)
