"""What was sent for each position, kept so that it can be sent again byte for byte.

A release is never computed twice: after a broken connection the very same bytes go out again. Bytes
beyond a memory budget move to an unnamed temporary file that only this process can read.
"""

from __future__ import annotations

import tempfile
import weakref
from bisect import bisect_right
from collections import deque
from typing import IO

from fedsea.errors import LocalProtocolError

DEFAULT_MEMORY = 256 * 2**20
# References of dropped sequences are swept out when there are this many.
_MANY_RELEASES = 65536


class Release:
    """Bytes of some rows: in memory, or at `offset` of the spill file."""

    __slots__ = ("__weakref__", "_store", "data", "offset", "size")

    def __init__(self, data: bytes, store: ReleaseStore) -> None:
        self.size = len(data)
        self.data: bytes | None = data
        self.offset = 0
        self._store = store

    def __del__(self) -> None:
        self._store.forget(self)


class ReleaseStore:
    """Holds the releases of many sequences within a memory budget of `max_memory` bytes.

    A release leaves the store when no log refers to it any more. `memory_bytes` are held in memory.
    """

    def __init__(self, max_memory: int = DEFAULT_MEMORY) -> None:
        self.memory_bytes = 0
        self._max_memory = max_memory
        self._oldest_first: deque[weakref.ref[Release]] = deque()
        self._sweep_at = _MANY_RELEASES
        self._file: IO[bytes] | None = None
        self._file_end = 0
        self._spilled = 0

    @property
    def spilled_bytes(self) -> int:
        """Size of the spill file; it is emptied when nothing in it is needed any more."""
        return self._file_end

    def put(self, data: bytes) -> Release:
        """Keep bytes; the oldest ones leave memory when the budget is exceeded."""
        release = Release(data, self)
        self.memory_bytes += release.size
        self._oldest_first.append(weakref.ref(release))
        while self.memory_bytes > self._max_memory and self._oldest_first:
            oldest = self._oldest_first.popleft()()
            if oldest is not None:
                self._spill(oldest)
        if len(self._oldest_first) > self._sweep_at:
            self._forget_dead()
        return release

    def forget(self, release: Release) -> None:
        """A release that no log refers to any more takes no space."""
        if release.data is not None:
            self.memory_bytes -= release.size
            return
        self._spilled -= release.size
        if not self._spilled and self._file is not None:
            self._file.truncate(0)
            self._file_end = 0

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

    def _forget_dead(self) -> None:
        alive = deque(ref for ref in self._oldest_first if ref() is not None)
        self._oldest_first = alive
        # Twice as many must come before the next sweep, so that one put costs little on average.
        self._sweep_at = max(_MANY_RELEASES, 2 * len(alive))

    def _spill(self, release: Release) -> None:
        if release.data is None:
            return
        if self._file is None:
            # Unnamed on disk: nobody else can open it, and it goes with the process.
            self._file = tempfile.TemporaryFile(prefix="fedsea-")  # noqa: SIM115 - see close()
        self._spilled += release.size
        self._file.seek(self._file_end)
        self._file.write(release.data)
        release.offset = self._file_end
        release.data = None
        self._file_end += release.size
        self.memory_bytes -= release.size


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
