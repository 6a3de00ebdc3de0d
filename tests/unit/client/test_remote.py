"""One session at a server: what is sent and when, and that no fault changes a row that comes back."""

from __future__ import annotations

import asyncio
import functools
import time
from contextlib import asynccontextmanager
from types import SimpleNamespace

import pytest
import torch
from tests.conftest import memory_config
from tests.unit.client.conftest import BRIEF, Wire

from fedsea.client.link import Patience
from fedsea.client.releases import ReleaseStore
from fedsea.client.remote import RemoteTrunk, SessionPlan
from fedsea.client.servers import Endpoint, Expectation
from fedsea.errors import (
    Capacity,
    FingerprintMismatch,
    LocalProtocolError,
    PromptTooLong,
    Unreachable,
)
from fedsea.model.attention import RaggedBatch
from fedsea.model.checkpoint import Checkpoint
from fedsea.model.partition import Span
from fedsea.model.spans import Placement, load_trunk
from fedsea.server.service import TrunkService
from fedsea.transport.recording import Direction
from fedsea.wire.codecs import Codec, RowFormat
from fedsea.wire.messages import Append, Begin, Close, Drop, Fork, Open, Rollback, Want

HIDDEN = 48
ROWS = RowFormat(Codec.FP32, HIDDEN)
SPAN = Span(1, 4)
UP, DOWN = Direction.UP, Direction.DOWN
# Messages of `dialogue` without faults.
MESSAGES = {UP: 20, DOWN: 15}


def run(work, seconds=60.0):
    """Run a coroutine; a hang is a failure."""
    return asyncio.run(asyncio.wait_for(work, seconds))


