"""What a soft prompt at the server gives back of what noise took, beside what an attacker reads.

In the shape of DEL's Tables 7 and 8 (arXiv 2602.11513): perplexity at several mu without a prompt,
with one that was trained at this mu, and with one that was trained at another; then for several
widths of the projection. Beside each setting stands the recovery of the strongest attack on what
the client sent, and the control in which nothing is sent. From the repository's root:

    python -m benchmarks.soft_prompts --models DIR --training FILE --held-out FILE --out PAGE

writes PAGE.md and PAGE.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime as dt
import json
import math
import platform
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.projection import Silence
from fedsea.client.llm import load_tokenizer
from fedsea.evaluation import projection_training
from fedsea.evaluation.frozen import FrozenModel, perplexity
from fedsea.evaluation.prompt_training import Recipe, Tuned, held_out, train_prompt
from fedsea.evaluation.public_text import PublicText
from fedsea.evaluation.releasing import Cut
from fedsea.evaluation.suite import Plan, evaluate
from fedsea.evaluation.texts import Texts, read_texts
from fedsea.evaluation.training import Schedule
from fedsea.model.checkpoint import Checkpoint
from fedsea.model.lora import LoraConfig
from fedsea.model.partition import Partition
from fedsea.model.projection import Projection
from fedsea.privacy.calibration import Calibration
from fedsea.privacy.quantization import StochasticQuantization
from fedsea.redteam.report import PLAIN, PRIOR_ATTACK

PARTITION = Partition(1, 0)
WINDOW = 128
BITS = 4
INSIDE = 0.99
ATTACKS = ("nn", "r1", "r2")
MU = (8.0, 20.0, 40.0, 60.0, 200.0)
OTHER_MU = 40.0
FEWER_MU = (20.0, 40.0, 60.0, 200.0)
NOISE_SEEDS = (0, 1)
TRAINING_SEEDS = (0, 1, 2)
_NORMAL_95 = 1.96


@dataclass(frozen=True, slots=True)
class Budget:
    """Steps of trainings, texts that are attacked, and sizes of what is trained."""

    projection_steps: int
    steps: int
    prompt_rate: float
    adapter_rate: float
    rows: int
    rank: int
    texts: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Cell:
    """Held-out text in one setting.

    Attributes:
        perplexity: over all windows and draws of the noise.
        low: of its interval of 95 %, over windows.
        high: likewise.
        agreement: share of first tokens that are those of the model without noise; not a number
            where there is no model.
    """

    perplexity: float
    low: float
    high: float
    agreement: float

    def __str__(self) -> str:
        return f"{self.perplexity:.1f} ({self.low:.1f} – {self.high:.1f})"


@dataclass(frozen=True, slots=True)
class Recovery:
    """The strongest attack on one setting, and its interval of 95 %."""

    attack: str
    recovery: float
    low: float
    high: float
    prior: float

    def __str__(self) -> str:
        return f"{self.recovery:.1%} ({self.low:.1%} – {self.high:.1%}), {self.attack}"


class Subject:
    """One checkpoint, with texts to train on, to measure on and to attack."""

    def __init__(self, folder: Path, training: Path, other: Path, budget: Budget) -> None:
        self.folder, self.budget = folder, budget
        self.checkpoint = Checkpoint.open(folder)
        self.model = FrozenModel(self.checkpoint, PARTITION)
        known = PublicText.read(training, self.checkpoint, WINDOW)
        new = PublicText.read(other, self.checkpoint, WINDOW)
        self.text = PublicText(known.training, new.held_out, known.prefix)
        self._secret = other
        self._projections: dict[int, Projection | None] = {}

    @cached_property
    def texts(self) -> Texts:
        """What is attacked."""
        tokenizer = load_tokenizer(self.checkpoint)
        return read_texts(
            self._secret,
            lambda text: tokenizer(text, verbose=False).input_ids,
            count=self.budget.texts,
            tokens=self.budget.tokens,
        )

    def projection(self, width: int) -> Projection | None:
        """Trained for next tokens, without noise, as the paper does; None for the whole width."""
        if width not in self._projections:
            found = None
            if width < self.checkpoint.hidden_size:
                recipe = projection_training.Recipe(
                    width, schedule=Schedule(self.budget.projection_steps)
                )
                trained = projection_training.train_projection(self.model, self.text, recipe)
                found = trained.projection
            self._projections[width] = found
        return self._projections[width]

    def cuts(self, width: int, mus: tuple[float, ...]) -> dict[float, Cut]:
        """DEL's quantization behind one projection, at several mu."""
        clean = Cut(self.text.prefix, None, self.projection(width))
        rows = clean.narrow(self.model.rows(self.text.training[:256]))[:, self.text.prefix :]
        known = Calibration.of([rows.flatten(0, 1)], PARTITION.bottom, self.model.fingerprint)
        clip = known.clip(INSIDE)
        return {
            mu: dataclasses.replace(clean, mechanism=StochasticQuantization(BITS, clip, mu, width))
            for mu in mus
        }

    def prompt(self, cut: Cut, seed: int = 0) -> Tuned:
        """A soft prompt trained under the noise of a cut."""
        return self._trained(cut, Recipe(self.budget.rows, seed=seed), self.budget.prompt_rate)

    def adapter(self, cut: Cut) -> Tuned:
        """LoRA in the trunk, trained in the same way."""
        rank = self.budget.rank
        recipe = Recipe(0, LoraConfig(rank=rank, alpha=2.0 * rank))
        return self._trained(cut, recipe, self.budget.adapter_rate)

    def cell(self, cut: Cut, tuned: Tuned | None = None) -> Cell:
        """Held-out text through a cut."""
        found = [held_out(self.model, self.text, cut, tuned, seed) for seed in NOISE_SEEDS]
        nats = torch.stack([each.nats for each in found]).mean(0)
        return _cell(nats, sum(each.agreement for each in found) / len(found))

    def recoveries(self, width: int, cuts: dict[float, Cut]) -> dict[float, Recovery]:
        """The strongest attack on the releases of each cut; a prompt changes none of them."""
        mechanisms = {mu: cut.mechanism for mu, cut in cuts.items() if cut.mechanism is not None}
        plan = Plan(
            model=self.folder,
            partition=PARTITION,
            texts=self.texts,
            mechanisms=tuple(mechanisms.values()),
            attacks=ATTACKS,
            answers=0,
        )
        pair = self.projection(width)
        with tempfile.TemporaryDirectory() as folder:
            if pair is not None:
                pair.save(Path(folder) / "pair")
                plan = dataclasses.replace(plan, projection=Path(folder) / "pair")
            rows = evaluate(plan)
        clean = max(row.recovery for row in rows if row.mechanism == PLAIN)
        if clean < INSIDE:
            raise SystemExit("no attack reads the channel without protection: this proves nothing")
        found = {}
        for mu, mechanism in mechanisms.items():
            ours = [row for row in rows if row.parameters == mechanism.spec()]
            best = max(
                (row for row in ours if row.attack != PRIOR_ATTACK), key=lambda row: row.recovery
            )
            found[mu] = Recovery(best.attack, best.recovery, best.low, best.high, best.prior)
        return found

    def _trained(self, cut: Cut, recipe: Recipe, rate: float) -> Tuned:
        recipe = dataclasses.replace(recipe, schedule=Schedule(self.budget.steps, rate))
        # What the training itself measures is not used.
        text = dataclasses.replace(self.text, held_out=self.text.held_out[:1])
        return train_prompt(self.model, text, recipe, cut).tuned


