"""The engine computes what the blocks compute, however sessions, chunks and spans are mixed."""

from __future__ import annotations

import asyncio

import pytest
import torch

from fedsea.errors import RemoteProtocolError
from fedsea.model.attention import RaggedBatch
from fedsea.model.checkpoint import Checkpoint
from fedsea.model.partition import Span
from fedsea.model.projection import Projection
from fedsea.model.spans import Placement, load_trunk
from fedsea.wire.codecs import VALUE_CODECS, Codec, RowFormat, decode, encode
from fedsea.wire.messages import Drop, Fork, Rollback, Want

CPU = torch.device("cpu")
CHUNKED = {"scheduler": {"max_step_rows": 16, "small_append_rows": 8}}


@pytest.fixture
def expected(checkpoint_folder):
    """What blocks first..end make of a whole sequence, without any cache."""

    def run(rows, first=0, end=4):
        span = load_trunk(Checkpoint.open(checkpoint_folder), Span(first, end), Placement())
        with torch.inference_mode():
            return span.run(rows, RaggedBatch.whole([len(rows)], CPU))

    return run


def close_to(expected):
    """Equality up to the rounding of another order of additions."""
    return pytest.approx(expected.numpy(), abs=1e-5)


def test_prefill_and_decoding_equal_the_blocks(serving, connect, rows, expected):
    """A prompt and single rows after it come back as the blocks alone compute them."""
    sequence = rows(20)

    async def dialogue():
        async with serving() as service:
            client = await connect(service)
            await client.begin()
            parts = [await client.run(sequence[:12])]
            parts += [await client.run(sequence[i : i + 1]) for i in range(12, 20)]
            await client.close()
            return torch.cat(parts)

    assert asyncio.run(dialogue()).numpy() == close_to(expected(sequence))


def test_chunked_prefill_equals_whole(serving, connect, rows, expected):
    """A prompt of many chunks, sent in two Appends, equals one pass."""
    sequence = rows(100)

    async def dialogue():
        async with serving(**CHUNKED) as service:
            client = await connect(service)
            await client.begin()
            await client.push(sequence[:70])
            await client.push(sequence[70:])
            parts = [await client.pull(), await client.pull()]
            await client.close()
            return torch.cat(parts)

    assert asyncio.run(dialogue()).numpy() == close_to(expected(sequence))


def test_no_answer_overtakes_one_on_its_way_to_the_loop(serving, connect, rows, monkeypatch):
    """A small Append waits its turn while the answer of a large one is still being handed over."""
    sequence = rows(41)

    async def dialogue():
        async with serving() as service:
            client = await connect(service)
            await client.begin()
            loop, engine = asyncio.get_running_loop(), service.engine
            hand_over = engine._call_loop
            handed_over = asyncio.Event()

            def late(function, *arguments):
                hand_over(handed_over.set)
                hand_over(loop.call_later, 0.05, function, *arguments)

            monkeypatch.setattr(engine, "_call_loop", late)
            await client.push(sequence[:40])
            await handed_over.wait()
            while engine._turn.locked():  # noqa: ASYNC110 - the engine's thread is about to leave it
                await asyncio.sleep(0)
            await client.push(sequence[40:])
            answers = [await client.pull(), await client.pull()]
            await client.close()
            return [len(answer) for answer in answers]

    assert asyncio.run(dialogue()) == [40, 1]


def test_concurrent_sessions_equal_solo_runs(serving, connect, rows, expected):
    """Sessions of several tenants that prefill and decode at the same time do not mix."""
    sequences = [rows(10 + 7 * n, seed=n) for n in range(6)]

    async def one(service, number):
        client = await connect(service, tenant=f"t{number % 3}", rows=64)
        sequence = sequences[number]
        await client.begin(capacity=64)
        parts = [await client.run(sequence[:-6])]
        parts += [await client.run(row[None]) for row in sequence[-6:]]
        await client.close()
        return torch.cat(parts)

    async def dialogue():
        async with serving(**CHUNKED) as service:
            return await asyncio.gather(*(one(service, n) for n in range(6)))

    for sequence, result in zip(sequences, asyncio.run(dialogue()), strict=True):
        assert result.numpy() == close_to(expected(sequence))


