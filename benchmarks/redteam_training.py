"""Attacks on fine-tuning the two pretrained models of the assets, for the threat model's tables.

    python -m benchmarks.redteam_training ASSETS --part r3 --model stories260K --bottom 1 --top 2 \
        --json r3.json
    python -m benchmarks.redteam_training ASSETS --report results.md --json results.json r3.json ...

Each part takes minutes; the second form joins them. Random numbers are seeded, the noise is not.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path

import torch

from fedsea.client.examples import Example
from fedsea.client.llm import load_tokenizer
from fedsea.evaluation.texts import Encode, cut
from fedsea.evaluation.training_suite import TrainingData, TrainingPlan, evaluate_training
from fedsea.evaluation.training_victim import Guarded
from fedsea.model.checkpoint import Checkpoint
from fedsea.model.lora import LoraConfig
from fedsea.model.partition import Partition
from fedsea.privacy.clipping import Clipping
from fedsea.privacy.gaussian import FedSEAGaussian, Gaussian
from fedsea.redteam.inverter import Architecture, Recipe
from fedsea.redteam.report import Row, dump, parse, percent
from fedsea.tasks.loading import load

TOKENS = 32
# As in the paper: attention only.
LORA = LoraConfig(rank=8, alpha=16, targets=("q_proj", "k_proj", "v_proj", "o_proj"))
FEDSEA_SCALES = (0.02, 0.05, 0.1)


def stories(assets: Path, encode: Encode, examples: int, held_out: int) -> TrainingData:
    """TinyStories: secret and held-out texts of its validation part, public ones of the other."""
    folder = assets / "data" / "tinystories"
    secret = cut((folder / "valid_cased.txt").read_text("utf-8"), encode, TOKENS)
    public = cut((folder / "train_first_cased.txt").read_text("utf-8"), encode, TOKENS)
    found = list(islice(secret, examples + held_out))
    return TrainingData(
        tuple(Example.of(ids) for ids in found[:examples]),
        tuple(found[examples:]),
        tuple(islice(public, 512)),
        tuple(encode("")),
    )


def sentiments(assets: Path, encode: Encode, examples: int, held_out: int) -> TrainingData:
    """SST-2 with the loss on the answer; classes are those of the sentences."""
    records = load("sst2", assets / "data" / "sst2" / "train.tsv", limit=4000)
    prefix = tuple(encode(""))
    made: list[Example] = []
    kinds: list[tuple[str, ...]] = []
    rest: list[tuple[int, ...]] = []
    for record in records:
        prompt, whole = encode(record.prompt), tuple(encode(record.prompt + record.completion))
        if len(whole) > 2 * TOKENS or tuple(whole[: len(prompt)]) != tuple(prompt):
            continue
        if len(made) < examples:
            made.append(Example.of(whole, len(prompt)))
            kinds.append((record.gold[0],) * (len(whole) - len(prompt)))
        else:
            rest.append(whole)
    return TrainingData(
        tuple(made), tuple(rest[:held_out]), tuple(rest[held_out:][:512]), prefix, tuple(kinds)
    )


def r3(plan: TrainingPlan) -> TrainingPlan:
    """Gradients, by the noise on them; noise on rows for comparison."""
    return replace(
        plan,
        attacks=("r3", "r3t"),
        guards=(Guarded(rows=FedSEAGaussian(0.1)),),
        gradient_noise=(0.5, 1.0, 2.0, 4.0),
        gradient_mu=(16.0, 4.0),
        batch=8,
        steps=10,
        attacked=1,
    )


def labels(plan: TrainingPlan) -> TrainingPlan:
    """Answers of a classification, in one step."""
    return replace(
        plan,
        attacks=("r3t",),
        guards=(Guarded(rows=FedSEAGaussian(0.1)),),
        gradient_noise=(1.0, 4.0),
        gradient_mu=(4.0,),
        batch=32,
        steps=1,
        attacked=1,
    )


def r7(plan: TrainingPlan) -> TrainingPlan:
    """Updates, by rank."""
    return replace(plan, attacks=("r7",), steps=2, attacked=1, ranks=(4, 16, 64))


def r8(plan: TrainingPlan) -> TrainingPlan:
    """The released adapter, without and with noise on what crosses the wire."""
    rows, gradients = FedSEAGaussian(0.1), Gaussian(0.1, 8.0, Clipping.FROBENIUS)
    guards = (Guarded(rows=rows), Guarded(gradients=gradients), Guarded(rows, gradients))
    return replace(
        plan, attacks=("r8",), guards=guards, steps=40, batch=8, attacked=1, canaries=32,
        learning_rate=5e-3,
    )  # fmt: skip


def decoder(plan: TrainingPlan) -> TrainingPlan:
    """The decoder of a malicious client, by FedSEA's noise on rows."""
    guards = tuple(Guarded(rows=FedSEAGaussian(scale)) for scale in FEDSEA_SCALES)
    recipe = Recipe(Architecture.TRANSFORMER, hidden=128, steps=200, texts=512, learning_rate=4e-3)
    return replace(plan, attacks=("r1", "r4t"), guards=guards, steps=1, attacked=1, recipe=recipe)