@dataclass(frozen=True, slots=True)
class Line:
    """One setting: what is recovered, and what is left, by what the server computes with."""

    model: str
    width: int
    mu: float
    recovery: Recovery
    cells: dict[str, Cell]


def by_mu(subject: Subject, width: int, mus: tuple[float, ...]) -> Iterator[Line]:
    """The shape of Table 7."""
    cuts = subject.cuts(width, mus)
    recovered = subject.recoveries(width, cuts)
    other = subject.prompt(cuts[OTHER_MU])
    for mu, cut in cuts.items():
        own = other if mu == OTHER_MU else subject.prompt(cut)
        cells = {
            "no prompt": subject.cell(cut),
            "prompt of this mu": subject.cell(cut, own),
            f"prompt of mu = {OTHER_MU:g}": subject.cell(cut, other),
            "LoRA of this mu": subject.cell(cut, subject.adapter(cut)),
        }
        yield Line(subject.checkpoint.name, width, mu, recovered[mu], cells)


def of_width(subject: Subject, width: int) -> Iterator[Line]:
    """The lines of one width in the shape of Table 8."""
    cuts = subject.cuts(width, FEWER_MU)
    recovered = subject.recoveries(width, cuts)
    for mu, cut in cuts.items():
        cells = {
            "no prompt": subject.cell(cut),
            "prompt of this mu": subject.cell(cut, subject.prompt(cut)),
        }
        yield Line(subject.checkpoint.name, width, mu, recovered[mu], cells)


