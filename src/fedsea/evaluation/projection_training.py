"""Training a projection on public text, for one checkpoint and one cut, with its noise in sight.

The start is closed-form: the encoder takes the principal components of the rows (PCA without
centering, since the maps have no bias), turned at random so that every coordinate carries about
the same, and scaled so that nearly all rows lie inside the mechanism's clip; the decoder is the
least-squares one for rows released that way. Gradient steps then lower

    mse  the mean squared error of decoded rows, relative to the rows' mean square, or
    nll  the loss of the next tokens through the frozen model (DEL, arXiv 2602.11513, eq. 7).

A mechanism's noise is added as a constant; clipping is differentiated (straight-through for the
rounding of counts).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedsea.errors import ConfigError
from fedsea.evaluation.frozen import FrozenModel, perplexity
from fedsea.evaluation.public_text import PublicText
from fedsea.evaluation.releasing import Cut, seeded_noise
from fedsea.evaluation.training import OnProgress, Schedule, Training, ignore_progress
from fedsea.model.projection import Projection
from fedsea.privacy.mechanism import Mechanism
from fedsea.privacy.noise import NoiseSource

_INSIDE = 0.99
"""Share of the rows (or coordinates) that the start puts inside the clip."""
_START_WINDOWS = 256
_RIDGE = 1e-6
_EVALUATION_STEP = -1
_START_STEP = -2


class Objective(StrEnum):
    """What the gradient steps lower."""

    MSE = "mse"
    NLL = "nll"


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a projection depends on besides model and text.

    Raises:
        ConfigError: a value out of range.
    """

    width: int
    objective: Objective = Objective.NLL
    schedule: Schedule = field(default_factory=Schedule)
    batch: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ConfigError(f"a batch of {self.batch} windows; use 1 or more")


@dataclass(frozen=True, slots=True)
class Fidelity:
    """How well held-out public text passes the cut.

    Attributes:
        error: mean squared error of the rows that enter the trunk, relative to their mean square.
        perplexity: of the next tokens. None where the checkpoint has no trunk.
        agreement: share of positions whose first token is that of the model without the cut.
    """

    error: float
    perplexity: float | None = None
    agreement: float | None = None


@dataclass(frozen=True, slots=True)
class Trained:
    """A projection, and held-out text through it at the start and at the end."""

    projection: Projection
    start: Fidelity
    end: Fidelity


class _Pair(nn.Module):
    """Encoder and decoder, both at the scale of the rows; `gain` takes them into the clip."""

    gain: Tensor

    def __init__(self, encoder: Tensor, decoder: Tensor, gain: float) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Parameter(encoder), nn.Parameter(decoder)
        self.register_buffer("gain", torch.tensor(gain))

    def narrow(self, rows: Tensor) -> Tensor:
        """Rows (B, T, hidden) as they enter the mechanism, (B, T, width)."""
        return (rows @ self.encoder.T) * self.gain

    def widen(self, released: Tensor) -> Tensor:
        """Released rows as they enter the trunk."""
        return (released / self.gain) @ self.decoder.T


