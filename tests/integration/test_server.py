"""A server over real gRPC, in this process and in its own: TLS, refusals, drain, slow and lost clients."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import urllib.request

import pytest
import torch
from tests.trunk_client import Client, random_rows, save_tiny_llama

from fedsea.errors import (
    BindError,
    Capacity,
    ConfigError,
    ConnectionLost,
    Draining,
    QuotaExceeded,
    SessionLost,
)
from fedsea.model.checkpoint import Checkpoint
from fedsea.server.app import running
from fedsea.server.config import ServerConfig
from fedsea.transport.certificates import init_ca, issue_client, issue_server
from fedsea.transport.credentials import Plaintext
from fedsea.transport.grpc_client import GrpcChannel
from fedsea.transport.grpc_server import GrpcServer, ServerOptions
from fedsea.wire.codecs import Codec
from fedsea.wire.description import decode_description
from fedsea.wire.limits import Limits
from fedsea.wire.messages import NoticeKind, Rollback

INSECURE = Plaintext(allow_insecure=True)

SERVE = """
import json, sys
from fedsea.server.app import serve
from fedsea.server.config import ServerConfig
sys.exit(serve(ServerConfig.from_table(json.loads(sys.argv[1]))))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama on disk."""
    path = tmp_path_factory.mktemp("models") / "tiny-llama"
    save_tiny_llama(path)
    return path


@pytest.fixture(scope="module")
def fingerprint(folder):
    """The fingerprint of the tiny Llama."""
    return Checkpoint.open(folder).fingerprint()


@pytest.fixture
def table(folder):
    """Build section tables for a plaintext server of the tiny model."""

    def make(**sections):
        made: dict[str, dict[str, object]] = {
            "server": {"model": str(folder), "address": "127.0.0.1:0"},
            "kv": {"rows": 2048, "page_rows": 8},
            "security": {"plaintext": True},
        }
        for name, keys in sections.items():
            made.setdefault(name, {}).update(keys)
        return made

    return make


def run(dialogue, seconds=60):
    """Run a dialogue; a hang is a failure."""
    return asyncio.run(asyncio.wait_for(dialogue, seconds))


def test_sessions_over_mutual_tls(folder, fingerprint, table, tmp_path):
    """Two tenants with certificates of their own generate at the same time; quotas go by tenant."""
    init_ca(tmp_path)
    server = issue_server(tmp_path, ["127.0.0.1"])
    security = {"ca": server.ca, "certificate": server.certificate, "key": server.key}
    sections = table(quotas={"sessions": 1})
    sections["security"] = security
    tenants = [issue_client(tmp_path, name) for name in ("acme", "zeta")]

    async def one(address, tenant, seed):
        async with GrpcChannel(str(address), tenant) as channel:
            client = await Client.open(channel, fingerprint)
            with pytest.raises(QuotaExceeded, match="its quota"):
                await Client.open(channel, fingerprint)
            await client.begin()
            parts = [await client.run(random_rows(20, seed))]
            parts += [await client.run(random_rows(1, seed + i)) for i in range(5)]
            await client.close()
            return torch.cat(parts)

    async def dialogue():
        async with running(ServerConfig.from_table(sections)) as server:
            both = await asyncio.gather(
                *(one(server.address, tenant, seed=100 * n) for n, tenant in enumerate(tenants))
            )
            alone = [await one(server.address, tenant, 100 * n) for n, tenant in enumerate(tenants)]
            return both, alone

    for together, alone in zip(*run(dialogue()), strict=True):
        assert together.numpy() == pytest.approx(alone.numpy(), abs=1e-5)


def test_refusals_keep_their_class_and_their_time(table, fingerprint):
    """Over gRPC a refusal is what the server raised, with the time to retry after."""

    async def dialogue():
        config = ServerConfig.from_table(table(kv={"rows": 256}))
        async with running(config) as server, GrpcChannel(str(server.address), INSECURE) as channel:
            about = decode_description(await channel.describe())
            first = await Client.open(channel, about.fingerprint, rows=256)
            with pytest.raises(Capacity, match="KV pool") as refusal:
                await Client.open(channel, fingerprint, rows=8)
            await first.close()
            await (await Client.open(channel, fingerprint, rows=256)).close()
            return refusal.value.retry_after

    assert run(dialogue()) == pytest.approx(1.0)


def test_a_lost_client_frees_its_rows(table, fingerprint):
    """A cancelled call in the middle of a prompt and a closed channel give all rows back."""

    async def dialogue():
        config = ServerConfig.from_table(
            table(kv={"rows": 512}, scheduler={"max_step_rows": 16, "small_append_rows": 4})
        )
        async with running(config) as server:
            for leave in ("cancel", "close"):
                async with GrpcChannel(str(server.address), INSECURE) as channel:
                    client = await Client.open(channel, fingerprint, rows=512)
                    await client.begin(capacity=512)
                    await client.push(random_rows(500))
                    if leave == "cancel":
                        await client.stream.cancel()
            async with GrpcChannel(str(server.address), INSECURE) as channel:
                await retried(channel, fingerprint, rows=512)
        pool = server.service.trunk.runner.pool
        pool.check_integrity()
        return pool.num_accounts

    assert run(dialogue()) == 0


async def retried(channel, fingerprint, **options):
    """Open and close a session, trying again while the server says it is full."""
    while True:
        try:
            client = await Client.open(channel, fingerprint, **options)
        except Capacity:
            await asyncio.sleep(0.01)
        else:
            return await client.close()


def test_idle_eviction(table, fingerprint):
    """A silent session ends with SessionLost over gRPC, too."""

    async def dialogue():
        config = ServerConfig.from_table(table(server={"idle_timeout_s": 0.2}))
        async with running(config) as server, GrpcChannel(str(server.address), INSECURE) as channel:
            client = await Client.open(channel, fingerprint)
            with pytest.raises(SessionLost, match="idle"):
                await client.receive()

    run(dialogue())


def test_a_client_that_never_reads_is_ended(table, fingerprint):
    """When its buffers are full for longer than the deadline its session ends; others go on."""

    async def push(slow):
        await slow.push(random_rows(16))
        await slow.send(Rollback(0, 0))

    async def dialogue():
        config = ServerConfig.from_table(table(limits={"max_pending": 64}))
        async with running(config) as server:
            options = ServerOptions(send_timeout=0.3)
            impatient = GrpcServer(server.service, "127.0.0.1:0", INSECURE, options=options)
            address = await impatient.start()
            async with (
                GrpcChannel(str(address), INSECURE) as channel,
                GrpcChannel(str(server.address), INSECURE) as other,
            ):
                slow = await Client.open(channel, fingerprint, limits=Limits(max_pending=10**6))
                quick = await Client.open(other, fingerprint)
                await slow.begin()
                await quick.begin()
                # Its own writes wait, too, once the server reads no more, so it learns nothing.
                pushing = asyncio.create_task(push(slow))
                while server.service.num_sessions == 2:
                    await quick.run(random_rows(1))
                    await quick.send(Rollback(0, 0))
                    if pushing.done():
                        pushing = asyncio.create_task(push(slow))
                pushing.cancel()
                assert server.service.metrics.registry.get_sample_value(
                    "fedsea_ended_total", {"code": "deadline_exceeded"}
                )
                await slow.stream.cancel()
                await quick.close()
            await impatient.stop()

    run(dialogue())


def test_drain_lets_sessions_finish(table, fingerprint):
    """While draining, a running session is told and served, a new one is refused."""

    async def dialogue():
        config = ServerConfig.from_table(table())
        async with running(config) as server, GrpcChannel(str(server.address), INSECURE) as channel:
            client = await Client.open(channel, fingerprint)
            await client.begin()
            draining = asyncio.create_task(server.drain(20))
            assert len(await client.run(random_rows(3))) == 3
            while not client.notices:
                await client.run(random_rows(1))
            with pytest.raises(Draining):
                await Client.open(channel, fingerprint)
            assert not draining.done()
            await client.close()
            await draining
            return client.notices[0].kind

    assert run(dialogue()) is NoticeKind.DRAINING


def test_drain_ends_what_does_not_finish(table, fingerprint):
    """After the grace a session that is still open ends with Draining."""

    async def dialogue():
        config = ServerConfig.from_table(table())
        async with running(config) as server, GrpcChannel(str(server.address), INSECURE) as channel:
            client = await Client.open(channel, fingerprint)
            await server.drain(0.1)
            with pytest.raises(Draining):
                await client.receive()

    run(dialogue())


def test_200_sessions_over_grpc(table, fingerprint):
    """On a pool for 16 of them, 200 sessions of int8 rows are all served in the end."""

    async def one(channel, number):
        while True:
            try:
                client = await Client.open(
                    channel, fingerprint, rows=32, up=Codec.INT8, down=Codec.INT8
                )
                break
            except Capacity as refusal:
                await asyncio.sleep(min(0.05, refusal.retry_after or 0.0))
        await client.begin(capacity=32)
        count = len(await client.run(random_rows(20, number)))
        count += len(await client.run(random_rows(1, number)))
        await client.close()
        return count

    async def dialogue():
        config = ServerConfig.from_table(table(kv={"rows": 512}))
        async with running(config) as server, GrpcChannel(str(server.address), INSECURE) as channel:
            counts = await asyncio.gather(*(one(channel, number) for number in range(200)))
        pool = server.service.trunk.runner.pool
        pool.check_integrity()
        return counts, pool.num_accounts

    assert run(dialogue()) == ([21] * 200, 0)


def test_metrics_over_http(table, fingerprint):
    """Prometheus reads numbers on loopback; an address for everybody is refused."""

    async def dialogue():
        config = ServerConfig.from_table(table(metrics={"address": "127.0.0.1:0"}))
        async with running(config) as server, GrpcChannel(str(server.address), INSECURE) as channel:
            await (await Client.open(channel, fingerprint)).close()
            url = f"http://{server.metrics_address}/metrics"
            return await asyncio.to_thread(lambda: urllib.request.urlopen(url).read().decode())

    text = run(dialogue())

    assert 'fedsea_sessions_opened_total{tenant="local"} 1.0' in text

    async def exposed():
        async with running(ServerConfig.from_table(table(metrics={"address": "0.0.0.0:0"}))):
            pass

    with pytest.raises(ConfigError, match="no access control"):
        run(exposed())


@pytest.mark.parametrize(
    ("sections", "error", "message"),
    [
        ({"security": {"plaintext": False}}, ConfigError, "fedsea certs init"),
        ({"server": {"address": "0.0.0.0:0"}}, ConfigError, "loopback only"),
        ({"server": {"address": "nowhere"}}, ConfigError, "not an address"),
        ({"security": {"tokens": "missing.json"}}, ConfigError, "does not exist"),
    ],
)
def test_settings_that_cannot_work(table, sections, error, message):
    """What cannot be served is refused at the start with the fix."""

    async def dialogue():
        async with running(ServerConfig.from_table(table(**sections))):
            pass

    with pytest.raises(error, match=message):
        run(dialogue())


def test_a_port_in_use(table):
    """A second server on the same port says so."""

    async def dialogue():
        async with running(ServerConfig.from_table(table())) as server:
            again = ServerConfig.from_table(table(server={"address": str(server.address)}))
            with pytest.raises(BindError, match="in use"):
                async with running(again):
                    pass

    run(dialogue())


def start(table, **popen):
    """Start a server process and wait for its ready line."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, json.dumps(table)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        **popen,
    )
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def test_a_server_process_from_start_to_drain(table, fingerprint):
    """One ready line, service, a drain on SIGTERM that lets the session finish, exit code 0."""
    process, line = start(table(log={"format": "json"}))
    assert line.startswith("serving blocks 0:4 of tiny-llama (fp32, ")
    address = line.split()[-1]

    async def dialogue():
        async with GrpcChannel(address, INSECURE) as channel:
            client = await Client.open(channel, fingerprint)
            await client.begin()
            await client.run(random_rows(5))
            process.send_signal(signal.SIGTERM)
            while not client.notices:
                await client.run(random_rows(1))
            await client.close()

    try:
        run(dialogue())
        _, log = process.communicate(timeout=20)
    finally:
        process.kill()

    events = [json.loads(entry) for entry in log.splitlines()]
    assert process.returncode == 0
    assert [entry["event"] for entry in events] == [
        "session_opened", "draining", "session_closed", "stopped",
    ]  # fmt: skip
    assert {key for entry in events for key in entry} == {
        "event", "level", "timestamp", "tenant", "session", "span", "reserved", "sessions",
    }  # fmt: skip


def test_a_second_signal_stops_at_once(table, fingerprint):
    """An open session holds a drain back only until the operator insists."""
    process, line = start(table(server={"drain_grace_s": 600.0}))
    address = line.split()[-1]

    async def dialogue():
        async with GrpcChannel(address, INSECURE) as channel:
            client = await Client.open(channel, fingerprint)
            await client.begin()
            process.send_signal(signal.SIGTERM)
            while not client.notices:
                await client.run(random_rows(1))
            process.send_signal(signal.SIGINT)
            with pytest.raises((ConnectionLost, Draining, SessionLost)):
                await client.receive()

    try:
        run(dialogue())
        process.communicate(timeout=20)
    finally:
        process.kill()

    assert process.returncode == 0
