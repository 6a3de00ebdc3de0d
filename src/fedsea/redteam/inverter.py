"""R4: a network that learns to read tokens from released rows.

It is trained on public text, on rows that the mechanism protected with fresh noise at every step
(SIP of SplitLLM and BiSR, arXiv 2409.00960): a defence that is only tried against an inverter that
never saw its noise has not been tried. Where the scale of the noise is not known, `mixture` trains
over several mechanisms. It needs no weights: a black box trains on rows that it asks for.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from fedsea.errors import ConfigError
from fedsea.privacy.mechanism import Mechanism
from fedsea.privacy.noise import NoiseSource
from fedsea.redteam.attack import Attack, TextGuess
from fedsea.redteam.knowledge import Knowledge
from fedsea.redteam.view import Chain, Repeats

_IGNORED = -100
_LARGEST_GRADIENT = 1.0


class Architecture(StrEnum):
    """What reads the rows."""

    GRU = "gru"
    TRANSFORMER = "transformer"


@dataclass(frozen=True, slots=True)
class Recipe:
    """How an inverter is made and trained; the same recipe gives the same inverter.

    Raises:
        ConfigError: a value out of range.
    """

    architecture: Architecture = Architecture.GRU
    hidden: int = 256
    steps: int = 250
    texts: int = 512
    batch: int = 16
    learning_rate: float = 2e-3
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.hidden, self.steps, self.texts, self.batch) < 1 or self.learning_rate <= 0:
            raise ConfigError("sizes, steps and the learning rate of an inverter are above 0")


class Inverter(Attack):
    """A trained network: for each position the token that it finds most likely.

    Make it with `train`; it then attacks what the mechanism of its training released.
    """

    name: ClassVar[str] = "r4"

    def __init__(self, network: _Network, loss: float, repeats: Repeats = Repeats.APART) -> None:
        self.repeats = repeats
        self.loss = loss
        self._network = network

    @classmethod
    def train(
        cls,
        knowledge: Knowledge,
        mechanism: Mechanism | None,
        texts: Sequence[Sequence[int]],
        recipe: Recipe = Recipe(),
        mixture: Sequence[Mechanism] = (),
    ) -> Self:
        """Train on public texts.

        Args:
            knowledge: gives the clean rows of any text.
            mechanism: protects them; None for the clean channel.
            texts: token ids of public texts.
            recipe: sizes and steps.
            mixture: train over these instead, one drawn for each step, where the attacker does not
                know which of them is used.

        Raises:
            ConfigError: there are no texts.
        """
        known = [torch.tensor(list(ids)) for ids in texts[: recipe.texts] if len(ids)]
        if not known:
            raise ConfigError("an inverter learns from public texts: give it some")
        clean = [knowledge.clean_rows(ids) for ids in known]
        first = len(knowledge.public_prefix)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            network = _Network(recipe, torch.cat(clean), knowledge.vocabulary)
            loss = _fit(network, recipe, known, clean, tuple(mixture) or (mechanism,), first)
        return cls(network, loss)

    def read(self, chain: Chain, knowledge: Knowledge, mechanism: Mechanism | None) -> TextGuess:  # noqa: ARG002 - it was trained with it
        if not len(chain):
            return TextGuess(())
        with torch.inference_mode():
            logits = self._network(chain.means()[None])[0]
        scores, ids = torch.log_softmax(logits, dim=-1).max(dim=-1)
        known = knowledge.public_prefix[: len(chain)]
        found = (*known, *ids.tolist()[len(known) :])
        return TextGuess(found, tuple(scores.tolist()), {"training_loss": self.loss})


class _Network(nn.Module):
    """Rows [b, n, width] to logits [b, n, vocabulary]; later rows are read too."""

    def __init__(self, recipe: Recipe, clean: Tensor, vocabulary: int) -> None:
        super().__init__()
        self.mean = clean.mean(dim=0)
        self.scale = clean.std(dim=0, correction=0).clamp_min(1e-6)
        hidden = recipe.hidden
        self.enter = nn.Linear(clean.shape[1], hidden)
        self.is_recurrent = recipe.architecture is Architecture.GRU
        self.reader: nn.Module = (
            nn.GRU(hidden, hidden, batch_first=True, bidirectional=True)
            if self.is_recurrent
            else _encoder(hidden)
        )
        self.choose = nn.Linear(hidden * (3 if self.is_recurrent else 2), vocabulary)

    def forward(self, rows: Tensor) -> Tensor:
        entered = self.enter((rows - self.mean) / self.scale)
        context = self.reader(entered)
        if self.is_recurrent:
            context = context[0]
        logits: Tensor = self.choose(torch.cat([entered, context], dim=-1))
        return logits


def _encoder(hidden: int) -> nn.Module:
    heads = next(count for count in (4, 2, 1) if hidden % count == 0)
    layer = nn.TransformerEncoderLayer(
        hidden, heads, 2 * hidden, dropout=0.0, batch_first=True, norm_first=True
    )
    return nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)


def _fit(
    network: _Network,
    recipe: Recipe,
    texts: Sequence[Tensor],
    clean: Sequence[Tensor],
    mechanisms: Sequence[Mechanism | None],
    first: int,
) -> float:
    """Train; the mean loss of the last tenth of the steps, in nats per token."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=recipe.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, total_steps=recipe.steps + 1, pct_start=0.1
    )
    noise = NoiseSource(seed=f"inverter {recipe.seed}".encode())
    losses = []
    batches = _batches(len(texts), recipe.batch)
    for step in range(recipe.steps):
        chosen = next(batches)
        mechanism = mechanisms[step % len(mechanisms)]
        rows = pad_sequence([_released(mechanism, clean[i], noise) for i in chosen], True)
        truth = pad_sequence([texts[i] for i in chosen], True, _IGNORED)
        logits = network(rows)[:, first:]
        loss = cross_entropy(
            logits.flatten(0, 1), truth[:, first:].flatten(), ignore_index=_IGNORED
        )
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), _LARGEST_GRADIENT)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    last = losses[-max(1, len(losses) // 10) :]
    return sum(last) / len(last)


def _released(mechanism: Mechanism | None, clean: Tensor, noise: NoiseSource) -> Tensor:
    if mechanism is None:
        return clean
    return mechanism.values(mechanism.protect(clean, noise))


def _batches(count: int, size: int) -> Iterator[list[int]]:
    """Numbers of texts, every text once before any comes again."""
    endless = itertools.chain.from_iterable(
        torch.randperm(count).tolist() for _ in itertools.count()
    )
    while True:
        yield list(itertools.islice(endless, min(size, count)))
