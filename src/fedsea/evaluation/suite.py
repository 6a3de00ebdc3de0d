"""The red team's suite: every mechanism on a cut, every attack on what it released.

The order is that of an experiment. The clean channel comes first: it gives the utility without
protection, what each attack can do at best, and the check that the attacks work at all. Where there
is a projection, it then stands at the cut alone: what it leaves out is lost to attacker and model
alike, and is not the merit of a mechanism. Then each mechanism protects the same texts, behind the
projection, through the client's own path, and is attacked and measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from fedsea.errors import ConfigError
from fedsea.evaluation import utility as usefulness
from fedsea.evaluation.finding import Score, rate_of, rates_by_class
from fedsea.evaluation.lineup import Lineup, check_attacks
from fedsea.evaluation.texts import Ids, Texts
from fedsea.evaluation.utility import Reading
from fedsea.evaluation.verdict import FLOOR_ATTACK
from fedsea.evaluation.victim import Observed, Victim, load_trunk
from fedsea.model.checkpoint import Checkpoint
from fedsea.model.partition import Partition
from fedsea.model.projection import Projection
from fedsea.privacy.denoiser import Denoiser, Purpose
from fedsea.privacy.mechanism import Mechanism
from fedsea.redteam.attack import TextGuess
from fedsea.redteam.knowledge import Knowledge, Level
from fedsea.redteam.prior import prior_only
from fedsea.redteam.report import PLAIN, PRIOR_ATTACK, Row, Utility
from fedsea.redteam.rotation import Rotation
from fedsea.redteam.view import ServerView

Progress = Callable[[str, int, int], None]

# What the client decodes, not what it sent, is what this attack reads.
_ANSWER_ATTACK = "r5"
# Secret rotations are no mechanisms: they are attacked only to show that they break.
_ROTATION_ATTACK = "r6"
_ROTATIONS = {"rotation": Rotation.random, "permutation": Rotation.permutation}
_ROTATION_SEED = 1
_ROTATION_SAYS = "not private: norms and inner products stay, and name the tokens"
_PLAIN_SAYS = "not private: splitting alone hides nothing from who runs the trunk"
_NARROW_SAYS = "not private: everybody knows the projection, and what it keeps names the tokens"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to attack, how, and what the attacker holds.

    Attributes:
        model: folder of the client's checkpoint.
        partition: where it is cut.
        texts: what is secret and what is public.
        mechanisms: what protects, one after the other; the clean channel is always attacked too.
        attacks: names from `lineup.ATTACKS`; R1 always reads the clean channel.
        level: what the attacker holds.
        base: folder of the public checkpoint that an attacker uses; the client's own by default.
        projection: file of the pair that narrows rows before they are protected; attackers know it.
        denoiser: file of the denoiser that the client restores answers with, under the mechanism
            that it was trained for; attackers do not have it.
        answers: how many prompts are answered, to compare greedy generation.
        answer_tokens: how long these answers are at most.
    """

    model: Path
    partition: Partition
    texts: Texts
    mechanisms: tuple[Mechanism, ...] = ()
    attacks: tuple[str, ...] = ("nn", "r1", "r2")
    level: Level = Level.BASE
    base: Path | None = None
    projection: Path | None = None
    denoiser: Path | None = None
    answers: int = 4
    answer_tokens: int = 24


@dataclass(frozen=True, slots=True)
class _Channel:
    """What one mechanism released, and what it left of the model."""

    mechanism: Mechanism | None
    projection: Projection | None
    denoised: bool
    observed: tuple[Observed, ...]
    views: tuple[ServerView, ...]
    readings: tuple[Reading, ...]
    answers: tuple[Ids, ...]