def test_a_batch_of_unequal_prompts(serving, connect, rows, expected):
    """One Append with several prompts is answered once, with the rows that each segment wants."""
    prompts = [rows(30, 1), rows(3, 2), rows(17, 3)]
    wants = [Want.LAST, Want.ALL, Want.NONE]

    async def dialogue():
        async with serving(**CHUNKED) as service:
            client = await connect(service)
            for number in range(3):
                await client.begin(number, capacity=40)
            await client.push_many(list(zip(range(3), prompts, wants, strict=True)))
            first = await client.pull()
            rest = torch.cat([rows(1, 9)] * 3)
            await client.push_many([(n, rest[n : n + 1], Want.ALL) for n in range(3)])
            second = await client.pull()
            await client.close()
            return first, second

    first, second = asyncio.run(dialogue())

    wanted = torch.cat([expected(prompts[0])[-1:], expected(prompts[1])])
    assert first.numpy() == close_to(wanted)
    following = [expected(torch.cat([prompt, rows(1, 9)]))[-1:] for prompt in prompts]
    assert second.numpy() == close_to(torch.cat(following))


def test_nothing_wanted_is_still_answered(serving, connect, rows):
    """An Append that wants no rows gets its Output, empty."""

    async def dialogue():
        async with serving() as service:
            client = await connect(service)
            await client.begin()
            result = await client.run(rows(5), want=Want.NONE)
            await client.close()
            return result

    assert asyncio.run(dialogue()).shape == (0, 32)


def test_rollback_equals_fresh(serving, connect, rows, expected):
    """After a rollback the sequence goes on as if the forgotten rows had never been."""
    kept, lost, new = rows(13, 1), rows(9, 2), rows(11, 3)

    async def dialogue():
        async with serving() as service:
            client = await connect(service)
            await client.begin()
            await client.run(torch.cat([kept, lost]))
            await client.send(Rollback(0, 13))
            result = await client.run(new)
            await client.close()
            return result

    assert asyncio.run(dialogue()).numpy() == close_to(expected(torch.cat([kept, new]))[13:])


def test_fork_equals_copy(serving, connect, rows, expected):
    """A fork and its source go on independently, each as a sequence of its own."""
    shared, left, right = rows(13, 1), rows(6, 2), rows(7, 3)

    async def dialogue():
        async with serving() as service:
            client = await connect(service)
            await client.begin(capacity=64)
            await client.run(shared)
            await client.send(Fork(0, 1, 13, 64))
            await client.push_many([(0, left, Want.ALL), (1, right, Want.ALL)])
            both = await client.pull()
            await client.send(Drop(0))
            tail = await client.run(rows(2, 4), sequence=1)
            await client.close()
            return both, tail

    both, tail = asyncio.run(dialogue())

    assert both[:6].numpy() == close_to(expected(torch.cat([shared, left]))[13:])
    assert both[6:].numpy() == close_to(expected(torch.cat([shared, right]))[13:])
    assert tail.numpy() == close_to(expected(torch.cat([shared, right, rows(2, 4)]))[20:])


def test_a_narrower_span_equals_a_server_of_that_span(serving, connect, rows, expected):
    """Sessions over different spans run side by side, each through its own blocks only."""
    sequence = rows(20)
    spans = [(0, 4), (1, 3), (2, 4), (1, 3)]

    async def one(service, span):
        client = await connect(service, span=span)
        await client.begin()
        parts = [await client.run(sequence[:15])]
        parts += [await client.run(row[None]) for row in sequence[15:]]
        await client.close()
        return torch.cat(parts)

    async def dialogue():
        async with serving() as service:
            return await asyncio.gather(*(one(service, span) for span in spans))

    for span, result in zip(spans, asyncio.run(dialogue()), strict=True):
        assert result.numpy() == close_to(expected(sequence, *span))


@pytest.mark.parametrize("down", VALUE_CODECS)
@pytest.mark.parametrize("up", VALUE_CODECS)
def test_every_pair_of_codecs(serving, connect, rows, expected, up, down):
    """Rows are computed as the up codec carried them and come back in the down codec."""
    sequence = rows(9)

    async def dialogue():
        async with serving() as service:
            client = await connect(service, up=up, down=down)
            await client.begin()
            result = await client.run(sequence)
            await client.close()
            return result

    received = decode(encode(sequence, up), up, 9, 32)
    wanted = expected(received)
    sent = decode(encode(wanted, down), down, 9, 32)
    step = wanted.abs().max().item() / 64
    assert asyncio.run(dialogue()).numpy() == pytest.approx(
        sent.numpy(), abs=1e-5 if down is Codec.FP32 else step
    )


COUNTS = RowFormat(Codec.COUNTS, 32, 15, 2.0)
NARROW_COUNTS = RowFormat(Codec.COUNTS, 8, 5, 1.5)
NARROW = RowFormat(Codec.FP32, 8)


@pytest.fixture(scope="module")
def projection(fingerprint):
    """A pair for rows that enter block 0 of the tiny model."""
    generator = torch.Generator().manual_seed(3)
    return Projection.of(
        torch.randn(8, 32, generator=generator) / 6,
        torch.randn(32, 8, generator=generator) / 3,
        0,
        fingerprint,
    )


