"""The red team's suite for training: what crosses the cuts in fine-tuning, and what is released after.

One run of training for each pair of mechanisms, by the real client against a real server. The first
steps are attacked by R3 on the gradients and, where asked for, by a decoder on the rows; at the end
the released adapter is attacked by R8. The clean run comes first: it gives the scale of gradients, by
which noise is measured, the use of the model without protection, and the check of the attacks. R7
attacks updates of the bottom in short runs of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from fedsea.client.examples import Example
from fedsea.errors import ConfigError
from fedsea.evaluation import released_update
from fedsea.evaluation import utility as usefulness
from fedsea.evaluation.finding import Finding, Score, rate_of
from fedsea.evaluation.released_adapter import ReleasedAdapter
from fedsea.evaluation.training_victim import Guarded, StepTaken, TrainingVictim
from fedsea.evaluation.utility import Reading
from fedsea.evaluation.verdict import FIRST_GRADIENTS
from fedsea.evaluation.victim import server_config
from fedsea.model.checkpoint import Checkpoint
from fedsea.model.lora import Adapter, LoraConfig
from fedsea.model.partition import Partition
from fedsea.privacy.clipping import Clipping
from fedsea.privacy.gaussian import FedSEAGaussian, Gaussian
from fedsea.privacy.losses import PrivacyLoss
from fedsea.privacy.mechanism import Mechanism
from fedsea.redteam.attack import Attack, TextGuess
from fedsea.redteam.exchange import Exchange, Scored
from fedsea.redteam.inverter import Architecture, Inverter, Recipe
from fedsea.redteam.knowledge import Knowledge, Level
from fedsea.redteam.language_model import LanguageModel
from fedsea.redteam.prefix import PrefixSearch
from fedsea.redteam.report import PLAIN, PRIOR_ATTACK, Row
from fedsea.redteam.return_gradient import ClosedForm, Refined, ReturnGradient
from fedsea.redteam.training_view import StepSeen
from fedsea.redteam.view import Chain
from fedsea.server import loading

Progress = Callable[[str, int, int], None]
Decode = Callable[[Sequence[int]], str]

ATTACKS = ("r1", "r3", "r3t", "r4t", "r7", "r8")
_ON_GRADIENTS = frozenset({"r3", "r3t"})
_ON_ROWS = frozenset({"r1", "r4t"})
_PLAIN_SAYS = "not private: splitting alone hides nothing from who runs the trunk"
_UPDATE_STEPS = 8
_MEASURED = 8  # held-out texts that say what is left of the model
ROWS = "rows of training"


@dataclass(frozen=True, slots=True)
class TrainingData:
    """What is trained on and attacked, and what attackers may learn from.

    Attributes:
        examples: the training data; the first ones are attacked.
        held_out: texts that were not trained on, as many as possible: R8 has to tell them from the
            examples, and the first ones measure the model's use.
        public: texts that everybody has.
        prefix: ids with which every text begins, known to everybody.
        kinds: for each example what each of its answer tokens is, for rates by kind; may be empty.
        choices: the only tokens that answers are made of, as in classification; empty for all.
    """

    examples: tuple[Example, ...]
    held_out: tuple[tuple[int, ...], ...]
    public: tuple[tuple[int, ...], ...]
    prefix: tuple[int, ...] = ()
    kinds: tuple[tuple[str, ...], ...] = ()
    choices: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        kinds = [len(each) for each in self.kinds]
        if not self.examples or not self.held_out:
            raise ConfigError("the red team needs examples to train on, and others held out")
        if self.kinds and kinds != [example.answer_tokens for example in self.examples]:
            raise ConfigError("give a kind for every answer token of every example, or none")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingPlan:
    """What to train, how it is protected, and what attacks it.

    Attributes:
        model: folder of the checkpoint.
        partition: where it is cut.
        data: what is trained on.
        guards: pairs of mechanisms, one run for each; the clean run is always made.
        gradient_noise: further runs with noise on gradients only, by its size in units of the root
            mean square of the gradients of the clean first step; without clipping.
        gradient_mu: further runs with a Gaussian mechanism on gradients only, by its mu for one
            example, clipped to the median norm of the examples of the clean first step.
        attacks: names from `ATTACKS`.
        lora: what is trained.
        batch: examples of a step.
        steps: of a run.
        attacked: steps whose exchanges are attacked, the first ones.
        learning_rate: constant.
        canaries: texts that are put into the training data or left out by a coin; 0 for none.
        ranks: of the adapters whose updates R7 attacks.
        decode: token ids to text; with it the decoder's text is scored by ROUGE and BLEU.
        recipe: of the decoder.
        refined: R3's second form.
        seed: of factors, order and canaries.
    """

    model: Path
    partition: Partition
    data: TrainingData
    guards: tuple[Guarded, ...] = ()
    gradient_noise: tuple[float, ...] = ()
    gradient_mu: tuple[float, ...] = ()
    attacks: tuple[str, ...] = ("r3", "r3t")
    lora: LoraConfig = field(default_factory=LoraConfig)
    batch: int = 4
    steps: int = 30
    attacked: int = 2
    learning_rate: float = 2e-3
    canaries: int = 0
    ranks: tuple[int, ...] = (4, 16)
    decode: Decode | None = field(default=None, repr=False)
    recipe: Recipe = field(default_factory=lambda: Recipe(architecture=Architecture.TRANSFORMER))
    refined: Refined = field(default_factory=Refined)
    seed: int = 0

    def __post_init__(self) -> None:
        for name in self.attacks:
            if name not in ATTACKS:
                raise ConfigError(
                    f"attack {name!r} is not known for training: use some of {', '.join(ATTACKS)}"
                )
        if not self.attacks or min(self.batch, self.steps, self.attacked) < 1:
            raise ConfigError("give an attack, and 1 or more steps, attacked steps and examples")
        if self.attacked > self.steps or self.attacked * self.batch > len(self.data.examples):
            raise ConfigError(
                f"{self.attacked} steps of {self.batch} are to be attacked: train as many, with "
                "other examples in each"
            )
        if not all(size > 0 for size in (*self.gradient_noise, *self.gradient_mu)):
            raise ConfigError("noise and mu on gradients are above 0; none is the clean run")
        if "r7" in self.attacks and self.partition.bottom < 1:
            raise ConfigError("R7 attacks updates of the bottom's blocks: give it one, or leave it")


@dataclass(frozen=True, slots=True, eq=False)
class _Run:
    """What one training gave."""

    guarded: Guarded
    taken: tuple[StepTaken, ...]
    seen: tuple[StepSeen, ...]
    written: Chain
    readings: tuple[Reading, ...]
    released: Adapter | None


def evaluate_training(plan: TrainingPlan, progress: Progress | None = None) -> list[Row]:
    """Run a plan; rows come in the order of its runs, the clean one first.

    Args:
        plan: what to do.
        progress: called with what is done now, the runs done, and the runs in all.

    Raises:
        ConfigError: parts that do not fit the model or each other.
        FedseaError: whatever the client raises.
    """
    tell = progress or (lambda *_: None)
    count = 1 + len(plan.guards) + len(plan.gradient_noise) + len(plan.gradient_mu)
    tell("the clean run", 0, count)
    suite = _Suite(plan)
    rows = suite.rows(suite.clean)
    for done, guarded in enumerate((*plan.guards, *suite.noisy()), start=1):
        tell(_spec(guarded), done, count)
        rows += suite.rows(suite.run(guarded))
    tell("done", count, count)
    return rows


class _Suite:
    """One cut of one model under attack in training."""

    def __init__(self, plan: TrainingPlan) -> None:
        self._plan = plan
        self._checkpoint = Checkpoint.open(plan.model)
        plan.partition.trunk_span(self._checkpoint.num_blocks)
        self._trunk = loading.load(server_config(plan.model))
        self._knowledge = Knowledge.of_weights(
            self._checkpoint, plan.partition, public_prefix=plan.data.prefix
        )
        self._released = self._release_attacker()
        self._decoders: dict[Mechanism | None, Inverter] = {}
        self._best: dict[tuple[str, str, str], float] = {}
        self.clean = self.run(Guarded())
        self._clean_utility = usefulness.utility(self.clean.readings, self.clean.readings)

    def noisy(self) -> list[Guarded]:
        """The runs whose noise is measured by the clean gradients."""
        exchanges = self.clean.seen[0].exchanges
        whole = torch.cat([exchange.gradient for exchange in exchanges])
        unit = float(whole.square().mean().sqrt()) / math.sqrt(math.pi / 2)
        norms = torch.stack([exchange.gradient.norm() for exchange in exchanges])
        radius = _rounded(float(norms.median()))
        plan = self._plan
        return [
            *(
                Guarded(gradients=FedSEAGaussian(_rounded(size * unit)))
                for size in plan.gradient_noise
            ),
            *(
                Guarded(gradients=Gaussian(radius, mu, Clipping.FROBENIUS))
                for mu in plan.gradient_mu
            ),
        ]

    def run(self, guarded: Guarded, plan: TrainingPlan | None = None) -> _Run:
        """Train, and keep what the server saw and what came out."""
        plan = plan or self._plan
        batches = self._batches(plan)
        with TrainingVictim(
            plan.model, plan.partition, plan.lora, guarded, self._trunk, plan.seed
        ) as victim:
            taken = tuple(victim.step(batch, plan.learning_rate) for batch in batches)
            view = victim.view()
            texts = plan.data.held_out[:_MEASURED]
            readings = tuple(usefulness.read(victim.read(ids), torch.tensor(ids)) for ids in texts)
            released = victim.released() if "r8" in plan.attacks else None
        return _Run(guarded, taken, view.steps, view.chains()[0], readings, released)

    def rows(self, run: _Run) -> list[Row]:
        """All that is asked for about one run."""
        plan = self._plan
        is_clean = run is self.clean
        rows = self._gradient_rows(run)
        found = [self._text(name, run) for name in plan.attacks if name in _ON_ROWS]
        if is_clean and "r7" in plan.attacks:
            found += self._updates()
        if self._released is not None and run.released is not None:
            tuned = LanguageModel.load(self._checkpoint, run.released)
            found += self._released.findings(tuned, f"adapter after {plan.steps} steps")
        return [*rows, *(self._row(finding, run) for finding in found)]

    def _gradient_rows(self, run: _Run) -> list[Row]:
        """R3 on the first steps; of the clean run on the last step too, with its top leaked or not."""
        plan = self._plan
        known: dict[str, ReturnGradient] = {"r3": ClosedForm(), "r3t": plan.refined}
        attacks = [known[name] for name in plan.attacks if name in _ON_GRADIENTS]
        if not attacks:
            return []
        first = slice(0, plan.attacked)
        rows = [
            self._row(self._gradients(each, run, FIRST_GRADIENTS, first), run) for each in attacks
        ]
        if run is not self.clean:
            return rows
        examples = [each for taken in run.taken[first] for each in taken.examples]
        scores = self._label_scores(examples, self._expected(examples))
        guess = Finding.of(PRIOR_ATTACK, FIRST_GRADIENTS, scores, rate_of(scores).recovery)
        rows.insert(0, self._row(guess, run))
        if plan.steps > plan.attacked:
            last, exposed = slice(plan.steps - 1, plan.steps), f"gradients of step {plan.steps}"
            for is_leaked in (False, True):
                seen = f"{exposed}, top leaked" if is_leaked else exposed
                found = self._gradients(attacks[-1], run, seen, last, is_leaked=is_leaked)
                rows.append(self._row(found, run, Level.LEAKED if is_leaked else Level.BASE))
        return rows

    def _gradients(
        self,
        attack: ReturnGradient,
        run: _Run,
        exposed: str,
        steps: slice,
        *,
        is_leaked: bool = False,
    ) -> Finding:
        """R3 on the exchanges of some steps."""
        top = self._knowledge.top
        guesses: list[TextGuess] = []
        examples: list[Example] = []
        seconds = 0.0
        for taken, seen in zip(run.taken[steps], run.seen[steps], strict=True):
            adapter = taken.top if is_leaked else None
            if adapter is not None:
                top.span.accept(adapter)
            pairs = list(zip(seen.exchanges, self._scored(taken, seen), strict=True))
            guess = attack.run(pairs, top, run.guarded.gradients, adapter)
            guesses += guess.texts
            examples += taken.examples
            seconds += guess.seconds
        scores = self._label_scores(examples, guesses)
        prior = rate_of(self._label_scores(examples, self._expected(examples))).recovery
        return Finding.of(attack.name, exposed, scores, prior, seconds=seconds)

    def _scored(self, taken: StepTaken, seen: StepSeen) -> list[Scored]:
        total = sum(example.answer_tokens for example in taken.examples)
        found = []
        for example in taken.examples:
            marks = torch.zeros(example.rows, dtype=torch.bool)
            marks[list(example.predicting)] = True
            found.append(Scored(marks, total, seen.scale, self._plan.data.choices))
        return found

    def _label_scores(
        self, examples: Sequence[Example], guesses: Sequence[TextGuess]
    ) -> list[Score]:
        kinds = dict(zip(self._plan.data.examples, self._plan.data.kinds, strict=False))
        found = []
        for example, guess in zip(examples, guesses, strict=True):
            named = [guess.ids[row] for row in example.predicting]
            own = kinds.get(example, ("",) * example.answer_tokens)
            found += [
                Score(kind, name == token)
                for kind, name, token in zip(own, named, example.targets, strict=True)
            ]
        return found

    def _expected(self, examples: Sequence[Example]) -> list[TextGuess]:
        """The public model's first choice after the true text, of the choices that there are."""
        choices = torch.tensor(self._plan.data.choices, dtype=torch.long)
        found = []
        for example in examples:
            expected = self._knowledge.language_model.expect(example.inputs)
            if len(choices):
                expected = torch.full_like(expected, -torch.inf).index_copy(
                    1, choices, expected[:, choices]
                )
            found.append(TextGuess(tuple(expected.argmax(dim=1).tolist())))
        return found

    def _text(self, name: str, run: _Run) -> Finding:
        """A decoder, or the prefix search, on the rows of the attacked steps."""
        plan = self._plan
        mechanism = run.guarded.rows
        attack: Attack = PrefixSearch() if name == "r1" else self._decoder(mechanism)
        first, attacked = len(plan.data.prefix), plan.attacked
        examples = [each for taken in run.taken[:attacked] for each in taken.examples]
        found = [
            attack.read(_chain(exchange, run.written), self._knowledge, mechanism).ids
            for seen in run.seen[:attacked]
            for exchange in seen.exchanges
        ]
        guessed = [
            (example.inputs[0], *text.ids[:-1])
            for example, text in zip(examples, self._next_tokens(examples), strict=True)
        ]
        details = self._overlap(examples, found) | {
            f"guess_{name}": value for name, value in self._overlap(examples, guessed).items()
        }
        prior = rate_of(_text_scores(examples, guessed, first)).recovery
        return Finding.of(name, ROWS, _text_scores(examples, found, first), prior, details)

    def _next_tokens(self, examples: Sequence[Example]) -> list[TextGuess]:
        model = self._knowledge.language_model
        return [
            TextGuess(tuple(model.expect(example.inputs).argmax(dim=1).tolist()))
            for example in examples
        ]

    def _decoder(self, mechanism: Mechanism | None) -> Inverter:
        """That of a malicious client, trained with the same bottom and noise."""
        if mechanism not in self._decoders:
            public, recipe = self._plan.data.public, self._plan.recipe
            self._decoders[mechanism] = Inverter.train(self._knowledge, mechanism, public, recipe)
        return self._decoders[mechanism]

    def _overlap(
        self, examples: Sequence[Example], texts: Sequence[tuple[int, ...]]
    ) -> dict[str, float]:
        """ROUGE and BLEU of recovered texts, as the FedSEA paper reports its decoder."""
        decode = self._plan.decode
        if decode is None:
            return {}
        from fedsea.tasks.overlap import bleu, rouge

        first = len(self._plan.data.prefix)
        found = [decode(ids[first:]) for ids in texts]
        truth = [[decode(example.inputs[first:])] for example in examples]
        return {**rouge(found, truth), **bleu(found, truth)}

    def _updates(self) -> list[Finding]:
        """R7 by rank and batch, of the first step and of a later one."""
        plan = self._plan
        found = []
        for rank in plan.ranks:
            for batch in dict.fromkeys((1, plan.batch)):
                lora = replace(plan.lora, rank=rank)
                short = replace(
                    plan, lora=lora, batch=batch, steps=_UPDATE_STEPS, attacked=1, attacks=("r7",)
                )
                taken = self.run(Guarded(), short).taken
                texts = "1 text" if batch == 1 else f"{batch} texts"
                for number in (1, _UPDATE_STEPS):
                    found += released_update.findings(
                        self._checkpoint,
                        plan.partition.bottom_span(),
                        taken[number - 1],
                        plan.learning_rate,
                        plan.data.public,
                        plan.data.prefix,
                        f"rank {rank}, {texts}, step {number}",
                    )
        return found

    def _release_attacker(self) -> ReleasedAdapter | None:
        plan = self._plan
        if "r8" not in plan.attacks:
            return None
        return ReleasedAdapter(
            self._knowledge.language_model,
            [example.ids for example in plan.data.examples],
            plan.data.held_out,
            plan.data.public,
            plan.data.prefix,
            plan.canaries,
            plan.seed,
        )

    def _batches(self, plan: TrainingPlan) -> list[list[Example]]:
        """The attacked steps in the order of the data; then everything, shuffled, time and again."""
        size = plan.batch
        front = plan.data.examples[: plan.attacked * size]
        batches = [list(front[at : at + size]) for at in range(0, len(front), size)]
        planted = () if self._released is None else self._released.planted
        everything = (*plan.data.examples, *planted)
        generator = torch.Generator().manual_seed(plan.seed)
        rest: list[Example] = []
        while len(batches) < plan.steps:
            while len(rest) < size:
                order = torch.randperm(len(everything), generator=generator).tolist()
                rest += [everything[number] for number in order]
            batches.append(rest[:size])
            rest = rest[size:]
        return batches

    def _row(self, found: Finding, run: _Run, level: Level = Level.BASE) -> Row:
        plan, guarded = self._plan, run.guarded
        on_rows = found.attack in _ON_ROWS
        mechanism = guarded.rows if on_rows else guarded.gradients
        seen = on_rows or found.attack in _ON_GRADIENTS
        loss = mechanism.loss() if mechanism is not None and seen else None
        row = Row(
            attack=found.attack,
            model=plan.model.name,
            bottom=plan.partition.bottom,
            top=plan.partition.top,
            mechanism=_names(guarded),
            parameters=_spec(guarded),
            knowledge=level.value,
            recovery=found.rate.recovery,
            low=found.rate.low,
            high=found.rate.high,
            tokens=found.rate.tokens,
            prior=found.prior,
            clean=None,
            utility=usefulness.utility(run.readings, self.clean.readings),
            clean_utility=self._clean_utility,
            noise=0.0 if mechanism is None else self._noise(run, on_rows),
            by_class=found.by_class,
            guarantee=_guarantee(guarded),
            mu=None if loss is None else loss.mu(),
            bound=self._bound(mechanism, loss, found.prior),
            seconds=found.seconds,
            details=found.details,
            exposed=found.exposed,
        )
        key = row.attack, row.exposed, row.knowledge
        if row.is_clean:
            self._best[key] = row.recovery
        return replace(row, clean=self._best.get(key))

    def _bound(
        self, mechanism: Mechanism | None, loss: PrivacyLoss | None, prior: float
    ) -> float | None:
        """Most that any attacker with this prior recovers of one token of an example."""
        if mechanism is None or loss is None or not 0 < prior < 1:
            return None
        longest = max(example.rows for example in self._plan.data.examples)
        return loss.composed(mechanism.releases(longest)).recovery_bound(prior)

    def _noise(self, run: _Run, on_rows: bool) -> float:
        """Root mean square of what was added in the first step, in units of what was there."""
        pairs = zip(run.seen[0].exchanges, self.clean.seen[0].exchanges, strict=True)
        sent, clean = [], []
        for noisy, plain in pairs:
            sent.append(_chain(noisy, run.written).means() if on_rows else noisy.gradient)
            clean.append(_chain(plain, self.clean.written).means() if on_rows else plain.gradient)
        whole = torch.cat(clean)
        return float((torch.cat(sent) - whole).norm() / whole.norm())


