"""One session of the wire protocol, spoken by hand: a client for tests of servers."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fedsea.wire.codecs import Codec, RowFormat, decode
from fedsea.wire.connection import Connection
from fedsea.wire.limits import DEFAULT_LIMITS
from fedsea.wire.messages import (
    Append,
    Begin,
    Close,
    Notice,
    Open,
    Opened,
    Output,
    Role,
    Segment,
    Want,
)

HIDDEN = 32
BLOCKS = 4


def save_tiny_llama(folder):
    """Save a Llama with random weights: hidden 32, 4 blocks, 512 positions."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=64,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        max_position_embeddings=512,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def random_rows(count, seed=0):
    """Rows that are the same for the same seed."""
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(seed))


class Client:
    """One session, spoken by hand; `up` is a codec, or the whole format of the rows."""

    def __init__(self, stream, *, up=Codec.FP32, down=Codec.FP32, limits=DEFAULT_LIMITS):
        self.stream = stream
        self.connection = Connection(Role.CLIENT, limits, hidden_size=HIDDEN)
        self.up = RowFormat(up, HIDDEN) if isinstance(up, Codec) else up
        self.down = down
        self.notices = []
        self._next_id = 0

    @classmethod
    async def open(
        cls,
        channel,
        fingerprint,
        *,
        span=(0, BLOCKS),
        rows=256,
        adapter="",
        projection="",
        prompt="",
        **options,
    ):
        """Open a session and wait for the server's answer."""
        client = cls(await channel.open_stream(), **options)
        await client.send(
            Open(
                fingerprint=fingerprint,
                first_block=span[0],
                end_block=span[1],
                up_codec=client.up.codec,
                up_width=client.up.width,
                up_levels=client.up.levels,
                up_scale=client.up.scale,
                projection=projection,
                down_codec=client.down,
                reserve_rows=rows,
                adapter=adapter,
                prompt=prompt,
            )
        )
        assert isinstance(await client.receive(), Opened)
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

    async def begin(self, sequence=0, capacity=256):
        """Begin a sequence."""
        await self.send(Begin(sequence, capacity))

    async def push(self, rows, sequence=0, want=Want.ALL):
        """Append rows to one sequence without waiting for the output."""
        await self.push_many([(sequence, rows, want)])

    async def push_many(self, parts):
        """Append (sequence, rows, want) parts in one message without waiting for the output."""
        segments = tuple(
            Segment(sequence, self.connection.length(sequence), len(rows), want)
            for sequence, rows, want in parts
        )
        data = self.up.encode(torch.cat([rows for _, rows, _ in parts]))
        self._next_id += 1
        await self.send(Append(self._next_id, segments, data))

    async def pull(self):
        """The rows of the next output."""
        output = await self.receive()
        assert isinstance(output, Output)
        count = sum(segment.count for segment in output.segments)
        return decode(output.rows, self.down, count, HIDDEN)

    async def run(self, rows, sequence=0, want=Want.ALL):
        """Append rows and return what comes back."""
        await self.push(rows, sequence, want)
        return await self.pull()

    async def close(self):
        """End the session in order and wait for the server's end."""
        await self.send(Close())
        assert await self.receive() is None