@pytest.fixture
def projected(projection, tmp_path):
    """Settings of a server that widens narrow rows by its half of the pair."""
    projection.for_server().save(tmp_path / "decoder.safetensors")
    return {"model": {"projections": [str(tmp_path / "decoder.safetensors")]}}


def drawn(chosen, count, seed=0):
    """Rows as a session of a format sends them, and what the trunk should see before a projection."""
    generator = torch.Generator().manual_seed(seed)
    if chosen.codec is Codec.COUNTS:
        size = (count, chosen.width)
        counts = torch.randint(0, chosen.levels + 1, size, generator=generator)
        return counts.byte(), chosen.values(counts)
    rows = torch.randn(count, chosen.width, generator=generator)
    return rows, rows


@pytest.mark.parametrize("up", [COUNTS, NARROW_COUNTS, NARROW], ids=["counts", "narrow", "floats"])
def test_counts_and_narrow_rows(serving, connect, expected, projected, projection, up):
    """Counts are computed with as their values, narrow rows as the projection widens them."""
    sent, seen = drawn(up, 20)

    async def dialogue():
        async with serving(**projected) as service:
            name = projection.fingerprint() if up.width == 8 else ""
            client = await connect(service, up=up, projection=name)
            await client.begin()
            parts = [await client.run(sent[:12])]
            parts += [await client.run(sent[i : i + 1]) for i in range(12, 20)]
            await client.close()
            return torch.cat(parts)

    wanted = expected(projection.decode(seen) if up.width == 8 else seen)
    assert asyncio.run(dialogue()).numpy() == close_to(wanted)


def test_all_formats_share_a_step(serving, connect, projected, projection):
    """Sessions of different formats that are computed together get what they get alone."""
    formats = [COUNTS, NARROW, RowFormat(Codec.FP32, 32), NARROW_COUNTS, COUNTS]

    async def one(service, number):
        up = formats[number]
        name = projection.fingerprint() if up.width == 8 else ""
        client = await connect(service, up=up, projection=name)
        await client.begin()
        sent, _ = drawn(up, 6, seed=number)
        parts = [await client.run(sent[i : i + 1]) for i in range(6)]
        await client.close()
        return torch.cat(parts)

    async def dialogue():
        async with serving(**projected) as service:
            together = await asyncio.gather(*(one(service, n) for n in range(len(formats))))
            return together, [await one(service, n) for n in range(len(formats))]

    together, alone = asyncio.run(dialogue())
    for left, right in zip(together, alone, strict=True):
        assert left.numpy() == close_to(right)


def test_rows_that_a_projection_makes_infinite_end_their_session_only(
    serving, connect, projected, projection
):
    """Finite narrow rows can widen to infinity: refused, and a session beside it goes on."""

    async def dialogue():
        async with serving(**projected) as service:
            name = projection.fingerprint()
            bad, good = [await connect(service, up=NARROW, projection=name) for _ in range(2)]
            for client in (bad, good):
                await client.begin()
            with pytest.raises(RemoteProtocolError, match="not finite"):
                await bad.run(torch.full((1, 8), 3e38))
            assert (await good.run(torch.ones(1, 8))).isfinite().all()
            await good.close()

    asyncio.run(dialogue())


def test_codecs_share_a_step(serving, connect, rows):
    """Sessions of different codecs that are computed together get what they get alone."""
    codecs = [Codec.FP32, Codec.INT8, Codec.FP16, Codec.FP32]

    async def one(service, codec):
        client = await connect(service, up=codec, down=codec)
        await client.begin()
        parts = [await client.run(rows(1, n)) for n in range(6)]
        await client.close()
        return torch.cat(parts)

    async def dialogue():
        async with serving() as service:
            together = await asyncio.gather(*(one(service, codec) for codec in codecs))
            alone = [await one(service, codec) for codec in codecs]
            return together, alone

    for together, alone in zip(*asyncio.run(dialogue()), strict=True):
        assert together.numpy() == pytest.approx(alone.numpy(), abs=0.05)


@pytest.mark.parametrize("model", [{"dtype": "bf16"}, {"quantization": "int8"}, {"threads": 1}])
def test_other_ways_to_keep_the_blocks(serving, connect, rows, expected, model):
    """bf16 and int8 weights give the same rows up to their rounding."""

    async def dialogue():
        async with serving(model=model) as service:
            client = await connect(service)
            await client.begin()
            result = await client.run(rows(9))
            await client.close()
            return result

    wanted = expected(rows(9))
    assert torch.nn.functional.cosine_similarity(asyncio.run(dialogue()), wanted).min() > 0.999
