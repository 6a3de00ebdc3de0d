"""A whole federation on this machine: a trunk's server, the clients, and Flower without a network.

Aggregator and clients run the code that they run over a network, in one process; training rows go
over loopback TLS to a server of the trunk, with a certificate for each client.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Final

from fedsea.errors import ConfigError, TransportError
from fedsea.federated.client_app import client_app
from fedsea.federated.config import FederationConfig
from fedsea.federated.flower import end
from fedsea.federated.joining import ClientConfig, Joined
from fedsea.federated.memory import MemoryGrid, new_context
from fedsea.federated.requests import Requests
from fedsea.federated.rounds import Federation, RoundReport
from fedsea.transport.certificates import CA_CERTIFICATE, init_ca, issue_client, issue_server

_HOST: Final = "127.0.0.1"
_START_S: Final = 120.0


class TrunkProcess:
    """`fedsea serve` with training on, in a process of its own, until it is closed.

    Args:
        model: folder of a checkpoint, or a hub id.
        folder: certificates, what is trained, and the log go there.
        clients: names that get a certificate.

    Raises:
        TransportError: it did not start.

    Attributes:
        address: where it listens.
        certificates: folder of the certificates.
    """

    def __init__(self, model: str, folder: Path, clients: Sequence[str]) -> None:
        self.certificates = folder / "certificates"
        if not (self.certificates / CA_CERTIFICATE).exists():
            init_ca(self.certificates)
            issue_server(self.certificates, [_HOST])
        for client in clients:
            if not (self.certificates / f"client-{client}.pem").exists():
                issue_client(self.certificates, client)
        log = folder / "trunk.log"
        with log.open("ab") as opened:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "fedsea", "serve", model),
                    *("--address", f"{_HOST}:0", "--certs", str(self.certificates)),
                    *("--set", f"training.folder={folder / 'trained'}", "--kv-rows", "1024"),
                ],
                env={**os.environ, "HF_HUB_OFFLINE": "1"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=opened,
                text=True,
                start_new_session=True,
            )
        self.address = self._ready(log)

    def close(self) -> None:
        """End the process."""
        end([self._process])  # type: ignore[list-item]
        if self._process.stdout is not None:
            self._process.stdout.close()

    def _ready(self, log: Path) -> str:
        assert self._process.stdout is not None
        timer = threading.Timer(_START_S, self._process.kill)
        timer.start()
        line = self._process.stdout.readline()
        timer.cancel()
        if " at " not in line:
            self.close()
            raise TransportError(f"the server of the trunk did not start; see {log}")
        return line.rsplit(" at ", 1)[1].strip()


def simulate(
    config: FederationConfig,
    clients: Sequence[ClientConfig],
    report: Callable[[RoundReport], None],
    notice: Callable[[str], None],
) -> None:
    """Make all rounds of a federation whose clients are here.

    Args:
        config: of the federation.
        clients: of all of its clients; servers, addresses and certificates in them are not used.
        report: is told of every round.
        notice: is told in words of everything else.

    Raises:
        ConfigError: the settings of aggregator and clients do not fit together.
        FedseaError: with which a client or the federation ended.
    """
    names = tuple(client.client.name for client in clients)
    if sorted(names) != sorted(config.federation.clients):
        raise ConfigError(
            "federation.clients and the clients that were given differ; give a file for each"
        )
    models = {client.finetune.run.model for client in clients}
    if len(models) != 1:
        raise ConfigError("the clients have different models; give all of them the same")
    logging.getLogger("flwr").setLevel(logging.WARNING)
    folder = config.federation.folder
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        trunk = TrunkProcess(models.pop(), folder, names)
        stack.callback(trunk.close)
        apps = {}
        for node, client in enumerate(clients, start=1):
            here = with_trunk(client, trunk)
            joined = stack.enter_context(Joined(here, notice))
            terms = client.secure if client.secure.enabled else None
            apps[node] = client_app(Requests(joined.client), terms)
        Federation(MemoryGrid(apps), new_context(0), config, report, notice).run()


def with_trunk(client: ClientConfig, trunk: TrunkProcess) -> ClientConfig:
    """The same client, with the trunk of this machine and a certificate for it."""
    files, name = trunk.certificates, client.client.name
    section = replace(
        client.client,
        servers=(trunk.address,),
        ca=files / CA_CERTIFICATE,
        certificate=files / f"client-{name}.pem",
        key=files / f"client-{name}.key",
    )
    return replace(client, client=section)
