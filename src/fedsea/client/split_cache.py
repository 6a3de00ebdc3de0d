"""The KV cache that `transformers` code holds: one row of tokens per row of a batch.

The cache knows each row's tokens and how far a session has computed them. Whatever `transformers`
does to a cache (reordering beams, cropping drafts, selecting rows) is bookkeeping here; the next
forward pass turns it into forks, rollbacks and drops of sequences, which share rows at the bottom,
in the trunk and at the top. Rows of a batch that hold the same tokens are computed once.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from fedsea.client.background import Background, Pending
from fedsea.client.link import Traffic
from fedsea.client.split import SplitModel, SplitSession
from fedsea.errors import RequestError
from fedsea.model.kv_pool import pages_for

# Rows reserved beyond what is known to be needed when a caller may go on with the cache.
_HEADROOM = 256

PADDING_BETWEEN_TOKENS = (
    "the attention mask has padding between tokens; only padding to the left or to the right of "
    "all tokens of a row can be left out"
)


@dataclass(frozen=True, slots=True)
class NewColumns:
    """What one row of a batch gets in a forward pass: padding, tokens, padding."""

    left: int
    ids: tuple[int, ...] = field(repr=False)
    right: int


@dataclass(slots=True)
class CachedRow:
    """One row of a batch: its tokens between padding on the left and on the right.

    The first `released` tokens have been computed as the first rows of sequence `chain` of the
    session; several rows may name one chain until they differ.
    """

    ids: list[int] = field(default_factory=list, repr=False)
    left: int = 0
    right: int = 0
    chain: int | None = None
    released: int = 0

    @property
    def is_padded(self) -> bool:
        """Whether columns of this row hold no token."""
        return bool(self.left or self.right)

    def fits(self, new: NewColumns) -> bool:
        """Whether the columns can follow: padding never comes between tokens."""
        return not (self.ids and new.ids and (self.right or new.left))

    def add(self, new: NewColumns) -> None:
        """Append columns."""
        if not self.ids:
            self.left += new.left
        elif not new.ids:
            self.right += new.left
        self.ids.extend(new.ids)
        self.right += new.right

    def crop(self, columns: int) -> None:
        """Forget the last columns."""
        gone = min(columns, self.right)
        self.right -= gone
        columns -= gone
        gone = min(columns, len(self.ids))
        del self.ids[len(self.ids) - gone :]
        self.released = min(self.released, len(self.ids))
        self.left -= columns - gone

    def copy(self) -> CachedRow:
        """A row that shares what was computed."""
        return CachedRow(list(self.ids), self.left, self.right, self.chain, self.released)


class Lease:
    """An open session, the number of sequences and the rows of each that it has room for.

    The session is closed when nobody holds the lease any more, or by `end`.
    """

    def __init__(
        self, session: SplitSession, sequences: int, capacity: int, sessions: Sessions
    ) -> None:
        self.session = session
        self.sequences = sequences
        self.capacity = capacity
        self._finalizer = weakref.finalize(self, sessions.close_soon, session)
        # At exit the connection ends by itself; nothing is left to wait for the loop.
        self._finalizer.atexit = False

    def end(self) -> None:
        """Close the session."""
        self._finalizer()


class Sessions:
    """Opens and closes the sessions of one model's caches.

    Args:
        split: the parts and servers.
        background: the loop on which sessions live.
    """

    def __init__(self, split: SplitModel, background: Background) -> None:
        self.split = split
        self.background = background
        self._leases: weakref.WeakSet[Lease] = weakref.WeakSet()
        self._closing: list[Pending[None]] = []

    @property
    def context(self) -> int:
        """Most rows of one sequence; 0 when nothing limits them."""
        return self.split.description.max_context

    def room_for(self, capacity: int) -> int:
        """How many sequences of a capacity in rows this process could open now."""
        return min(
            pool.unreserved_rows // (pages_for(max(1, capacity), pool.page_rows) * pool.page_rows)
            for pool in self.split.parts.pools
        )

    async def open(self, sequences: int, capacity: int) -> Lease:
        """Open a session for a number of sequences of a capacity in rows.

        Raises:
            PromptTooLong, Capacity, QuotaExceeded, Unreachable: as `SplitModel.open`.
        """
        # Rows of dropped caches count as taken until their sessions are closed.
        for pending in tuple(self._closing):
            await pending
        session = await self.split.open([capacity] * sequences)
        lease = Lease(session, sequences, capacity, self)
        self._leases.add(lease)
        return lease

    def close_soon(self, session: SplitSession) -> None:
        """Close a session in the background; may be called from any thread, the loop's included."""
        self._closing = [pending for pending in self._closing if not pending.done()]
        work = session.close()
        try:
            self._closing.append(self.background.start(work))
        except RuntimeError:
            # The loop has ended, and every connection with it.
            work.close()

    def close(self) -> None:
        """Close the sessions of all caches and wait for it."""
        for lease in tuple(self._leases):
            lease.end()
        for pending in tuple(self._closing):
            pending.result()


