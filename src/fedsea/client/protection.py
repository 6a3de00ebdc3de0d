"""What the data owner chose: the mode of a connection, and the rules by which rows may leave.

A `Protection` is the choice: a mechanism, the unit that it protects, and the ledger that counts.
Applied to a model it becomes a `ReleasePolicy`, which all sessions of a client share; what one
session does under it is `fedsea.client.protector`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TypeVar

import torch
from transformers import PreTrainedTokenizerBase

from fedsea.client.channel import format_of
from fedsea.errors import ConfigError
from fedsea.model.projection import Projection
from fedsea.privacy.accounts import DEFAULT_DELTA, Budget, Statement
from fedsea.privacy.calibration import Calibration
from fedsea.privacy.denoiser import Denoiser, Purpose
from fedsea.privacy.ledger import Account, Ledger, default_path
from fedsea.privacy.losses import PrivacyLoss
from fedsea.privacy.mechanism import Mechanism, Unit
from fedsea.privacy.noise import NoiseSource
from fedsea.privacy.registry import mechanism_from_spec
from fedsea.wire.codecs import Codec, RowFormat

BOS = "bos"
DEFAULT_TENANT = "default"

SHOWN_PRIOR = 0.01
"""How likely the attacker of the shown recovery bound guesses a token before seeing anything."""

PLAIN = (
    "no confidentiality against the server; splitting alone is data minimisation, whoever runs the "
    "trunk can try to invert the rows"
)

_Loaded = TypeVar("_Loaded", Projection, Calibration, Denoiser)


class Mode(StrEnum):
    """What protects the text from whoever runs the trunk."""

    PLAIN = "plain"
    """Nothing does."""
    NOISY = "noisy"
    """A mechanism whose releases a ledger counts."""
    ATTESTED = "attested"
    """Rows go only to a server that proved what it runs."""


@dataclass(frozen=True, slots=True)
class Cut:
    """Where rows leave: the model by its fingerprint, and the blocks that stay here."""

    model: str
    hidden_size: int
    bottom: int
    top: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Protection:
    """How rows are protected before they leave, and who counts what that costs.

    Attributes:
        mechanism: what is done to rows: a mechanism, or its spec such as
            "gaussian:clip_norm=20,mu=1".
        unit: what the guarantee protects. `token` holds only where no block runs here (bottom=0):
            blocks mix every token into all later rows.
        record: the name of the record that the text belongs to, for the unit `record`.
        tenant: whose account of the ledger is charged.
        ledger: file of the ledger; None for that of this user.
        budget: the most that the account may spend, kept in the ledger; None for the one that is
            kept there, or no limit.
        delta: at which epsilon is shown.
        public_prefix: how sequences begin that everybody may know: "bos" for the model's
            begin-of-text token, another text, or a number of tokens; 0 for nothing. A text is
            public only as a whole: what begins like it and goes on otherwise is not. Its rows cost
            nothing. They travel without noise, except that a mechanism which sends counts sends
            them as counts too: a session has one format.
        projection: makes rows narrow before the mechanism sees them; a pair or its file.
        calibration: public statistics whose mean is the centre of a spec's clipping.
        denoiser: restores what comes back, at this side; a denoiser or its file.
        noise: where randomness comes from; only tests give one.
    """

    mechanism: Mechanism | str
    unit: Unit | str = Unit.PROMPT
    record: str | None = None
    tenant: str = DEFAULT_TENANT
    ledger: str | Path | None = None
    budget: Budget | None = None
    delta: float = DEFAULT_DELTA
    public_prefix: str | int = BOS
    projection: Projection | str | Path | None = None
    calibration: Calibration | str | Path | None = None
    denoiser: Denoiser | str | Path | None = None
    noise: NoiseSource | None = field(default=None, repr=False)

    def applied(self, cut: Cut, codec: Codec, tokenizer: PreTrainedTokenizerBase) -> ReleasePolicy:
        """The rules for one client; opens the ledger.

        Args:
            cut: where rows leave.
            codec: how rows travel that are floats.
            tokenizer: of the model, for the public prefix.

        Raises:
            ConfigError: the parts do not fit each other or the model.
            CheckpointError, FingerprintMismatch: a file is corrupt, or for another model.
            LedgerError: the ledger cannot be used.
        """
        unit = self._unit(cut)
        projection = _loaded(Projection, self.projection)
        if projection is not None:
            projection.check_fits(cut.hidden_size, cut.bottom, cut.model)
            if projection.encoder is None:
                raise ConfigError(
                    "the projection has no encoder; give the client's half, or the whole pair"
                )
        width = cut.hidden_size if projection is None else projection.width
        mechanism = self._mechanism(cut, width, projection)
        denoiser = self._denoiser(cut, unit, mechanism, projection)
        public = PublicPrefix.of(self.public_prefix, tokenizer)
        with ledger_to_keep(self.ledger, self.delta) as ledger:
            account = ledger.account(self.tenant, unit, mechanism, self.record, self.budget)
        return ReleasePolicy(
            mechanism=mechanism,
            loss=mechanism.loss(),
            account=account,
            ledger=ledger,
            rows=format_of(mechanism, width, codec),
            public=public,
            projection=projection,
            denoiser=denoiser,
            noise=self.noise or NoiseSource(),
            delta=self.delta,
        )

    def _unit(self, cut: Cut) -> Unit:
        try:
            unit = Unit(self.unit)
        except ValueError:
            known = ", ".join(each.value for each in Unit)
            raise ConfigError(f"unit {self.unit!r} is not known; use {known}") from None
        if unit is Unit.TOKEN and cut.bottom:
            raise ConfigError(
                f"with bottom={cut.bottom} a token changes all later rows, so the unit token "
                "protects nothing; use unit prompt or record, or bottom=0"
            )
        return unit

    def _mechanism(self, cut: Cut, width: int, projection: Projection | None) -> Mechanism:
        calibration = _loaded(Calibration, self.calibration)
        if calibration is not None:
            named = "" if projection is None else projection.fingerprint()
            calibration.check_fits(width, cut.bottom, cut.model, named)
        chosen: Mechanism | None
        if isinstance(self.mechanism, str):
            center = None if calibration is None else calibration.mean
            chosen = mechanism_from_spec(self.mechanism, center, width)
        elif calibration is not None:
            raise ConfigError(
                "a calibration is the centre of a mechanism that is given by its spec; "
                "give this mechanism its own center, and no calibration"
            )
        else:
            chosen = self.mechanism
        if chosen is None:
            raise ConfigError("plain is no mechanism and protects nothing; leave privacy out")
        # A mechanism that is for rows of another width says so now, and not at the first prompt.
        chosen.protect(torch.zeros(1, width), NoiseSource())
        return chosen

    def _denoiser(
        self, cut: Cut, unit: Unit, mechanism: Mechanism, projection: Projection | None
    ) -> Denoiser | None:
        denoiser = _loaded(Denoiser, self.denoiser)
        if denoiser is None:
            return None
        if unit is Unit.TOKEN:
            raise ConfigError(
                "a denoiser lets every token of an answer depend on the clean rows before it, "
                "which the unit token does not count; use unit prompt or record"
            )
        named = "" if projection is None else projection.fingerprint()
        used = Purpose(cut.model, cut.bottom, cut.top, mechanism.spec(), named)
        denoiser.purpose.check(used)
        return denoiser


@dataclass(frozen=True, slots=True)
class PublicPrefix:
    """How sequences begin that everybody may know: these tokens, or so many, whatever they are.

    The first `alone` of the tokens are public without those that follow them.
    """

    ids: tuple[int, ...] = ()
    length: int = 0
    alone: int = 0

    @classmethod
    def of(cls, chosen: str | int, tokenizer: PreTrainedTokenizerBase) -> PublicPrefix:
        """From what `Protection.public_prefix` says.

        Raises:
            ConfigError: a negative number of tokens.
        """
        if isinstance(chosen, int):
            if chosen < 0:
                raise ConfigError(f"a public prefix of {chosen} tokens; give 0 or more")
            return cls(length=chosen)
        bos = tokenizer.bos_token_id
        if chosen == BOS:
            return cls() if bos is None else cls(ids=(int(bos),), alone=1)
        ids = tuple(tokenizer(chosen).input_ids)
        return cls(ids=ids, alone=int(bos is not None and ids[:1] == (bos,)))

    def reaches(self, start: int, tokens: Sequence[int]) -> int:
        """How many of the tokens from position `start` on are public, all before them being so.

        A private text that shares its first words with the public one must not give them away, so
        the tokens count as public when all that is left of the public text is there.
        """
        if self.length:
            return max(0, min(self.length - start, len(tokens)))
        for end in (len(self.ids), self.alone):
            left = self.ids[start:end]
            if left and tuple(tokens[: len(left)]) == left:
                return len(left)
        return 0


@dataclass(frozen=True, slots=True)
class ReleasePolicy:
    """The rules by which rows of one client leave; all its sessions share them.

    `rows` is the format in which they do, and `loss` what one release costs, None without
    differential privacy.
    """

    mechanism: Mechanism
    loss: PrivacyLoss | None
    account: Account
    ledger: Ledger = field(repr=False)
    rows: RowFormat
    public: PublicPrefix = field(repr=False)
    projection: Projection | None
    denoiser: Denoiser | None = field(repr=False)
    noise: NoiseSource = field(repr=False)
    delta: float

    @property
    def unit(self) -> Unit:
        """What the guarantee protects."""
        return self.account.unit

    @property
    def projection_name(self) -> str:
        """Fingerprint of the projection; "" for none."""
        return "" if self.projection is None else self.projection.fingerprint()

    def check_choice(self, way: str) -> None:
        """Refuse a way of choosing the tokens of an answer that looks at the tokens of the prompt.

        With the unit token an answer may depend on the prompt through what was released alone: a
        prompt's token that also decides which tokens are fed later changes more rows than its own.

        Raises:
            ConfigError: the unit is token.
        """
        if self.unit is Unit.TOKEN:
            raise ConfigError(
                f"{way} chooses tokens by those of the prompt, which the unit token does not "
                "count; leave it out, or use unit prompt or record"
            )

    def statement(self) -> Statement:
        """The account as it stands.

        Raises:
            LedgerError: the ledger cannot be read.
        """
        return self.account.statement()

    def spent(self, releases: int) -> Spent:
        """What so many charged releases of this mechanism amount to."""
        return Spent(releases, self.loss, self.unit, self.delta)

    def describe(self) -> str:
        """One line for people: what is done, what one release guarantees, and what is left.

        Raises:
            LedgerError: the ledger cannot be read.
        """
        narrowed = "" if self.projection is None else f" after a projection to {self.rows.width}"
        one = self.spent(1).guarantee()
        return (
            f"{self.mechanism.spec()}{narrowed}; one release: {one}; unit {self.unit.value}; "
            f"{account_line(self.statement(), self.delta)}"
        )

    def close(self) -> None:
        """Close the ledger."""
        self.ledger.close()


@dataclass(frozen=True, slots=True)
class Spent:
    """What an answer has cost: so many charged releases, each with this loss.

    `loss` is None for a mechanism that is not differentially private.
    """

    releases: int
    loss: PrivacyLoss | None
    unit: Unit
    delta: float

    def composed(self) -> PrivacyLoss | None:
        """All releases together; None without differential privacy."""
        return None if self.loss is None else self.loss.composed(self.releases)

    def guarantee(self) -> str:
        """mu, epsilon and the bound on recovery, in words."""
        if self.releases == 0:
            return "nothing was charged"
        loss = self.composed()
        if loss is None:
            return "not differentially private, a token may be recovered with certainty"
        return (
            f"mu {loss.mu():.4g}, epsilon {loss.epsilon(self.delta):.4g} at delta "
            f"{self.delta:g}, recovery of a token at most "
            f"{loss.recovery_bound(SHOWN_PRIOR):.2%} where a guess is right {SHOWN_PRIOR:.0%} "
            "of the time"
        )

    def describe(self) -> str:
        """One line for people."""
        return f"{self.releases} releases charged, unit {self.unit.value}: {self.guarantee()}"


@contextmanager
def ledger_to_keep(path: str | Path | None, delta: float) -> Iterator[Ledger]:
    """Open a ledger, None for that of this user; it stays open unless the block fails.

    Raises:
        ConfigError: epsilon cannot be told at this delta.
        LedgerError: the ledger cannot be used.
    """
    if not 0 < delta < 1:
        raise ConfigError(f"delta {delta} is no probability: give one between 0 and 1")
    with ExitStack() as stack:
        yield stack.enter_context(Ledger.open(path if path is not None else default_path()))
        stack.pop_all()


def account_line(statement: Statement, delta: float) -> str:
    """What an account has spent and what its budget leaves."""
    spending = statement.spending()
    if spending.is_unbounded:
        spent = "without a guarantee"
    else:
        spent = f"epsilon {spending.epsilon(delta):.4g} at delta {delta:g}"
    budget = "no budget" if statement.budget is None else f"budget {statement.budget}"
    return f"spent {statement.releases} releases, {spent}; {budget}"


def _loaded(kind: type[_Loaded], given: _Loaded | str | Path | None) -> _Loaded | None:
    return kind.load(given) if isinstance(given, str | Path) else given
