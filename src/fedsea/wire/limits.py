"""What one side of a session accepts at most, whoever the peer is."""

from __future__ import annotations

from dataclasses import dataclass, fields

from fedsea.errors import ConfigError

UINT32_MAX = 2**32 - 1


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


DEFAULT_LIMITS = Limits()
