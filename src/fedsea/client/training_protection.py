"""Privacy in training: what leaves for the rows and for the gradients that go up, and what it costs.

In a step of training two things of a text leave: its rows at the first cut, and the gradient of its
loss at the second. What comes back is computed from these two and costs nothing. A
`TrainingProtection` is the data owner's choice; applied to a model it becomes a `TrainingPolicy`,
and every session of training gets a `TrainingGuard` of it.

Rule 1: every forward and every gradient is a new release, at every step, and is charged before it is
sent. Both directions are charged to one account, where the mu of Gaussian releases add in squares.
A forward for evaluation is a release as any other.
Rule 2: a forward pays for its gradient as well. When the budget does not hold both, nothing of that
batch leaves.
Rule 3: a step that is done anew, because the connection broke, sends the very same bytes and is
charged once. A process that starts anew no longer has them: it draws new noise and pays for it.
Rule 4: a mechanism sees one example at a time. One that clips by the Frobenius norm bounds all rows of
an example together, and the example is one release; one that clips rows makes a release of each.

What is protected. The bottom and the top that are trained here depend on every example that was used
before, so what one example changed shows in every later release of all others. Then the record is the
data set as a whole. Only when nothing but the trunk is trained, releases of different examples are
independent of each other, and each example may be a record of its own: examples compose in parallel,
and the account holds what the most released example has cost. In both cases the numbers of examples,
rows and steps, the loss scale, and which steps are saved (with patience, those whose evaluation was
the best so far) are public, as they are on the wire, and so is the number of answer tokens of a batch.
Nothing is claimed for sampling batches at random. The guarantee is about what the server sees and
about the adapter of the trunk, which is computed from that; adapters of bottom and top are not
covered.

The gradient that comes back belongs to the released rows. It is taken as that of the clean rows, as
FedSEA does (AAAI 2026, released code): straight through noise and clipping, with no factor for rows that
were clipped. What the bottom learns from it stays here.
"""

from __future__ import annotations

import logging
import secrets
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from hashlib import blake2b
from pathlib import Path
from typing import Self

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fedsea.client.channel import format_of
from fedsea.client.protection import (
    BOS,
    DEFAULT_TENANT,
    PublicPrefix,
    account_line,
    ledger_to_keep,
)
from fedsea.client.releases import Release, ReleaseStore
from fedsea.errors import BudgetExceeded, ConfigError, LedgerError, LocalProtocolError, NotFinite
from fedsea.privacy.accounts import DEFAULT_DELTA, Budget, Charge, Spending, Statement
from fedsea.privacy.ledger import Account, Ledger, Reservation
from fedsea.privacy.mechanism import Mechanism, Unit
from fedsea.privacy.noise import NoiseSource
from fedsea.privacy.registry import mechanism_from_spec
from fedsea.wire.codecs import Codec, RowFormat

EACH_EXAMPLE = " (each example)"
"""What the name of an account ends with when every example is a record."""

EVALUATIONS_KEPT = 16
"""Forwards for evaluation whose bytes are kept, to be sent again when the connection breaks."""

NOTHING_PROTECTED = (
    "no mechanism: whoever runs the trunk can read the text of the training data from the rows that "
    "go up, and its answers from the gradients"
)
GRADIENTS_BARE = (
    "noise on the rows alone protects no answer: the gradients that go up as they are hold the labels, "
    "which are the text shifted by one; give the gradients a mechanism too"
)
ROWS_BARE = (
    "noise on the gradients alone protects no text: the rows that go up as they are can be inverted "
    "token by token; give the rows a mechanism too"
)

logger = logging.getLogger("fedsea.client")

_DIGEST_BYTES = 16
_TOKEN_BYTES = 8


class Record(StrEnum):
    """What the guarantee protects: all examples together, or each by itself."""

    DATA = "data"
    EXAMPLE = "example"


