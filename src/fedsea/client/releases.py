"""What was sent for each position, kept so that it can be sent again byte for byte.

A release is never computed twice: after a broken connection the very same bytes go out again. Bytes
beyond a memory budget move to an unnamed temporary file that only this process can read.
"""

from __future__ import annotations

import tempfile
import weakref
from bisect import bisect_right
from collections import OrderedDict
from typing import IO

from fedsea.errors import LocalProtocolError

DEFAULT_MEMORY = 256 * 2**20


class Release:
    """Bytes of some rows: in memory, or at `offset` of the spill file."""

    __slots__ = ("__weakref__", "data", "offset", "size")

    def __init__(self, data: bytes) -> None:
        self.size = len(data)
        self.data: bytes | None = data
        self.offset = 0


class ReleaseStore:
    """Holds the releases of many sequences within a memory budget of `max_memory` bytes.

    A release leaves the store when no log refers to it any more.
    """

    def __init__(self, max_memory: int = DEFAULT_MEMORY) -> None:
        self._max_memory = max_memory
        self._in_memory = 0
        self._oldest_first: OrderedDict[int, weakref.ref[Release]] = OrderedDict()
        self._file: IO[bytes] | None = None
        self._file_end = 0

    @property
    def memory_bytes(self) -> int:
        """Bytes held in memory."""
        return self._in_memory

    @property
    def spilled_bytes(self) -> int:
        """Bytes written to the spill file so far."""
        return self._file_end

    def put(self, data: bytes) -> Release:
        """Keep bytes; the oldest ones leave memory when the budget is exceeded."""
        release = Release(data)
        key = id(release)
        self._oldest_first[key] = weakref.ref(release)
        weakref.finalize(release, self._left, key, release.size)
        self._in_memory += release.size
        while self._in_memory > self._max_memory:
            _, oldest = self._oldest_first.popitem(last=False)
            spilled = oldest()
            if spilled is not None:
                self._spill(spilled)
        return release

    def read(self, release: Release) -> bytes:
        """The bytes that were put."""
        if release.data is not None:
            return release.data
        if self._file is None:
            raise LocalProtocolError("the store of releases is closed; open a new session")
        self._file.seek(release.offset)
        return self._file.read(release.size)

    def close(self) -> None:
        """Remove the spill file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _left(self, key: int, size: int) -> None:
        if self._oldest_first.pop(key, None) is not None:
            self._in_memory -= size

    def _spill(self, release: Release) -> None:
        if self._file is None:
            self._file = tempfile.TemporaryFile(prefix="fedsea-")  # noqa: SIM115 - closed in close()
        self._file.seek(self._file_end)
        self._file.write(release.data or b"")
        release.offset = self._file_end
        release.data = None
        self._file_end += release.size
        self._in_memory -= release.size


class ReleaseLog:
    """The releases of one sequence, by position.

    Args:
        store: where the bytes are kept.
        row_bytes: bytes of one row in the codec of the session.
    """

    def __init__(self, store: ReleaseStore, row_bytes: int) -> None:
        self._store = store
        self._row_bytes = row_bytes
        self._parts: list[Release] = []
        self._ends: list[int] = []

    def __len__(self) -> int:
        """Rows released so far."""
        return self._ends[-1] if self._ends else 0

    def append(self, data: bytes) -> None:
        """Add the bytes of the next rows."""
        self._parts.append(self._store.put(data))
        self._ends.append(len(self) + len(data) // self._row_bytes)

    def truncate(self, length: int) -> None:
        """Forget the rows from `length` on."""
        keep = bisect_right(self._ends, length)
        boundary = self._ends[keep - 1] if keep else 0
        rest = self.read(boundary, length)
        del self._parts[keep:], self._ends[keep:]
        if rest:
            self.append(rest)

    def fork(self, length: int) -> ReleaseLog:
        """A log that starts as the first `length` rows of this one and shares their bytes."""
        forked = ReleaseLog(self._store, self._row_bytes)
        forked._parts = list(self._parts)
        forked._ends = list(self._ends)
        forked.truncate(length)
        return forked

    def read(self, start: int, end: int) -> bytes:
        """The bytes of rows ``[start, end)``."""
        pieces = []
        index = bisect_right(self._ends, start)
        while start < min(end, len(self)):
            first = self._ends[index - 1] if index else 0
            stop = min(end, self._ends[index])
            data = self._store.read(self._parts[index])
            pieces.append(
                data[(start - first) * self._row_bytes : (stop - first) * self._row_bytes]
            )
            start = stop
            index += 1
        return b"".join(pieces)