async def until(condition, seconds=5.0):
    """Let the loop run until a condition holds that is about to come about."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - what is watched has no event
            await asyncio.sleep(0.001)


def rows(count, seed=0):
    """Random rows."""
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def blocks(tiny_model):
    """What the served blocks make of a whole sequence, without wire and cache."""
    span = load_trunk(Checkpoint.open(tiny_model), SPAN, Placement())

    @torch.inference_mode()
    def compute(sequence):
        return span.run(sequence, RaggedBatch.whole([len(sequence)], torch.device("cpu")))

    return compute


@pytest.fixture(scope="module")
def expectation(tiny_model):
    """What a client of the tiny model expects."""
    checkpoint = Checkpoint.open(tiny_model)
    return Expectation("tiny", checkpoint.fingerprint(), HIDDEN, SPAN, (Codec.FP32, Codec.FP32))


class Trunks:
    """Makes sessions over one wire to the given services, and closes them."""

    def __init__(self, expectation, wire):
        self.expectation = expectation
        self.wire = wire
        self.notices: list[str] = []
        self.made: list[RemoteTrunk] = []

    def make(self, *services, reserve=512, patience=BRIEF, tell=None):
        """A session that is not open yet."""
        endpoints = [
            Endpoint(f"server-{number}", functools.partial(self.wire.channel, service))
            for number, service in enumerate(services)
        ]
        plan = SessionPlan(self.expectation, reserve, ROWS, ROWS)
        store = ReleaseStore()
        tell = tell or self.notices.append
        self.made.append(RemoteTrunk(endpoints, plan, store, patience, tell))
        return self.made[-1]

    async def open(self, *services, **options):
        """An open session."""
        trunk = self.make(*services, **options)
        await trunk.open()
        return trunk


@pytest.fixture
def connected(expectation, wire):
    """A context that hands out a maker of sessions and closes them before the servers end."""

    @asynccontextmanager
    async def context():
        trunks = Trunks(expectation, wire)
        try:
            yield trunks
        finally:
            for trunk in trunks.made:
                await trunk.close()

    return context


def assert_close(actual, expected):
    """Equal up to the rounding of another order of additions."""
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def segments(append):
    """Sequence and count of each segment."""
    return [(segment.sequence, segment.count) for segment in append.segments]


async def dialogue(trunk):
    """Prefill, decode, fork, roll back and drop; returns all rows that came back, by name."""
    got = {}
    trunk.begin(0, 64)
    chunks = [trunk.append(0, rows(12, seed), Want.ALL) for seed in range(3)]
    got["prefill"] = torch.cat([await chunk for chunk in chunks])
    for seed in (10, 11):
        got[f"decode {seed}"] = await trunk.append(0, rows(1, seed), Want.LAST)
    trunk.fork(0, 1, 36, 64)
    both = [trunk.append(n, rows(1, 20 + n), Want.LAST) for n in (0, 1)]
    got["fork 0"], got["fork 1"] = [await one for one in both]
    trunk.rollback(0, 30)
    got["rollback"] = await trunk.append(0, rows(2, 30), Want.ALL)
    trunk.drop(1)
    trunk.begin(2, 16)
    got["begin"] = await trunk.append(2, rows(5, 40), Want.LAST)
    nothing = await trunk.append(2, rows(3, 41), Want.NONE)
    assert nothing.shape == (0, HIDDEN)
    pair = [trunk.append(n, rows(1, 50 + n), Want.LAST) for n in (0, 2)]
    got["pair 0"], got["pair 2"] = [await one for one in pair]
    for seed in (60, 61, 62):
        got[f"decode {seed}"] = await trunk.append(0, rows(1, seed), Want.LAST)
    got["prefill again"] = await trunk.append(2, rows(6, 70), Want.ALL)
    return got


@pytest.fixture(scope="module")
def expected(blocks):
    """What `dialogue` must return."""
    prompt = torch.cat([rows(12, seed) for seed in range(3)])
    long = torch.cat([prompt, rows(1, 10), rows(1, 11), rows(1, 20)])
    forked = torch.cat([prompt, rows(1, 21)])
    back = torch.cat([prompt[:30], rows(2, 30), rows(1, 50), *(rows(1, s) for s in (60, 61, 62))])
    second = torch.cat([rows(5, 40), rows(3, 41), rows(1, 52), rows(6, 70)])
    first, fork, rolled, other = (blocks(sequence) for sequence in (long, forked, back, second))
    return {
        "prefill": first[:36],
        "decode 10": first[36:37],
        "decode 11": first[37:38],
        "fork 0": first[38:39],
        "fork 1": fork[36:37],
        "rollback": rolled[30:32],
        "begin": other[4:5],
        "pair 0": rolled[32:33],
        "pair 2": other[8:9],
        "decode 60": rolled[33:34],
        "decode 61": rolled[34:35],
        "decode 62": rolled[35:36],
        "prefill again": other[9:15],
    }


def released(wire):
    """All bytes that crossed the wire for each sequence and position."""
    seen: dict[tuple[int, int], set[bytes]] = {}
    for append in wire.of(Append):
        data = bytes(append.rows)
        size = len(data) // append.count
        pieces = iter(range(0, len(data), size))
        for segment in append.segments:
            for position in range(segment.start, segment.end):
                offset = next(pieces)
                key = segment.sequence, position
                seen.setdefault(key, set()).add(data[offset : offset + size])
    return seen


def test_a_whole_dialogue(serve_tiny, connected, wire, expected):
    """Every row that comes back is what the blocks compute, in the expected number of messages."""

    async def work():
        async with serve_tiny() as service, connected() as trunks:
            got = await dialogue(await trunks.open(service))
            assert wire.counts == MESSAGES
            return got, trunks.notices

    got, notices = run(work())
    assert got.keys() == expected.keys()
    for name, back in got.items():
        assert_close(back, expected[name])
    assert not notices


@pytest.mark.parametrize(
    ("direction", "number"),
    [(side, number) for side in (UP, DOWN) for number in range(1, MESSAGES[side] + 1)],
    ids=lambda value: value.value if isinstance(value, Direction) else str(value),
)
def test_a_cut_at_every_message(serve_tiny, connected, wire, expected, direction, number):
    """Wherever the connection breaks, the rows are the same and releases go out unchanged."""
    wire.cut_at = direction, number

    async def work():
        async with serve_tiny() as service, connected() as trunks:
            got = await dialogue(await trunks.open(service))
            return got, trunks.notices

    got, notices = run(work())
    for name, back in got.items():
        assert_close(back, expected[name])
    assert wire.connections == 2
    # Breaking the first message is no break of a session: there was none yet.
    assert len(notices) == (0 if number == 1 else 2)
    assert_unchanged(wire)


def assert_unchanged(wire):
    """Positions have one release each, but for those that were rolled back and written anew."""
    rewritten = {(0, 30), (0, 31), (0, 32), (0, 33), (0, 34), (0, 35)}
    for key, versions in released(wire).items():
        assert len(versions) <= (2 if key in rewritten else 1), key


@pytest.mark.parametrize("number", range(1, MESSAGES[DOWN] + 1))
def test_failover_at_every_answer(serve_tiny, connected, expected, expectation, number):
    """A second server takes over wherever the first one dies for good."""
    first, second = Wire(), Wire()
    first.cut_at = DOWN, number

    async def work():
        async with serve_tiny() as one, serve_tiny() as two, connected() as trunks:
            trunk = trunks.make()
            trunk._endpoints = [
                Endpoint("one", lambda: first.channel(one)),
                Endpoint("two", lambda: second.channel(two)),
            ]

            def told(line):
                first.down = True
                trunks.notices.append(line)

            trunk._tell = told
            first.down = False
            await trunk.open()
            got = await dialogue(trunk)
            return got, trunk.address

    got, address = run(work())
    for name, back in got.items():
        assert_close(back, expected[name])
    assert address == "two"


def test_two_cuts_in_a_row(serve_tiny, connected, wire, expected):
    """A connection that breaks in the middle of a replay is replayed again."""
    cuts = iter([(UP, 9), (UP, 13), (UP, 18)])
    wire.cut_at = next(cuts)

    def told(line):
        if "lost" in line:
            wire.cut_at = next(cuts, None)

    async def work():
        async with serve_tiny() as service, connected() as trunks:
            return await dialogue(await trunks.open(service, tell=told))

    got = run(work())
    for name, back in got.items():
        assert_close(back, expected[name])
    assert wire.connections == 4
    assert_unchanged(wire)


def test_rows_of_one_turn_share_a_message(serve_tiny, connected, wire):
    """Small pieces of different sequences travel together, large ones and repeated ones alone."""

    async def work():
        async with serve_tiny() as service, connected() as trunks:
            trunk = await trunks.open(service)
            for sequence in range(3):
                trunk.begin(sequence, 64)
            futures = [
                trunk.append(0, rows(1), Want.LAST),
                trunk.append(1, rows(8), Want.NONE),
                trunk.append(2, rows(9), Want.ALL),
                trunk.append(0, rows(1), Want.LAST),
                trunk.append(0, rows(1), Want.LAST),
                trunk.append(1, rows(2), Want.ALL),
            ]
            return [tuple((await future).shape) for future in futures]

    assert run(work()) == [(1, 48), (0, 48), (9, 48), (1, 48), (1, 48), (2, 48)]
    assert [segments(append) for append in wire.of(Append)] == [
        [(0, 1), (1, 8)],
        [(2, 9)],
        [(0, 1)],
        [(0, 1), (1, 2)],
    ]


def test_the_events_of_a_sequence_keep_their_order(serve_tiny, connected, wire):
    """Begin, rows, fork, rollback and drop arrive in the order in which they were said."""

    async def work():
        async with serve_tiny() as service, connected() as trunks:
            trunk = await trunks.open(service)
            trunk.begin(4, 32)
            await trunk.append(4, rows(3), Want.LAST)
            trunk.fork(4, 5, 2, 32)
            trunk.rollback(4, 1)
            trunk.drop(4)
            await trunk.append(5, rows(1), Want.LAST)
            return trunk.length(5)

    assert run(work()) == 3
    said = [event for _, side, event in wire.events if side is UP]
    kinds = [type(event) for event in said]
    assert kinds == [Open, Begin, Append, Fork, Rollback, Drop, Append, Close]
    assert said[3] == Fork(4, 5, 2, 32)
    assert said[4] == Rollback(4, 1)


@pytest.mark.parametrize("pending", [1, 2, 5])
def test_the_server_says_how_far_to_run_ahead(serve_tiny, connected, wire, blocks, pending):
    """No more messages are unanswered than the server accepts, and all are answered."""

    async def work():
        async with (
            serve_tiny(limits={"max_pending": pending}) as service,
            connected() as trunks,
        ):
            trunk = await trunks.open(service)
            trunk.begin(0, 128)
            futures = [trunk.append(0, rows(10, seed), Want.ALL) for seed in range(9)]
            return torch.cat([await future for future in futures])

    assert_close(run(work()), blocks(torch.cat([rows(10, seed) for seed in range(9)])))
    unanswered = most = 0
    for _, side, event in wire.events[2:]:
        if isinstance(event, Append):
            unanswered += 1
        elif side is DOWN:
            unanswered -= 1
        most = max(most, unanswered)
    assert most == pending


def test_the_server_says_how_many_segments_it_takes(serve_tiny, connected, wire):
    """A full turn of sequences is cut into messages that the server accepts."""

    async def work():
        async with serve_tiny(limits={"max_segments": 2}) as service, connected() as trunks:
            trunk = await trunks.open(service)
            for sequence in range(5):
                trunk.begin(sequence, 8)
            await asyncio.gather(*(trunk.append(n, rows(1), Want.LAST) for n in range(5)))

    run(work())
    assert [len(append.segments) for append in wire.of(Append)] == [2, 2, 1]


@pytest.mark.parametrize("want", list(Want))
def test_pieces_larger_than_a_message_go_in_parts(serve_tiny, connected, wire, blocks, want):
    """The caller gets its rows in one piece, whatever the server's caps."""

    async def work():
        async with (
            serve_tiny(limits={"max_rows_per_message": 16}) as service,
            connected() as trunks,
        ):
            trunk = await trunks.open(service)
            trunk.begin(0, 64)
            return await trunk.append(0, rows(37), want)

    back = run(work())
    whole = blocks(rows(37))
    assert_close(back, {Want.ALL: whole, Want.LAST: whole[-1:], Want.NONE: whole[:0]}[want])
    assert [append.count for append in wire.of(Append)] == [16, 16, 5]


