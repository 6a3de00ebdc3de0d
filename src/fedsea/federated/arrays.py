"""Adapters as named arrays: what a federation averages, and how two sides know it is the same.

Names are those of PEFT's format, values are fp32. What travels is an update, the difference to the
global arrays, in the order of the names; the digest of a layout stands for names, shapes and
everything that must be equal at all clients without being averaged.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays

from fedsea.errors import CheckpointError, NotFinite, RemoteProtocolError

Array = NDArray[np.float32]
Arrays = dict[str, Array]


def packed(arrays: Mapping[str, Array]) -> bytes:
    """Safetensors bytes; equal arrays give equal bytes."""
    return save_arrays({name: np.ascontiguousarray(arrays[name]) for name in sorted(arrays)})


def unpacked(data: bytes) -> Arrays:
    """What `packed` wrote.

    Raises:
        RemoteProtocolError: it is no safetensors of finite fp32 arrays.
    """
    try:
        found = load_arrays(data)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise RemoteProtocolError("the arrays are no safetensors; end the connection") from error
    for name, array in found.items():
        if array.dtype != np.float32 or not bool(np.isfinite(array).all()):
            raise RemoteProtocolError(f"{name} is not of finite fp32 numbers; end the connection")
    return found


def layout_digest(arrays: Mapping[str, Array], fixed: Mapping[str, Array]) -> str:
    """Sixteen hexadecimal digits for names and shapes of `arrays`, and for all of `fixed`.

    Args:
        arrays: what is averaged; only names and shapes count.
        fixed: what is not averaged and must be equal everywhere, such as A under FFA-LoRA.
    """
    shapes = {name: list(arrays[name].shape) for name in sorted(arrays)}
    digest = hashlib.sha256(json.dumps(shapes).encode())
    digest.update(packed(fixed))
    return digest.hexdigest()[:16]


def in_order(arrays: Mapping[str, Array]) -> list[Array]:
    """The arrays by name, as they travel."""
    return [arrays[name] for name in sorted(arrays)]


def named(like: Mapping[str, Array], values: Sequence[NDArray[np.generic]]) -> Arrays:
    """Arrays that travelled, under the names of `like`; fp32.

    Raises:
        CheckpointError: their number or a shape is another.
        NotFinite: one holds NaN or infinity.
    """
    names = sorted(like)
    if len(values) != len(names):
        raise CheckpointError(
            f"{len(values)} arrays came and {len(names)} are expected; "
            "all sides must train the same adapter"
        )
    found: Arrays = {}
    for name, value in zip(names, values, strict=True):
        if value.shape != like[name].shape:
            raise CheckpointError(
                f"{name} came with shape {list(value.shape)} and has {list(like[name].shape)}; "
                "all sides must train the same adapter"
            )
        array = np.asarray(value, dtype=np.float32)
        if not bool(np.isfinite(array).all()):
            raise NotFinite(f"{name} holds NaN or infinity; the update is left out")
        found[name] = array
    return found


def plus(arrays: Mapping[str, Array], update: Mapping[str, Array], factor: float = 1.0) -> Arrays:
    """arrays + factor * update, summed in float64."""
    return {
        name: (array.astype(np.float64) + factor * update[name].astype(np.float64)).astype(
            np.float32
        )
        for name, array in arrays.items()
    }


def norm(arrays: Mapping[str, Array]) -> float:
    """Euclidean norm of all numbers together, in float64."""
    squares = (float(np.square(arrays[name], dtype=np.float64).sum()) for name in sorted(arrays))
    return math.sqrt(math.fsum(squares))


def largest(arrays: Mapping[str, Array]) -> float:
    """The largest absolute number."""
    return max((float(np.abs(array).max(initial=0.0)) for array in arrays.values()), default=0.0)
