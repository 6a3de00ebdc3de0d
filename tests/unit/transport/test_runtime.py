"""The gRPC settings of this process."""

from __future__ import annotations

import os

from fedsea.transport.runtime import CIPHER_VARIABLE, NO_TLS12_CIPHERS, tls13_enforced


def test_importing_the_transport_configures_grpc():
    """The cipher list is set for this process and its children, before gRPC read it."""
    assert os.environ[CIPHER_VARIABLE] == NO_TLS12_CIPHERS
    assert tls13_enforced()