def evaluate(plan: Plan, progress: Progress | None = None) -> list[Row]:
    """Run a plan; rows come in the order of its mechanisms, the clean channel first.

    Args:
        plan: what to do.
        progress: called with what is done now, the channels done, and the channels in all.

    Raises:
        ConfigError: an unknown attack, or a part that does not fit the model or the others.
        FedseaError: whatever the client raises.
    """
    check_plan(plan)
    tell = progress or _silent
    narrowed = [] if plan.projection is None else [None]
    behind: list[Mechanism | None] = [*narrowed, *plan.mechanisms]
    steps = 1 + len(behind)
    tell("the clean channel", 0, steps)
    with _Suite(plan) as suite:
        rows = [*suite.attack(suite.clean), *suite.attack_rotations()]
        for done, mechanism in enumerate(behind, start=1):
            tell("the projection" if mechanism is None else mechanism.spec(), done, steps)
            rows += suite.attack(suite.channel(mechanism, suite.projection))
    tell("done", steps, steps)
    return rows


def check_plan(plan: Plan) -> None:
    """Refuse what can be refused before anything runs.

    Raises:
        ConfigError: an attack that is not known or cannot be run, a projection or a denoiser for
            something else.
        CheckpointError, FingerprintMismatch: a file is corrupt, or for another checkpoint.
    """
    check_attacks(plan.attacks, has_weights=plan.level is not Level.BLACK_BOX)
    if plan.projection is None and plan.denoiser is None:
        return
    checkpoint = Checkpoint.open(plan.model)
    projection = _projection(plan)
    if projection is not None:
        projection.check_fits(
            checkpoint.hidden_size, plan.partition.bottom, checkpoint.fingerprint()
        )
        if projection.encoder is None or projection.decoder is None:
            raise ConfigError(
                "the red team runs both sides and needs both halves of the projection; "
                "give the whole pair"
            )
    if plan.denoiser is not None:
        _check_denoiser(plan, Denoiser.load(plan.denoiser).purpose, projection, checkpoint)


def _check_denoiser(
    plan: Plan, purpose: Purpose, projection: Projection | None, checkpoint: Checkpoint
) -> None:
    if not any(mechanism.spec() == purpose.mechanism for mechanism in plan.mechanisms):
        raise ConfigError(
            f"the denoiser was trained for '{purpose.mechanism}', which is not attacked here; "
            "give this mechanism"
        )
    named = "" if projection is None else projection.fingerprint()
    used = replace(
        purpose,
        model=checkpoint.fingerprint(),
        bottom=plan.partition.bottom,
        top=plan.partition.top,
        projection=named,
    )
    purpose.check(used)


def _projection(plan: Plan) -> Projection | None:
    return None if plan.projection is None else Projection.load(plan.projection)


def public_rows(plan: Plan, most: int = 64) -> list[Tensor]:
    """Rows [n, width] at the cut of some public texts, as a client without a mechanism sends them.

    A sweep takes its clip norms from them.
    """
    with Victim(plan.model, plan.partition, projection=plan.projection) as victim:
        first = len(plan.texts.prefix)
        return [_sent(_view(victim, ids))[first:] for ids in plan.texts.public[:most]]