Part = Callable[[TrainingPlan], TrainingPlan]
PARTS: dict[str, tuple[Callable[..., TrainingData], Part, tuple[int, int]]] = {
    "r3": (stories, r3, (32, 16)),
    "labels": (sentiments, labels, (64, 8)),
    "r7": (stories, r7, (32, 16)),
    "r8": (stories, r8, (48, 200)),
    "decoder": (stories, decoder, (32, 16)),
}


def measure(assets: Path, part: str, model: str, bottom: int, top: int) -> list[Row]:
    """The rows of one part."""
    folder = assets / "models" / model
    tokenizer = load_tokenizer(Checkpoint.open(folder))

    def encode(text: str) -> Sequence[int]:
        ids: list[int] = tokenizer(text, verbose=False).input_ids
        return ids

    make, shape, (examples, held_out) = PARTS[part]
    plan = TrainingPlan(
        model=folder,
        partition=Partition(bottom, top),
        data=make(assets, encode, examples, held_out),
        lora=LORA,
        steps=30,
        decode=lambda ids: str(tokenizer.decode(list(ids))),
    )
    what = "SST-2 answers" if part == "labels" else "TinyStories"
    rows = evaluate_training(shape(plan), lambda *said: print(*said, file=sys.stderr, flush=True))
    return [replace(row, exposed=f"{row.exposed} of {what}") for row in rows]


def report(rows: Sequence[Row], command: str) -> str:
    """All findings as Markdown tables, one for each question."""
    lines = [
        "# Red team in training",
        "",
        f"fedsea {version('fedsea')}, two pretrained models, CPU. Commands: `{command}` for each "
        "part, model and cut. The interval is Clopper and Pearson's of 95 %. A guess is what the "
        "public model expects after the true text (R3, decoder), the most common tokens (R7), or "
        "chance (R8).",
        "",
        "## R3: labels from returned gradients",
        "",
        "Noise is in units of the gradient. `r3` is one product each way, `r3t` the refined form. "
        "mu is that of one example.",
        "",
        *_gradients(rows),
        "",
        "## R7: tokens from an update of the bottom's adapter",
        "",
        "Found: share of the distinct tokens of the batch among as many that the update points at. "
        "Named: tokens inside of a span that holds all inputs, and how many of them were true.",
        "",
        *_updates(rows),
        "",
        "## R8: the released adapter",
        "",
        *_released(rows),
        "",
        "## The decoder of a malicious client",
        "",
        "A transformer trained on public text behind the same bottom and noise, beside the prefix "
        "search. ROUGE and BLEU of the guess are in brackets.",
        "",
        *_decoded(rows),
        "",
    ]
    return "\n".join(lines)


def _table(head: Sequence[str], body: Iterable[Sequence[str]]) -> list[str]:
    return [
        "| " + " | ".join(head) + " |",
        "|---|" + "---|" * (len(head) - 1),
        *("| " + " | ".join(cells) + " |" for cells in body),
    ]


def _rate(row: Row) -> list[str]:
    return [
        percent(row.recovery),
        f"{row.low * 100:.0f} to {row.high * 100:.0f} %",
        percent(row.prior),
    ]


