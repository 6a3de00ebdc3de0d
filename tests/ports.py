"""Ports for servers that a test starts in a moment, or on which nobody may listen."""

from __future__ import annotations

import random
import socket

# Below those that systems give to outgoing connections and to servers that take any port: a port
# that was found free is not given to another test while its server starts.
_PORTS = range(20_000, 32_000)


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    while True:
        port = random.SystemRandom().choice(_PORTS)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
