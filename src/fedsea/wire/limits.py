"""What one side of a session accepts at most, whoever the peer is."""

from __future__ import annotations

from dataclasses import dataclass, fields

from fedsea.errors import ConfigError

UINT32_MAX = 2**32 - 1

LARGEST_MESSAGE = 256 * 2**20
"""Bytes of a message that no side goes beyond, whatever it is configured with."""

FRAME_BYTES = 64
"""Most bytes of an event with rows, besides its rows and their counts."""

MAX_COUNT_BYTES = 5
"""Bytes of one count of a Forward, in a field that holds all of them."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Caps that hold before anything is allocated; all are inclusive and at least 1.

    Attributes:
        max_message_bytes: size of one serialized message, in either direction.
        max_rows_per_message: rows in one Append or Forward, summed over its sequences.
        max_segments: segments in one Append, sequences in one Forward.
        max_sequences: sequences alive at the same time in one session.
        max_capacity: rows that one sequence may be begun or forked with, or have in a Forward.
        max_pending: events of one session that wait for their answer.
        max_forwards: Forwards of one training session that wait for their Backward.
        max_text: UTF-8 bytes of any text field (names and references, never a prompt).
    """

    max_message_bytes: int = 8 * 2**20
    max_rows_per_message: int = 8192
    max_segments: int = 256
    max_sequences: int = 256
    max_capacity: int = 2**20
    max_pending: int = 8
    max_forwards: int = 64
    max_text: int = 512

    def __post_init__(self) -> None:
        """Raise `ConfigError` for a cap that no field of the schema can carry."""
        for field in fields(self):
            cap = getattr(self, field.name)
            if not isinstance(cap, int) or not 1 <= cap <= UINT32_MAX:
                raise ConfigError(f"{field.name} is {cap!r}; give an integer from 1 to 2**32 - 1")

    @property
    def frame_bytes(self) -> int:
        """Most bytes of a Forward, or of what answers or follows it, besides its rows."""
        return FRAME_BYTES + MAX_COUNT_BYTES * self.max_segments


DEFAULT_LIMITS = Limits()

TRAINING_LIMITS = Limits(max_message_bytes=LARGEST_MESSAGE)
"""Those of a client that trains: whole sequences travel, so the server says what it can bear."""


def patience_factor(size: int) -> float:
    """How many times as long as for any other message to wait for one of `size` bytes."""
    return max(1.0, size / DEFAULT_LIMITS.max_message_bytes)