def test_failover_to_a_server_with_smaller_messages(
    serve_tiny, connected, wire, expected, expectation
):
    """Unanswered rows that the next server cannot take at once go to it in parts."""
    wire.cut_at = DOWN, 2

    async def work():
        async with (
            serve_tiny() as one,
            serve_tiny(limits={"max_rows_per_message": 5}) as two,
            connected() as trunks,
        ):
            trunk = await trunks.open(one, two)
            trunk._preferred = 1
            return await dialogue(trunk)

    got = run(work())
    for name, back in got.items():
        assert_close(back, expected[name])
    assert max(append.count for append in wire.of(Append, connection=2)) == 5


def test_a_fork_of_rows_that_still_wait_here(serve_tiny, connected, blocks):
    """A sequence can be forked before its rows have left this process."""

    async def work():
        async with serve_tiny(limits={"max_pending": 1}) as service, connected() as trunks:
            trunk = await trunks.open(service)
            trunk.begin(0, 64)
            parts = [trunk.append(0, rows(10, seed), Want.ALL) for seed in range(3)]
            trunk.fork(0, 1, 25, 64)
            forked = await trunk.append(1, rows(1, 9), Want.LAST)
            return torch.cat([await part for part in parts]), forked

    whole, forked = run(work())
    prompt = torch.cat([rows(10, seed) for seed in range(3)])
    assert_close(whole, blocks(prompt))
    assert_close(forked, blocks(torch.cat([prompt[:25], rows(1, 9)]))[25:])