class _Suite:
    """One cut of one model under attack; the attacker may ask a client of its own."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self.projection = _projection(plan)
        self._denoised = (
            None if plan.denoiser is None else Denoiser.load(plan.denoiser).purpose.mechanism
        )
        self._trunk = load_trunk(plan.model, plan.projection)
        self._first = len(plan.texts.prefix)
        self._own_client = Victim(plan.model, plan.partition, self._trunk)
        self.clean = self.channel(None)
        self._clean_rows = [_sent(view)[self._first :] for view in self.clean.views]
        self._clean_utility = self._utility(self.clean)
        self._best: dict[str, float] = {}
        self._lineup = Lineup(self._knowledge(), plan.texts.public)
        model = self._lineup.knowledge.language_model
        self._prior = [prior_only(ids, self._first, model) for ids in plan.texts.secret]
        self._prior_rate = rate_of(self._scores(PRIOR_ATTACK, self.clean, self._prior)).recovery
        # After the prior, so that its language model is loaded once for both.
        self._behind = self._lineup
        if self.projection is not None:
            known = self._lineup.knowledge.behind(self.projection)
            self._behind = Lineup(known, plan.texts.public)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._own_client.close()

    def channel(
        self, mechanism: Mechanism | None, projection: Projection | None = None
    ) -> _Channel:
        """Send the texts through the client's own path, and have some prompts answered."""
        plan = self._plan
        secret = plan.texts.secret
        denoised = mechanism is not None and mechanism.spec() == self._denoised
        with Victim(
            plan.model,
            plan.partition,
            self._trunk,
            mechanism,
            plan.texts.prefix,
            None if projection is None else plan.projection,
            plan.denoiser if denoised else None,
        ) as victim:
            observed = tuple(victim.read(ids) for ids in secret)
            answers = tuple(
                victim.answer(ids[: len(ids) // 2], plan.answer_tokens)
                for ids in secret[: plan.answers]
            )
            hidden = victim.llm.checkpoint.hidden_size
        return _Channel(
            mechanism=mechanism,
            projection=projection,
            denoised=denoised,
            observed=observed,
            # A view for each text: they are told apart even where they begin alike.
            views=tuple(ServerView(seen.messages, hidden) for seen in observed),
            readings=tuple(usefulness.read(seen.logits, seen.ids) for seen in observed),
            answers=answers,
        )

    def attack(self, channel: _Channel) -> list[Row]:
        """One row for each attack, the guess first."""
        names = list(self._plan.attacks)
        utility = self._utility(channel)
        rows = []
        is_clean = channel is self.clean
        if not is_clean and _ROTATION_ATTACK in names:
            names.remove(_ROTATION_ATTACK)
        if is_clean:
            rows.append(self._row(PRIOR_ATTACK, channel, utility, self._prior))
            if self._plan.level is not Level.BLACK_BOX and FLOOR_ATTACK not in names:
                names.insert(0, FLOOR_ATTACK)
        for name in names:
            lineup = self._lineup if channel.projection is None else self._behind
            guesses = [lineup.run(name, view, channel.mechanism) for view in channel.views]
            texts = [text for guess in guesses for text in guess.texts]
            seconds = sum(guess.seconds for guess in guesses)
            rows.append(self._row(name, channel, utility, texts, seconds))
        return rows

    def attack_rotations(self) -> list[Row]:
        """What a secret rotation, and a secret order of coordinates, are worth without noise.

        They are applied to what the plain client sent; a provider who computes with weights
        rotated alike would return the same answers, so the utility is that of the clean channel.
        """
        if _ROTATION_ATTACK not in self._plan.attacks:
            return []
        rows = []
        for name, make in _ROTATIONS.items():
            for attack in ("nn", _ROTATION_ATTACK):
                began = time.perf_counter()
                texts = [self._read_rotated(view, attack, make) for view in self.clean.views]
                seconds = time.perf_counter() - began
                row = self._row(attack, self.clean, self._clean_utility, texts, seconds)
                rows.append(replace(row, mechanism=name, parameters=name, guarantee=_ROTATION_SAYS))
        return rows

    def _read_rotated(
        self, view: ServerView, attack: str, make: Callable[[int, int], Rotation]
    ) -> TextGuess:
        (chain,) = view.chains()
        secret = make(view.hidden_size, _ROTATION_SEED)
        rotated = replace(
            chain, releases=tuple(secret.apply(chain.values(at)) for at in range(len(chain)))
        )
        return self._lineup.attack(attack, None).read(rotated, self._lineup.knowledge, None)

    def _row(
        self,
        attack: str,
        channel: _Channel,
        utility: Utility,
        guesses: Sequence[TextGuess],
        seconds: float = 0.0,
    ) -> Row:
        plan, mechanism = self._plan, channel.mechanism
        scores = self._scores(attack, channel, guesses)
        total = rate_of(scores)
        projection = channel.projection
        if channel is self.clean:
            self._best.setdefault(attack, total.recovery)
        loss = None if mechanism is None else mechanism.loss()
        return Row(
            attack=attack,
            model=plan.model.name,
            bottom=plan.partition.bottom,
            top=plan.partition.top,
            mechanism=PLAIN if mechanism is None else mechanism.name,
            parameters=PLAIN if mechanism is None else mechanism.spec(),
            knowledge=plan.level.value,
            recovery=total.recovery,
            low=total.low,
            high=total.high,
            tokens=total.tokens,
            prior=self._prior_rate,
            clean=self._best.get(attack),
            utility=utility,
            clean_utility=self._clean_utility,
            noise=self._noise(channel),
            by_class=rates_by_class(scores),
            guarantee=_guarantee(channel),
            mu=None if loss is None else loss.mu(),
            bound=None if mechanism is None else self._bound(mechanism),
            seconds=seconds,
            details=_means(guesses),
            width=None if projection is None else projection.width,
            projection="" if projection is None else projection.fingerprint(),
            denoised=channel.denoised,
        )

    def _scores(self, attack: str, channel: _Channel, guesses: Sequence[TextGuess]) -> list[Score]:
        """One for each token that is to be found: of the texts, or of what the client decodes."""
        texts = self._plan.texts
        found = []
        for number, guess in enumerate(guesses):
            if attack == _ANSWER_ATTACK:
                truth = channel.readings[number].first.tolist()
                kinds = [""] * len(truth)
            else:
                truth = list(texts.secret[number])
                kinds = list(texts.kinds[number]) if texts.kinds else [""] * len(truth)
            found += [
                Score(kind, named == token)
                for kind, named, token in zip(kinds, guess.ids, truth, strict=True)
            ][self._first :]
        return found

    def _utility(self, channel: _Channel) -> Utility:
        clean = self.clean
        return usefulness.utility(channel.readings, clean.readings, channel.answers, clean.answers)

    def _noise(self, channel: _Channel) -> float:
        """Root mean square of what became of the rows before the trunk, in units of the rows."""
        if channel is self.clean:
            return 0.0
        released = torch.cat([_sent(view)[self._first :] for view in channel.views])
        if channel.projection is not None:
            released = channel.projection.decode(released)
        clean = torch.cat(self._clean_rows)
        return float((released - clean).norm() / clean.norm())

    def _bound(self, mechanism: Mechanism) -> float | None:
        """Most that any attacker with this prior recovers of one token.

        Without blocks before the cut a token is in one row. Behind blocks it is in all later rows
        too, and the losses of a whole text compose.
        """
        loss = mechanism.loss()
        if loss is None or not 0 < self._prior_rate < 1:
            return None
        if self._plan.partition.bottom:
            longest = max(len(ids) for ids in self._plan.texts.secret) - self._first
            loss = loss.composed(mechanism.releases(longest))
        return loss.recovery_bound(self._prior_rate)

    def _knowledge(self) -> Knowledge:
        plan = self._plan
        public = Checkpoint.open(plan.base or plan.model)
        if plan.level is Level.BLACK_BOX:
            return Knowledge.black_box(
                lambda ids: _sent(_view(self._own_client, ids.tolist())),
                int(public.config.vocab_size),
                plan.partition,
                public=public,
                public_prefix=plan.texts.prefix,
            )
        held = public if plan.level is Level.BASE else Checkpoint.open(plan.model)
        return Knowledge.of_weights(
            held,
            plan.partition,
            level=plan.level,
            public=public,
            public_prefix=plan.texts.prefix,
        )


def _guarantee(channel: _Channel) -> str:
    if channel.mechanism is not None:
        return channel.mechanism.describe()
    return _PLAIN_SAYS if channel.projection is None else _NARROW_SAYS


def _view(victim: Victim, ids: Sequence[int]) -> ServerView:
    return ServerView(victim.read(ids).messages, victim.llm.checkpoint.hidden_size)


def _sent(view: ServerView) -> Tensor:
    """The released rows of the one text of a view, as the server computes with them."""
    (chain,) = view.chains()
    return chain.means()


def _means(guesses: Sequence[TextGuess]) -> dict[str, float]:
    """The attack's own numbers, averaged over texts."""
    names = {name for guess in guesses for name in guess.numbers}
    return {
        name: sum(guess.numbers.get(name, 0.0) for guess in guesses) / len(guesses)
        for name in sorted(names)
    }


def _silent(doing: str, done: int, steps: int) -> None:
    """Progress that nobody looks at."""
