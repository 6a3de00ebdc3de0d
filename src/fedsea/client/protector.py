"""What one session releases: protected, charged, kept, and only then sent.

Rule 1: a row is released once. What was released for a token after the tokens before it is kept and
repeated byte for byte whenever the same tokens are fed again: after a rollback, in a fork, when the
client resumes. A second draw of noise would be averaged with the first. That a token was fed again
at its position is what the server can tell, as it can from the row that is sent or not sent.
Rule 2: a new release is charged, durably, before its bytes are handed out. When the ledger refuses,
or a row is not finite, nothing was charged for it, nothing is kept and nothing may be sent.
Rule 3: sequences that were begun apart share nothing, even if they hold the same tokens: equal bytes
would tell that they do. Forks of one sequence share what they have in common.
Rule 4: rows of the public prefix are released without a charge.

Tokens are kept as a chain of hashes under a key that never leaves the session.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

import torch
from torch import Tensor

from fedsea.client.protection import ReleasePolicy
from fedsea.client.releases import Release, ReleaseStore
from fedsea.errors import LedgerError, UnsafeRows
from fedsea.privacy.denoiser import Restorer
from fedsea.privacy.metering import SessionMeter

logger = logging.getLogger("fedsea.client")

_DIGEST_BYTES = 16
_TOKEN_BYTES = 8

_Memo = dict[bytes, tuple[Release, int]]
"""Where the row of each chain of tokens is: in which bytes, and which row of them."""


@dataclass(slots=True, repr=False)
class _Known:
    """Rows that only this side knows, until the denoiser has used them: clean ones, and noise."""

    start: int
    clean: Tensor
    noise: Tensor

    @property
    def end(self) -> int:
        return self.start + len(self.clean)


@dataclass(slots=True, repr=False)
class _Path:
    """One sequence: the hash of every chain of its tokens, and how far it is public."""

    root: bytes
    memo: _Memo
    digests: list[bytes] = field(default_factory=list)
    public: int = 0
    restorer: Restorer | None = None
    known: list[_Known] = field(default_factory=list)

    def following(self, tokens: Sequence[int]) -> list[bytes]:
        """Hashes of the chains that end with each of the next tokens."""
        last = self.digests[-1] if self.digests else self.root
        found = []
        for token in tokens:
            entry = token.to_bytes(_TOKEN_BYTES, "little")
            last = blake2b(entry, key=last, digest_size=_DIGEST_BYTES).digest()
            found.append(last)
        return found

    def truncate(self, length: int) -> None:
        del self.digests[length:]
        self.public = min(self.public, length)
        if self.restorer is not None:
            self.restorer.rollback(length)
        self.known = [_first(entry, length) for entry in self.known if entry.start < length]

    def fork(self, length: int) -> _Path:
        restorer = None if self.restorer is None else self.restorer.fork(length)
        forked = _Path(self.root, self.memo, list(self.digests), self.public, restorer)
        forked.known = list(self.known)
        forked.truncate(length)
        return forked


class Protector:
    """Protects the rows of one session. All calls belong to the client's event loop.

    Args:
        policy: the rules.
        store: where releases are kept.
    """

    def __init__(self, policy: ReleasePolicy, store: ReleaseStore) -> None:
        self._policy = policy
        self._store = store
        self._meter = SessionMeter(policy.account)
        self._paths: dict[int, _Path] = {}

    @property
    def policy(self) -> ReleasePolicy:
        """The rules."""
        return self._policy

    @property
    def charged(self) -> int:
        """Releases of this session that were charged for what was sent."""
        return self._meter.used

    def begin(self, sequence: int) -> None:
        """A new, empty sequence."""
        denoiser = self._policy.denoiser
        restorer = None if denoiser is None else denoiser.sequence()
        self._paths[sequence] = _Path(secrets.token_bytes(_DIGEST_BYTES), {}, restorer=restorer)

    def fork(self, source: int, target: int, length: int) -> None:
        """A new sequence that starts as the first `length` rows of another."""
        self._paths[target] = self._paths[source].fork(length)
        self._meter.fork(source, target)

    def rollback(self, sequence: int, length: int) -> None:
        """Rows from `length` on may be fed anew; what was released for them is not forgotten."""
        self._paths[sequence].truncate(length)

    def drop(self, sequence: int) -> None:
        """Forget a sequence; what was released is forgotten with its last fork."""
        del self._paths[sequence]
        self._meter.drop(sequence)

    def reserve_ahead(self, sequence: int, tokens: Sequence[int], chunk: int) -> None:
        """Charge a prompt that is fed in chunks of `chunk` rows: all of it, or nothing.

        Raises:
            BudgetExceeded: it does not fit; nothing was charged.
            LedgerError: the charge could not be written.
        """
        path = self._paths[sequence]
        known = _known_count(path, path.following(tokens))
        first, releases = max(known, self._public_reach(path, tokens)), 0
        for end in range(chunk, len(tokens) + chunk, chunk):
            fresh = min(end, len(tokens)) - max(first, end - chunk)
            releases += self._policy.mechanism.releases(fresh) if fresh > 0 else 0
        if releases:
            self._meter.reserve_ahead(releases, sequence)

    def length(self, sequence: int) -> int:
        """Rows that were handed out for a sequence."""
        return len(self._paths[sequence].digests)

    def release(
        self, sequence: int, tokens: Sequence[int], rows: Tensor, later: Sequence[int] = ()
    ) -> bytes:
        """What leaves for the next rows (n, hidden) of a sequence, which belong to these tokens.

        Args:
            sequence: which one.
            tokens: n token ids.
            rows: what the bottom made of them.
            later: tokens of the same prompt that follow; they show whether it begins publicly.

        Returns:
            Bytes in the format of the policy.

        Raises:
            UnsafeRows: a row is not finite.
            BudgetExceeded, LedgerError: new releases could not be charged.
            LocalProtocolError: a protected value is too large for the codec.
        """
        path = self._paths[sequence]
        digests = path.following(tokens)
        reach = min(self._public_reach(path, [*tokens, *later]), len(tokens))
        known = _known_count(path, digests)
        public = max(0, reach - known)
        data = self._repeated(path, digests[:known]) if known else b""
        if known < len(tokens):
            start = len(path.digests) + known
            fresh = self._fresh(sequence, start, rows[known:], public)
            self._keep(path, digests[known:], fresh)
            data = data + fresh if data else fresh
        if path.restorer is not None:
            self._remember(path, rows, data)
        path.public += reach
        path.digests.extend(digests)
        return data

    def restore(self, sequence: int, count: int, rows: Tensor) -> Tensor:
        """What came back for the next `count` positions, restored by the denoiser if there is one.

        Args:
            sequence: which one.
            count: positions since the last call.
            rows: (k, hidden), those of the last k of these positions.
        """
        path = self._paths[sequence]
        if path.restorer is None:
            return rows
        start = path.restorer.length
        path.known = [entry for entry in path.known if entry.end > start]
        parts = [_between(entry, start, start + count) for entry in path.known]
        clean = torch.cat([part.clean for part in parts])
        noise = torch.cat([part.noise for part in parts])
        return path.restorer.restore(rows, clean, noise)

    def rewind(self, sequence: int, length: int) -> None:
        """Rows from `length` on will be restored once more, because what followed failed."""
        path = self._paths[sequence]
        if path.restorer is not None:
            path.restorer.rollback(length)

    def close(self) -> None:
        """Give back what was reserved and never used; safe to repeat.

        When the ledger cannot be written it stays charged, which is no reason to withhold an
        answer.
        """
        self._paths.clear()
        try:
            self._meter.close()
        except LedgerError as error:
            logger.warning("releases that were reserved and not used stay charged: %s", error)

    def _public_reach(self, path: _Path, tokens: Sequence[int]) -> int:
        """How many of the next tokens are public, all of the sequence before them being so."""
        at = len(path.digests)
        return self._policy.public.reaches(at, tokens) if path.public == at else 0

    def _fresh(self, sequence: int, start: int, rows: Tensor, public: int) -> bytes:
        """New releases for rows from position `start` on; the first `public` cost nothing."""
        policy = self._policy
        if not bool(rows.isfinite().all()):
            raise UnsafeRows(
                "rows hold NaN or infinity, which no mechanism can protect; nothing was sent: "
                "check the dtype that the model is computed in"
            )
        narrow = rows if policy.projection is None else policy.projection.encode(rows)
        parts = []
        if public:
            free = narrow[:public]
            counted = policy.mechanism.levels > 0
            parts.append(policy.mechanism.protect(free, policy.noise) if counted else free)
        if public < len(narrow):
            parts.append(policy.mechanism.protect(narrow[public:], policy.noise))
        data = b"".join(map(policy.rows.encode, parts))
        if public < len(narrow):
            self._meter.reserve_positions(start + public, len(narrow) - public, sequence)
        return data

    def _keep(self, path: _Path, digests: Sequence[bytes], data: bytes) -> None:
        release = self._store.put(data)
        for index, digest in enumerate(digests):
            path.memo[digest] = release, index

    def _repeated(self, path: _Path, digests: Sequence[bytes]) -> bytes:
        """The bytes that were released for rows, in their order."""
        size = self._policy.rows.row_bytes
        parts: list[bytes] = []
        data, of = b"", None
        for digest in digests:
            release, index = path.memo[digest]
            if release is not of:
                data, of = self._store.read(release), release
            parts.append(data[index * size : (index + 1) * size])
        return b"".join(parts)

    def _remember(self, path: _Path, rows: Tensor, data: bytes) -> None:
        """Keep what the denoiser needs: the clean rows, and what the release added to them."""
        policy = self._policy
        clean = rows.detach().float().cpu()
        narrow = clean if policy.projection is None else policy.projection.encode(rows).cpu()
        noise = policy.rows.decode(data, len(rows)) - narrow
        path.known.append(_Known(len(path.digests), clean, noise))


def _known_count(path: _Path, digests: Sequence[bytes]) -> int:
    """How many of the next rows were released before."""
    return next((n for n, digest in enumerate(digests) if digest not in path.memo), len(digests))


def _first(entry: _Known, length: int) -> _Known:
    return _between(entry, entry.start, length)


def _between(entry: _Known, start: int, end: int) -> _Known:
    """The part of an entry at positions start .. end - 1."""
    first = max(start, entry.start)
    part = slice(first - entry.start, max(0, end - entry.start))
    return _Known(first, entry.clean[part], entry.noise[part])
