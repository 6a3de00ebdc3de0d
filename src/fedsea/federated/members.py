"""Who takes part in a round: a node of Flower, and what it said about itself."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from flwr.app import Message
from flwr.compat.common import recorddict_compat as compat
from numpy.typing import NDArray

from fedsea.federated.arrays import Arrays, named

_LONGEST: Final = 1 << 20
_MOST_NUMBERS: Final = 1 << 31


@dataclass(frozen=True, slots=True)
class Member:
    """A client that is there.

    Attributes:
        name: of the client.
        node: number under which Flower reaches it.
        layout: digest of what it averages.
        shared: shapes of what is averaged, by name.
        fixed: names of what is equal at all and not trained.
        adapter: its configuration in PEFT's format.
        share_loss: whether it tells its loss.
    """

    name: str
    node: int
    layout: str
    shared: Mapping[str, tuple[int, ...]]
    fixed: tuple[str, ...]
    adapter: Mapping[str, Any]
    share_loss: bool

    def named(self, values: Sequence[NDArray[np.generic]]) -> Arrays:
        """Arrays of everything that this client sends at the beginning.

        Raises:
            CheckpointError: they are not what it described.
        """
        names = sorted([*self.shared, *self.fixed])
        like = {
            name: np.empty(self.shared.get(name, np.shape(value)), dtype=np.float32)
            for name, value in zip(names, values, strict=False)
        }
        return named(like, values)


def member_of(reply: Message, names: Collection[str]) -> Member | None:
    """Read what a node says about itself; None when it makes no sense or nobody expects it."""
    try:
        text = compat.recorddict_to_getpropertiesres(reply.content).properties["description"]
        found = json.loads(text) if isinstance(text, str) and len(text) <= _LONGEST else {}
        member = Member(
            name=found["client"],
            node=reply.metadata.src_node_id,
            layout=found["layout"],
            shared={str(name): _shape(shape) for name, shape in found["shared"].items()},
            fixed=tuple(str(name) for name in found["fixed"]),
            adapter=dict(found["adapter"]),
            share_loss=found["share_loss"] is True,
        )
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
        return None
    is_text = isinstance(member.name, str) and isinstance(member.layout, str)
    return member if is_text and member.name in names and member.shared else None


def _shape(found: Sequence[int]) -> tuple[int, ...]:
    shape = tuple(int(size) for size in found)
    if any(size < 0 for size in shape) or int(np.prod(shape, dtype=object)) > _MOST_NUMBERS:
        raise ValueError("a shape beyond the cap")
    return shape
