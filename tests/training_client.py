"""One training session of the wire protocol, spoken by hand: a client for tests of servers."""

from __future__ import annotations

import torch
from tests.trunk_client import BLOCKS, HIDDEN

from fedsea.transport.base import Peer
from fedsea.transport.memory import MemoryChannel
from fedsea.wire.codecs import Codec
from fedsea.wire.connection import Connection
from fedsea.wire.limits import DEFAULT_LIMITS
from fedsea.wire.messages import (
    Activations,
    Backward,
    Close,
    Discard,
    Forward,
    Gradients,
    Lora,
    Notice,
    Opened,
    OpenTraining,
    Reset,
    Role,
    Save,
    Saved,
    Step,
    Stepped,
)

LORA = Lora(rank=2, alpha=4.0, targets=("q_proj", "down_proj"))


class TrainingClient:
    """One training session; `step` is the number of steps that were done when it opened."""

    def __init__(self, stream, opening, hidden=HIDDEN):
        self.stream = stream
        self.opening = opening
        self.hidden = hidden
        self.connection = Connection(Role.CLIENT, DEFAULT_LIMITS, hidden_size=hidden)
        self.step = 0
        self.notices = []
        self._next_id = 0

    @classmethod
    async def open(cls, service, fingerprint, tenant="local", **options):
        """Open a session at a service of this process and wait for its answer."""
        return await cls.over(
            MemoryChannel(service, Peer(tenant, "memory")), fingerprint, **options
        )

    @classmethod
    async def over(cls, channel, fingerprint, hidden=HIDDEN, **options):
        """Open a session over a channel and wait for the server's answer."""
        options = {
            "first_block": 1,
            "end_block": BLOCKS,
            "up_codec": Codec.FP32,
            "down_codec": Codec.FP32,
            "gradient_codec": Codec.FP32,
            "adapter": "clinic",
            "lora": LORA,
            "seed": 7,
            **options,
        }
        client = cls(await channel.open_stream(), OpenTraining(fingerprint, **options), hidden)
        await client.send(client.opening)
        opened = await client.receive()
        assert isinstance(opened, Opened)
        client.step = opened.step
        return client

    async def send(self, event):
        """Send one event."""
        await self.stream.send(self.connection.send(event))

    async def receive(self):
        """The server's next event, notices put aside; None at a clean end."""
        while (data := await self.stream.receive()) is not None:
            event = self.connection.receive(data)
            if not isinstance(event, Notice):
                return event
            self.notices.append(event)
        return None

    async def push(self, rows, counts=None, *, no_grad=False):
        """Send rows without waiting; the id of the Forward."""
        self._next_id += 1
        data = self.opening.up_format(self.hidden).encode(rows)
        await self.send(Forward(self._next_id, counts or (len(rows),), data, no_grad))
        return self._next_id

    async def pull(self):
        """The rows of the next Activations."""
        event = await self.receive()
        assert isinstance(event, Activations)
        down = self.opening.down_format(self.hidden)
        return down.decode(event.rows, len(event.rows) // down.row_bytes)

    async def forward(self, rows, counts=None, *, no_grad=False):
        """The id of a Forward, and what comes back."""
        number = await self.push(rows, counts, no_grad=no_grad)
        return number, await self.pull()

    async def send_back(self, number, gradient):
        """Send the gradient of a Forward without waiting."""
        await self.send(
            Backward(number, self.opening.backward_format(self.hidden).encode(gradient))
        )

    async def backward(self, number, gradient):
        """Send the gradient of a Forward; that of its rows."""
        await self.send_back(number, gradient)
        return await self.gradients()

    async def gradients(self):
        """The rows of the next Gradients."""
        event = await self.receive()
        assert isinstance(event, Gradients)
        back = self.opening.gradients_format(self.hidden)
        return back.decode(event.rows, len(event.rows) // back.row_bytes)

    async def take_step(self, number, learning_rate=0.1, max_grad_norm=0.0, scale=1.0):
        """Take a step; its answer."""
        await self.send(Step(number, learning_rate, max_grad_norm, scale))
        stepped = await self.receive()
        assert isinstance(stepped, Stepped)
        return stepped

    async def train(self, number, rows, **options):
        """One whole step on rows, with the sum of squares as the loss; rows back, gradient, answer."""
        forward, hidden = await self.forward(rows)
        gradient = await self.backward(forward, 2 * hidden)
        return hidden, gradient, await self.take_step(number, **options)

    async def save(self, number):
        """Save a step; the problem, empty for none."""
        await self.send(Save(number))
        saved = await self.receive()
        assert isinstance(saved, Saved)
        return saved.problem

    async def discard(self, number):
        """Give a Forward up."""
        await self.send(Discard(number))

    async def reset(self):
        """Give the unfinished step up."""
        await self.send(Reset())

    async def close(self):
        """End the session in order and wait for the server's end."""
        await self.send(Close())
        assert await self.receive() is None

    async def vanish(self):
        """Break the stream."""
        await self.stream.cancel()


def some_rows(count, seed=0, hidden=HIDDEN):
    """Rows that are the same for the same seed."""
    return torch.randn(count, hidden, generator=torch.Generator().manual_seed(seed))
