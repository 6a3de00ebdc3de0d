"""How a stream ends with an error: our exceptions to and from a gRPC status with metadata.

The server turns an exception into an `Ending`; the client turns the ending back into the same class
with the same message and retry time. The text of a peer is cut and stripped of control characters
before it becomes a message of ours.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Iterable
from dataclasses import dataclass
from typing import TypeVar

from fedsea import errors
from fedsea.errors import FedseaError, Refused

ERROR_KEY = "fedsea-error"
RETRY_KEY = "retry-after-ms"
MAX_MESSAGE_CHARACTERS = 500
MAX_RETRY_MS = 3_600_000
INTERNAL_MESSAGE = "the server failed: try again, and tell its operator when it keeps failing"

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

# The nearest class upward in the tree decides, so a new error needs no entry of its own.
_STATUS: dict[type[FedseaError], str] = {
    FedseaError: "INTERNAL",
    errors.ConfigError: "INVALID_ARGUMENT",
    errors.ModelError: "FAILED_PRECONDITION",
    errors.OutOfMemory: "RESOURCE_EXHAUSTED",
    errors.RequestError: "INVALID_ARGUMENT",
    errors.ProtocolError: "INVALID_ARGUMENT",
    errors.TransportError: "UNAVAILABLE",
    errors.DeadlineExceeded: "DEADLINE_EXCEEDED",
    errors.SecurityError: "UNAUTHENTICATED",
    errors.PermissionDenied: "PERMISSION_DENIED",
    errors.TrainingError: "FAILED_PRECONDITION",
    errors.StaleStep: "ABORTED",
    errors.Refused: "RESOURCE_EXHAUSTED",
    errors.Draining: "UNAVAILABLE",
    errors.SessionLost: "ABORTED",
}


@dataclass(frozen=True, slots=True)
class Ending:
    """A stream's error as it crosses the wire; `status` is the name of a gRPC status code."""

    status: str
    code: str
    message: str
    retry_after_ms: int | None = None

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """The trailing metadata that carries the parts a gRPC status has no room for."""
        pairs = [(ERROR_KEY, self.code)]
        if self.retry_after_ms is not None:
            pairs.append((RETRY_KEY, str(self.retry_after_ms)))
        return tuple(pairs)


INTERNAL = Ending("INTERNAL", FedseaError.code, INTERNAL_MESSAGE)


def ending_of(error: FedseaError) -> Ending:
    """The ending that tells a client about `error`."""
    status = next(_STATUS[cls] for cls in type(error).__mro__ if cls in _STATUS)
    retry_after = error.retry_after if isinstance(error, Refused) else None
    retry_after_ms = None if retry_after is None else min(round(retry_after * 1000), MAX_RETRY_MS)
    return Ending(status, error.code, one_line(str(error)), retry_after_ms)


def error_of(ending: Ending) -> FedseaError:
    """The exception that `ending` stands for; an unknown code becomes a plain FedseaError."""
    cls = errors.error_classes().get(ending.code, FedseaError)
    message = one_line(ending.message)
    if issubclass(cls, Refused):
        retry = ending.retry_after_ms
        return cls(message, retry_after=None if retry is None else retry / 1000)
    return cls(message)


async def outcome(work: Awaitable[_T]) -> _T | Ending:
    """The result of a handler's work, or the ending that its exception stands for."""
    try:
        return await work
    except FedseaError as error:
        return ending_of(error)
    except Exception as error:  # noqa: BLE001
        # A handler's defect ends its own stream only. Neither the client nor the log may see its
        # details, which can hold anything that the handler worked on.
        _log.error("a handler failed with %s", type(error).__name__)
        return INTERNAL


def read_metadata(pairs: Iterable[tuple[str, str | bytes]]) -> tuple[str | None, int | None]:
    """The error code and retry time, in ms, of a stream's trailing metadata; None where absent."""
    found = {key: value for key, value in pairs if key in (ERROR_KEY, RETRY_KEY)}
    code, retry = found.get(ERROR_KEY), found.get(RETRY_KEY)
    known = isinstance(code, str) and code in errors.error_classes()
    return (str(code) if known else None), _retry_ms(retry)


def _retry_ms(value: str | bytes | None) -> int | None:
    if not isinstance(value, str) or not (value.isascii() and value.isdigit()) or len(value) > 9:
        return None
    return min(int(value), MAX_RETRY_MS)


def one_line(text: str) -> str:
    """`text` on one line of bounded length, without control characters."""
    cleaned = "".join(c if c.isprintable() else " " for c in text[: MAX_MESSAGE_CHARACTERS + 1])
    if len(cleaned) > MAX_MESSAGE_CHARACTERS:
        return cleaned[: MAX_MESSAGE_CHARACTERS - 1] + "…"
    return cleaned