class _Task:
    """One training: what it starts from, the loss of a step, and what comes of it."""

    def __init__(
        self, model: FrozenModel, text: PublicText, recipe: Recipe, mechanism: Mechanism | None
    ) -> None:
        self._model, self._text, self._recipe = model, text, recipe
        self._cut = Cut(text.prefix, mechanism)
        self.described: dict[str, Any] = {
            "objective": recipe.objective.value,
            "steps": recipe.schedule.steps,
            "learning_rate": recipe.schedule.learning_rate,
            "batch": recipe.batch,
            "seed": recipe.seed,
            "window": text.training.shape[1],
            "windows": len(text.training),
            "mechanism": "plain" if mechanism is None else mechanism.spec(),
        }

    @torch.no_grad()
    def start(self) -> _Pair:
        """Principal components, turned and scaled, and the decoder that fits them best."""
        rows = self._model.rows(self._text.training[:_START_WINDOWS])
        flat = rows.flatten(0, 1).double()
        components = torch.linalg.eigh(flat.T @ flat).eigenvectors[:, -self._recipe.width :]
        chance = torch.Generator().manual_seed(self._recipe.seed)
        turn = torch.linalg.qr(torch.randn(2 * (self._recipe.width,), generator=chance)).Q
        encoder = (turn.double() @ components.T).float()
        pair = _Pair(encoder, encoder.T.clone(), self._gain(rows @ encoder.T))
        released = self._cut.release(pair.narrow(rows), self._noise(_START_STEP)) / pair.gain
        seen = released.flatten(0, 1).double()
        square = seen.T @ seen
        square += _RIDGE * square.diagonal().mean() * torch.eye(len(square), dtype=square.dtype)
        pair.decoder.copy_(torch.linalg.solve(square, seen.T @ flat).T)
        return pair

    def loss(self, pair: _Pair, step: int) -> Tensor:
        """The objective at one step."""
        windows = self._text.batch(self._recipe.batch, self._recipe.seed, step)
        rows = self._model.rows(windows)
        passed = pair.widen(self._released(pair.narrow(rows), step))
        if self._recipe.objective is Objective.MSE:
            return (passed - rows).square().sum() / rows.square().sum()
        return _next_token_loss(self._model.logits(self._model.outputs(passed)), windows)

    def projection(self, pair: _Pair) -> Projection:
        """The pair as it is used."""
        return Projection.of(
            pair.encoder * pair.gain,
            pair.decoder / pair.gain,
            self._model.partition.bottom,
            self._model.fingerprint,
            self.described,
        )

    def fidelity(self, pair: _Pair) -> Fidelity:
        """Held-out text through the pair."""
        cut = Cut(self._cut.prefix, self._cut.mechanism, self.projection(pair))
        return fidelity(self._model, self._text, cut)

    def _gain(self, narrow: Tensor) -> float:
        """The factor that puts nearly all of the rows that are protected inside the clip."""
        clip = self._cut.clip
        if math.isinf(clip.radius):
            return 1.0
        found = clip.magnitudes(narrow[:, self._cut.prefix :]).flatten().sort().values
        return clip.radius / float(found[int(_INSIDE * (len(found) - 1))])

    def _released(self, narrow: Tensor, step: int) -> Tensor:
        """Released rows with the gradient of the clipping alone."""
        smooth = self._cut.let_through(narrow)
        released = self._cut.release(narrow, self._noise(step))
        return smooth + (released - smooth).detach()

    def _noise(self, step: int) -> NoiseSource:
        return seeded_noise(self._recipe.seed, step)


def train_projection(
    model: FrozenModel,
    text: PublicText,
    recipe: Recipe,
    mechanism: Mechanism | None = None,
    file: Path | None = None,
    on_progress: OnProgress = ignore_progress,
) -> Trained:
    """Train a projection; `file` keeps the state while it is under way.

    Raises:
        ConfigError: a width that the model does not have, a state of another training, or a
            training that diverged.
        UnsafeRows: the model's rows are not finite.
    """
    hidden = model.checkpoint.hidden_size
    if not 1 <= recipe.width <= hidden:
        raise ConfigError(f"a width of {recipe.width} for rows of {hidden}; use 1 to {hidden}")
    task = _Task(model, text, recipe, mechanism)
    pair = task.start()
    start = task.fidelity(pair)
    identity = {
        **task.described,
        "width": recipe.width,
        "bottom": model.partition.bottom,
        "model": model.fingerprint,
        "text": text.digest(),
    }
    training = Training(pair, recipe.schedule, file, identity)
    training.resume()
    training.run(lambda step: task.loss(pair, step), on_progress)
    return Trained(task.projection(pair), start, task.fidelity(pair))


@torch.no_grad()
def fidelity(model: FrozenModel, text: PublicText, cut: Cut) -> Fidelity:
    """Held-out text through a cut, with the same noise every time."""
    whole = model.checkpoint.bundle is None
    noise = seeded_noise(0, _EVALUATION_STEP)
    error = power = nats = 0.0
    agreeing = positions = 0
    for window in text.held_out[:, None]:
        rows = model.rows(window)
        passed = cut.widen(cut.release(cut.narrow(rows), noise))
        error += (passed - rows).square().sum().item()
        power += rows.square().sum().item()
        if whole:
            logits = model.logits(model.outputs(passed))
            clean = model.logits(model.outputs(rows))
            nats += _next_token_loss(logits, window).item()
            agreeing += int((logits.argmax(-1) == clean.argmax(-1)).sum())
            positions += window.numel()
    if not whole:
        return Fidelity(error / power)
    return Fidelity(error / power, perplexity(nats / len(text.held_out)), agreeing / positions)


def _next_token_loss(logits: Tensor, windows: Tensor) -> Tensor:
    """Mean -log p of the next tokens, for logits (B, T, vocabulary) and ids (B, T)."""
    return cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten())
