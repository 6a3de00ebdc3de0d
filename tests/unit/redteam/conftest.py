"""A tiny checkpoint, its attacker, and recordings made message by message."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.tiny_models import VOCABULARY
from torch import Tensor
from transformers import AutoModelForCausalLM

from fedsea.model.checkpoint import Checkpoint
from fedsea.model.partition import Partition
from fedsea.redteam.knowledge import Knowledge
from fedsea.redteam.view import Chain
from fedsea.transport.recording import Direction, Message
from fedsea.wire.codecs import Codec, RowFormat
from fedsea.wire.framing import encode_event
from fedsea.wire.limits import DEFAULT_LIMITS
from fedsea.wire.messages import Event, ServerEvent


@pytest.fixture(scope="session")
def secret() -> Tensor:
    """Token ids of a text; the first is public."""
    generator = torch.Generator().manual_seed(5)
    return torch.cat([torch.tensor([1]), torch.randint(3, VOCABULARY, (11,), generator=generator)])


@pytest.fixture(scope="session")
def hidden_states(tiny_model: Path, secret: Tensor) -> tuple[Tensor, ...]:
    """Rows [n, hidden] in front of every block, by transformers' own forward."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation="eager")
    with torch.no_grad():
        states = model(secret[None], output_hidden_states=True).hidden_states
    return tuple(rows[0] for rows in states)


@pytest.fixture(scope="session")
def knowledge_of(tiny_model: Path) -> Callable[..., Knowledge]:
    """An attacker with the weights of the tiny model, for a number of blocks in bottom and top."""
    checkpoint = Checkpoint.open(tiny_model)

    def make(bottom: int, top: int = 0, **more) -> Knowledge:
        return Knowledge.of_weights(checkpoint, Partition(bottom, top), public_prefix=(1,), **more)

    return make


def chain_of(rows: Tensor, *more: Tensor) -> Chain:
    """What was released for a text: the rows, and further releases of the same."""
    releases = tuple(torch.stack(each) for each in zip(rows, *more, strict=True))
    return Chain(RowFormat(Codec.FP32, rows.shape[1]), releases, {})


def recorded(*events: Event) -> list[Message]:
    """Events of both sides as recorded messages."""
    return [
        Message(
            Direction.DOWN if isinstance(event, ServerEvent) else Direction.UP,
            float(index),
            encode_event(event, DEFAULT_LIMITS),
        )
        for index, event in enumerate(events)
    ]
