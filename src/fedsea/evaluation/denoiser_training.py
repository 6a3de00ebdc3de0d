"""Training the client's denoiser on public text, for one model, cut, mechanism and projection.

Every step releases fresh noise, runs the trunk over clean and over released rows, and lowers the
mean squared error between what the denoiser makes of the second answer and the first (Split-and-
Denoise, arXiv 2310.09130, section 3.3). The start is closed-form: the linear map of output, clean
row and noise of one position that fits best.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fedsea.errors import ConfigError
from fedsea.evaluation.frozen import FrozenModel, perplexity
from fedsea.evaluation.public_text import PublicText
from fedsea.evaluation.releasing import Cut, seeded_noise
from fedsea.evaluation.training import OnProgress, Schedule, Training, ignore_progress
from fedsea.privacy.denoiser import Denoiser, Purpose, Shape
from fedsea.privacy.noise import NoiseSource

_START_WINDOWS = 256
_RIDGE = 1e-4
_EVALUATION_STEP = -1
_START_STEP = -2


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a denoiser depends on besides model, cut and text.

    `inner`, `layers`, `heads` and `window` are the sizes of `Shape`.

    Raises:
        ConfigError: a value out of range.
    """

    inner: int = 128
    layers: int = 2
    heads: int = 4
    window: int = 64
    schedule: Schedule = field(default_factory=Schedule)
    batch: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ConfigError(f"a batch of {self.batch} windows; use 1 or more")


@dataclass(frozen=True, slots=True)
class Restoration:
    """Held-out text through trunk and top, with noise.

    Attributes:
        error: mean squared error of the trunk's output, relative to the clean one's mean square.
        perplexity: of the next tokens.
        agreement: share of positions whose first token is that of the model without noise.
    """

    error: float
    perplexity: float
    agreement: float


@dataclass(frozen=True, slots=True)
class Trained:
    """A denoiser, and held-out text without it, with its start, and with it."""

    denoiser: Denoiser
    without: Restoration
    start: Restoration
    end: Restoration


@dataclass(frozen=True, slots=True)
class _Example:
    """Texts with noise: answers to released and to clean rows, clean rows, noise; (B, T, *)."""

    noisy: Tensor
    target: Tensor
    clean: Tensor
    noise: Tensor


class _Task:
    """One training: examples of a step, the start, and the loss."""

    def __init__(self, model: FrozenModel, text: PublicText, recipe: Recipe, cut: Cut) -> None:
        self._model, self._text, self._recipe, self._cut = model, text, recipe, cut

    @torch.no_grad()
    def example(self, windows: Tensor, noise: NoiseSource) -> _Example:
        """Run windows (B, T) through the trunk, clean and released."""
        clean = self._model.rows(windows)
        narrow = self._cut.narrow(clean)
        released = self._cut.release(narrow, noise)
        return _Example(
            noisy=self._model.outputs(self._cut.widen(released)),
            target=self._model.outputs(clean),
            clean=clean,
            noise=released - narrow,
        )

    def start(self, shape: Shape, purpose: Purpose, described: dict[str, Any]) -> Denoiser:
        """Weights from the seed, scales from public rows, and the linear map that fits best."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._recipe.seed)
            made = Denoiser(shape, purpose, described)
        windows = self._text.training[:_START_WINDOWS]
        example = self.example(windows, seeded_noise(self._recipe.seed, _START_STEP))
        parts = (example.noisy, example.clean, example.noise)
        made.scales.copy_(torch.stack([_rms(rows) for rows in parts]))
        scaled = [rows / scale for rows, scale in zip(parts, made.scales, strict=True)]
        _fit(made.direct, torch.cat(scaled, -1), example.target / made.scales[0])
        return made

    def loss(self, denoiser: Denoiser, step: int) -> Tensor:
        """Squared error of one step's outputs, relative to the clean ones."""
        windows = self._text.batch(self._recipe.batch, self._recipe.seed, step)
        example = self.example(windows, seeded_noise(self._recipe.seed, step))
        restored: Tensor = denoiser(example.noisy, example.clean, example.noise)
        return (restored - example.target).square().sum() / example.target.square().sum()

    @torch.no_grad()
    def restoration(self, denoiser: Denoiser | None) -> Restoration:
        """Held-out text, with the same noise every time."""
        noise = seeded_noise(0, _EVALUATION_STEP)
        error = power = nats = 0.0
        agreeing = 0
        for window in self._text.held_out[:, None]:
            example = self.example(window, noise)
            restored = example.noisy
            if denoiser is not None:
                restored = denoiser(example.noisy, example.clean, example.noise)
            error += (restored - example.target).square().sum().item()
            power += example.target.square().sum().item()
            logits = self._model.logits(restored)
            clean = self._model.logits(example.target)
            nats += cross_entropy(logits[0, :-1], window[0, 1:]).item()
            agreeing += int((logits.argmax(-1) == clean.argmax(-1)).sum())
        count = self._text.held_out.numel()
        nats /= len(self._text.held_out)
        return Restoration(error / power, perplexity(nats), agreeing / count)