@pytest.mark.parametrize("pending", [1, 8])
@pytest.mark.parametrize("cut", [None, 2, 3, 4])
def test_rows_taken_back_on_their_way(serve_tiny, connected, wire, blocks, pending, cut):
    """Rollback of rows that wait, are on their way or are lost: what follows is as if fresh."""
    wire.cut_at = None if cut is None else (DOWN, cut)

    async def work():
        async with (
            serve_tiny(limits={"max_pending": pending}) as service,
            connected() as trunks,
        ):
            trunk = await trunks.open(service)
            trunk.begin(0, 64)
            kept = trunk.append(0, rows(10, 0), Want.ALL)
            unwanted = [trunk.append(0, rows(10, seed), Want.ALL) for seed in (1, 2)]
            trunk.rollback(0, 15)
            again = trunk.append(0, rows(4, 7), Want.ALL)
            assert all(future.cancelled() for future in unwanted)
            assert trunk.length(0) == 19
            return await kept, await again

    kept, again = run(work())
    whole = blocks(torch.cat([rows(10, 0), rows(10, 1)[:5], rows(4, 7)]))
    assert_close(kept, whole[:10])
    assert_close(again, whole[15:])


@pytest.mark.parametrize("cut", [None, 2, 3])
def test_a_sequence_dropped_on_its_way(serve_tiny, connected, wire, blocks, cut):
    """Dropping a sequence with rows under way disturbs no other, with or without a break."""
    wire.cut_at = None if cut is None else (DOWN, cut)

    async def work():
        async with serve_tiny(limits={"max_pending": 1}) as service, connected() as trunks:
            trunk = await trunks.open(service)
            trunk.begin(0, 32)
            trunk.begin(1, 32)
            lost = [trunk.append(0, rows(10), Want.ALL) for _ in range(2)]
            other = trunk.append(1, rows(12, 3), Want.ALL)
            trunk.drop(0)
            assert all(future.cancelled() for future in lost)
            return await other

    assert_close(run(work()), blocks(rows(12, 3)))


