"""Proof of what this server runs: a program of the operator makes a token for each request.

The program asks the hardware and its service; nothing of that is known here. It is run without a
shell, with a nonce and the hash of this server's TLS key as its last two arguments, and prints a
token. Time, output, rate and programs at a time are bounded, since any tenant may ask.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Final

from fedsea.errors import AttestationError, Capacity, LocalProtocolError, QuotaExceeded
from fedsea.server.config import AttestationSection
from fedsea.server.logs import get_logger
from fedsea.server.quotas import TokenBucket
from fedsea.transport.base import Peer
from fedsea.wire.attestation import (
    MAX_TOKEN_CHARACTERS,
    decode_attest_request,
    encode_attestation,
)

MAX_AT_ONCE: Final = 4
RETRY_WHEN_BUSY: Final = 1.0
READ_BYTES: Final = 4096
CLOSING_SECONDS: Final = 1.0

FAILED_MESSAGE: Final = (
    "the server could not get proof of what it runs: try again, and tell its operator"
)

_log = get_logger(__name__)


class TokenCommand:
    """Answers requests for proof by running a program.

    Args:
        section: the program and its bounds.
        key_sha256: the TLS key that clients of this server see, as hex.
        clock: seconds that never run backwards.
    """

    def __init__(
        self,
        section: AttestationSection,
        key_sha256: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._section = section
        self._key_sha256 = key_sha256
        self._clock = clock
        self._buckets: dict[str, TokenBucket] = {}
        self._running = 0

    async def attest(self, peer: Peer, request: bytes) -> bytes:
        """A token for the nonce of a request.

        Raises:
            RemoteProtocolError: the request is not valid.
            QuotaExceeded, Capacity: the tenant, or all together, ask too often.
            AttestationError: the program failed; the log says how.
        """
        nonce = decode_attest_request(request)
        self._charge(peer.tenant)
        if self._running >= MAX_AT_ONCE:
            raise Capacity("others are being attested to: try again", RETRY_WHEN_BUSY)
        self._running += 1
        try:
            token = await self._token(nonce)
        finally:
            self._running -= 1
        try:
            answer = encode_attestation(token)
        except LocalProtocolError:
            raise _failure("no_token") from None
        _log.info("attested", tenant=peer.tenant)
        return answer

    def _charge(self, tenant: str) -> None:
        now = self._clock()
        bucket = self._buckets.get(tenant)
        if bucket is None:
            bucket = TokenBucket(self._section.requests_per_second, now)
            self._buckets[tenant] = bucket
        if not bucket.available(now):
            raise QuotaExceeded(
                "the tenant asks for proof too often: reuse what was accepted, or wait",
                retry_after=max(bucket.ready_at() - now, 0.001),
            )
        bucket.take(1)

    async def _token(self, nonce: bytes) -> str:
        try:
            async with asyncio.timeout(self._section.timeout_s), self._program(nonce) as program:
                output = await _read(program)
                code = await program.wait()
        except TimeoutError:
            raise _failure("timeout") from None
        except OSError:
            raise _failure("not_started") from None
        if code:
            raise _failure("exit_code", exit_code=code)
        return output.decode("ascii", "replace").strip()

    @asynccontextmanager
    async def _program(self, nonce: bytes) -> AsyncIterator[asyncio.subprocess.Process]:
        """The program, which is gone with everything that it started when the block ends."""
        program = await asyncio.create_subprocess_exec(
            *self._section.command,
            nonce.hex(),
            self._key_sha256,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            yield program
        finally:
            with suppress(ProcessLookupError):
                os.killpg(program.pid, signal.SIGKILL)
            with suppress(TimeoutError):
                # `wait` ends when the pipe is closed as well, which is by reading to its end.
                async with asyncio.timeout(CLOSING_SECONDS):
                    while await _stdout(program).read(READ_BYTES):
                        pass
                    await program.wait()


async def _read(program: asyncio.subprocess.Process) -> bytes:
    """All that the program prints; more than a token can have is a failure."""
    output = b""
    while data := await _stdout(program).read(READ_BYTES):
        output += data
        if len(output) > MAX_TOKEN_CHARACTERS:
            raise _failure("too_much_output")
    return output


def _stdout(program: asyncio.subprocess.Process) -> asyncio.StreamReader:
    assert program.stdout is not None  # it was asked for
    return program.stdout


def _failure(reason: str, **details: int) -> AttestationError:
    """What the client gets to know; the log knows the reason, and nobody what was printed."""
    _log.warning("attestation_failed", reason=reason, **details)
    return AttestationError(FAILED_MESSAGE)
