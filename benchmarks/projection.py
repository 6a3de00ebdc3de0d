"""What projections and denoisers are worth on real checkpoints: perplexity and agreement.

Trains on public text and measures on other text, for several widths and noises. From the
repository's root:

    python -m benchmarks.projection projections --models DIR --training FILE --held-out FILE \
        --out PAGE.md

and the same with `denoisers`.
"""

from __future__ import annotations

import argparse
import datetime as dt
import platform
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fedsea.evaluation import denoiser_training, projection_training
from fedsea.evaluation.denoiser_training import Restoration
from fedsea.evaluation.frozen import FrozenModel
from fedsea.evaluation.projection_training import Fidelity, Objective
from fedsea.evaluation.public_text import PublicText
from fedsea.evaluation.releasing import Cut
from fedsea.evaluation.training import Schedule
from fedsea.model.checkpoint import Checkpoint
from fedsea.model.partition import Partition
from fedsea.privacy.calibration import Calibration
from fedsea.privacy.gaussian import Gaussian
from fedsea.privacy.mechanism import Mechanism
from fedsea.privacy.metric import MetricDP
from fedsea.privacy.noise import NoiseSource
from fedsea.privacy.quantization import StochasticQuantization

WINDOW = 128
BITS = 4
NARROWER = (8, 4, 2)
DEL_MU = (8.0, 20.0, 60.0)
DENOISED_MU = (8.0, 32.0)
DEL_CLIP = 0.05
INSIDE = 0.99


class Part(StrEnum):
    """What a page is about."""

    PROJECTIONS = "projections"
    DENOISERS = "denoisers"


_ROWS = {
    Part.PROJECTIONS: "the rows that enter the trunk",
    Part.DENOISERS: "the rows that leave the trunk",
}


@dataclass(frozen=True, slots=True)
class Subject:
    """A checkpoint with the text that it is measured on."""

    checkpoint: Checkpoint
    text: PublicText
    steps: int

    def model(self, partition: Partition) -> FrozenModel:
        """The checkpoint, cut."""
        return FrozenModel(self.checkpoint, partition)

    def projection(
        self, model: FrozenModel, width: int, objective: Objective, mechanism: Mechanism | None
    ) -> projection_training.Trained:
        """Train a projection."""
        recipe = projection_training.Recipe(width, objective, Schedule(self.steps))
        return projection_training.train_projection(model, self.text, recipe, mechanism)


class Silence(Mechanism):
    """Zeros instead of rows: the control in which the server has nothing to work on."""

    name = "silence"

    def protect(self, rows: Tensor, noise: NoiseSource) -> Tensor:  # noqa: ARG002 - needs none
        """Zeros."""
        return torch.zeros_like(rows)

    def loss(self) -> None:
        """Not accounted: nothing is sent outside this benchmark."""

    def _scores(self, released: Tensor, clean: Tensor) -> Tensor:  # noqa: ARG002
        """The same for every candidate."""
        return torch.zeros(len(clean), dtype=torch.float64)

    def parameters(self) -> dict[str, str]:
        """None."""
        return {}

    def describe(self) -> str:
        """One line for people."""
        return "nothing is sent"


