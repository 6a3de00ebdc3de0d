"""Sessions over the memory transport: what is refused, what ends, and that nothing leaks."""

from __future__ import annotations

import asyncio
import math

import pytest
import torch

from fedsea.errors import (
    Capacity,
    ConfigError,
    ConnectionLost,
    DeadlineExceeded,
    Draining,
    FedseaError,
    FingerprintMismatch,
    ModelError,
    PartitionError,
    PermissionDenied,
    PromptTooLong,
    QuotaExceeded,
    RemoteProtocolError,
    SessionLost,
)
from fedsea.model.projection import Projection
from fedsea.model.runner import SpanRunner
from fedsea.server.service import TrunkService
from fedsea.transport.memory import MemoryChannel
from fedsea.wire.codecs import Codec, RowFormat
from fedsea.wire.description import decode_description
from fedsea.wire.limits import LARGEST_MESSAGE, Limits
from fedsea.wire.messages import (
    Append,
    Begin,
    Drop,
    NoticeKind,
    Segment,
    Want,
)


def run(dialogue, seconds=30):
    """Run a dialogue; a hang is a failure."""
    return asyncio.run(asyncio.wait_for(dialogue, seconds))


def test_describe(serving, fingerprint):
    """A client learns what it needs to know before it opens a session."""

    async def dialogue():
        async with serving(server={"span": "1:3"}, kv={"rows": 256}) as service:
            return decode_description(await MemoryChannel(service).describe())

    about = run(dialogue())

    assert (about.family, about.hidden_size, about.num_blocks) == ("llama", 32, 4)
    assert (about.first_block, about.end_block, about.fingerprint) == (1, 3, fingerprint)
    assert (about.max_context, about.page_rows, about.dtype) == (256, 8, "fp32")
    assert set(about.codecs) == set(Codec)


@pytest.mark.parametrize(
    ("tables", "expected"),
    [
        ({}, 8 * 2**20),
        ({"kv": {"rows": 2**17, "max_context": 2**17}}, 8 * 2**20),
        ({"limits": {"max_message_bytes": 1000}}, 1000),
        ({"training": True}, 8 * 2**20),
        ({"training": True, "limits": {"max_message_bytes": 1000}}, 1000),
        (
            {"training": True, "limits": {"max_rows_per_message": 2**17}},
            2**17 * 32 * 4 + Limits().frame_bytes,
        ),
        (
            {"training": True, "limits": {"max_rows_per_message": 2**22}},
            LARGEST_MESSAGE,
        ),
    ],
)
def test_messages_of_a_server_that_trains_hold_whole_sequences(serving, tmp_path, tables, expected):
    """Unless the configuration says how large they are, and never beyond the largest of all."""
    tables = dict(tables)
    if tables.pop("training", False):
        tables["training"] = {"folder": str(tmp_path)}
        tables["kv"] = {"rows": 2**22, "max_context": 2**22}

    async def dialogue():
        async with serving(**tables) as service:
            assert service.limits.max_message_bytes == expected
            return decode_description(await MemoryChannel(service).describe())

    assert run(dialogue()).max_message_bytes == expected


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"fingerprint": "f" * 64}, FingerprintMismatch, "tiny-llama.*ffffffffffff.*same files"),
        ({"span": (0, 4)}, PartitionError, "0:4.*serves 1:4"),
        ({"span": (3, 9)}, PartitionError, "3:9"),
        ({"adapter": "clinic"}, PermissionDenied, "no adapter of that name"),
        ({"rows": 10_000}, Capacity, "2048 rows"),
    ],
)
def test_a_session_that_cannot_be(serving, connect, fingerprint, options, error, message):
    """Each wrong Open is refused with the reason and the fix."""
    options = {"span": (1, 4), "fingerprint": fingerprint, **options}

    async def dialogue():
        async with serving(server={"span": "1:4"}) as service:
            with pytest.raises(error, match=message):
                await connect(service, **options)

    run(dialogue())


@pytest.fixture
def projection(fingerprint, tmp_path):
    """A pair for rows that enter block 1; the server's half is in decoder.safetensors."""
    pair = Projection.of(torch.eye(8, 32), torch.eye(32, 8), 1, fingerprint)
    pair.for_server().save(tmp_path / "decoder.safetensors")
    return pair


