"""The names under which the protocol is reached over gRPC."""

from __future__ import annotations

SERVICE = "fedsea.v1.Trunk"
DESCRIBE_METHOD = f"/{SERVICE}/Describe"
SESSION_METHOD = f"/{SERVICE}/Session"

ERROR_KEY = "fedsea-error"
"""Trailing metadata: the `code` of the error that ended a call."""

RETRY_AFTER_KEY = "retry-after-ms"
"""Trailing metadata: how long to wait before trying again; absent when waiting does not help."""