def test_rows_can_be_asked_for_again(serve_tiny, connected, wire, blocks):
    """Rows whose answer nobody kept come back once more, from the same releases."""

    async def work():
        async with serve_tiny() as service, connected() as trunks:
            trunk = await trunks.open(service)
            trunk.begin(0, 64)
            await trunk.append(0, rows(10, 0), Want.ALL)
            unread = trunk.append(0, rows(10, 1), Want.ALL)
            unread.cancel()
            back = await trunk.ask_again(0, 10)
            return back, await trunk.append(0, rows(1, 2), Want.LAST)

    back, after = run(work())
    whole = blocks(torch.cat([rows(10, 0), rows(10, 1), rows(1, 2)]))
    assert_close(back, whole[10:20])
    assert_close(after, whole[20:])
    assert all(len(versions) == 1 for versions in released(wire).values())


def test_a_wrong_model_at_the_second_address_is_named(serve_tiny, connected, wire, other_model):
    """Failover never goes to another checkpoint: the error says which server serves what."""
    wire.cut_at = DOWN, 2

    async def work():
        other = TrunkService.load(memory_config(other_model))
        async with serve_tiny() as one, other as two, connected() as trunks:
            trunk = await trunks.open(one, two)
            trunk._preferred = 1
            trunk.begin(0, 32)
            with pytest.raises(FingerprintMismatch, match=r"server-1 serves .* use the same"):
                await trunk.append(0, rows(4), Want.ALL)
            # The session is not lost: it goes on where the right model is served.
            trunk._preferred = 0
            await trunk.resume()
            return await trunk.ask_again(0, 0)

    assert run(work()).shape == (4, HIDDEN)


def test_a_full_server_is_waited_for(serve_tiny, connected):
    """Whoever finds no place waits as long as the server says, and gets in when there is one."""

    async def work():
        async with serve_tiny(kv={"rows": 512}) as service, connected() as trunks:
            first = await trunks.open(service)
            waiting = asyncio.create_task(trunks.open(service))
            await until(lambda: times_refused(service))
            assert not waiting.done()
            await first.close()
            second = await waiting
            second.begin(0, 8)
            return await second.append(0, rows(1), Want.LAST)

    assert run(work()).shape == (1, HIDDEN)


def times_refused(service):
    """How often the server had no room."""
    return service.metrics.registry.get_sample_value("fedsea_ended_total", {"code": "capacity"})


def test_a_place_that_does_not_come_is_given_up(serve_tiny, connected):
    """Patience has an end: the refusal of the server is the error, within its bound."""

    async def work():
        async with serve_tiny(kv={"rows": 512}) as service, connected() as trunks:
            await trunks.open(service)
            began = time.monotonic()
            with pytest.raises(Capacity):
                await trunks.open(service, patience=Patience(open=0.4))
            return time.monotonic() - began

    assert run(work()) < 1.5


