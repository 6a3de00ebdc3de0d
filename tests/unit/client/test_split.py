"""Sessions of the split model: three caches that stay at one length, and logits of the whole model."""

from __future__ import annotations

import asyncio

import pytest
import torch
from transformers import AutoModelForCausalLM

from fedsea.client.split import PREFILL_CHUNK
from fedsea.errors import Capacity, PromptTooLong
from fedsea.transport.recording import Direction
from fedsea.wire.messages import Append, Open, Want

DOWN = Direction.DOWN
IDS = torch.randint(3, 90, (600,), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def logits(tiny_model):
    """Logits (n, vocabulary) of the unsplit model."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation="eager").eval()

    @torch.inference_mode()
    def compute(ids):
        return model(ids.unsqueeze(0)).logits[0]

    return compute


def in_session(split, work, capacities=(700,)):
    """Run `work` with a session of the split model on the client's loop."""

    async def run():
        session = await split.llm.split.open(list(capacities))
        try:
            return await asyncio.wait_for(work(session), 60)
        finally:
            await session.close()

    return split.on_loop(run())


def assert_logits(actual, expected):
    """Equal within the tolerance of fp32."""
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("partition", [(1, 1), (1, 0), (0, 0)])
@pytest.mark.parametrize("keep", [1, 5, PREFILL_CHUNK + 30, 600])
def test_kept_logits_equal_the_whole_model(make_split, logits, partition, keep):
    """The last rows of a prompt in chunks, however many are kept and over however many chunks."""
    split = make_split(partition=partition)

    async def work(session):
        sequence = session.begin(700)
        return await session.feed(sequence, IDS, keep=keep)

    assert_logits(in_session(split, work).logits, logits(IDS)[-keep:])


def test_keeping_nothing_still_fills_the_caches(split, logits):
    """Rows can be fed without logits; what follows sees them."""

    async def work(session):
        sequence = session.begin(700)
        first = await session.feed(sequence, IDS[:300], keep=0)
        assert first.logits.shape[0] == 0
        return await session.feed(sequence, IDS[300:301])

    assert_logits(in_session(split, work).logits, logits(IDS[:301])[-1:])


def test_a_top_without_blocks_asks_for_few_rows(make_split, wire):
    """Rows that the top does not read do not come back."""
    split = make_split(partition=(1, 0))

    async def work(session):
        sequence = session.begin(700)
        await session.feed(sequence, IDS)
        return session.traffic.rows_down

    assert in_session(split, work) <= PREFILL_CHUNK
    wants = [segment.want for append in wire.of(Append) for segment in append.segments]
    assert wants[:2] == [Want.NONE, Want.NONE]


def test_forks_and_rollbacks_equal_fresh_runs(split, logits):
    """After any of them each sequence gives the logits of its own tokens."""

    async def work(session):
        first = session.begin(700)
        await session.feed(first, IDS[:100])
        second = session.fork(first, 60, 700)
        session.rollback(first, 80)
        results = await asyncio.gather(
            session.feed(first, IDS[200:210]), session.feed(second, IDS[300:301])
        )
        lengths = [session.length(one) for one in (first, second)]
        session.drop(first)
        assert session.sequences() == [second]
        return results, lengths

    (one, two), lengths = in_session(split, work, (700, 700))
    assert lengths == [90, 61]
    assert_logits(one.logits, logits(torch.cat([IDS[:80], IDS[200:210]]))[-1:])
    assert_logits(two.logits, logits(torch.cat([IDS[:60], IDS[300:301]]))[-1:])


def test_progress_is_told_after_every_chunk(split):
    """Done and all, growing to the whole."""
    steps = []

    async def work(session):
        sequence = session.begin(700)
        await session.feed(sequence, IDS, progress=lambda *step: steps.append(step))

    in_session(split, work)
    assert steps == [(256, 600), (512, 600), (600, 600)]


def test_reservations_are_whole_pages_of_the_server(split, wire):
    """The session asks for what its sequences can take, page by page."""

    async def work(session):
        session.begin(1)

    in_session(split, work, (1, 8, 9))
    assert wire.of(Open)[0].reserve_rows == 8 + 8 + 16


def test_a_capacity_over_the_context(split):
    """Refused before anything is reserved."""

    async def work(session):
        raise AssertionError("it must not open")

    with pytest.raises(PromptTooLong, match="2049 positions and the context is 2048"):
        in_session(split, work, (10, 2049))
    assert split.settled()


def test_a_session_that_finds_no_place_leaves_nothing(make_split):
    """When the server has no room the client's own rows are free again."""
    split = make_split({"kv": {"rows": 64}})

    async def work(session):
        raise AssertionError("it must not open")

    with pytest.raises(Capacity):
        in_session(split, work, (64, 64))
    assert split.settled()


def test_a_session_cancelled_while_it_opens_leaves_nothing(split, wire):
    """Cancelling before the server has answered frees the client's rows and the server's."""
    wire.hold_at = DOWN, 1

    async def open_one():
        await split.llm.split.open([100])

    pending = split.llm.background.start(open_one())
    assert wire.holding.wait(10)
    assert split.llm.split.parts.pools[0].num_accounts == 1
    pending.cancel()
    split.wait_until(split.settled)


@pytest.mark.parametrize("number", [2, 3, 4])
def test_parts_are_brought_together(split, wire, logits, number):
    """After a feed that was cancelled anywhere, `resume` lets the next one go on exactly."""
    wire.hold_at = DOWN, number

    async def work(session):
        sequence = session.begin(700)
        feeding = asyncio.create_task(session.feed(sequence, IDS))
        await asyncio.to_thread(wire.holding.wait, 10)
        feeding.cancel()
        await asyncio.gather(feeding, return_exceptions=True)
        wire.release.set()
        await session.resume(sequence)
        await session.resume(sequence)
        done = session.length(sequence)
        assert done > 0
        return await session.feed(sequence, torch.cat([IDS, IDS])[done:650])

    assert_logits(in_session(split, work).logits, logits(torch.cat([IDS, IDS])[:650])[-1:])


def test_closing_twice_is_harmless(split):
    """A session is closed once."""

    async def work(session):
        await session.close()

    in_session(split, work)