@pytest.mark.parametrize(
    ("width", "first", "name", "message"),
    [
        (8, 1, "e" * 64, "eeeeeeeeeeee is not served here"),
        (7, 1, None, "rows of 8 numbers.*rows of 7"),
        (8, 2, None, "block 1, and.*block 2"),
    ],
)
def test_a_projection_that_does_not_fit(
    serving, connect, projection, tmp_path, width, first, name, message
):
    """An unknown projection, another width and another cut are refused when the session opens."""
    file = tmp_path / "decoder.safetensors"

    async def dialogue():
        async with serving(model={"projections": [str(file)]}) as service:
            about = decode_description(await MemoryChannel(service).describe())
            assert about.projections == (projection.fingerprint(),)
            with pytest.raises(ConfigError, match=message):
                await connect(
                    service,
                    up=RowFormat(Codec.FP32, width),
                    span=(first, 4),
                    projection=name or projection.fingerprint(),
                )

    run(dialogue())


@pytest.mark.parametrize("change", ["model", "hidden", "span", "half", "missing"])
def test_a_projection_that_cannot_be_served(make_config, fingerprint, tmp_path, change):
    """The server does not start with a file for something else, or without a decoder."""
    hidden = 16 if change == "hidden" else 32
    model = "a" * 64 if change == "model" else fingerprint
    pair = Projection.of(torch.eye(8, hidden), torch.eye(hidden, 8), 1, model)
    file = tmp_path / "pair.safetensors"
    if change != "missing":
        (pair.for_client() if change == "half" else pair).save(file)
    server = {"span": "2:4"} if change == "span" else {}
    with pytest.raises(ModelError if change in ("model", "missing") else ConfigError):
        TrunkService.load(make_config(server=server, model={"projections": [str(file)]}))


def test_a_full_pool_says_when_to_retry(serving, connect):
    """Capacity carries retry_after, and the rows of a closed session can be had again."""

    async def dialogue():
        async with serving(kv={"rows": 512}) as service:
            first = await connect(service, rows=400)
            with pytest.raises(Capacity) as refusal:
                await connect(service, rows=200)
            assert refusal.value.retry_after
            await first.close()
            await (await connect(service, rows=512)).close()

    run(dialogue())


def test_a_full_session_table(serving, connect):
    """Beyond max_sessions of all tenants the answer is Capacity."""

    async def dialogue():
        async with serving(server={"max_sessions": 2}) as service:
            clients = [await connect(service, tenant=name) for name in "ab"]
            with pytest.raises(Capacity, match="2 sessions"):
                await connect(service, tenant="c")
            for client in clients:
                await client.close()

    run(dialogue())


def test_quotas_are_per_tenant(serving, connect):
    """A tenant over its sessions or KV rows is refused, another one is not."""

    async def dialogue():
        quotas = {"sessions": 2, "kv_rows": 300, "tenants": {"big": {"kv_rows": 1000}}}
        async with serving(quotas=quotas) as service:
            first = await connect(service, tenant="a", rows=200)
            with pytest.raises(QuotaExceeded, match="KV rows") as refusal:
                await connect(service, tenant="a", rows=200)
            assert refusal.value.retry_after
            second = await connect(service, tenant="a", rows=50)
            with pytest.raises(QuotaExceeded, match="sessions"):
                await connect(service, tenant="a", rows=0)
            third = await connect(service, tenant="big", rows=1000)
            for client in (first, second, third):
                await client.close()

    run(dialogue())


def test_rows_per_second_delays_and_refuses_nothing(serving, connect, rows):
    """A tenant over its rate gets all its rows, late; the time is what the rate asks for."""

    async def dialogue():
        async with serving(quotas={"rows_per_second": 100.0}) as service:
            client = await connect(service)
            await client.begin()
            began = asyncio.get_running_loop().time()
            for number in range(3):
                assert len(await client.run(rows(50, number))) == 50
            took = asyncio.get_running_loop().time() - began
            await client.close()
            return took

    assert 0.45 < run(dialogue()) < 5


def test_a_sequence_longer_than_the_context(serving, connect):
    """A capacity beyond max_context ends the session with PromptTooLong, naming both numbers."""

    async def dialogue():
        async with serving(kv={"max_context": 128}) as service:
            client = await connect(service)
            await client.begin(capacity=129)
            with pytest.raises(PromptTooLong, match=r"129 rows.*holds 128"):
                await client.receive()

    run(dialogue())


def test_more_rows_than_reserved(serving, connect, rows):
    """An Append beyond the reservation ends its own session before anything is computed."""

    async def dialogue():
        async with serving() as service:
            client = await connect(service, rows=16)
            other = await connect(service)
            await other.begin()
            await client.begin(capacity=64)
            await client.push(rows(17))
            with pytest.raises(QuotaExceeded, match=r"reserved 16 rows.*larger reservation"):
                await client.receive()
            assert len(await other.run(rows(1))) == 1
            await other.close()

    run(dialogue())