def test_a_reservation_that_can_never_fit_is_refused_at_once(serve_tiny, connected):
    """Where waiting does not help, nobody waits."""

    async def work():
        async with serve_tiny(kv={"rows": 512}) as service, connected() as trunks:
            began = time.monotonic()
            with pytest.raises(Capacity):
                await trunks.open(service, reserve=100_000)
            return time.monotonic() - began

    assert run(work()) < 1.0


def test_nobody_at_any_address(serve_tiny, connected, wire):
    """The error names all addresses and the time, and comes within it."""
    wire.down = True

    async def work():
        async with serve_tiny() as service, connected() as trunks:
            began = time.monotonic()
            with pytest.raises(Unreachable, match=r"within 0.5 s \(server-0, server-1\)"):
                await trunks.open(service, service, patience=Patience(open=0.5))
            return time.monotonic() - began

    assert run(work()) < 1.0


def test_an_outage_and_its_end(serve_tiny, connected, wire, blocks):
    """When nobody answers the call fails in time; `resume` later goes on from the same releases."""
    patience = Patience(recover=0.3)

    async def work():
        async with serve_tiny() as service, connected() as trunks:
            trunk = await trunks.open(service, patience=patience)
            trunk.begin(0, 64)
            first = await trunk.append(0, rows(10), Want.ALL)
            wire.down = True
            wire.cut_at = DOWN, wire.counts[DOWN] + 1
            began = time.monotonic()
            with pytest.raises(Unreachable, match="resumed later"):
                await trunk.append(0, rows(10, 1), Want.ALL)
            assert time.monotonic() - began < 1.5
            with pytest.raises(Unreachable):
                trunk.append(0, rows(1), Want.LAST)
            with pytest.raises(Unreachable):
                await trunk.resume()
            # What needs no server still works.
            trunk.rollback(0, 18)
            wire.down = False
            await asyncio.gather(trunk.resume(), trunk.resume())
            back = await trunk.ask_again(0, 10)
            return first, back, await trunk.append(0, rows(1, 5), Want.LAST)

    parts = run(work())
    whole = blocks(torch.cat([rows(10), rows(10, 1)[:8], rows(1, 5)]))
    assert_close(torch.cat(parts), whole)
    assert wire.connections == 2


def test_a_silent_server_is_left(serve_tiny, connected, wire, expected):
    """A server that owes an answer for too long is left for the next one."""
    wire.mute_at = DOWN, 6

    async def work():
        async with serve_tiny() as one, serve_tiny() as two, connected() as trunks:
            trunk = await trunks.open(one, two, patience=Patience(recover=5, answer=0.4))
            return await dialogue(trunk), trunk.address, trunks.notices

    got, address, notices = run(work())
    for name, back in got.items():
        assert_close(back, expected[name])
    assert address == "server-1"
    assert "deadline_exceeded" in notices[0]


def test_a_pause_of_the_client_is_no_silence_of_the_server(
    serve_tiny, connected, wire, monkeypatch
):
    """The time in which nothing was owed does not count against the server."""
    now = 0.0
    monkeypatch.setattr("fedsea.client.remote.time", SimpleNamespace(monotonic=lambda: now))

    async def work():
        nonlocal now
        async with serve_tiny() as service, connected() as trunks:
            trunk = await trunks.open(service, patience=Patience(answer=0.2))
            trunk.begin(0, 32)
            await trunk.append(0, rows(1), Want.LAST)
            now += 1000
            wire.mute_at = DOWN, 3
            arrival = trunk.append(0, rows(1), Want.LAST)
            # Time stands still from here on, while the watch looks several times.
            await asyncio.sleep(0.2)
            assert not arrival.done()
            return trunks.notices

    assert run(work()) == []


def test_a_server_that_never_greets(serve_tiny, connected, wire):
    """Opening at a server that takes the stream and says nothing leaves time for the next one."""
    wire.mute_at = DOWN, 1

    async def work():
        async with serve_tiny() as one, serve_tiny() as two, connected() as trunks:
            began = time.monotonic()
            trunk = await trunks.open(one, two, patience=Patience(open=2.0))
            return trunk.address, time.monotonic() - began

    address, seconds = run(work())
    assert address == "server-1"
    assert seconds < 1.9


