"""A tiny random Llama on disk, and servers of it in this process."""

from __future__ import annotations

from contextlib import asynccontextmanager

import pytest
from tests.trunk_client import Client, random_rows, save_tiny_llama

from fedsea.model.checkpoint import Checkpoint
from fedsea.server.config import ServerConfig
from fedsea.server.service import TrunkService
from fedsea.transport.base import Peer
from fedsea.transport.memory import MemoryChannel


@pytest.fixture(scope="session")
def checkpoint_folder(tmp_path_factory):
    """A saved Llama with random weights."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    save_tiny_llama(folder)
    return folder


@pytest.fixture(scope="session")
def fingerprint(checkpoint_folder):
    """The fingerprint that a client of the tiny model shows."""
    return Checkpoint.open(checkpoint_folder).fingerprint()


@pytest.fixture
def make_config(checkpoint_folder):
    """Build a configuration of the tiny model from section tables."""

    def make(**sections):
        table: dict[str, dict[str, object]] = {
            "server": {"model": str(checkpoint_folder), "address": "127.0.0.1:0"},
            "kv": {"rows": 2048, "page_rows": 8},
            "security": {"plaintext": True},
        }
        for name, keys in sections.items():
            table.setdefault(name, {}).update(keys)
        return ServerConfig.from_table(table)

    return make


@pytest.fixture
def serving(make_config):
    """An async context manager that runs a service, and checks afterwards that nothing leaked."""

    @asynccontextmanager
    async def serve(**sections):
        async with TrunkService.load(make_config(**sections)) as service:
            yield service
        pool = service.trunk.runner.pool
        pool.check_integrity()
        assert pool.num_accounts == 0

    return serve


@pytest.fixture
def connect(fingerprint):
    """Open a session of a tenant on a service over the memory transport."""

    async def open_client(service, tenant="local", fingerprint=fingerprint, **options):
        channel = MemoryChannel(service, Peer(tenant, "memory"))
        return await Client.open(channel, fingerprint, **options)

    return open_client


@pytest.fixture
def rows():
    """Random rows by count and seed."""
    return random_rows