def _chain(exchange: Exchange, written: Chain) -> Chain:
    """The rows of one sequence that went up."""
    assert exchange.released is not None
    return Chain(written.format, tuple(row[None] for row in exchange.released), {})


def _text_scores(
    examples: Sequence[Example], texts: Sequence[tuple[int, ...]], first: int
) -> list[Score]:
    return [
        Score("", named == token)
        for example, ids in zip(examples, texts, strict=True)
        for named, token in zip(ids[first:], example.inputs[first:], strict=True)
    ]


def _directions(guarded: Guarded) -> list[tuple[str, Mechanism]]:
    both = (("rows", guarded.rows), ("gradients", guarded.gradients))
    return [(what, made) for what, made in both if made is not None]


def _spec(guarded: Guarded) -> str:
    return "; ".join(f"{what} {made.spec()}" for what, made in _directions(guarded)) or PLAIN


def _names(guarded: Guarded) -> str:
    return "; ".join(f"{what} {made.name}" for what, made in _directions(guarded)) or PLAIN


def _guarantee(guarded: Guarded) -> str:
    said = (f"{what}: {made.describe()}" for what, made in _directions(guarded))
    return "; ".join(said) or _PLAIN_SAYS


def _rounded(value: float) -> float:
    """Three figures, for specs that people read."""
    return float(f"{value:.3g}")
