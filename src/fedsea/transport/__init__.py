"""Moves opaque bytes between client and server: gRPC or in memory, TLS 1.3, identities, deadlines.

gRPC reads its settings from the environment while it is imported, so the one call below runs
before any module of this package can import it; `fedsea.transport.runtime` says what and why.
"""

from fedsea.transport.runtime import configure_grpc

configure_grpc()