def widths_table(subject: Subject) -> Iterator[str]:
    """Projections without noise."""
    model = subject.model(Partition(1, 0))
    hidden = subject.checkpoint.hidden_size
    clean = projection_training.fidelity(model, subject.text, Cut(subject.text.prefix))
    yield _row(subject.checkpoint.name, hidden, "none", *_cells(clean))
    for width in (hidden // part for part in NARROWER):
        mse = subject.projection(model, width, Objective.MSE, None)
        nll = subject.projection(model, width, Objective.NLL, None)
        for name, found in (("PCA", mse.start), ("mse", mse.end), ("nll", nll.end)):
            yield _row(subject.checkpoint.name, width, name, *_cells(found))


def noise_table(subject: Subject) -> Iterator[str]:
    """Projections under DEL's quantization: trained without noise, and with it in sight."""
    model = subject.model(Partition(1, 0))
    for width in (subject.checkpoint.hidden_size // part for part in NARROWER[:2]):
        blind = subject.projection(model, width, Objective.NLL, None).projection
        clip = _calibration(model, subject.text, Cut(subject.text.prefix, None, blind)).clip(INSIDE)
        for mu in DEL_MU:
            wide = StochasticQuantization(BITS, clip, mu, width)
            cut = Cut(subject.text.prefix, wide, blind)
            unaware = projection_training.fidelity(model, subject.text, cut)
            own = StochasticQuantization(BITS, DEL_CLIP, mu, width)
            aware = subject.projection(model, width, Objective.NLL, own)
            for name, found in (
                ("nll without noise", unaware),
                ("start for the noise", aware.start),
                ("nll with the noise", aware.end),
            ):
                yield _row(subject.checkpoint.name, width, f"{mu:g}", name, *_cells(found))


def denoiser_table(subject: Subject) -> Iterator[str]:
    """Outputs under Gaussian and metric noise, as they are and restored."""
    blocks = subject.checkpoint.num_blocks
    partition = Partition(min(1, blocks - 2), 1)
    model = subject.model(partition)
    hidden = subject.checkpoint.hidden_size
    public = _calibration(model, subject.text, Cut(subject.text.prefix))
    norm = public.clip_norm(INSIDE, centered=False)
    head = (subject.checkpoint.name, f"{partition.bottom} + {partition.top}")
    yield _row(*head, "any", "any", "no answer at all", *without_answers(model, subject.text))
    noises: list[tuple[str, Mechanism]] = [("any", Silence())]
    for mu in DENOISED_MU:
        noises.append((f"{mu:g}", Gaussian(public.clip_norm(INSIDE), mu, center=public.mean)))
        noises.append((f"{mu:g}", MetricDP(mu * hidden**0.5 / (2 * norm), norm, hidden)))
    for shown, noise in noises:
        recipe = denoiser_training.Recipe(schedule=Schedule(subject.steps))
        cut = Cut(subject.text.prefix, noise)
        done = denoiser_training.train_denoiser(model, subject.text, recipe, cut)
        for name, found in (
            ("without", done.without), ("linear start", done.start), ("trained", done.end)
        ):  # fmt: skip
            yield _row(*head, noise.name, shown, name, *_cells(found))


@torch.no_grad()
def without_answers(model: FrozenModel, text: PublicText) -> tuple[str, str, str]:
    """What the client can do alone: outputs as the best linear map of its own clean rows."""
    rows = model.rows(text.training[:256])
    known, wanted = rows.flatten(0, 1), model.outputs(rows).flatten(0, 1)
    guess = torch.linalg.lstsq(_with_one(known), wanted).solution
    clean = model.rows(text.held_out)
    target = model.outputs(clean)
    made = _with_one(clean) @ guess
    logits, right = model.logits(made), model.logits(target).argmax(-1)
    error = (made - target).square().sum() / target.square().sum()
    loss = cross_entropy(logits[:, :-1].flatten(0, 1), text.held_out[:, 1:].flatten())
    agreement = (logits.argmax(-1) == right).float().mean()
    return _cells(Fidelity(error.item(), loss.exp().item(), agreement.item()))


def _with_one(rows: Tensor) -> Tensor:
    return torch.cat([rows, rows.new_ones(*rows.shape[:-1], 1)], -1)


def page(part: Part, subjects: Iterable[Subject], command: str) -> Iterator[str]:
    """The whole page, line by line as it is measured."""
    subjects, began = list(subjects), time.monotonic()
    texts, what = subjects[0].text, part.value.capitalize()
    yield from (
        f"# {what} on real checkpoints",
        "",
        f"{dt.datetime.now(dt.UTC):%Y-%m-%d}, torch {torch.__version__}, {platform.machine()}, "
        f"{torch.get_num_threads()} thread. Command:",
        "",
        f"    {command}",
        "",
        f"Trained for {subjects[0].steps} steps of 8 windows of {WINDOW} tokens on one file of "
        f"TinyStories, measured on {len(texts.held_out)} windows of another. *Error* is the mean "
        f"squared error of {_ROWS[part]}, relative to their mean square. *Agreement* is the share "
        "of positions whose first token is that of the model without projection and noise.",
        "",
        "These figures are of utility. What an attacker recovers at the same noise is measured by "
        "`fedsea redteam`.",
        "",
    )
    sections = projections_page if part is Part.PROJECTIONS else denoisers_page
    yield from sections(subjects)
    yield from ("", f"All of it took {(time.monotonic() - began) / 60:.0f} minutes.")


def projections_page(subjects: Iterable[Subject]) -> Iterator[str]:
    """Narrow rows without and with noise."""
    yield from (
        "## Without noise, one block at the client",
        "",
        "A pair that is trained for next tokens also fits the text, so its perplexity may fall "
        "below that of the model alone; agreement tells how far it is from the model.",
        "",
    )
    yield from _head("model", "width", "trained for", "error", "perplexity", "agreement")
    for subject in subjects:
        yield from widths_table(subject)
    yield from (
        "",
        f"## Under stochastic quantization of {BITS} bits (DEL)",
        "",
        "*mu* is the paper's figure for one row. *nll without noise* is the projection of the "
        f"table above, its clip at the {INSIDE:.0%} quantile of public coordinates. The other two "
        "know the mechanism: at their closed-form start, and after training.",
        "",
    )
    yield from _head("model", "width", "mu", "projection", "error", "perplexity", "agreement")
    for subject in subjects:
        yield from noise_table(subject)


def denoisers_page(subjects: Iterable[Subject]) -> Iterator[str]:
    """Outputs as they are, and restored."""
    yield from (
        "*Cut* is blocks before and after the trunk. *mu* is that of one row for Gaussian noise "
        "around the public mean; for metric noise, eta is chosen so that eta times the diameter "
        "of the ball, divided by the root of the width, is the same number. Clip norms are the "
        f"{INSIDE:.0%} quantiles of public rows. The denoiser has 2 layers of 128; with models "
        "this small it has about as many parameters as their trunk, so the gain is what can be "
        "had, not what it costs. What the server contributes is only what lies above two controls: "
        "*no answer at all*, what the client makes of its clean rows by a linear map, and a denoiser "
        "trained under *silence*, where zeros are sent instead of rows.",
        "",
    )
    yield from _head("model", "cut", "noise", "mu", "denoiser", "error", "perplexity", "agreement")
    for subject in subjects:
        yield from denoiser_table(subject)


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", type=Part, choices=list(Part))
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--training", type=Path, required=True)
    parser.add_argument("--held-out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    command = (
        f"python -m benchmarks.projection {given.part} --models {given.models} --training {given.training} "
        f"--held-out {given.held_out} --steps {given.steps} --out {given.out}"
    )
    torch.set_num_threads(1)
    lines = []
    for line in page(given.part, _subjects(given), command):
        lines.append(line)
        print(line, flush=True)
    given.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _subjects(given: argparse.Namespace) -> Iterator[Subject]:
    for folder in sorted(given.models.iterdir()):
        checkpoint = Checkpoint.open(folder)
        training = PublicText.read(given.training, checkpoint, WINDOW)
        other = PublicText.read(given.held_out, checkpoint, WINDOW)
        text = PublicText(training.training, other.held_out, training.prefix)
        yield Subject(checkpoint, text, given.steps)


def _calibration(model: FrozenModel, text: PublicText, cut: Cut) -> Calibration:
    rows = cut.narrow(model.rows(text.training[:256]))[:, text.prefix :]
    return Calibration.of([rows.flatten(0, 1)], model.partition.bottom, model.fingerprint)


def _cells(found: Fidelity | Restoration) -> tuple[str, str, str]:
    return f"{found.error:.3f}", f"{found.perplexity:.1f}", f"{found.agreement:.1%}"


def _head(*columns: str) -> tuple[str, str]:
    return _row(*columns), _row(*("---" for _ in columns))


def _row(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


if __name__ == "__main__":
    main()
