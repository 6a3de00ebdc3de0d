"""What must hold for the gRPC runtime before it is imported.

TLS 1.3 only: gRPC for Python has no option for the lowest TLS version. It does read the TLS 1.2
cipher list from `GRPC_SSL_CIPHER_SUITES`; TLS 1.3 suites are not configurable and always on. A list
that holds nothing but a pre-shared-key suite leaves TLS 1.2 without a usable cipher, because no
pre-shared keys are configured: every TLS 1.2 handshake fails and TLS 1.3 is untouched. An empty
list or one with TLS 1.3 names is rejected by the library.

gRPC reads the variable once, while it is imported. When another package imported gRPC earlier in
this process the setting comes too late. Servers therefore try a TLS 1.2 handshake against
themselves before they serve, and channels of such a process try one against their server
(`fedsea.transport.handshake`): the rule is checked, not assumed.
"""

from __future__ import annotations

import asyncio
import os
import sys

CIPHER_VARIABLE = "GRPC_SSL_CIPHER_SUITES"
NO_TLS12_CIPHERS = "ECDHE-PSK-AES256-CBC-SHA"

SETTLE_SECONDS = 0.01

_state = {"enforced": False}


def configure_grpc() -> None:
    """Set gRPC's environment for this process; has no effect once gRPC is imported.

    Also quiets the C core, which prints failed handshakes to stderr for anybody who knocks; an
    operator who wants that output sets `GRPC_VERBOSITY`.
    """
    already_set = os.environ.get(CIPHER_VARIABLE) == NO_TLS12_CIPHERS
    _state["enforced"] = already_set or "grpc" not in sys.modules
    os.environ[CIPHER_VARIABLE] = NO_TLS12_CIPHERS
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")


def tls13_enforced() -> bool:
    """Whether gRPC saw the setting when it was imported, so that this process refuses TLS 1.2."""
    return _state["enforced"]


async def settle() -> None:
    """Wait for the last events of what was just closed.

    All event loops of a process share one poller of gRPC, which delivers these events a moment
    after `close` returns. A loop that is itself closed before that makes the poller fail in
    another loop.
    """
    await asyncio.sleep(SETTLE_SECONDS)
