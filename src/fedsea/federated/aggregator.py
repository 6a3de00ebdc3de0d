"""The aggregator on a network: Flower's SuperLink on loopback, the gate before it, and the rounds."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

from fedsea.federated.config import AggregatorConfig
from fedsea.federated.flower import Programs, free_port
from fedsea.federated.gate import LOOPBACK, Gate
from fedsea.federated.nodes import Nodes
from fedsea.federated.reports import Reports
from fedsea.federated.rounds import RoundReport
from fedsea.federated.server_app import NODES, REPORTS, SETTINGS
from fedsea.transport.address import Address, parse_address
from fedsea.transport.credentials import ServerTLS

_BEGIN_S: Final = 120.0


class Aggregator:
    """Listens for clients, and makes all rounds with them.

    Args:
        settings: path of the TOML file.

    Raises:
        ConfigError: the settings cannot be used.
        BindError: the address cannot be listened on.
        CertificateError: a certificate cannot be used.
        TransportError: Flower's SuperLink did not start.

    Attributes:
        address: where clients reach it.
    """

    def __init__(self, settings: Path) -> None:
        self.config = AggregatorConfig.load(settings)
        section = self.config.aggregator
        self._reports = Reports()
        folder = self.config.federation.folder.absolute() / "flower"
        nodes = folder / "nodes.json"
        variables = {
            SETTINGS: str(settings.absolute()),
            REPORTS: self._reports.path,
            NODES: str(nodes),
        }
        self._programs = Programs(folder, variables | _one_thread())
        self._link = free_port()
        self._gate: Gate | None = None
        try:
            self._gate = Gate(
                parse_address(section.address),
                ServerTLS(section.ca, section.certificate, section.key),
                self.config.federation.clients,
                self._link,
                Nodes(nodes),
            )
            self.address: Address = self._gate.address
            link = self._programs.start(
                "flower-superlink",
                *("--host", LOOPBACK, "--port", str(self._link), "--insecure"),
                *("--fleet-api-address", f"{LOOPBACK}:{free_port()}"),
                *("--control-api-address", f"{LOOPBACK}:{free_port()}"),
                "--disable-runtime-dependency-installation",
            )
            self._programs.wait_for(link, "flower-superlink", self._link)
        except BaseException:
            self.close()
            raise

    def run(self, report: Callable[[RoundReport], None], notice: Callable[[str], None]) -> None:
        """Make all rounds that are not made yet.

        Args:
            report: is told of every round.
            notice: is told in words of everything else.

        Raises:
            FedseaError: with which the federation ended.
            ConnectionLost: its process is gone; run it again to go on.
        """
        self._programs.submit(self._link)
        for line in self._reports.lines(_BEGIN_S):
            if isinstance(line, RoundReport):
                report(line)
            else:
                notice(line)

    def close(self) -> None:
        """End everything that was started."""
        if self._gate is not None:
            self._gate.close()
        self._programs.close()
        self._reports.close()


def _one_thread() -> dict[str, str]:
    """Flower's processes add up small arrays; they need no pool of threads each."""
    return {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
