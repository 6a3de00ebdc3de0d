"""What is left of a model's use: perplexity, accuracy and agreement with the unprotected model.

Logits are reduced to three numbers a position as soon as they are there, because a vocabulary is
wide and texts are many.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor

from fedsea.errors import ConfigError
from fedsea.redteam.report import Utility

_MOST_NATS = 700.0  # exp of more is no float


@dataclass(frozen=True, slots=True)
class Reading:
    """What a model made of one text of n tokens.

    Attributes:
        nats: (n - 1,) -log p of every next token, natural logarithm.
        first: (n,) the token ranked first after every position.
        hits: (n - 1,) whether the token ranked first was the next one.
    """

    nats: Tensor
    first: Tensor
    hits: Tensor


def read(logits: Tensor, ids: Tensor) -> Reading:
    """Reduce logits (n, vocabulary) of a text with token ids (n,).

    Raises:
        ConfigError: the shapes do not belong together, or the text has fewer than two tokens.
    """
    if logits.ndim != 2 or ids.shape != logits.shape[:1] or len(ids) < 2:
        raise ConfigError("utility is measured on texts of two tokens or more, with all logits")
    logs = logits[:-1].float().log_softmax(-1)
    nats = -logs.gather(1, ids[1:, None])[:, 0]
    first = logits.argmax(-1)
    return Reading(nats=nats, first=first, hits=first[:-1] == ids[1:])


def utility(
    readings: Sequence[Reading],
    clean: Sequence[Reading],
    answers: Sequence[Sequence[int]] = (),
    clean_answers: Sequence[Sequence[int]] = (),
) -> Utility:
    """Compare what a protected model made of texts, and answered, with what the clean one did.

    Raises:
        ConfigError: there is nothing to compare, or the two do not belong together.
    """
    if not readings or len(readings) != len(clean) or len(answers) != len(clean_answers):
        raise ConfigError("utility compares readings of the same texts, one at least")
    nats = torch.cat([reading.nats for reading in readings])
    hits = torch.cat([reading.hits for reading in readings])
    first = torch.cat([reading.first for reading in readings])
    clean_first = torch.cat([reading.first for reading in clean])
    if first.shape != clean_first.shape:
        raise ConfigError("utility compares readings of the same texts, one at least")
    return Utility(
        perplexity=math.exp(min(nats.double().mean().item(), _MOST_NATS)),
        accuracy=hits.double().mean().item(),
        agreement=(first == clean_first).double().mean().item(),
        generation=generation_agreement(answers, clean_answers) if answers else None,
    )


def generation_agreement(
    answers: Sequence[Sequence[int]], clean_answers: Sequence[Sequence[int]]
) -> float:
    """Share of positions at which greedy answers have the token of the clean ones.

    Where one answer has ended and the other goes on, the positions count as different.
    """
    pairs = [
        pair
        for answer, clean in zip(answers, clean_answers, strict=True)
        for pair in zip_longest(answer, clean)
    ]
    return sum(left == right for left, right in pairs) / len(pairs) if pairs else 1.0