class SplitLayer(CacheLayerMixin):
    """Stands for all blocks of a split model in a `transformers` cache.

    Args:
        sessions: of the model that the cache belongs to.
        max_length: rows that each sequence will need, when known.
    """

    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self, sessions: Sessions, max_length: int = 0) -> None:
        super().__init__()
        self.sessions = sessions
        self.rows: list[CachedRow] = []
        self._max_length = max_length
        self._columns = 0
        self._lease: Lease | None = None

    @property
    def batch_size(self) -> int:
        """Rows of the batch; -1 before the first forward pass."""
        return len(self.rows) or -1

    @property
    def traffic(self) -> Traffic:
        """What crossed the wire in the session that is open; nothing while none is."""
        return self._lease.session.traffic if self._lease else Traffic()

    def plan(self, max_length: int) -> None:
        """Make the next session large enough for sequences of `max_length` rows."""
        self._max_length = max(self._max_length, max_length)

    def check_batch(self, size: int) -> None:
        """Refuse a batch of another size.

        Raises:
            RequestError: the rows of the batch are not those of the cache.
        """
        if self.rows and len(self.rows) != size:
            raise RequestError(
                f"the cache holds {len(self.rows)} rows and the batch has {size}; "
                "give the cache that belongs to this batch"
            )

    def check(self, new: Sequence[NewColumns]) -> None:
        """Refuse columns that do not belong behind these rows.

        Raises:
            RequestError: padding between tokens.
        """
        if self.rows and not all(map(CachedRow.fits, self.rows, new)):
            raise RequestError(PADDING_BETWEEN_TOKENS)

    async def extend(self, new: Sequence[NewColumns], keep: Sequence[int]) -> list[Tensor]:
        """Compute the next columns of every row, all rows together.

        Args:
            new: one entry per row, accepted by `check`.
            keep: logits of how many of the last tokens of each row are wanted.

        Returns:
            Logits (keep, vocabulary) of each row.
        """
        rows = self.rows or [CachedRow() for _ in new]
        longest = max(
            len(row.ids) + len(columns.ids) for row, columns in zip(rows, new, strict=True)
        )
        lease = await self._lease_for(rows, longest)
        work = _plan_chains(rows, new, keep)
        _settle(lease, rows, work)
        logits: list[Tensor] = [torch.empty(0)] * len(rows)
        tails = await _gather(lease.session, work)
        for chain, tail in zip(work, tails, strict=True):
            for index in chain.members:
                logits[index] = tail[tail.shape[0] - keep[index] :]
                rows[index].chain = chain.sequence
        for row, columns in zip(rows, new, strict=True):
            row.add(columns)
            row.released = len(row.ids)
        self.rows = rows
        self._columns += _width(new[0])
        return logits

    def let_go(self) -> None:
        """Close the session. The tokens stay; the next forward pass computes them again."""
        if self._lease is not None:
            self._lease.end()
            self._lease = None
        for row in self.rows:
            row.chain, row.released = None, 0

    def get_seq_length(self) -> int:
        """Columns so far, padding included."""
        return self._columns

    def get_max_length(self) -> int:
        """Most rows of one sequence, or -1."""
        return self.sessions.context or -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of a mask over this cache and new columns."""
        return self._columns + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last columns, given as a negative number; a positive one is what to keep."""
        gone = -tokens_to_remove if tokens_to_remove <= 0 else self._columns - tokens_to_remove
        gone = min(max(gone, 0), self._columns)
        for row in self.rows:
            row.crop(gone)
        self._columns -= gone

    def reset(self) -> None:
        """Forget everything."""
        self.let_go()
        self.rows = []
        self._columns = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row `beam_idx[i]` was."""
        self._select(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times."""
        self._select([index for index in range(len(self.rows)) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows, given by number or by a mask."""
        self._select(torch.arange(len(self.rows))[indices.cpu()].tolist())

    def lazy_initialization(self, *_: Any, **__: Any) -> NoReturn:
        """Refused: keys and values never leave the blocks that made them."""
        raise _not_for_other_models()

    def update(self, *_: Any, **__: Any) -> NoReturn:
        """Refused: keys and values never leave the blocks that made them."""
        raise _not_for_other_models()

    def __deepcopy__(self, memo: dict[int, Any]) -> SplitLayer:
        """A cache of the same tokens; its first forward pass computes them again."""
        twin = SplitLayer(self.sessions, self._max_length)
        twin.rows = [CachedRow(list(row.ids), row.left, row.right) for row in self.rows]
        twin._columns = self._columns
        return twin

    def _select(self, indices: Sequence[int]) -> None:
        """Rows that are only moved keep their lists; copies are made of those that are doubled."""
        taken: set[int] = set()
        chosen = []
        for index in indices:
            row = self.rows[index]
            chosen.append(row.copy() if index in taken else row)
            taken.add(index)
        self.rows = chosen

    async def _lease_for(self, rows: Sequence[CachedRow], length: int) -> Lease:
        """The open session when the rows fit into it, else a new and larger one."""
        lease = self._lease
        if lease is None or len(rows) > lease.sequences or length > lease.capacity:
            self.let_go()
            lease = await self.sessions.open(len(rows), self._capacity(len(rows), length))
            self._lease = lease
        return lease

    def _capacity(self, sequences: int, length: int) -> int:
        """Rows to reserve per sequence: what was planned, or room to go on where there is some."""
        if length <= self._max_length:
            wanted = self._max_length
        else:
            wanted = roomy(length)
            if self.sessions.room_for(wanted) < sequences:
                wanted = length
        return max(length, min(wanted, self.sessions.context or wanted))


class SplitCache(Cache):
    """A cache for `past_key_values` of a split model.

    Args:
        layer: what holds the rows.
    """

    def __init__(self, layer: SplitLayer) -> None:
        super().__init__(layers=[layer])

    @property
    def traffic(self) -> Traffic:
        """What crossed the wire for this cache."""
        traffic: Traffic = self.layers[0].traffic
        return traffic


def layer_of(cache: Any, sessions: Sessions) -> SplitLayer:
    """The layer of a cache of this model; an empty `DynamicCache` becomes one.

    Raises:
        RequestError: the cache is of another kind, or of another model.
    """
    layers = getattr(cache, "layers", None)
    if layers and isinstance(layers[0], SplitLayer):
        layer: SplitLayer = layers[0]
        if layer.sessions is not sessions:
            raise RequestError("past_key_values belong to another model; give this model's own")
        return layer
    if type(cache) is DynamicCache and not cache.get_seq_length():
        cache.layers = [SplitLayer(sessions)]
        return layer_of(cache, sessions)
    raise RequestError(
        "past_key_values must be what this model returned, or an empty DynamicCache: "
        "the keys and values of the trunk are at the server"
    )


def roomy(length: int) -> int:
    """Rows to reserve for a sequence of `length` rows that is likely to grow."""
    return length + max(_HEADROOM, length // 2)


@dataclass(slots=True)
class _Chain:
    """Rows of the batch that are the same after this step, so that one sequence does for all.

    `source` is the chain that holds the first `released` of their tokens.
    """

    source: int | None
    released: int
    tail: tuple[int, ...] = field(repr=False)
    members: list[int]
    keep: int = 0
    sequence: int = -1


def _plan_chains(
    rows: Sequence[CachedRow], new: Sequence[NewColumns], keep: Sequence[int]
) -> list[_Chain]:
    chains: dict[tuple[int | None, int, tuple[int, ...]], _Chain] = {}
    for index, (row, columns) in enumerate(zip(rows, new, strict=True)):
        tail = (*row.ids[row.released :], *columns.ids)
        key = (row.chain, row.released, tail)
        chain = chains.setdefault(key, _Chain(*key, members=[]))
        chain.members.append(index)
        chain.keep = max(chain.keep, keep[index])
    return list(chains.values())


def _settle(lease: Lease, rows: Sequence[CachedRow], work: Sequence[_Chain]) -> None:
    """Give every chain its sequence: one goes on with its source's, others fork it.

    Unused sequences go first, so that the living ones never outgrow the reservation; sequences are
    rolled back last, because forks may need what they lose.
    """
    session = lease.session
    for unused in set(session.sequences()) - {row.chain for row in rows}:
        session.drop(unused)
    heirs: dict[int, _Chain] = {}
    for chain in work:
        if chain.source is None:
            chain.sequence = session.begin(lease.capacity)
        elif chain.source in heirs:
            chain.sequence = session.fork(chain.source, chain.released, lease.capacity)
        else:
            heirs[chain.source] = chain
            chain.sequence = chain.source
    for source, chain in heirs.items():
        if session.length(source) > chain.released:
            session.rollback(source, chain.released)


async def _gather(session: SplitSession, work: Sequence[_Chain]) -> list[Tensor]:
    """Logits of all chains; when one fails, none is left running."""
    tasks = [asyncio.create_task(_feed(session, chain)) for chain in work]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _feed(session: SplitSession, chain: _Chain) -> Tensor:
    if not chain.tail:
        return torch.empty(0)
    result = await session.feed(chain.sequence, torch.tensor(chain.tail), keep=chain.keep)
    return result.logits


def _width(columns: NewColumns) -> int:
    return columns.left + len(columns.ids) + columns.right


def _not_for_other_models() -> RequestError:
    return RequestError(
        "this cache belongs to a split model and holds no keys and values; "
        "give other models a cache of their own"
    )
