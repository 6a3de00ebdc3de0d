"""A client on a network: the client process with its socket, a tunnel, and Flower's SuperNode."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Final

from fedsea.federated.channel import Listener
from fedsea.federated.client_app import SOCKET, TERMS
from fedsea.federated.config import SecureSection
from fedsea.federated.flower import Programs, free_port
from fedsea.federated.gate import LOOPBACK, Tunnel
from fedsea.federated.local import LocalClient
from fedsea.federated.requests import Requests
from fedsea.transport.address import Address
from fedsea.transport.credentials import ClientTLS

_POLL_S: Final = 0.5
_AGAIN_S: Final = 3.0
_LAST_S: Final = 15.0
# A node asks every few seconds while it is idle, and beats every half a minute while it is not.
_SILENT_S: Final = 120.0


class Participant:
    """Takes part in a federation until it ends or `close` is called.

    Args:
        client: computes.
        gate: address of the aggregator.
        tls: this client's certificate.
        secure: the least that it accepts; disabled, it takes part in rounds in clear only.
        folder: where Flower's state and logs go.
        on_round: is told the number of each round that was computed here, and the factor by which
            its update was scaled to the clip range.

    Raises:
        CertificateError: a certificate cannot be used.
    """

    def __init__(
        self,
        client: LocalClient,
        gate: Address,
        tls: ClientTLS,
        secure: SecureSection,
        folder: Path,
        on_round: Callable[[int, float], None],
    ) -> None:
        self._ended = threading.Event()
        self._stopped = threading.Event()
        requests = Requests(client, on_finish=lambda _: self._ended.set(), on_round=on_round)
        self._tunnel = Tunnel(gate, tls, self._ended)
        self._listener = Listener(requests)
        terms = json.dumps(asdict(secure)) if secure.enabled else ""
        self._programs = Programs(
            folder / "flower",
            {SOCKET: self._listener.path, TERMS: terms, "OMP_NUM_THREADS": "1"},
        )

    def run(self, notice: Callable[[str], None]) -> bool:
        """Take part; whether the federation came to its end.

        A SuperNode that ends or falls silent, because the aggregator went away, is started again.
        """
        while not self._stopped.is_set():
            node = self._programs.start(
                "flower-supernode",
                *("--superlink", str(self._tunnel.address), "--insecure"),
                *("--host", LOOPBACK, "--port", str(free_port())),
            )
            started = time.monotonic()
            while node.poll() is None and not self._stopped.is_set():
                if self._ended.wait(_POLL_S):
                    # The answer to the last request is on its way through the SuperNode.
                    self._tunnel.lost.wait(_LAST_S)
                    return True
                if time.monotonic() - max(started, self._tunnel.answered) > _SILENT_S:
                    break
            self._programs.close()
            if not self._stopped.wait(_AGAIN_S):
                notice("the connection to the aggregator ended; trying again")
        return self._ended.is_set()

    def stop(self) -> None:
        """Have `run` return."""
        self._stopped.set()

    def close(self) -> None:
        """End everything that was started."""
        self.stop()
        self._programs.close()
        self._listener.close()
        self._tunnel.close()