def warning_about(rows: Mechanism | None, gradients: Mechanism | None) -> str | None:
    """What leaks in training with these mechanisms, in one line; None when both are private."""
    if rows is None and gradients is None:
        return NOTHING_PROTECTED
    if gradients is None:
        return GRADIENTS_BARE
    if rows is None:
        return ROWS_BARE
    for what, mechanism in (("rows", rows), ("gradients", gradients)):
        if mechanism.loss() is None:
            return (
                f"the mechanism of the {what}, {mechanism.name}, is not differentially private as "
                "given: noise without a clip norm bounds nothing"
            )
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingProtection:
    """How rows and gradients are protected in training, and who counts what that costs.

    Attributes:
        rows: what is done to rows that go up: a mechanism, its spec, or None for nothing.
        gradients: what is done to gradients that go up; it must release floats.
        record: the name of the training data in the ledger: a data set, or a person.
        of: whether the record is all of the data, or each example; the latter holds only where
            nothing but the trunk is trained.
        tenant: whose account of the ledger is charged.
        ledger: file of the ledger; None for that of this user.
        budget: the most that the account may spend; None for the one that the ledger keeps, or no
            limit.
        delta: at which epsilon is shown.
        public_prefix: how examples begin that everybody may know, as for `Protection`. Its rows
            cost nothing where the bottom is not trained; a trained bottom knows the data, so there
            no row is public.
        noise: where randomness comes from; only tests give one.
    """

    rows: Mechanism | str | None = None
    gradients: Mechanism | str | None = None
    record: str
    of: Record | str = Record.DATA
    tenant: str = DEFAULT_TENANT
    ledger: str | Path | None = None
    budget: Budget | None = None
    delta: float = DEFAULT_DELTA
    public_prefix: str | int = BOS
    noise: NoiseSource | None = field(default=None, repr=False)

    def applied(
        self,
        hidden_size: int,
        train: Iterable[str],
        *,
        up: Codec = Codec.FP32,
        gradient: Codec = Codec.FP32,
        width: int | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> TrainingPolicy:
        """The rules for one run; opens the ledger.

        Args:
            hidden_size: numbers in a row of gradients, and in one of rows unless `width` says else.
            train: which of "bottom", "trunk" and "top" are trained.
            up: how rows travel that are floats.
            gradient: how gradients travel.
            width: numbers in a row that goes up, behind a projection.
            tokenizer: of the model, for the public prefix.

        Raises:
            ConfigError: the parts do not fit each other or the model.
            LedgerError: the ledger cannot be used.
        """
        here = sorted(set(train) - {"trunk"})
        width = hidden_size if width is None else width
        rows = _mechanism(self.rows, width)
        gradients = _mechanism(self.gradients, hidden_size)
        if rows is None and gradients is None:
            raise ConfigError("neither rows nor gradients have a mechanism; leave privacy out")
        if gradients is not None and gradients.levels:
            raise ConfigError(
                f"{gradients.name} releases counts, and gradients travel as floats: give them "
                "gaussian, for example"
            )
        record = self._record(here)
        public = self._public("bottom" in here, tokenizer)
        with ledger_to_keep(self.ledger, self.delta) as ledger:
            accounts = [
                None
                if mechanism is None
                else ledger.account(self.tenant, Unit.RECORD, mechanism, record, self.budget)
                for mechanism in (rows, gradients)
            ]
        plain = RowFormat(up, width)
        if (warning := warning_about(rows, gradients)) is not None:
            logger.warning("%s", warning)
        return TrainingPolicy(
            rows=Direction(
                plain if rows is None else format_of(rows, width, up), rows, accounts[0]
            ),
            gradients=Direction(RowFormat(gradient, hidden_size), gradients, accounts[1]),
            of=Record(self.of),
            ledger=ledger,
            public=public,
            noise=self.noise or NoiseSource(),
            delta=self.delta,
        )

    def _record(self, here: Sequence[str]) -> str:
        try:
            of = Record(self.of)
        except ValueError:
            known = ", ".join(each.value for each in Record)
            raise ConfigError(f"a record of {self.of!r} is not known; use {known}") from None
        if of is Record.DATA:
            return self.record
        if here:
            raise ConfigError(
                f"the {' and the '.join(here)} are trained here, and what one example changes in "
                "them shows in every later release: protect the data as a whole, or train the "
                "trunk only"
            )
        return self.record + EACH_EXAMPLE if self.record else ""

    def _public(
        self, bottom_is_trained: bool, tokenizer: PreTrainedTokenizerBase | None
    ) -> PublicPrefix:
        chosen = self.public_prefix
        if bottom_is_trained:
            if chosen not in (BOS, 0):
                raise ConfigError(
                    "with a trained bottom no row is public, because the bottom knows the data: "
                    "leave the public prefix out, or do not train the bottom"
                )
            return PublicPrefix()
        if tokenizer is not None:
            return PublicPrefix.of(chosen, tokenizer)
        if isinstance(chosen, int) and chosen >= 0:
            return PublicPrefix(length=chosen)
        if chosen != BOS:
            raise ConfigError("a public prefix needs the tokenizer, or a number of tokens")
        return PublicPrefix()


@dataclass(frozen=True, slots=True)
class Direction:
    """One of the two things that go up: how it travels, what is done to it, who pays."""

    format: RowFormat
    mechanism: Mechanism | None
    account: Account | None = field(repr=False)

    def releases(self, rows: int) -> int:
        """What an example of so many rows costs."""
        return 0 if self.mechanism is None or rows == 0 else self.mechanism.releases(rows)

    def charge(self, releases: int) -> Charge | None:
        """So many releases, as the ledger has them; None where nothing is charged."""
        if self.mechanism is None:
            return None
        return Charge(self.mechanism.spec(), self.mechanism.loss(), releases)


@dataclass(frozen=True, slots=True)
class TrainingPolicy:
    """The rules of one run; all its sessions share them."""

    rows: Direction
    gradients: Direction
    of: Record
    ledger: Ledger = field(repr=False)
    public: PublicPrefix = field(repr=False)
    noise: NoiseSource = field(repr=False)
    delta: float

    @property
    def warning(self) -> str | None:
        """What leaks although there is a mechanism, in one line; None when nothing is known to."""
        return warning_about(self.rows.mechanism, self.gradients.mechanism)

    def guard(self, store: ReleaseStore | None = None) -> TrainingGuard:
        """What one session of training releases under these rules."""
        return TrainingGuard(self, store or ReleaseStore())

    def cost(self, counts: Iterable[int], epochs: int = 1, evaluations: int = 0) -> Spending:
        """What training on examples with so many rows each will cost.

        Args:
            counts: rows of each example.
            epochs: how often each example is used for a step.
            evaluations: how often each is used for evaluation besides.
        """
        counts = list(counts)
        composed = sum if self.of is Record.DATA else max
        charges = []
        for direction, times in ((self.rows, epochs + evaluations), (self.gradients, epochs)):
            one = composed(direction.releases(count) for count in counts) if counts else 0
            charges.append(direction.charge(times * one))
        return Spending.of(charge for charge in charges if charge is not None)

    def statement(self) -> Statement:
        """The account as it stands.

        Raises:
            LedgerError: the ledger cannot be read.
        """
        account = self.rows.account or self.gradients.account
        assert account is not None
        return account.statement()

    def describe(self) -> str:
        """One line for people: what is done in each direction, for what unit, and what is left.

        Raises:
            LedgerError: the ledger cannot be read.
        """
        done = ", ".join(
            f"{what}: {'as they are' if made is None else made.spec()}"
            for what, made in (
                ("rows", self.rows.mechanism),
                ("gradients", self.gradients.mechanism),
            )
        )
        unit = "the data as a whole" if self.of is Record.DATA else "each example"
        return f"{done}; protects {unit}; {account_line(self.statement(), self.delta)}"

    def close(self) -> None:
        """Close the ledger."""
        self.ledger.close()


class TrainingGuard:
    """What one session of training releases. One thread at a time.

    Use it as a context manager, or close it.

    Args:
        policy: the rules.
        store: where the releases of the current step are kept; closed with the guard.
    """

    def __init__(self, policy: TrainingPolicy, store: ReleaseStore) -> None:
        self.policy = policy
        self._store = store
        self._rows = _Purse(policy.rows, policy.of)
        self._gradients = _Purse(policy.gradients, policy.of)
        self._key = secrets.token_bytes(_DIGEST_BYTES)
        self._step = 0
        self._forwards: dict[int, _Forward] = {}
        self._evaluations: OrderedDict[int, _Forward] = OrderedDict()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def rows_format(self) -> RowFormat:
        """How rows go up."""
        return self.policy.rows.format

    @property
    def gradients_format(self) -> RowFormat:
        """How gradients go up, and come back."""
        return self.policy.gradients.format

    @property
    def description(self) -> dict[str, str | None]:
        """The mechanisms, and what they protect; for JSON."""
        directions = {"rows": self.policy.rows, "gradients": self.policy.gradients}
        made = {name: direction.mechanism for name, direction in directions.items()}
        specs = {name: None if each is None else each.spec() for name, each in made.items()}
        return {**specs, "of": self.policy.of.value}

    @property
    def charged(self) -> tuple[int, int]:
        """Releases of rows and of gradients that this session was charged for."""
        return self._rows.used, self._gradients.used

    def begin(self, step: int) -> None:
        """Step number `step` is done now: for the first time, or anew.

        What was released for another step is forgotten.
        """
        if step != self._step:
            self._step = step
            self._forwards.clear()
            self._evaluations.clear()

    def forward(
        self,
        index: int,
        sequences: Sequence[Sequence[int]],
        rows: Tensor,
        *,
        no_grad: bool = False,
    ) -> bytes:
        """What goes up for the rows of a forward.

        Args:
            index: number of the forward within its step; evaluations have numbers of their own.
            sequences: token ids of each example.
            rows: (n, width), the rows of all examples one after the other.
            no_grad: no gradient will follow.

        Returns:
            Bytes in `rows_format`.

        Raises:
            NotFinite: a row is NaN or infinite, or too large for the codec; nothing was charged.
            BudgetExceeded, LedgerError: it could not be charged; nothing may be sent.
            LocalProtocolError: rows and sequences do not belong together.
        """
        counts = [len(sequence) for sequence in sequences]
        if sum(counts) != len(rows):
            raise LocalProtocolError(
                f"{len(rows)} rows cannot be those of {sum(counts)} tokens; fix the caller"
            )
        keys = [self._digest(sequence) for sequence in sequences]
        kept = self._evaluations if no_grad else self._forwards
        known = kept.get(index)
        if known is not None and known.keys == keys:
            return self._store.read(known.rows)
        self._check_finite(rows, "a row")
        public = [self.policy.public.reaches(0, sequence) for sequence in sequences]
        data = self._protected(rows, counts, public)
        private = [count - free for count, free in zip(counts, public, strict=True)]
        self._charge(keys, private, [] if no_grad else counts)
        kept[index] = _Forward(keys, counts, self._store.put(data))
        if len(self._evaluations) > EVALUATIONS_KEPT:
            self._evaluations.popitem(last=False)
        return data

    def gradient(self, index: int, rows: Tensor, scale: float = 1.0) -> bytes:
        """What goes up for the gradient at the outputs of forward `index` of this step.

        Args:
            index: of the forward.
            rows: (n, hidden), as many as the forward had.
            scale: the gradient is so many times too large, and stays so; clipping is meant for
                the gradient itself. A step that is done anew with another scale sends the same
                release in that scale.

        Returns:
            Bytes in `gradients_format`.

        Raises:
            NotFinite: a number is NaN or infinite, or too large for the codec.
            LocalProtocolError: there is no such forward, or it had other rows.
        """
        forward = self._forwards.get(index)
        if forward is None or sum(forward.counts) != len(rows):
            raise LocalProtocolError(
                f"{len(rows)} rows of gradient belong to no forward of this step; fix the caller"
            )
        direction = self.policy.gradients
        if forward.gradient is None:
            self._check_finite(rows, "a gradient")
            parts = rows.detach().split(forward.counts)
            data = b"".join(self._protect(direction, part, scale) for part in parts)
        else:
            data = self._store.read(forward.gradient)
            if scale != forward.scale:
                sent = direction.format.decode(data, len(rows))
                data = self._encode(direction, sent * (scale / forward.scale))
        if forward.gradient is None or scale != forward.scale:
            forward.gradient, forward.scale = self._store.put(data), scale
        return data

    def close(self) -> None:
        """Settle with the ledger; safe to repeat.

        What was reserved and not used goes back. When the ledger cannot be written it stays
        charged, which is no reason to lose what was trained.
        """
        self._forwards.clear()
        self._evaluations.clear()
        self._store.close()
        for purse in (self._rows, self._gradients):
            try:
                purse.close()
            except LedgerError as error:
                logger.warning("releases that were reserved and not used stay charged: %s", error)

    def _digest(self, sequence: Sequence[int]) -> bytes:
        """Stands for an example, under a key that never leaves the session."""
        entry = b"".join(token.to_bytes(_TOKEN_BYTES, "little") for token in sequence)
        return blake2b(entry, key=self._key, digest_size=_DIGEST_BYTES).digest()

    def _protected(self, rows: Tensor, counts: Sequence[int], public: Sequence[int]) -> bytes:
        """Each example by itself; its public rows travel without noise, or as counts."""
        direction, parts = self.policy.rows, []
        for example, free in zip(rows.detach().split(list(counts)), public, strict=True):
            if free and direction.format.codec is Codec.COUNTS:
                parts.append(self._protect(direction, example[:free]))
            elif free:
                parts.append(self._encode(direction, example[:free]))
            if free < len(example):
                parts.append(self._protect(direction, example[free:]))
        return b"".join(parts)

    def _protect(self, direction: Direction, rows: Tensor, scale: float = 1.0) -> bytes:
        """One example as bytes; its numbers are `scale` times too large, and stay so."""
        mechanism, noise = direction.mechanism, self.policy.noise
        if mechanism is None:
            return self._encode(direction, rows)
        if scale == 1.0:
            return self._encode(direction, mechanism.protect(rows, noise))
        return self._encode(direction, mechanism.protect(rows.double() / scale, noise) * scale)

    def _encode(self, direction: Direction, rows: Tensor) -> bytes:
        """What is too large for the codec is not finite in it."""
        try:
            return direction.format.encode(rows)
        except LocalProtocolError as error:
            raise NotFinite(f"a number of step {self._step} cannot be sent: {error}") from error

    def _check_finite(self, rows: Tensor, what: str) -> None:
        if not bool(rows.isfinite().all()):
            raise NotFinite(
                f"{what} of step {self._step} is NaN or infinite, which no mechanism can protect; "
                "nothing was sent: lower the learning rate, or compute in a wider dtype"
            )

    def _charge(self, keys: Sequence[bytes], rows: Sequence[int], gradients: Sequence[int]) -> None:
        """Pay for a forward and for the gradient that follows it; all or nothing."""
        try:
            paid = [
                self._rows.reserve(keys, rows),
                self._gradients.reserve(keys[: len(gradients)], gradients),
            ]
        except BudgetExceeded as error:
            raise BudgetExceeded(f"training stops at step {self._step}: {error}") from error
        for purse, releases in zip((self._rows, self._gradients), paid, strict=True):
            purse.use(releases)


@dataclass(slots=True)
class _Forward:
    """What was released for one forward of the current step."""

    keys: list[bytes]
    counts: list[int]
    rows: Release
    gradient: Release | None = None
    scale: float = 1.0


class _Purse:
    """What one direction of a session pays.

    Where each example is a record, examples compose in parallel: a release costs something only when
    it makes its example the most released one. A session does not know what earlier ones released
    for an example, so sessions add up.
    """

    def __init__(self, direction: Direction, of: Record) -> None:
        self.used = 0
        self._direction = direction
        self._of = of
        self._reserved: Reservation | None = None
        self._paid: dict[bytes, int] = {}
        self._next: dict[bytes, int] = {}

    def reserve(self, keys: Sequence[bytes], counts: Sequence[int]) -> int:
        """Have what one batch costs, durably; that number of releases.

        Raises:
            BudgetExceeded: it does not fit.
            LedgerError: it could not be written.
        """
        account = self._direction.account
        if account is None:
            return 0
        each = [self._direction.releases(count) for count in counts]
        releases = sum(each) if self._of is Record.DATA else self._rise(keys, each)
        missing = releases - (0 if self._reserved is None else self._reserved.left)
        if missing > 0 and self._reserved is None:
            self._reserved = account.reserve(missing)
        elif missing > 0:
            assert self._reserved is not None
            self._reserved.extend(missing)
        return releases

    def use(self, releases: int) -> None:
        """The batch that was reserved last is sent."""
        self._paid.update(self._next)
        self._next.clear()
        self.used += releases
        if releases:
            assert self._reserved is not None
            self._reserved.use(releases)

    def close(self) -> None:
        reserved, self._reserved = self._reserved, None
        if reserved is not None:
            reserved.settle()

    def _rise(self, keys: Sequence[bytes], each: Sequence[int]) -> int:
        """By how much the most released example rises with these releases."""
        self._next = {key: self._paid.get(key, 0) for key in keys}
        for key, releases in zip(keys, each, strict=True):
            self._next[key] += releases
        return max(0, max(self._next.values(), default=0) - self.used)


def _mechanism(chosen: Mechanism | str | None, width: int) -> Mechanism | None:
    made = mechanism_from_spec(chosen, width=width) if isinstance(chosen, str) else chosen
    if made is not None:
        # A mechanism that is for rows of another width says so now, and not at the first batch.
        made.protect(torch.zeros(1, width), NoiseSource())
    return made