def controls(subject: Subject) -> dict[str, Cell]:
    """The model alone, with a prompt and with LoRA but no noise, and where nothing is sent."""
    clean = Cut(subject.text.prefix)
    silent = Cut(subject.text.prefix, Silence())
    return {
        "frequencies of tokens, no model": frequencies(subject.text, subject.checkpoint),
        "no noise, no prompt": subject.cell(clean),
        "no noise, prompt": subject.cell(clean, subject.prompt(clean)),
        "nothing is sent, no prompt": subject.cell(silent),
        "nothing is sent, prompt": subject.cell(silent, subject.prompt(silent)),
        "nothing is sent, LoRA": subject.cell(silent, subject.adapter(silent)),
    }


def frequencies(text: PublicText, checkpoint: Checkpoint) -> Cell:
    """The best that can be done without any rows: every token by how often it is, plus one."""
    size = int(checkpoint.config.vocab_size)
    counts = torch.bincount(text.training[:, 1:].flatten(), minlength=size).double() + 1
    each = -(counts / counts.sum()).log()[text.held_out[:, 1:]]
    return _cell(each.mean(1), agreement=math.nan)


def _cell(nats: torch.Tensor, agreement: float) -> Cell:
    """Mean and interval of 95 % over windows (n,)."""
    mean = nats.mean().item()
    away = _NORMAL_95 * nats.std().item() / math.sqrt(len(nats))
    return Cell(perplexity(mean), perplexity(mean - away), perplexity(mean + away), agreement)


def seeds(subject: Subject, width: int) -> list[Cell]:
    """The same prompt from other starts, batches and noise."""
    cut = subject.cuts(width, (OTHER_MU,))[OTHER_MU]
    return [subject.cell(cut, subject.prompt(cut, seed)) for seed in TRAINING_SEEDS]


def lines_table(lines: list[Line]) -> Iterator[str]:
    """One row for each setting: recovery, perplexities, agreements."""
    names = list(lines[0].cells)
    head = ["model", "width", "mu", "recovered", *names, "agreement"]
    yield _row(*head)
    yield _row(*("---" for _ in head))
    for line in lines:
        agreements = " / ".join(f"{cell.agreement:.1%}" for cell in line.cells.values())
        cells = (str(cell) for cell in line.cells.values())
        yield _row(line.model, line.width, f"{line.mu:g}", line.recovery, *cells, agreements)


@dataclass(frozen=True, slots=True)
class Source:
    """What a process needs to measure a part by itself."""

    folder: Path
    training: Path
    other: Path
    budget: Budget

    def subject(self) -> Subject:
        """The checkpoint and its texts, loaded."""
        torch.set_num_threads(1)
        return Subject(self.folder, self.training, self.other, self.budget)


def measured_controls(source: Source) -> dict[str, Cell]:
    """One column of the table of controls."""
    return controls(source.subject())


