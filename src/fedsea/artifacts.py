"""Small files of trained tensors: one safetensors file with a checked description inside.

The description is one JSON object under a single metadata key, so that equal content gives equal
bytes. A file is replaced as a whole or not at all: whoever is killed while writing leaves the
previous file. Trained tensors tell about the data, so only the owner may read what is written.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from fedsea.errors import CheckpointError, ConfigError

_KEY = "fedsea"
_FORMAT = 1
_LENGTH_BYTES = 8
_OWNER_ONLY = 0o600


@dataclass(frozen=True, slots=True)
class Artifact:
    """What one file holds: its kind ('projection', 'calibration', ...), description and tensors."""

    path: Path
    kind: str
    description: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    def value(self, key: str, kind: type | tuple[type, ...]) -> Any:
        """One entry of the description.

        Raises:
            CheckpointError: it is missing or of another type.
        """
        found = self.description.get(key)
        # bool is a subclass of int, and no number here is a truth value.
        if not isinstance(found, kind) or (isinstance(found, bool) and kind is not bool):
            raise self.corrupt(f"its entry '{key}' is missing or of another type")
        return found

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """One tensor, fp32 and finite.

        Raises:
            CheckpointError: it is missing, of another shape or dtype, or not finite.
        """
        found = self.tensors.get(name)
        if found is None or found.dtype != torch.float32 or tuple(found.shape) != shape:
            raise self.corrupt(f"'{name}' is not an fp32 tensor of shape {list(shape)}")
        if not bool(torch.isfinite(found).all()):
            raise self.corrupt(f"'{name}' holds NaN or infinity")
        return found

    def expect_only(self, keys: set[str], tensors: set[str]) -> None:
        """Refuse what this version does not know.

        Raises:
            CheckpointError: there is another key or another tensor.
        """
        unknown = (set(self.description) - keys) | (set(self.tensors) - tensors)
        if unknown:
            raise self.corrupt(f"'{min(unknown)}' is not known")

    def corrupt(self, reason: str) -> CheckpointError:
        """The error for a content that cannot be used."""
        return CheckpointError(f"{self.path} is no usable {self.kind}: {reason}; make it again")


def write(
    path: Path, kind: str, description: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Write a file, in place of an older one if there is one.

    Raises:
        ConfigError: the file cannot be written.
    """
    head = json.dumps({"kind": kind, "format": _FORMAT, **description}, sort_keys=True)
    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    replace_file(path, save_tensors(kept, {_KEY: head}))


def read(path: Path, kind: str) -> Artifact:
    """Read a file of the expected kind.

    Raises:
        CheckpointError: it cannot be read, is corrupt, or is of another kind or format.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror}); check that it is there and its permissions"
        ) from error
    try:
        tensors = load_tensors(content)
        length = int.from_bytes(content[:_LENGTH_BYTES], "little")
        header = json.loads(content[_LENGTH_BYTES : _LENGTH_BYTES + length])
        description = json.loads(header["__metadata__"][_KEY])
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} holds no {kind} of fedsea; check the path") from error
    if not isinstance(description, dict) or description.pop("kind", None) != kind:
        raise CheckpointError(f"{path} holds no {kind} of fedsea; check the path")
    found = description.pop("format", None)
    if found != _FORMAT:
        raise CheckpointError(
            f"{path} has format {found!r} and {_FORMAT} is understood; make it again"
        )
    return Artifact(path, kind, description, tensors)


def replace_file(path: Path, content: bytes) -> None:
    """Write a file as a whole or not at all, its folder as well when it is missing.

    Only the owner may read it, whatever the mode of an earlier one.

    Raises:
        ConfigError: it cannot be written.
    """
    begun = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(begun, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, _OWNER_ONLY)
        with os.fdopen(descriptor, "wb") as opened:
            opened.write(content)
            opened.flush()
            os.fsync(opened.fileno())
        begun.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            begun.unlink()
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> ConfigError:
    return ConfigError(f"{path} cannot be written ({error.strerror}); choose another place")