def _gradients(rows: Sequence[Row]) -> list[str]:
    head = (
        "model", "top", "what", "protection", "noise", "mu", "attack", "attacker", "found", "95 %",
        "guess", "by class", "agreement",
    )  # fmt: skip
    return _table(
        head,
        (
            [
                row.model, str(row.top), row.exposed, f"`{row.parameters}`", f"{row.noise:.2f}",
                "–" if row.mu is None else f"{row.mu:g}", row.attack, row.knowledge, *_rate(row),
                "; ".join(f"{name} {percent(rate.recovery)}" for name, rate in row.by_class.items())
                or "–",
                percent(row.utility.agreement),
            ]
            for row in rows
            if row.attack in ("r3", "r3t")
        ),
    )  # fmt: skip


def _updates(rows: Sequence[Row]) -> list[str]:
    head = (
        "model",
        "what",
        "tokens",
        "distinct",
        "found",
        "95 %",
        "guess",
        "named",
        "true",
        "in order",
    )
    return _table(
        head,
        (
            [
                row.model, row.exposed, f"{row.details['tokens']:.0f}", str(row.tokens), *_rate(row),
                f"{row.details['named']:.0f}", f"{row.details['named_right']:.0f}",
                percent(row.details["in_order"]),
            ]
            for row in rows
            if row.attack == "r7"
        ),
    )  # fmt: skip


def _released(rows: Sequence[Row]) -> list[str]:
    head = ("model", "protection", "measure", "found", "95 %", "guess", "besides")
    said = {
        "auc": lambda d: f"{d['members']:.0f} members, {d['others']:.0f} others",
        "r8": lambda d: f"{d['members']:.0f} members, {d['others']:.0f} others",
        "canary": lambda d: (
            f"mean exposure {d['mean_exposure']:.1f} of {d['highest_exposure']:.0f} bits"
        ),
        "audit": lambda d: f"epsilon at least {d['epsilon']:.2f}",
    }
    names = {
        "auc": "a member scores above another text",
        "r8": "members found at 1 % false positives",
        "canary": "canaries found first",
        "audit": "coins guessed right",
    }
    return _table(
        head,
        (
            [
                row.model,
                f"`{row.parameters}`",
                names[row.attack],
                *_rate(row),
                said[row.attack](row.details),
            ]
            for row in rows
            if row.attack in names
        ),
    )


def _decoded(rows: Sequence[Row]) -> list[str]:
    head = (
        "model", "bottom", "protection", "noise", "attack", "found", "95 %", "guess", "ROUGE-1",
        "ROUGE-2", "ROUGE-L", "BLEU-4",
    )  # fmt: skip
    return _table(
        head,
        (
            [
                row.model, str(row.bottom), f"`{row.parameters}`", f"{row.noise:.2f}", row.attack,
                *_rate(row),
                *(
                    f"{row.details[name] * 100:.1f} ({row.details[f'guess_{name}'] * 100:.1f})"
                    for name in ("rouge1", "rouge2", "rougeL", "bleu")
                ),
            ]
            for row in rows
            if row.attack in ("r1", "r4t")
        ),
    )  # fmt: skip


def main() -> None:
    """Measure a part, or join parts."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    options.add_argument("assets", type=Path)
    options.add_argument("parts", type=Path, nargs="*")
    options.add_argument("--part", choices=PARTS)
    options.add_argument("--model", default="stories260K")
    options.add_argument("--bottom", type=int, default=1)
    options.add_argument("--top", type=int, default=1)
    options.add_argument("--json", type=Path, required=True)
    options.add_argument("--report", type=Path)
    given = options.parse_intermixed_args()
    if given.part:
        torch.set_num_threads(1)
        rows = measure(given.assets, given.part, given.model, given.bottom, given.top)
    else:
        rows = [row for part in given.parts for row in parse(part.read_text("utf-8"))]
    given.json.write_text(dump(rows), "utf-8")
    if given.report is not None:
        command = (
            "python -m benchmarks.redteam_training ASSETS --part PART --model M --bottom B --top T"
        )
        given.report.write_text(report(rows, command), "utf-8")


if __name__ == "__main__":
    main()
