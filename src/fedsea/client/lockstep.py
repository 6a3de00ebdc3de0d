"""Bringing sequences into step, so that one batch serves them all.

Sequences that start at different times would go round one behind the other, each alone in its
batch, at the client and at the server. So rows that are back wait for rows that will be back soon:
less than a round later. Once together, sequences stay together and nobody waits.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

# Weight of the latest round trip in the running estimate.
_NEWEST = 0.25
# A row that is this much later than expected, in round trips, is not waited for.
_LATENESS = 0.25
# What is due within this part of a round trip is worth waiting for. More than half, because the
# time that this side needs belongs to the round as well.
_SOON = 0.8
_LONGEST_WAIT = 0.05


class Lockstep:
    """Remembers which rows are on their way and since when."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._keys = itertools.count()
        self._sent: dict[int, float] = {}
        self._round_trip = 0.0

    def send(self) -> int:
        """Rows of one sequence go out; returns the key for `back`."""
        key = next(self._keys)
        self._sent[key] = self._clock()
        return key

    def back(self, key: int) -> None:
        """The rows are back, or will never be."""
        took = self._clock() - self._sent.pop(key)
        known = self._round_trip or took
        self._round_trip = known + _NEWEST * (took - known)

    def wait(self) -> float:
        """Seconds worth waiting now for others; 0 when none is expected soon."""
        if not self._sent:
            return 0.0
        now = self._clock()
        due = (sent + self._round_trip - now for sent in self._sent.values())
        soon = [
            seconds
            for seconds in due
            if -_LATENESS * self._round_trip < seconds <= _SOON * self._round_trip
        ]
        if not soon:
            return 0.0
        return min(max(soon) + _LATENESS * self._round_trip, _LONGEST_WAIT)
