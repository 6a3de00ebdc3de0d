"""Writes secrets to disk: whole or not at all, and readable by their owner only."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from fedsea.errors import ConfigError

PRIVATE = 0o600
PUBLIC = 0o644


def write_atomically(path: Path, data: bytes, *, mode: int, overwrite: bool) -> None:
    """Write `data` to `path` so that readers see the old file or the new one, never a part.

    Raises ConfigError when the file exists and `overwrite` is false, or cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror}): check it") from error
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        _put_in_place(temporary, path, overwrite=overwrite)
    finally:
        temporary.unlink(missing_ok=True)


def _put_in_place(temporary: Path, path: Path, *, overwrite: bool) -> None:
    if overwrite:
        temporary.replace(path)
        return
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise ConfigError(f"{path} exists: remove it, or overwrite it with force") from None