def test_rows_that_are_not_finite(serving, connect, rows):
    """NaN on the wire ends the session that sent it; those computed beside it go on."""

    async def dialogue():
        async with serving() as service:
            bad, good = await connect(service), await connect(service)
            for client in (bad, good):
                await client.begin()
            poison = torch.full((1, 32), math.nan).numpy().tobytes()
            await bad.send(Append(1, (Segment(0, 0, 1, Want.ALL),), poison))
            await good.push(rows(1))
            with pytest.raises(RemoteProtocolError, match="not finite"):
                await bad.receive()
            assert len(await good.pull()) == 1
            await good.close()

    run(dialogue())


def test_rows_that_do_not_fit_the_down_codec(serving, connect, rows):
    """A result too large for fp16 ends that session with the advice to use another codec."""

    async def dialogue():
        async with serving() as service:
            small = await connect(service, down=Codec.FP16)
            wide = await connect(service)
            for client in (small, wide):
                await client.begin()
                await client.push(rows(1) * 1e6)
            with pytest.raises(ConfigError, match="codec bf16 or fp32"):
                await small.receive()
            assert torch.isfinite(await wide.pull()).all()
            await wide.close()

    run(dialogue())


def test_a_broken_rule_ends_the_session(serving, connect, rows):
    """A message that the protocol does not allow is answered with RemoteProtocolError."""

    async def dialogue():
        async with serving() as service:
            client = await connect(service)
            await client.stream.send(b"\xff\xff")
            with pytest.raises(RemoteProtocolError):
                await client.receive()

    run(dialogue())


def test_a_stream_that_says_nothing(serving):
    """A stream without an Open ends after open_timeout_s."""

    async def dialogue():
        async with serving(server={"open_timeout_s": 0.05}) as service:
            stream = await MemoryChannel(service).open_stream()
            with pytest.raises(DeadlineExceeded, match="send Open"):
                await stream.receive()

    run(dialogue())


def test_a_stream_that_leaves_at_once(serving):
    """A stream that ends before its Open is no error."""

    async def dialogue():
        async with serving() as service:
            stream = await MemoryChannel(service).open_stream()
            await stream.half_close()
            return await stream.receive()

    assert run(dialogue()) is None


def test_idle_sessions_are_evicted(serving, connect, rows):
    """A silent session ends with SessionLost and its rows are free; a busy one stays."""

    async def dialogue():
        async with serving(server={"idle_timeout_s": 0.2}, kv={"rows": 512}) as service:
            silent, busy = await connect(service, rows=256), await connect(service, rows=256)
            await busy.begin()

            async def work():
                for _ in range(12):
                    await busy.run(rows(1))
                    await asyncio.sleep(0.04)

            working = asyncio.create_task(work())
            with pytest.raises(SessionLost, match=r"idle for 0\.2 s"):
                await silent.receive()
            await (await connect(service, rows=256)).close()
            await working
            await busy.close()

    run(dialogue())


def test_a_vanished_client_frees_its_rows(serving, connect, rows):
    """A connection that breaks in the middle of a prompt gives everything back."""

    async def dialogue():
        async with serving(kv={"rows": 512}, scheduler={"max_step_rows": 16}) as service:
            client = await connect(service, rows=512)
            await client.begin(capacity=512)
            await client.push(rows(500))
            await client.stream.cancel()
            await (await connect(service, rows=512)).close()

    run(dialogue())


def test_close_waits_for_the_last_output(serving, connect, rows):
    """Close right after an Append still gets the Output, then a clean end."""

    async def dialogue():
        async with serving(scheduler={"max_step_rows": 16}) as service:
            client = await connect(service)
            await client.begin()
            await client.push(rows(100))
            await client.stream.half_close()
            assert len(await client.pull()) == 100
            assert await client.receive() is None

    run(dialogue())


def test_draining(serving, connect, rows):
    """Open sessions are told and go on; new ones are refused with Draining."""

    async def dialogue():
        async with serving() as service:
            client = await connect(service)
            await client.begin()
            service.drain()
            with pytest.raises(Draining) as refusal:
                await connect(service)
            assert refusal.value.retry_after
            assert len(await client.run(rows(3))) == 3
            assert [notice.kind for notice in client.notices] == [NoticeKind.DRAINING]
            await client.close()

    run(dialogue())


def test_stopping_ends_open_sessions(serving, connect):
    """When the service stops, its sessions end with SessionLost and hang nowhere."""

    async def dialogue():
        async with serving() as service:
            client = await connect(service)
        with pytest.raises((SessionLost, ConnectionLost)):
            await client.receive()

    run(dialogue())


