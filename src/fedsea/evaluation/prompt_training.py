"""Training a soft prompt, and adapters, on public text under the noise that rows are released with.

Everything else is frozen. Every step releases fresh noise and lowers the loss of the next tokens:

    min_E  sum_i -log Pr[x_(i+1) | E, x^_1 .. x^_i]        (DEL, arXiv 2602.11513, eq. 13)

with x^ the released rows of any mechanism, narrowed by a projection or not. LoRA adapters may be
trained under the same noise, in its place or beside it. Prompt and trunk adapter see released rows
only: whatever the server makes of them costs no privacy. An adapter of the bottom changes rows
before they are released; its gradients pass the clipping, and the noise as a constant.
"""

from __future__ import annotations

from collections.abc import Mapping
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
from fedsea.model.adapters import write_adapter
from fedsea.model.lora import Adapter, LoraConfig
from fedsea.model.prompts import SoftPrompt, write_prompt
from fedsea.model.spans import BlockSpan, embedding_factor
from fedsea.privacy.noise import NoiseSource

_START_WINDOWS = 64
_HELD_OUT_BATCH = 16
_EVALUATION_STEP = -1


class Part(StrEnum):
    """Which blocks an adapter changes."""

    BOTTOM = "bottom"
    TRUNK = "trunk"
    TOP = "top"


@dataclass(frozen=True, slots=True)
class Recipe:
    """What is trained, besides model, cut and text.

    Attributes:
        rows: rows of the prompt; 0 for none.
        lora: adapters of the blocks of `parts`; None for none. Dropout is not applied.
        parts: whose blocks.
        schedule: gradient steps.
        batch: windows of text in one step.
        seed: start of all chance.

    Raises:
        ConfigError: a value out of range, or nothing to train.
    """

    rows: int = 20
    lora: LoraConfig | None = None
    parts: tuple[Part, ...] = (Part.TRUNK,)
    schedule: Schedule = field(default_factory=Schedule)
    batch: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rows < 0:
            raise ConfigError(f"a prompt of {self.rows} rows; use 0 or more")
        if self.batch < 1:
            raise ConfigError(f"a batch of {self.batch} windows; use 1 or more")
        if not self.rows and (self.lora is None or not self.parts):
            raise ConfigError("nothing is trained; give rows of a prompt, or an adapter")


@dataclass(frozen=True, slots=True)
class Quality:
    """What held-out text is predicted like, with noise.

    Attributes:
        perplexity: of the next tokens.
        agreement: share of positions whose first token is that of the model without noise, prompt
            and adapters.
        nats: (windows,) mean -log p of each window's next tokens, natural logarithm.
    """

    perplexity: float
    agreement: float
    nats: Tensor = field(repr=False, compare=False)


class Tuned(nn.Module):
    """What is trained: a prompt, or None, and adapters by part."""

    def __init__(self, prompt: SoftPrompt | None, adapters: Mapping[Part, Adapter]) -> None:
        super().__init__()
        self.prompt = prompt
        self.adapters = dict(adapters)
        for part, adapter in adapters.items():
            self.add_module(part.value, adapter)

    def save(self, folder: Path, base_model: str) -> list[Path]:
        """Write `prompt` and `adapter`, each a folder in PEFT's format; returns what there is.

        Raises:
            ConfigError: they cannot be written.
        """
        written = []
        if self.prompt is not None:
            written.append(folder / "prompt")
            write_prompt(written[-1], self.prompt, base_model)
        if self.adapters:
            written.append(folder / "adapter")
            write_adapter(written[-1], list(self.adapters.values()), base_model)
        return written


@dataclass(frozen=True, slots=True)
class Trained:
    """What was trained, and held-out text without it, with its start, and with it."""

    tuned: Tuned
    without: Quality
    start: Quality
    end: Quality