def measured_by_mu(source: Source, mus: tuple[float, ...]) -> list[Line]:
    """One model in the shape of Table 7."""
    subject = source.subject()
    return list(by_mu(subject, subject.checkpoint.hidden_size // 4, mus))


def measured_seeds(source: Source) -> list[Cell]:
    """One of its prompts from several seeds."""
    subject = source.subject()
    return seeds(subject, subject.checkpoint.hidden_size // 4)


def measured_width(source: Source, width: int) -> list[Line]:
    """One width in the shape of Table 8."""
    return list(of_width(source.subject(), width))


@dataclass(frozen=True, slots=True)
class Measured:
    """Everything that the page shows."""

    controls: dict[str, dict[str, Cell]]
    by_mu: list[Line]
    seeds: list[Cell]
    by_width: list[Line]


def measure(sources: list[Source], processes: int) -> Measured:
    """All parts, some at the same time; the widths are those of the first model."""
    names = [source.folder.name for source in sources]
    hidden = Checkpoint.open(sources[0].folder).hidden_size
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        mus = [
            pool.submit(measured_by_mu, source, FEWER_MU if number else MU)
            for number, source in enumerate(sources)
        ]
        spread = pool.submit(measured_seeds, sources[0])
        widths = [
            pool.submit(measured_width, sources[0], width)
            for width in (hidden // 8, hidden // 2, hidden)
        ]
        columns = [pool.submit(measured_controls, source) for source in sources]
        lines = [line for each in mus for line in each.result()]
        same = [
            dataclasses.replace(line, cells=dict(list(line.cells.items())[:2]))
            for line in lines
            if line.model == names[0] and line.mu in FEWER_MU
        ]
        narrow = [line for each in widths for line in each.result()]
        return Measured(
            {name: each.result() for name, each in zip(names, columns, strict=True)},
            lines,
            spread.result(),
            sorted([*narrow, *same], key=lambda line: (line.width, line.mu)),
        )


def page(command: str, budget: Budget, found: Measured, minutes: float) -> Iterator[str]:
    """The page, line by line."""
    yield from (
        "# Soft prompts under DEL's noise",
        "",
        f"{dt.datetime.now(dt.UTC):%Y-%m-%d}, torch {torch.__version__}, {platform.machine()}. "
        "Command:",
        "",
        f"    {command}",
        "",
        f"One block at the client, stochastic quantization of {BITS} bits behind a projection that "
        f"was trained for next tokens without noise ({budget.projection_steps} steps), its clip the "
        f"{INSIDE:.0%} quantile of public coordinates; as many numbers as the model has are sent "
        f"without a projection. Prompts of {budget.rows} rows and LoRA of rank {budget.rank} in the "
        f"trunk are trained under the noise for {budget.steps} steps of 8 windows of {WINDOW} "
        f"tokens, at rates of {budget.prompt_rate:g} and {budget.adapter_rate:g}. Perplexity is that "
        f"of held-out windows of other text with {len(NOISE_SEEDS)} draws of the noise; in "
        "parentheses its 95 % interval over windows. *Agreement* is the share of first tokens that "
        "are those of the model without noise, in the order of the columns. *Recovered* is the "
        f"strongest of {', '.join(ATTACKS)} on {budget.texts} texts of {budget.tokens} tokens, with "
        "its 95 % interval. Attacked is what the client sends; a prompt and LoRA in the trunk "
        "change nothing of that.",
        "",
        "## Controls",
        "",
        "Where *nothing is sent*, zeros take the place of rows: what is trained then can learn the "
        "statistics of the text only. No setting is of use that is not well below these rows.",
        "",
        _row("", *found.controls),
        _row(*("---" for _ in range(1 + len(found.controls)))),
    )
    columns = list(found.controls.values())
    for name in columns[0]:
        yield _row(name, *(_with_agreement(column[name]) for column in columns))
    yield from ("", "## By mu, as in Table 7", "", *lines_table(found.by_mu), "")
    shown = ", ".join(f"{cell.perplexity:.1f}" for cell in found.seeds)
    first = found.by_mu[0].model
    yield f"The prompt of {first} at mu = {OTHER_MU:g}, from {len(found.seeds)} seeds: {shown}."
    yield ""
    yield from ("## By width, as in Table 8", "", *lines_table(found.by_width), "")
    yield f"All of it took {minutes:.0f} minutes."


def main() -> None:
    """Measure, and write both files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--training", type=Path, required=True)
    parser.add_argument("--held-out", type=Path, required=True)
    parser.add_argument("--projection-steps", type=int, default=100)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--prompt-rate", type=float, default=0.05)
    parser.add_argument("--adapter-rate", type=float, default=0.005)
    parser.add_argument("--rows", type=int, default=20)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--texts", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=65)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    budget = Budget(
        given.projection_steps,
        given.steps,
        given.prompt_rate,
        given.adapter_rate,
        given.rows,
        given.rank,
        given.texts,
        given.tokens,
    )
    command = shlex.join(["python", "-m", "benchmarks.soft_prompts", *sys.argv[1:]])
    sources = [
        Source(folder, given.training, given.held_out, budget)
        for folder in sorted(given.models.iterdir())
    ]
    began = time.monotonic()
    found = measure(sources, given.processes)
    lines = page(command, budget, found, (time.monotonic() - began) / 60)
    given.out.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    kept = _plain({"command": command, "budget": budget, "measured": found})
    given.out.with_suffix(".json").write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


def _with_agreement(cell: Cell) -> str:
    known = not math.isnan(cell.agreement)
    return f"{cell}, agreement {cell.agreement:.1%}" if known else str(cell)


def _plain(value: object) -> Any:
    """Dataclasses, however nested, as JSON takes them."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain(dataclasses.asdict(value))
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, list) else value


def _row(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


if __name__ == "__main__":
    main()
