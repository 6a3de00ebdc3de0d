"""Fine-tuning through the cut on pretrained models: against no cut, and under FedSEA's noise.

Two questions. Does a split model learn what an unsplit one learns? The same data, order and settings
with `transformers` and `peft`, three seeds each. And does the paper's picture appear, that more blocks in
front of the cut tolerate more noise? From the repository's root:

    python -m benchmarks.finetuning --models DIR --data DIR --out FOLDER/NAME

writes NAME.json, NAME.md and NAME.svg. Runs that NAME.json holds already are not repeated.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime as dt
import json
import logging
import platform
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from fedsea.client.examples import (
    Batches,
    Example,
    LossOn,
    Paragraphs,
    ReadOptions,
    read_examples,
)
from fedsea.client.trainable import trainable
from fedsea.client.trainer import Callback, StepReport, Trainer
from fedsea.client.training import SplitForTraining
from fedsea.client.training_config import Schedule, TrainerConfig
from fedsea.client.training_protection import TrainingProtection
from fedsea.model.lora import LoraConfig
from fedsea.server.config import ServerConfig
from fedsea.server.service import TrunkService
from fedsea.tasks.catalogue import task
from fedsea.tasks.task import LORA_DROPOUT, LORA_TARGETS
from fedsea.tasks.templates import Template
from fedsea.transport.base import Channel, ClientStream
from fedsea.transport.memory import MemoryChannel

SEEDS = (0, 1, 2)
BOTTOMS = (1, 2, 3)
PAPER_SCALES = (0.0, 0.02, 0.05, 0.1)
PAPER_MEAN = 0.022
"""mean |h| of the paper's model behind one block, read off its figure 7."""

RANK, ALPHA = 8, 16.0
MAX_GRAD_NORM = 1.0
EVALUATED = 250
CURVE = 10
LAST = 20