def test_a_refusal_for_good_ends_the_session(serve_tiny, connected, wire):
    """What no repetition can mend is raised to who waits and to everyone after."""

    async def work():
        async with serve_tiny(kv={"max_context": 64}) as service, connected() as trunks:
            trunk = await trunks.open(service)
            trunk.begin(0, 65)
            with pytest.raises(PromptTooLong, match="65 rows"):
                await trunk.append(0, rows(1), Want.LAST)
            with pytest.raises(PromptTooLong):
                trunk.append(0, rows(1), Want.LAST)
            return trunks.notices

    assert run(work()) == []
    assert wire.connections == 1


def test_an_idle_session_gives_up_its_place_until_it_is_used(serve_tiny, connected, wire, blocks):
    """Evicted when idle, a session does not come back before it has something to send."""

    async def work():
        async with serve_tiny(server={"idle_timeout_s": 0.1}) as service, connected() as trunks:
            trunk = await trunks.open(service)
            trunk.begin(0, 32)
            first = await trunk.append(0, rows(3), Want.ALL)
            await until(lambda: trunk.address is None)
            await until(lambda: not service.trunk.runner.pool.num_accounts)
            trunk.fork(0, 1, 2, 32)
            assert wire.connections == 1
            second = await trunk.append(0, rows(1, 1), Want.LAST)
            forked = await trunk.append(1, rows(1, 2), Want.LAST)
            return first, second, forked

    first, second, forked = run(work())
    assert_close(torch.cat([first, second]), blocks(torch.cat([rows(3), rows(1, 1)])))
    assert_close(forked, blocks(torch.cat([rows(3)[:2], rows(1, 2)]))[2:])


def test_a_caller_that_fails_to_take_a_notice_does_no_harm(serve_tiny, connected, wire, expected):
    """An error in the caller's own function does not stop the recovery."""
    wire.cut_at = DOWN, 4

    def broken(line):
        raise ValueError(line)

    async def work():
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
        async with serve_tiny() as service, connected() as trunks:
            return await dialogue(await trunks.open(service, tell=broken))

    got = run(work())
    assert_close(got["prefill again"], expected["prefill again"])


def test_rows_that_do_not_fit_the_sequence_are_our_mistake(serve_tiny, connected):
    """More rows than the capacity end in a local error, not in a hang."""

    async def work():
        async with serve_tiny() as service, connected() as trunks:
            trunk = await trunks.open(service)
            trunk.begin(0, 8)
            with pytest.raises(LocalProtocolError, match="over its capacity of 8"):
                await trunk.append(0, rows(9), Want.ALL)

    run(work())


def test_closing_with_rows_on_their_way(serve_tiny, connected):
    """A session closed in the middle of everything leaves nothing behind at the server."""

    async def work():
        async with serve_tiny() as service, connected() as trunks:
            trunk = await trunks.open(service)
            trunk.begin(0, 64)
            futures = [trunk.append(0, rows(10), Want.ALL) for _ in range(5)]
            await trunk.close()
            for future in futures:
                future.cancel()
            return trunk.address

    assert run(work()) is None


def test_closing_while_it_reconnects(serve_tiny, connected, wire):
    """A recovery under way ends with the session."""
    wire.cut_at = DOWN, 2

    async def work():
        async with serve_tiny() as service, connected() as trunks:
            trunk = await trunks.open(service)
            wire.down = True
            trunk.begin(0, 64)
            arrival = trunk.append(0, rows(10), Want.ALL)
            await until(lambda: trunk.address is None)
            await trunk.close()
            arrival.cancel()
            return wire.connections

    assert run(work()) == 1


def test_traffic_counts_what_crossed(serve_tiny, connected, wire):
    """Messages and rows of both directions are counted as they are sent."""

    async def work():
        async with serve_tiny() as service, connected() as trunks:
            trunk = await trunks.open(service)
            await dialogue(trunk)
            return trunk.traffic

    traffic = run(work())
    assert traffic.messages_up == MESSAGES[UP]
    assert traffic.messages_down == MESSAGES[DOWN]
    assert traffic.rows_up == sum(append.count for append in wire.of(Append))
    assert traffic.bytes_up > traffic.rows_up * HIDDEN * 4
    assert traffic.compute_us > 0
