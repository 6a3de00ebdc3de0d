"""Every error that fedsea raises on purpose.

    FedseaError
    +-- ConfigError                 an option, key or value that cannot be used
    +-- ModelError
    |   +-- CheckpointError         missing, unreadable or corrupt checkpoint files
    |   +-- UnsupportedModel        a family or layer kind that cannot be cut
    |   +-- PartitionError          bottom and top do not fit the model or the served span
    |   +-- FingerprintMismatch     client and server hold different checkpoints
    |   +-- OutOfMemory             the machine has too little memory for what was asked
    +-- RequestError                a prompt or sampling request that cannot be served
    |   +-- PromptTooLong
    +-- ProtocolError
    |   +-- LocalProtocolError      this side broke the rules of the protocol
    |   +-- RemoteProtocolError     the peer broke them
    +-- TransportError
    |   +-- Unreachable             nobody answers at any address
    |   +-- ConnectionLost          an open stream broke
    |   +-- DeadlineExceeded        the peer answered too late
    |   +-- BindError               the address cannot be listened on
    +-- SecurityError
    |   +-- CertificateError        missing, expired, foreign or unusable certificate
    |   +-- Unauthenticated         no valid identity was shown
    |   +-- PermissionDenied        the identity may not do this
    |   +-- AttestationError        the server did not prove what it runs
    +-- PrivacyError                rows may not leave as things are; nothing was sent
    |   +-- UnsafeRows              activations that no mechanism can protect: NaN or infinity
    |   +-- BudgetExceeded          the ledger has too little left for the release
    |   +-- LedgerError             the ledger is missing, corrupt or cannot be written
    +-- DataError                   a data set that cannot be read, or examples of another form
    +-- TrainingError               a training step that cannot be taken; nothing was applied
    |   +-- NotFinite               a loss or gradient is NaN or infinite
    |   +-- StaleStep               the two sides, or the members of a group, are at other steps
    +-- Refused                     the server said no for now; carries retry_after
        +-- Capacity                the KV pool or session table is full
        +-- QuotaExceeded           this tenant is over its quota
        +-- Draining                the server is shutting down
        +-- SessionLost             the server no longer knows the session (evicted or restarted)

A message is one line: what happened, then what to do. It never holds text, token ids, rows or keys.
`code` is stable and travels on the wire; `exit_code` is what the command line returns.
"""

from __future__ import annotations

from typing import ClassVar


class FedseaError(Exception):
    """Base of all errors raised by fedsea."""

    code: ClassVar[str] = "internal"
    exit_code: ClassVar[int] = 1


class ConfigError(FedseaError):
    """An option, a configuration key or a value that cannot be used."""

    code = "config"
    exit_code = 2


class ModelError(FedseaError):
    """The model cannot be used as asked."""

    code = "model"
    exit_code = 3


class CheckpointError(ModelError):
    """Checkpoint files are missing, unreadable or corrupt."""

    code = "checkpoint"


class UnsupportedModel(ModelError):
    """A family, or a kind of layer in it, that cannot be cut into spans."""

    code = "unsupported_model"


class PartitionError(ModelError):
    """Bottom and top do not fit the model, or the span is not served."""

    code = "partition"


class FingerprintMismatch(ModelError):
    """Client and server hold different checkpoints."""

    code = "fingerprint_mismatch"


class OutOfMemory(ModelError):
    """The machine has too little memory for what was asked."""

    code = "out_of_memory"


class RequestError(FedseaError):
    """A prompt or a sampling request that cannot be served."""

    code = "request"
    exit_code = 2


class PromptTooLong(RequestError):
    """Prompt and requested new tokens exceed what the model or server holds."""

    code = "prompt_too_long"


class ProtocolError(FedseaError):
    """The rules of the wire protocol were broken; raise one of the two subclasses."""

    code = "protocol"
    exit_code = 4


class LocalProtocolError(ProtocolError):
    """This side tried to break the protocol; nothing was sent."""

    code = "local_protocol"


class RemoteProtocolError(ProtocolError):
    """The peer sent something that the protocol does not allow."""

    code = "remote_protocol"


class TransportError(FedseaError):
    """Bytes could not be moved."""

    code = "transport"
    exit_code = 5


class Unreachable(TransportError):
    """Nobody answers at any of the addresses."""

    code = "unreachable"


class ConnectionLost(TransportError):
    """An open stream broke."""

    code = "connection_lost"


class DeadlineExceeded(TransportError):
    """The peer answered too late."""

    code = "deadline_exceeded"


class BindError(TransportError):
    """The address cannot be listened on."""

    code = "bind"


class SecurityError(FedseaError):
    """Identity or permission is missing."""

    code = "security"
    exit_code = 6


class CertificateError(SecurityError):
    """A certificate or key is missing, expired, foreign or unusable."""

    code = "certificate"


class Unauthenticated(SecurityError):
    """No valid identity was shown."""

    code = "unauthenticated"


class PermissionDenied(SecurityError):
    """The identity is known and may not do this."""

    code = "permission_denied"


class AttestationError(SecurityError):
    """The server did not prove, by a token that the client's verifier accepts, what it runs."""

    code = "attestation"


class PrivacyError(FedseaError):
    """Rows may not leave this machine as things are; nothing was sent."""

    code = "privacy"
    exit_code = 8


class UnsafeRows(PrivacyError):
    """Activations that no mechanism can protect: NaN or infinity."""

    code = "unsafe_rows"


class BudgetExceeded(PrivacyError):
    """The ledger has too little left for the release."""

    code = "budget_exceeded"


class LedgerError(PrivacyError):
    """The ledger is missing, corrupt or cannot be written."""

    code = "ledger"


class DataError(FedseaError):
    """A data set that cannot be read, or examples of another form than expected."""

    code = "data"
    exit_code = 2


class TrainingError(FedseaError):
    """A training step that cannot be taken; nothing of it was applied."""

    code = "training"
    exit_code = 11


class NotFinite(TrainingError):
    """A loss or a gradient is NaN or infinite."""

    code = "not_finite"


class StaleStep(TrainingError):
    """The two sides of a training, or the members of a group, are at different steps."""

    code = "stale_step"


class Refused(FedseaError):
    """The server said no for now.

    `retry_after` is in seconds; None when waiting does not help.
    """

    code = "refused"
    exit_code = 7

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Capacity(Refused):
    """The KV pool or the session table is full."""

    code = "capacity"


class QuotaExceeded(Refused):
    """This tenant is over its quota."""

    code = "quota_exceeded"


class Draining(Refused):
    """The server is shutting down and takes no new sessions."""

    code = "draining"


class SessionLost(Refused):
    """The server no longer knows the session: it was evicted or the server restarted."""

    code = "session_lost"


def error_classes() -> dict[str, type[FedseaError]]:
    """All error classes by their wire code."""
    found: dict[str, type[FedseaError]] = {}
    pending: list[type[FedseaError]] = [FedseaError]
    while pending:
        cls = pending.pop()
        found[cls.code] = cls
        pending.extend(cls.__subclasses__())
    return found