SENTENCES = Template("{sentence} It was", " {answer}", {"negative": "bad", "positive": "good"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One training; what it is called says all of it.

    Attributes:
        noise: scale of FedSEA's noise on the rows.
    """

    model: str
    data: str
    seed: int
    split: bool
    steps: int
    batch_size: int
    learning_rate: float
    bottom: int = 1
    top: int = 1
    noise: float = 0.0

    @property
    def name(self) -> str:
        """Identifies it in the file of results."""
        return ",".join(f"{key}={value}" for key, value in asdict(self).items())


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a training came to.

    Attributes:
        start: loss on held-out examples before the first step.
        loss: the same after the last one.
        accuracy: share of held-out sentences that are judged right; None without a task.
        last: mean training loss of the last steps.
        curve: training loss, means of some steps each.
        seconds: of all steps.
    """

    start: float
    loss: float
    accuracy: float | None
    last: float
    curve: tuple[float, ...]
    seconds: float


@dataclass(frozen=True, slots=True)
class Choices:
    """A sentence with each of its answers, and which is right."""

    answers: tuple[Example, ...]
    right: int


@dataclass(frozen=True, slots=True)
class Data:
    """What is learned, and what is measured on."""

    train: Sequence[Example]
    held_out: Sequence[Example]
    choices: Sequence[Choices] = ()


class Learner(Protocol):
    """A model that is trained, with or without a cut."""

    def logits(self, batch: Sequence[Example]) -> Tensor:
        """Of the rows that predict answers, (answer tokens, vocabulary)."""

    def trained(self, run: Run, examples: Sequence[Example]) -> list[float]:
        """Take all steps; the loss of each."""


class Unsplit:
    """The whole model here, with `peft`."""

    def __init__(self, folder: Path, seed: int) -> None:
        torch.manual_seed(seed)
        config = PeftConfig(
            r=RANK, lora_alpha=int(ALPHA), lora_dropout=LORA_DROPOUT, target_modules=[*LORA_TARGETS]
        )
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self._model = get_peft_model(plain, config).train()
        self._trained = [one for one in self._model.parameters() if one.requires_grad]
        self._optimizer = torch.optim.AdamW(self._trained, weight_decay=0.01)

    def logits(self, batch: Sequence[Example]) -> Tensor:
        """Padded right; the mask sees to it that padding changes nothing."""
        self._model.train(torch.is_grad_enabled())
        longest = max(example.rows for example in batch)
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for at, example in enumerate(batch):
            ids[at, : example.rows] = torch.tensor(example.inputs)
            mask[at, : example.rows] = 1
        found = self._model(input_ids=ids, attention_mask=mask).logits
        kept = [found[at, list(example.predicting)] for at, example in enumerate(batch)]
        return torch.cat(kept)

    def trained(self, run: Run, examples: Sequence[Example]) -> list[float]:
        """One optimizer, and one norm for clipping."""
        batches = Batches(examples, batch_size=run.batch_size, seed=run.seed)
        losses = []
        for number, work in enumerate(islice(batches.from_step(0), run.steps)):
            loss = loss_of(self, work.batches[0]) / work.answer_tokens
            loss.backward()
            nn.utils.clip_grad_norm_(self._trained, MAX_GRAD_NORM)
            for group in self._optimizer.param_groups:
                group["lr"] = run.learning_rate * (1 - number / run.steps)
            self._optimizer.step()
            self._optimizer.zero_grad()
            losses.append(float(loss.detach()))
        return losses


class Split(Callback):
    """Bottom and top here, the trunk behind the cut."""

    def __init__(self, model: SplitForTraining) -> None:
        self._model = trainable(model)
        self._losses: list[float] = []

    def logits(self, batch: Sequence[Example]) -> Tensor:
        """Ragged, without padding."""
        return self._model.logits(batch)

    def on_step(self, report: StepReport) -> None:
        """Remember the loss."""
        self._losses.append(report.loss)

    def trained(self, run: Run, examples: Sequence[Example]) -> list[float]:
        """The client's own trainer."""
        config = TrainerConfig(
            steps=run.steps,
            batch_size=run.batch_size,
            learning_rate=run.learning_rate,
            schedule=Schedule.LINEAR,
            max_grad_norm=MAX_GRAD_NORM,
            seed=run.seed,
        )
        Trainer(self._model, config, examples, callbacks=[self]).run()
        return self._losses


def loss_of(model: Learner, batch: Sequence[Example]) -> Tensor:
    """Sum over the answer tokens."""
    targets = torch.tensor([target for example in batch for target in example.targets])
    return cross_entropy(model.logits(batch).float(), targets, reduction="sum")


def train(model: Learner, run: Run, data: Data) -> Outcome:
    """All steps, with the learning rate falling to zero on a line, and what came of them."""
    start = evaluate(model, data.held_out)
    began = time.perf_counter()
    losses = model.trained(run, data.train)
    seconds = time.perf_counter() - began
    return Outcome(
        start=start,
        loss=evaluate(model, data.held_out),
        accuracy=accuracy(model, data.choices) if data.choices else None,
        last=statistics.fmean(losses[-LAST:]),
        curve=tuple(
            statistics.fmean(losses[at : at + CURVE]) for at in range(0, len(losses), CURVE)
        ),
        seconds=seconds,
    )


@torch.no_grad()
def evaluate(model: Learner, examples: Sequence[Example]) -> float:
    """Mean loss over the answer tokens."""
    total = sum(float(loss_of(model, examples[at : at + 32])) for at in range(0, len(examples), 32))
    return total / sum(example.answer_tokens for example in examples)


@torch.no_grad()
def accuracy(model: Learner, choices: Sequence[Choices]) -> float:
    """How often the right answer is the likelier one."""
    flat = [answer for each in choices for answer in each.answers]
    scores: list[float] = []
    for at in range(0, len(flat), 32):
        batch = flat[at : at + 32]
        chances = model.logits(batch).float().log_softmax(-1)
        targets = torch.tensor([target for example in batch for target in example.targets])
        each = chances.gather(1, targets[:, None])[:, 0].split([one.answer_tokens for one in batch])
        scores += [float(part.sum()) for part in each]
    right, at = 0, 0
    for choice in choices:
        mine = scores[at : at + len(choice.answers)]
        right += mine.index(max(mine)) == choice.right
        at += len(choice.answers)
    return right / len(choices)


def sentences(
    folder: Path, tokenizer: PreTrainedTokenizerBase, loss_on: LossOn, count: int
) -> Data:
    """SST-2: sentences with a word for their sentiment."""
    options = ReadOptions(loss_on=loss_on, end_of_text=False)
    made = {}
    for name, most in (("train", count), ("dev", EVALUATED)):
        entries = task("sst2").read(folder / "sst2" / f"{name}.tsv")
        made[name] = [SENTENCES.render(entry) for entry in islice(entries, most)]
    train, held_out = (
        _read(((one.prompt, one.completion) for one in made[name]), tokenizer, options)
        for name in ("train", "dev")
    )
    lines = [(one.prompt, choice.text) for one in made["dev"] for choice in one.choices]
    word = ReadOptions(end_of_text=False)
    if loss_on is LossOn.ALL:
        return Data(train, held_out)
    flat = _read(lines, tokenizer, word)
    width = len(made["dev"][0].choices)
    choices = [
        Choices(
            tuple(flat[at * width : (at + 1) * width]),
            [choice.label for choice in one.choices].index(one.gold[0]),
        )
        for at, one in enumerate(made["dev"])
    ]
    return Data(train, held_out, choices)


def stories(folder: Path, tokenizer: PreTrainedTokenizerBase) -> Data:
    """TinyStories in windows; the files are of different stories."""
    options = ReadOptions(paragraphs=Paragraphs.PACKED, max_tokens=128)
    files = [folder / "tinystories" / name for name in ("train_first_cased", "valid_cased")]
    train, held_out = (
        read_examples(file.with_suffix(".txt"), tokenizer, options).examples for file in files
    )
    return Data(train, held_out[:: max(1, len(held_out) // 100)][:100])


def _read(
    pairs: Iterable[tuple[str, str]], tokenizer: PreTrainedTokenizerBase, options: ReadOptions
) -> Sequence[Example]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "pairs.jsonl"
        lines = (json.dumps({"prompt": a, "completion": b}) for a, b in pairs)
        file.write_text("\n".join(lines), encoding="utf-8")
        return read_examples(file, tokenizer, options).examples


class Bench:
    """Runs trainings, and keeps what was measured."""

    def __init__(self, models: Path, data: Path, kept: Path) -> None:
        self._models = models
        self._folder = data
        self._kept = kept
        self._data: dict[tuple[str, str], Data] = {}
        self.outcomes: dict[str, Outcome] = {}
        self.means: dict[str, list[float]] = {}
        if kept.exists():
            found = json.loads(kept.read_text(encoding="utf-8"))
            self.means = found["means"]
            self.outcomes = {name: Outcome(**value) for name, value in found["runs"].items()}

    def run(self, run: Run) -> Outcome:
        """One training, unless it is known already."""
        if run.name not in self.outcomes:
            self.outcomes[run.name] = self._trained(run)
            print(run.name, f"loss {self.outcomes[run.name].loss:.4f}", flush=True)
            self.save()
        return self.outcomes[run.name]

    def save(self) -> None:
        """Write what was measured so far."""
        runs = {name: asdict(outcome) for name, outcome in self.outcomes.items()}
        content = json.dumps({"means": self.means, "runs": _rounded(runs)}, indent=1)
        self._kept.write_text(content + "\n", encoding="utf-8")

    def mean_rows(self, model: str) -> list[float]:
        """mean |h| behind each number of blocks on the data of the noise study, measured once."""
        if model not in self.means:
            plain = AutoModelForCausalLM.from_pretrained(self._models / model, dtype=torch.float32)
            sums, rows = torch.zeros(plain.config.num_hidden_layers + 1), 0
            for example in self.data(model, "sst2, all tokens").held_out[:100]:
                ids = torch.tensor([example.inputs])
                with torch.no_grad():
                    found = plain(input_ids=ids, output_hidden_states=True).hidden_states
                sums += torch.stack([each.abs().mean(-1).sum() for each in found])
                rows += example.rows
            self.means[model] = (sums / rows).tolist()
        return self.means[model]

    def data(self, model: str, name: str) -> Data:
        """Examples of a data set in the tokens of a model."""
        if (model, name) not in self._data:
            tokenizer = AutoTokenizer.from_pretrained(self._models / model)
            if name == "stories":
                made = stories(self._folder, tokenizer)
            else:
                loss_on = LossOn.ALL if name.endswith("all tokens") else LossOn.ANSWER
                made = sentences(self._folder, tokenizer, loss_on, 8000)
            self._data[model, name] = made
        return self._data[model, name]

    def _trained(self, run: Run) -> Outcome:
        data, folder = self.data(run.model, run.data), self._models / run.model
        if not run.split:
            return train(Unsplit(folder, run.seed), run, data)
        with contextlib.ExitStack() as stack:
            return train(Split(self._connected(stack, run, folder)), run, data)

    def _connected(self, stack: contextlib.ExitStack, run: Run, folder: Path) -> SplitForTraining:
        """A client of a server in this process; with noise, its guard and a ledger."""
        place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        config = _server_config(folder, place)
        guard = None
        if run.noise:
            protection = TrainingProtection(
                rows=f"fedsea:scale={run.noise}", record=run.model, ledger=place / "ledger"
            )
            policy = protection.applied(_hidden(folder), ("bottom", "trunk", "top"))
            stack.callback(policy.close)
            guard = policy.guard()
        made = SplitForTraining.connect(
            folder,
            {"memory": lambda: _ServerHere(config)},
            name="bench",
            partition=(run.bottom, run.top),
            lora=LoraConfig(rank=RANK, alpha=ALPHA, dropout=LORA_DROPOUT, targets=LORA_TARGETS),
            seed=run.seed,
            guard=guard,
        )
        return stack.enter_context(made)


class _ServerHere(Channel):
    """A channel to a server that starts, on the client's loop, when it is first used."""

    def __init__(self, config: ServerConfig) -> None:
        self._config = config
        self._starting = asyncio.Lock()
        self._running = contextlib.AsyncExitStack()
        self._channel: MemoryChannel | None = None

    async def describe(self) -> bytes:
        return await (await self._started()).describe()

    async def open_stream(self) -> ClientStream:
        return await (await self._started()).open_stream()

    async def close(self) -> None:
        await self._running.aclose()
        self._channel = None

    async def _started(self) -> MemoryChannel:
        async with self._starting:
            if self._channel is None:
                service = await self._running.enter_async_context(TrunkService.load(self._config))
                self._channel = MemoryChannel(service)
                self._running.push_async_callback(self._channel.close)
            return self._channel


def _server_config(model: Path, place: Path) -> ServerConfig:
    return ServerConfig.from_table(
        {
            "server": {"model": str(model), "address": "127.0.0.1:0"},
            "kv": {"rows": 1024},
            "security": {"plaintext": True},
            "training": {"folder": str(place / "training"), "threads": 1},
        }
    )


def _hidden(folder: Path) -> int:
    found = json.loads((folder / "config.json").read_text(encoding="utf-8"))["hidden_size"]
    return int(found)


def _rounded(value: Any) -> Any:
    """Numbers with the digits that say something."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: _rounded(each) for key, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, list | tuple) else value


@dataclass(frozen=True, slots=True)
class Plan:
    """Which trainings there are."""

    same: Sequence[tuple[str, Run]]
    noise: Run

    def with_seeds(self, run: Run) -> list[Run]:
        """The same with each seed."""
        return [replace(run, seed=seed) for seed in SEEDS]


def plan(is_quick: bool) -> Plan:
    """All of it, or a few steps of each to see that it works."""
    sentences_run = Run(
        model="stories260K",
        data="sst2",
        seed=0,
        split=True,
        steps=20 if is_quick else 300,
        batch_size=16,
        learning_rate=5e-3,
    )
    stories_run = replace(
        sentences_run,
        data="stories",
        steps=10 if is_quick else 100,
        batch_size=4,
        learning_rate=2e-3,
    )

    def small(run: Run) -> Run:
        rate = 2 * run.learning_rate
        return replace(run, model="tinystories656K", bottom=1, top=0, learning_rate=rate)

    noise = replace(
        sentences_run,
        data="sst2, all tokens",
        steps=20 if is_quick else 100,
        batch_size=8,
        learning_rate=3e-3,
    )
    return Plan(
        same=(
            ("SST-2, a word for the sentiment", sentences_run),
            ("SST-2, a word for the sentiment", small(sentences_run)),
            ("TinyStories, windows of 128 tokens", stories_run),
            ("TinyStories, windows of 128 tokens", small(stories_run)),
        ),
        noise=noise,
    )


def page(bench: Bench, chosen: Plan, command: str, picture: str) -> Iterator[str]:
    """The whole page."""
    yield from (
        "# Fine-tuning through the cut",
        "",
        f"{dt.datetime.now(dt.UTC):%Y-%m-%d}, torch {torch.__version__}, {platform.machine()}, "
        f"{torch.get_num_threads()} thread. Command:",
        "",
        f"    {command}",
        "",
        f"Pretrained models, LoRA of rank {RANK} and alpha {ALPHA:g} on "
        f"{', '.join(LORA_TARGETS)} of every block with dropout {LORA_DROPOUT:g}, AdamW, gradients "
        f"clipped to {MAX_GRAD_NORM:g}, the learning rate falling to zero on a line, fp32. Every figure is the "
        f"mean of {len(SEEDS)} seeds with its standard deviation; a seed decides the first factors, the "
        "dropout and the order of the examples.",
        "",
        "## With and without a cut",
        "",
        "*Split*: bottom, trunk and top train through the client's own `Trainer` and a server in the "
        "same process; client and server have an optimizer each, and each clips by its own norm. "
        "*Unsplit*: `transformers` and `peft`, one optimizer; its first factors are peft's own, so "
        "equal seeds share the order of the data and nothing else. Loss is that of held-out examples, over the tokens "
        "that are learned; accuracy is the share of held-out sentences whose right word is the "
        "likelier one.",
        "",
    )
    yield from _head("data", "model", "cut", "steps", "", "loss before", "loss after", "accuracy")
    for name, run in chosen.same:
        yield from same_rows(bench, chosen, name, run)
    yield from noise_page(bench, chosen, picture)


def same_rows(bench: Bench, chosen: Plan, name: str, run: Run) -> Iterator[str]:
    """One data set and model, with a cut and without."""
    for is_split in (False, True):
        each = [bench.run(one) for one in chosen.with_seeds(replace(run, split=is_split))]
        accuracies = [one.accuracy for one in each if one.accuracy is not None]
        yield _row(
            name,
            run.model,
            f"{run.bottom} + {run.top}" if is_split else "none",
            run.steps,
            "split" if is_split else "unsplit",
            _spread([one.start for one in each], 3),
            _spread([one.loss for one in each], 3),
            _spread([100 * one for one in accuracies], 1, " %") if accuracies else "",
        )


def noise_page(bench: Bench, chosen: Plan, picture: str) -> Iterator[str]:
    """FedSEA's noise against blocks in front of the cut."""
    run, means = chosen.noise, bench.mean_rows(chosen.noise.model)
    shown = ", ".join(f"{means[bottom]:.3f} behind {bottom}" for bottom in BOTTOMS)
    yield from (
        "",
        "## FedSEA's noise and the blocks in front of the cut",
        "",
        f"{run.model} on whole texts of SST-2 (sentence and word, the loss on every token, as the paper "
        f"has it), {run.steps} steps of {run.batch_size}, one block behind the trunk, noise on the rows that go up "
        "and none on gradients, in training and in evaluation. *Last* is the training loss of the "
        f"last {LAST} steps, *held out* that of {EVALUATED} other texts. In the paper's model mean |h| is near "
        f"{PAPER_MEAN:g} behind one block; here it is {shown}. So its scales are small against these rows. "
        "The second half of the table has the scales that stand to the rows behind one block as the "
        "paper's do to its own: the same noise / mean |h| there. *Relative* is noise / mean |h| at the cut.",
        "",
    )
    yield from _head(
        "blocks in front", "noise", "relative", "the paper's scale", "last", "held out"
    )
    for kind in noise_scales(means[1]):
        for bottom in BOTTOMS:
            for paper, scale in kind:
                each = noise_runs(bench, chosen, bottom, scale)
                yield _row(
                    bottom,
                    f"{scale:g}",
                    f"{scale / means[bottom]:.2f}",
                    f"{paper:g}",
                    _spread([one.last for one in each], 2),
                    _spread([one.loss for one in each], 2),
                )
    yield from ("", f"![Training loss under noise]({picture})")


def noise_scales(mean: float) -> list[list[tuple[float, float]]]:
    """The paper's scales as they are, and as large against these rows as they are there."""
    return [
        [(scale, scale) for scale in PAPER_SCALES],
        [(scale, float(f"{scale * mean / PAPER_MEAN:.3g}")) for scale in PAPER_SCALES[1:]],
    ]


def noise_runs(bench: Bench, chosen: Plan, bottom: int, scale: float) -> list[Outcome]:
    """All seeds of one cell."""
    runs = chosen.with_seeds(replace(chosen.noise, bottom=bottom, noise=scale))
    return [bench.run(run) for run in runs]


def draw(bench: Bench, chosen: Plan, path: Path) -> None:
    """Training loss over steps: a column for each number of blocks, a row for each kind of scale."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    means = bench.mean_rows(chosen.noise.model)
    as_given, relative = noise_scales(means[1])
    rows = [
        ("the paper's scales", as_given),
        ("the paper's noise / mean |h|", [*as_given[:1], *relative]),
    ]
    colors = ["#1b1f24", "#1f77b4", "#e08214", "#b2182b"]
    with mpl.rc_context({"svg.hashsalt": "fedsea", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(10, 6), layout="constrained")
        panels = figure.subplots(len(rows), len(BOTTOMS), sharex=True, sharey="row")
        for line, (title, scales) in zip(panels, rows, strict=True):
            for panel, bottom in zip(line, BOTTOMS, strict=True):
                for color, (_, scale) in zip(colors, scales, strict=True):
                    curves = [one.curve for one in noise_runs(bench, chosen, bottom, scale)]
                    columns = list(zip(*curves, strict=True))
                    at = [CURVE * (number + 0.5) for number in range(len(columns))]
                    mean = [statistics.fmean(column) for column in columns]
                    label = f"{scale:g} ({scale / means[bottom]:.2f})"
                    panel.plot(at, mean, color=color, linewidth=1.5, label=label)
                    panel.fill_between(
                        at,
                        [*map(min, columns)],
                        [*map(max, columns)],
                        color=color,
                        alpha=0.15,
                        lw=0,
                    )
                panel.legend(
                    title="noise (of mean |h|)", fontsize=7, title_fontsize=7, frameon=False
                )
                panel.spines[["top", "right"]].set_visible(False)
            line[0].set_ylabel(f"training loss\n{title}")
        for panel, bottom in zip(panels[0], BOTTOMS, strict=True):
            blocks = "1 block" if bottom == 1 else f"{bottom} blocks"
            panel.set_title(f"{blocks} in front, mean |h| {means[bottom]:.2f}", fontsize=9)
        for panel in panels[-1]:
            panel.set_xlabel("step")
        figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Train, and write results, page and picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="without an ending")
    parser.add_argument("--quick", action="store_true", help="a few steps of each")
    given = parser.parse_args()
    command = (
        f"python -m benchmarks.finetuning --models {given.models} --data {given.data} "
        f"--out {given.out}{' --quick' if given.quick else ''}"
    )
    torch.set_num_threads(1)
    logging.getLogger("fedsea.client").setLevel(logging.ERROR)
    bench = Bench(given.models, given.data, given.out.with_suffix(".json"))
    chosen = plan(given.quick)
    picture = given.out.with_suffix(".svg")
    lines = list(page(bench, chosen, command, picture.name))
    bench.save()
    draw(bench, chosen, picture)
    given.out.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _spread(values: Sequence[float], digits: int, unit: str = "") -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.{digits}f} ± {spread:.{digits}f}{unit}"


def _head(*columns: str) -> tuple[str, str]:
    return _row(*columns), _row(*("---" for _ in columns))


def _row(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


if __name__ == "__main__":
    main()