class _Task:
    """One training: what it starts from, and the loss of a step."""

    def __init__(self, model: FrozenModel, text: PublicText, recipe: Recipe, cut: Cut) -> None:
        self._model, self._text, self._recipe, self._cut = model, text, recipe, cut

    def start(self) -> Tuned:
        """Rows of public text, drawn at random, and adapters that change nothing."""
        chance = torch.Generator().manual_seed(self._recipe.seed)
        prompt = self._first_prompt(chance) if self._recipe.rows else None
        adapters = {}
        if self._recipe.lora is not None:
            for part in self._recipe.parts:
                blocks = self._blocks(part)
                adapter = Adapter.fresh(self._recipe.lora, blocks.span, blocks.linears(), chance)
                if not adapter.factors:
                    raise ConfigError(f"the {part} has no blocks for an adapter; leave it out")
                blocks.accept(adapter)
                adapters[part] = adapter
        return Tuned(prompt, adapters)

    def loss(self, tuned: Tuned, step: int) -> Tensor:
        """Mean -log p of the next tokens at one step."""
        windows = self._text.batch(self._recipe.batch, self._recipe.seed, step)
        noise = seeded_noise(self._recipe.seed, step)
        logits = predicted(self._model, self._cut, windows, noise, tuned)
        return cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten())

    def _first_prompt(self, chance: torch.Generator) -> SoftPrompt:
        """Rows as they enter the trunk, so that they are of the size that its blocks expect."""
        model = self._model
        rows = model.rows(self._text.training[:_START_WINDOWS])[:, self._text.prefix :].flatten(
            0, 1
        )
        factor = embedding_factor(model.checkpoint.config) if not model.partition.bottom else 1.0
        drawn = rows[torch.randint(len(rows), (self._recipe.rows,), generator=chance)] / factor
        return SoftPrompt(drawn, model.partition.bottom, model.fingerprint, factor)

    def _blocks(self, part: Part) -> BlockSpan:
        match part:
            case Part.BOTTOM:
                return self._model.bottom
            case Part.TRUNK:
                return self._model.trunk
            case Part.TOP:
                return self._model.top.span


def train_prompt(
    model: FrozenModel,
    text: PublicText,
    recipe: Recipe,
    cut: Cut,
    file: Path | None = None,
    on_progress: OnProgress = ignore_progress,
) -> Trained:
    """Train a prompt, adapters, or both; `file` keeps the state while it is under way.

    Raises:
        ConfigError: a part without blocks, linears that the model does not have, a projection that
            does not fit, a state of another training, or a training that diverged.
        FingerprintMismatch: the projection is of another checkpoint.
        CheckpointError: the checkpoint is not complete.
    """
    projection = ""
    if cut.projection is not None:
        cut.projection.check_fits(
            model.checkpoint.hidden_size, model.partition.bottom, model.fingerprint
        )
        projection = cut.projection.fingerprint()
    task = _Task(model, text, recipe, cut)
    tuned = task.start()
    without, start = held_out(model, text, cut), held_out(model, text, cut, tuned)
    identity: dict[str, Any] = {
        "rows": recipe.rows,
        "lora": repr(recipe.lora),
        "parts": [part.value for part in recipe.parts],
        "batch": recipe.batch,
        "seed": recipe.seed,
        "model": model.fingerprint,
        "partition": repr(model.partition),
        "mechanism": "plain" if cut.mechanism is None else cut.mechanism.spec(),
        "projection": projection,
        "text": text.digest(),
    }
    training = Training(tuned, recipe.schedule, file, identity)
    training.resume()
    training.run(lambda step: task.loss(tuned, step), on_progress)
    return Trained(tuned, without, start, held_out(model, text, cut, tuned))


def predicted(
    model: FrozenModel, cut: Cut, windows: Tensor, noise: NoiseSource, tuned: Tuned | None = None
) -> Tensor:
    """Logits (B, T, vocabulary) of windows (B, T) that were released with noise."""
    tuned = tuned or Tuned(None, {})
    narrow = cut.narrow(model.rows(windows, tuned.adapters.get(Part.BOTTOM)))
    released = cut.release(narrow, noise)
    if narrow.requires_grad:
        smooth = cut.let_through(narrow)
        released = smooth + (released - smooth).detach()
    outputs = model.outputs(cut.widen(released), tuned.prompt, tuned.adapters.get(Part.TRUNK))
    return model.logits(outputs, tuned.adapters.get(Part.TOP))


@torch.no_grad()
def held_out(
    model: FrozenModel, text: PublicText, cut: Cut, tuned: Tuned | None = None, seed: int = 0
) -> Quality:
    """Held-out text through a cut; the same seed gives the same noise every time."""
    noise = seeded_noise(seed, _EVALUATION_STEP)
    nats, agreeing = [], 0
    for windows in text.held_out.split(_HELD_OUT_BATCH):
        logits = predicted(model, cut, windows, noise, tuned)
        clean = model.logits(model.outputs(model.rows(windows)))
        each = cross_entropy(logits[:, :-1].mT, windows[:, 1:], reduction="none")
        nats.append(each.mean(1))
        agreeing += int((logits.argmax(-1) == clean.argmax(-1)).sum())
    found = torch.cat(nats).double()
    return Quality(perplexity(found.mean().item()), agreeing / text.held_out.numel(), found)