def test_a_failing_step_ends_only_its_sessions(serving, connect, rows, monkeypatch):
    """An error of the backend is internal to the client, and the engine lives on."""

    async def dialogue():
        async with serving() as service:
            runner = service.trunk.runner
            original = runner.run

            def fail_once(*arguments):
                monkeypatch.setattr(runner, "run", original)
                raise RuntimeError("out of memory: tensor([0.1, 0.2])")

            victim, other = await connect(service), await connect(service)
            for client in (victim, other):
                await client.begin()
            monkeypatch.setattr(runner, "run", fail_once)
            await victim.push(rows(1))
            with pytest.raises(FedseaError, match="failed to compute") as failure:
                await victim.receive()
            assert "tensor" not in str(failure.value)
            assert len(await other.run(rows(1))) == 1
            await other.close()

    run(dialogue())


def test_an_engine_that_stops_ends_everything(make_config, connect, monkeypatch):
    """When the bookkeeping is broken nobody hangs: sessions end and new ones are refused."""

    async def dialogue():
        async with TrunkService.load(make_config()) as service:
            client = await connect(service)
            monkeypatch.setattr(service.engine._scheduler, "schedule", None)
            await client.begin()
            with pytest.raises(FedseaError, match="stopped computing"):
                await client.receive()
            await service.engine.stopped.wait()
            with pytest.raises(FedseaError, match="stopped computing"):
                await connect(service)

    run(dialogue())


def test_blocks_that_cannot_run_are_found_at_the_start(make_config, monkeypatch):
    """The first step runs before anybody is served; its failure names what to change."""

    def refuse(*arguments):
        raise RuntimeError("not implemented for Half")

    monkeypatch.setattr(SpanRunner, "run", refuse)

    async def dialogue():
        with pytest.raises(ConfigError, match=r"RuntimeError.*another dtype"):
            async with TrunkService.load(make_config()):
                pass

    run(dialogue())


def test_a_slow_reader_blocks_only_itself(serving, connect, rows):
    """A client that sends and never reads is not read any more; others go on."""

    async def dialogue():
        async with serving() as service:
            slow = await connect(service, limits=Limits(max_pending=1000))
            quick = await connect(service)
            await slow.begin()
            await quick.begin()
            for number in range(250):
                sending = asyncio.create_task(slow.push(rows(1, number)))
                # By the time that this answer is here, the engine has computed the other one, too.
                assert len(await quick.run(rows(1, number))) == 1
                if not sending.done():
                    break
            assert not sending.done()
            sending.cancel()
            await quick.close()
            await slow.stream.cancel()

    run(dialogue())


def test_200_sessions_on_a_small_pool(serving, connect, rows):
    """Most are refused at first; with retries all of them get their rows, and nothing is left."""
    waits: list[float] = []

    async def one(service, number):
        while True:
            try:
                client = await connect(service, tenant=f"t{number % 7}", rows=32)
                break
            except Capacity as refusal:
                waits.append(refusal.retry_after or 0.0)
                await asyncio.sleep(0.02)
        await client.begin(capacity=32)
        first = await client.run(rows(20, number))
        second = await client.run(rows(1, number))
        await client.close()
        return len(first) + len(second)

    async def dialogue():
        async with serving(kv={"rows": 512}) as service:
            return await asyncio.gather(*(one(service, number) for number in range(200)))

    assert run(dialogue()) == [21] * 200
    assert waits
    assert all(wait > 0 for wait in waits)


def test_metrics_hold_counts_only(serving, connect, rows):
    """Rows, steps and refusals are counted by tenant and code."""

    async def dialogue():
        async with serving() as service:
            client = await connect(service, tenant="acme")
            await client.begin()
            await client.run(rows(5))
            await client.close()
            with pytest.raises(Capacity):
                await connect(service, rows=10_000)
            return service.metrics.registry

    value = run(dialogue()).get_sample_value

    assert value("fedsea_rows_total", {"tenant": "acme"}) == 5
    assert value("fedsea_ended_total", {"code": "capacity"}) == 1
    assert value("fedsea_sessions_opened_total", {"tenant": "acme"}) == 1
    assert value("fedsea_kv_rows_unreserved") == 2048


def test_begin_flood_is_bounded(serving, connect):
    """Events that need no answer are applied as fast as they come and never pile up."""

    async def dialogue():
        async with serving() as service:
            client = await connect(service)
            for number in range(3000):
                await client.send(Begin(number, 8))
                await client.send(Drop(number))
            await client.close()

    run(dialogue())
