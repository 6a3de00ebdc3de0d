"""A wire that counts, records and breaks, and a split model whose server runs in this process."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import memory_config
from torch import Tensor
from transformers import AutoModelForCausalLM

from fedsea.client.link import Patience
from fedsea.client.llm import LLM
from fedsea.errors import ConnectionLost, Unreachable
from fedsea.server.service import TrunkService
from fedsea.transport.base import Channel, ClientStream, Handler
from fedsea.transport.memory import MemoryChannel
from fedsea.transport.recording import Direction
from fedsea.wire.framing import decode_event
from fedsea.wire.limits import DEFAULT_LIMITS
from fedsea.wire.messages import Event, Role

BRIEF = Patience(open=10.0, recover=10.0, answer=10.0)


class Wire:
    """All connections of a client: their messages, and the one at which a connection ends.

    `cut_at` breaks a connection at message number n (from 1) of a direction: that message does not
    arrive any more. `mute_at` lets the server fall silent there instead; `hold_at` keeps that message
    back until `release`. While `down`, nobody answers. Numbers count over all connections.
    """

    def __init__(self) -> None:
        self.events: list[tuple[int, Direction, Event]] = []
        self.counts = dict.fromkeys(Direction, 0)
        self.connections = 0
        self.cut_at: tuple[Direction, int] | None = None
        self.mute_at: tuple[Direction, int] | None = None
        self.hold_at: tuple[Direction, int] | None = None
        self.holding = threading.Event()
        self.release = asyncio.Event()
        self.down = False

    def channel(self, handler: Handler) -> Channel:
        """A channel to a handler over this wire."""
        return _WireChannel(MemoryChannel(handler), self)

    def of(self, kind: type[Any], connection: int | None = None) -> list[Any]:
        """The recorded events of one kind, in order."""
        return [
            event
            for number, _, event in self.events
            if isinstance(event, kind) and connection in (None, number)
        ]

    def note(self, connection: int, direction: Direction, data: bytes) -> int:
        """Record a message; returns its number."""
        sender = Role.CLIENT if direction is Direction.UP else Role.SERVER
        self.events.append((connection, direction, decode_event(data, sender, DEFAULT_LIMITS)))
        self.counts[direction] += 1
        return self.counts[direction]


class _WireChannel(Channel):
    def __init__(self, channel: MemoryChannel, wire: Wire) -> None:
        self._channel = channel
        self._wire = wire

    async def describe(self) -> bytes:
        if self._wire.down:
            raise Unreachable("nobody listens")
        return await self._channel.describe()

    async def open_stream(self) -> ClientStream:
        if self._wire.down:
            raise Unreachable("nobody listens")
        self._wire.connections += 1
        stream = await self._channel.open_stream()
        return _WireStream(stream, self._wire, self._wire.connections)

    async def close(self) -> None:
        await self._channel.close()


class _WireStream(ClientStream):
    def __init__(self, stream: ClientStream, wire: Wire, number: int) -> None:
        self._stream = stream
        self._wire = wire
        self._number = number
        self._mute = False

    async def send(self, data: bytes) -> None:
        if not await self._meets_fault(Direction.UP, data):
            await self._stream.send(data)

    async def receive(self) -> bytes | None:
        while (data := await self._stream.receive()) is not None:
            if not await self._meets_fault(Direction.DOWN, data):
                return data
        return None

    async def half_close(self) -> None:
        await self._stream.half_close()

    async def cancel(self) -> None:
        await self._stream.cancel()

    async def _meets_fault(self, direction: Direction, data: bytes) -> bool:
        """Whether the message is swallowed; breaks the connection when that is due."""
        here = direction, self._wire.note(self._number, direction, data)
        if here == self._wire.hold_at:
            self._wire.holding.set()
            await self._wire.release.wait()
        if here == self._wire.cut_at:
            await self._stream.cancel()
            raise ConnectionLost("the wire was cut")
        self._mute = self._mute or here == self._wire.mute_at
        return self._mute


@pytest.fixture
def wire() -> Wire:
    """A wire without faults yet."""
    return Wire()


class Split:
    """A client and its server in one process, on the client's loop.

    `notices` are the lines that the client told.
    """

    def __init__(self, folder: Path, wire: Wire, sections: dict[str, Any], options: Any) -> None:
        self.service = TrunkService.load(memory_config(folder, **sections))
        self.wire = wire
        self.notices: list[str] = []
        options.setdefault("patience", BRIEF)
        self.llm = LLM.connect(
            folder,
            {"memory": lambda: wire.channel(self.service)},
            on_notice=self.notices.append,
            **options,
        )
        self.on_loop(self.service.__aenter__())

    def on_loop(self, work: Any) -> Any:
        """Run a coroutine on the client's loop."""
        return self.llm.background.run(work)

    def settled(self) -> bool:
        """Whether nothing is reserved, at the client and at the server."""
        pools = (*self.llm.split.parts.pools, self.service.trunk.runner.pool)
        if any(pool.num_accounts for pool in pools):
            return False
        for pool in pools:
            pool.check_integrity()
        return True

    def wait_until(self, condition: Callable[[], bool], seconds: float = 10.0) -> None:
        """Let the loop run until a condition holds that it is about to bring about."""

        async def poll() -> None:
            async with asyncio.timeout(seconds):
                while not condition():  # noqa: ASYNC110 - what is watched has no event
                    await asyncio.sleep(0)

        self.on_loop(poll())

    def count_bottom(self) -> list[int]:
        """A list that gets the number of tokens of every run of the bottom from now on."""
        counts: list[int] = []
        runner: Any = self.llm.split.parts.bottom
        run = runner.run

        def counted(entering: Tensor, batch: Any) -> Tensor:
            counts.append(len(entering))
            result: Tensor = run(entering, batch)
            return result

        runner.run = counted
        return counts

    def close(self) -> None:
        """End both; nothing may be held by then."""
        if self.llm.background.is_stopped:
            asyncio.run(self.service.engine.stop())
            return
        self.wait_until(self.settled)
        self.on_loop(self.service.__aexit__(None, None, None))
        self.llm.close()


@pytest.fixture(scope="session")
def greedy(tiny_model: Path) -> Callable[..., list[int]]:
    """What the unsplit model of `transformers` answers to token ids, greedily."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation="eager").eval()

    def answer(ids: Sequence[int], count: int) -> list[int]:
        prompt = torch.tensor([list(ids)])
        whole = model.generate(
            prompt, max_new_tokens=count, do_sample=False, attention_mask=torch.ones_like(prompt)
        )
        new: list[int] = whole[0, prompt.shape[1] :].tolist()
        return new

    return answer


@pytest.fixture
def make_split(tiny_model: Path, wire: Wire) -> Iterator[Callable[..., Split]]:
    """Connect a client to a server of the tiny model; `server` holds tables of its settings."""
    made: list[Split] = []

    def make(server: dict[str, Any] | None = None, **options: Any) -> Split:
        made.append(Split(tiny_model, wire, server or {}, options))
        return made[-1]

    yield make
    for split in made:
        split.close()


@pytest.fixture
def split(make_split: Callable[..., Split]) -> Split:
    """A client with bottom 1 and top 1, and its server."""
    return make_split()
