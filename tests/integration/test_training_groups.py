"""Groups and vanishing clients at a server process over mutual TLS."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import textwrap
import time
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import torch
from tests.integration.conftest import tls_of
from tests.training_client import TrainingClient, some_rows

from fedsea.errors import FedseaError
from fedsea.model.checkpoint import Checkpoint
from fedsea.transport.grpc_client import GrpcChannel

HIDDEN = 48
TENANTS = ("acme", "globex")


def run(dialogue, seconds=100):
    """Run a dialogue; a hang is a failure."""
    return asyncio.run(asyncio.wait_for(dialogue, seconds))


@pytest.fixture
def start(start_server, tmp_path):
    """Start servers of one store, with a group of each kind."""
    config = tmp_path / "server.toml"
    lines = ["[training]", f'folder = "{tmp_path / "store"}"', "threads = 1"]
    for name in ("sequential", "client-batch", "server-hierarchical"):
        lines += [f"[training.groups.{name}]", f'strategy = "{name}"']
        lines += ['tenants = ["acme", "globex"]', "gather_s = 20.0", "average_every = 2"]
    config.write_text("\n".join(lines))
    return lambda: start_server("--config", str(config))


@pytest.fixture
def connected(tiny_model, certificates):
    """Channels of both tenants to a server, and a way to open trainings over them."""
    fingerprint = Checkpoint.open(tiny_model).fingerprint()

    @asynccontextmanager
    async def connect(server):
        channels = {
            tenant: GrpcChannel(server.address, tls_of(certificates, tenant)) for tenant in TENANTS
        }

        async def join(tenant, **options):
            options = {"adapter": "client-batch", "end_block": 4, **options}
            return await TrainingClient.over(
                channels[tenant], fingerprint, hidden=HIDDEN, **options
            )

        try:
            yield join
        finally:
            for channel in channels.values():
                await channel.close()

    return connect


def batch(number, place):
    """Rows of one member's step."""
    return some_rows(4 + 3 * place, 10 * number + place, HIDDEN)


async def steps(members, numbers):
    """All members' answers to some steps."""
    found = []
    for number in numbers:
        trained = (member.train(number, batch(number, i)) for i, member in enumerate(members))
        found.append([stepped for _, _, stepped in await asyncio.gather(*trained)])
    return found


@pytest.mark.parametrize("strategy", ["client-batch", "server-hierarchical"])
def test_a_group_survives_its_server(start, connected, strategy):
    """kill -9 behind a save: the members come back and their steps are the same."""

    async def first(server):
        async with connected(server) as join:
            members = [await join(tenant, adapter=strategy) for tenant in TENANTS]
            await steps(members, (1, 2))
            assert await asyncio.gather(*(member.save(2) for member in members)) == ["", ""]
            expected = await steps(members, (3, 4))
            server.kill()
            with pytest.raises(FedseaError):
                await members[0].receive()
            return expected

    async def second(server):
        async with connected(server) as join:
            members = [
                await join(tenant, adapter=strategy, resume_steps=(4, 2, 0)) for tenant in TENANTS
            ]
            assert [member.step for member in members] == [2, 2]
            found = await steps(members, (3, 4))
            for member in members:
                await member.close()
            return found

    assert run(first(start())) == run(second(start()))


def test_a_sequence_of_tenants(start, connected):
    """One after another over TLS, and what they made is served to both and to nobody else."""

    async def dialogue(server):
        async with connected(server) as join:
            for tenant in TENANTS:
                member = await join(tenant, adapter="sequential")
                assert member.step == 0
                await steps([member], (1, 2))
                assert await member.save(2) == ""
                _, hidden = await member.forward(batch(9, 0), no_grad=True)
                await member.close()
            member = await join("acme", adapter="sequential", resume_steps=(2,))
            _, again = await member.forward(batch(9, 0), no_grad=True)
            assert torch.equal(hidden, again)
            await member.close()

    run(dialogue(start()))


VANISHING = textwrap.dedent(
    """
    import asyncio, sys
    from tests.integration.conftest import tls_of
    from tests.training_client import TrainingClient, some_rows
    from fedsea.transport.grpc_client import GrpcChannel
    from pathlib import Path

    async def main(address, certificates, fingerprint):
        channel = GrpcChannel(address, tls_of(Path(certificates), "acme"))
        client = await TrainingClient.over(channel, fingerprint, hidden=48, end_block=4)
        await client.train(1, some_rows(5, hidden=48))
        await client.forward(some_rows(30, hidden=48))
        print("open", flush=True)
        await asyncio.sleep(100)

    asyncio.run(main(*sys.argv[1:]))
    """
)


def test_a_killed_client_holds_nothing(start, tiny_model, certificates, tmp_path):
    """kill -9 of a client between Forward and Backward frees its rows; its run stays for a while."""
    server = start()
    script = tmp_path / "vanishing.py"
    script.write_text(VANISHING)
    fingerprint = Checkpoint.open(tiny_model).fingerprint()
    command = [sys.executable, str(script), server.address, str(certificates), fingerprint]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=_environment()) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == "open\n"
        assert server.metric("fedsea_training_kept_rows") == 30
        client.kill()
        client.wait(10)
    deadline = time.monotonic() + 20
    while server.metric("fedsea_training_pending_rows") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert server.metric("fedsea_training_kept_rows") == 0
    assert server.metric("fedsea_training_pending_rows") == 0
    assert server.metric("fedsea_training_runs") == 1
    assert server.metric("fedsea_sessions ") == 0


def _environment():
    root = Path(__file__).resolve().parents[2]
    return {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'src'}", "OMP_NUM_THREADS": "1"}
