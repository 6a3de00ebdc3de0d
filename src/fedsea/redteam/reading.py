"""R5: what the server can read from the rows that it sends back.

The client decodes the returned rows with the last blocks, the norm and the head. Where these are
public, or near what is public, the server runs the same and reads the same tokens (threats, F3):
noise on the way up hurts both equally.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedsea.model.attention import RaggedBatch
from fedsea.model.spans import Top
from fedsea.privacy.mechanism import Mechanism
from fedsea.redteam.attack import UNKNOWN, Attack, TextGuess
from fedsea.redteam.knowledge import Knowledge
from fedsea.redteam.view import Chain, Repeats


@dataclass(frozen=True, slots=True)
class TopReading(Attack):
    """The first choice of the attacker's own top for every row that went down.

    The guess at a position is what the client decodes there: the token that follows. Only the rows
    that were asked for can be read, and with blocks in the top they can be read as far as they
    came without a gap; `UNKNOWN` elsewhere. A split client whose top has blocks asks for all.
    """

    name: ClassVar[str] = "r5"

    repeats: Repeats = Repeats.APART

    def read(self, chain: Chain, knowledge: Knowledge, mechanism: Mechanism | None) -> TextGuess:  # noqa: ARG002 - of no use to it
        top = knowledge.top
        positions = sorted(chain.returned)
        if len(top.span.span):
            positions = [place for index, place in enumerate(positions) if place == index]
        ids = [UNKNOWN] * len(chain)
        if positions:
            rows = torch.stack([chain.returned[position] for position in positions])
            for position, token in zip(positions, _first_choices(top, rows), strict=True):
                ids[position] = token
        return TextGuess(tuple(ids))


@torch.inference_mode()
def _first_choices(top: Top, rows: Tensor) -> list[int]:
    batch = RaggedBatch.whole([len(rows)], rows.device)
    found: list[int] = top.run(rows, batch, torch.arange(len(rows))).argmax(dim=-1).tolist()
    return found