def train_denoiser(
    model: FrozenModel,
    text: PublicText,
    recipe: Recipe,
    cut: Cut,
    file: Path | None = None,
    on_progress: OnProgress = ignore_progress,
) -> Trained:
    """Train a denoiser; `file` keeps the state while it is under way.

    Raises:
        ConfigError: no mechanism, sizes out of range, a projection that does not fit, a state of
            another training, or a training that diverged.
        FingerprintMismatch: the projection is of another checkpoint.
        CheckpointError: the checkpoint is not complete.
    """
    if cut.mechanism is None:
        raise ConfigError("without a mechanism there is no noise to take back; choose one")
    hidden, bottom = model.checkpoint.hidden_size, model.partition.bottom
    width, projection = hidden, ""
    if cut.projection is not None:
        cut.projection.check_fits(hidden, bottom, model.fingerprint)
        width, projection = cut.projection.width, cut.projection.fingerprint()
    purpose = Purpose(
        model.fingerprint, bottom, model.partition.top, cut.mechanism.spec(), projection
    )
    shape = Shape(hidden, width, recipe.inner, recipe.layers, recipe.heads, recipe.window)
    described: dict[str, Any] = {
        "steps": recipe.schedule.steps,
        "learning_rate": recipe.schedule.learning_rate,
        "batch": recipe.batch,
        "seed": recipe.seed,
        "window": text.training.shape[1],
        "windows": len(text.training),
    }
    task = _Task(model, text, recipe, cut)
    denoiser = task.start(shape, purpose, described)
    without, start = task.restoration(None), task.restoration(denoiser)
    identity = {
        **described, "shape": repr(shape), "purpose": repr(purpose), "text": text.digest()
    }  # fmt: skip
    training = Training(denoiser, recipe.schedule, file, identity)
    training.resume()
    training.run(lambda step: task.loss(denoiser, step), on_progress)
    return Trained(denoiser, without, start, task.restoration(denoiser))


def _rms(rows: Tensor) -> Tensor:
    """Root mean square; 1 where all is zero."""
    found = rows.square().mean().sqrt()
    return found if found > 0 else torch.ones(())


@torch.no_grad()
def _fit(layer: torch.nn.Linear, inputs: Tensor, targets: Tensor) -> None:
    """Set a layer to the least-squares map from inputs (..., in) to targets (..., out)."""
    known = inputs.flatten(0, 1).double()
    known = torch.cat([known, known.new_ones(len(known), 1)], 1)
    square = known.T @ known
    square += _RIDGE * square.diagonal().mean() * torch.eye(len(square), dtype=square.dtype)
    solved = torch.linalg.solve(square, known.T @ targets.flatten(0, 1).double()).T
    layer.weight.copy_(solved[:, :-1])
    layer.bias.copy_(solved[:, -1])
