"""A training session: several forwards in flight, refusals, silence, other servers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from tests.training_trunk import TinyTrainingTrunk
from tests.unit.client.conftest import BRIEF, Wire
from torch import Tensor

from fedsea.client.link import Patience
from fedsea.client.servers import Endpoint, Expectation
from fedsea.client.training_trunk import TrainingPlan, TrainingTrunk
from fedsea.errors import Capacity, ConnectionLost, QuotaExceeded, Unreachable
from fedsea.model.lora import LoraConfig
from fedsea.model.partition import Partition
from fedsea.transport.base import Handler, Peer, ServerStream
from fedsea.transport.recording import Direction
from fedsea.wire.codecs import Codec, RowFormat
from fedsea.wire.limits import Limits
from fedsea.wire.messages import Activations, Discard, Forward, OpenTraining

T = TypeVar("T")
HIDDEN = 48
ROWS = RowFormat(Codec.FP32, HIDDEN)


@pytest.fixture(scope="module")
def server(tiny_model: Path) -> TinyTrainingTrunk:
    """A trunk of the tiny model, for tests that begin anew."""
    return TinyTrainingTrunk(tiny_model, Partition(1, 1))


def plan_for(server: TinyTrainingTrunk) -> TrainingPlan:
    """What a client of the whole trunk asks for."""
    return TrainingPlan(
        expectation=Expectation(
            model=server.checkpoint.name,
            fingerprint=server.checkpoint.fingerprint(),
            hidden_size=HIDDEN,
            trunk=server.span,
            codecs=(Codec.FP32, Codec.FP32),
        ),
        up=ROWS,
        down=ROWS,
        gradient=ROWS,
        adapter="run",
        lora=LoraConfig(rank=2),
    )


def trunk_of(
    server: TinyTrainingTrunk,
    *wires: Wire,
    handlers: dict[int, Handler] | None = None,
    patience: Patience = BRIEF,
    limits: Limits | None = None,
    told: list[str] | None = None,
) -> TrainingTrunk:
    """A session over one wire for each server; `handlers` stand in for some of them."""

    def endpoint(number: int, wire: Wire) -> Endpoint:
        handler = (handlers or {}).get(number, server)
        return Endpoint(f"server-{number}", lambda: wire.channel(handler))

    endpoints = [endpoint(number, wire) for number, wire in enumerate(wires)]
    tell = (told if told is not None else []).append
    return TrainingTrunk(endpoints, plan_for(server), patience, tell, limits or Limits())


def rows(count: int, seed: int = 1) -> Tensor:
    """Random rows."""
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(seed))


def run(work: Callable[[], Awaitable[T]]) -> T:
    """Run a coroutine to its end in bounded time."""

    async def bounded() -> T:
        async with asyncio.timeout(30):
            return await work()

    return asyncio.run(bounded())


def test_many_forwards_at_once(server: TinyTrainingTrunk) -> None:
    """Twenty forwards that nobody waits for in between, over the cap of unanswered messages."""
    wire = Wire()

    async def work() -> None:
        trunk = trunk_of(server, wire, limits=Limits(max_pending=3))
        await trunk.open()
        sent = [rows(2 + number % 3, number) for number in range(20)]
        answers = await asyncio.gather(
            *(trunk.forward(ROWS.encode(one), [len(one)], no_grad=False) for one in sent)
        )
        for one, (numbers, data) in zip(sent, answers, strict=True):
            _, alone = await trunk.forward(ROWS.encode(one), [len(one)], no_grad=True)
            found, expected = (ROWS.decode(each, len(one)) for each in (data, alone))
            torch.testing.assert_close(found, expected)
            back = await trunk.backward(numbers, [len(one)], ROWS.encode(one))
            assert len(back) == len(data)
        assert (await trunk.step(1, 1e-3, None, 1.0)).applied
        await trunk.close()

    run(work)
    assert [event.id for event in wire.of(Forward)] == list(range(1, 41))


def test_forwards_without_a_gradient_are_discarded_by_the_step(server: TinyTrainingTrunk) -> None:
    """A step is not held up by forwards that nothing came of."""
    wire = Wire()

    async def work() -> None:
        trunk = trunk_of(server, wire)
        await trunk.open()
        for number in range(3):
            await trunk.forward(ROWS.encode(rows(2, number)), [2], no_grad=False)
        assert (await trunk.step(1, 1e-3, None, 1.0)).grad_norm == 0
        await trunk.close()

    run(work)
    assert [event.id for event in wire.of(Discard)] == [1, 2, 3]


def test_a_silent_server_ends_as_a_lost_connection(server: TinyTrainingTrunk) -> None:
    """Whoever waits is told in time, and the session can be opened again."""
    wire = Wire()

    async def work() -> None:
        trunk = trunk_of(server, wire, patience=Patience(open=5.0, recover=5.0, answer=0.2))
        await trunk.open()
        wire.mute_at = (Direction.DOWN, wire.counts[Direction.DOWN] + 1)
        with pytest.raises(ConnectionLost, match="owes an answer"):
            await trunk.forward(ROWS.encode(rows(2)), [2], no_grad=False)
        assert trunk.address is None
        with pytest.raises(ConnectionLost):
            await trunk.reset()
        assert await trunk.open((0,)) == 0
        await trunk.forward(ROWS.encode(rows(2)), [2], no_grad=True)
        await trunk.close()

    run(work)
    assert len(wire.of(OpenTraining)) == 2


def test_everybody_who_waits_is_told_of_a_break(server: TinyTrainingTrunk) -> None:
    """Forwards on their way and those that wait for room end alike."""
    wire = Wire()

    async def work() -> list[Any]:
        trunk = trunk_of(server, wire, limits=Limits(max_pending=2))
        await trunk.open()
        wire.cut_at = (Direction.DOWN, wire.counts[Direction.DOWN] + 2)
        return await asyncio.gather(
            *(trunk.forward(ROWS.encode(rows(2, n)), [2], no_grad=True) for n in range(6)),
            return_exceptions=True,
        )

    first, *others = run(work)
    assert not isinstance(first, BaseException)
    assert all(isinstance(one, ConnectionLost) for one in others)
    assert len(wire.of(Activations)) == 2


def test_the_next_server_takes_over(server: TinyTrainingTrunk) -> None:
    """Addresses are tried in their order, and the one that took the session first next time."""
    down, up = Wire(), Wire()
    down.down = True

    async def work() -> None:
        trunk = trunk_of(server, down, up)
        await trunk.open()
        assert trunk.address == "server-1"
        await trunk.close()
        up.down = True
        with pytest.raises(Unreachable):
            await trunk.open(within=0.3)

    run(work)


class Refusing:
    """A server that refuses so many sessions with an error, and then is another."""

    def __init__(self, server: TinyTrainingTrunk, error: Exception, times: int) -> None:
        self._server, self._error, self.left = server, error, times

    async def describe(self, peer: Peer) -> bytes:
        """As the other."""
        return await self._server.describe(peer)

    async def session(self, peer: Peer, stream: ServerStream) -> None:
        """Refuse, or be the other."""
        if self.left:
            self.left -= 1
            raise self._error
        await self._server.session(peer, stream)


def test_a_place_that_is_taken_is_waited_for(server: TinyTrainingTrunk) -> None:
    """Capacity with a time to come back is asked again; a quota without one is final."""
    wire = Wire()

    async def work() -> None:
        busy = Refusing(server, Capacity("somebody else trains", retry_after=0.05), 2)
        trunk = trunk_of(server, wire, handlers={0: busy})
        assert await trunk.open() == 0
        assert busy.left == 0
        await trunk.close()
        full = Refusing(server, QuotaExceeded("no more trainings"), 1)
        with pytest.raises(QuotaExceeded):
            await trunk_of(server, Wire(), handlers={0: full}).open()

    run(work)


def test_opening_again_ends_the_session_before(server: TinyTrainingTrunk) -> None:
    """There is one session at a time; what waits in the old one is told."""
    wire = Wire()

    async def work() -> None:
        trunk = trunk_of(server, wire)
        await trunk.open()
        wire.hold_at = (Direction.DOWN, wire.counts[Direction.DOWN] + 1)
        waiting = asyncio.create_task(trunk.step(1, 1e-3, None, 1.0))
        while not wire.holding.is_set():  # noqa: ASYNC110 - it belongs to threads
            await asyncio.sleep(0)
        await trunk.open((0,))
        wire.release.set()
        with pytest.raises(ConnectionLost):
            await waiting
        assert (await trunk.step(1, 1e-3, None, 1.0)).applied
        await trunk.close()
        with pytest.raises(ConnectionLost):
            await trunk.save(1)

    run(work)
