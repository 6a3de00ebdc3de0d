"""What a text field may hold: a short printable name, which is safe to log."""

from __future__ import annotations

from fedsea.errors import ProtocolError


def check_text(name: str, value: str, max_bytes: int, fault: type[ProtocolError]) -> None:
    """Raise `fault` when `value` is over `max_bytes` of UTF-8 or holds control characters.

    A line break from a peer would forge lines in a log, so it is refused where it enters.
    """
    size = len(value.encode("utf-8", "replace"))
    if size > max_bytes:
        raise fault(f"{name} takes {size} bytes, over the limit of {max_bytes}; shorten it")
    if not value.isprintable():
        raise fault(f"{name} holds control characters; use printable characters only")
