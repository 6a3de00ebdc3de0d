"""What an attacker holds besides the recording.

    BASE        the public checkpoint that the client's weights began as
    LEAKED      the very weights that the client runs
    BLACK_BOX   no weights of the client: pairs of text and rows, as many as may be asked for

With frozen client weights BASE and LEAKED are the same. Besides that, an attacker always knows the
mechanism, the projection, the partition, the tokenizer and the public prefix: none is a secret.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property

import torch
from torch import Tensor

from fedsea.errors import ConfigError
from fedsea.model.checkpoint import Checkpoint
from fedsea.model.partition import Partition
from fedsea.model.projection import Projection
from fedsea.model.spans import Placement, Top, load_top
from fedsea.redteam.continuation import Continuation, load_continuation
from fedsea.redteam.language_model import LanguageModel

Query = Callable[[Tensor], Tensor]
"""Token ids (n,) of one text to the rows [n, hidden] that a client computes for it."""


class Level(StrEnum):
    """Names of what attackers hold, as in reports."""

    BASE = "base"
    LEAKED = "leaked"
    BLACK_BOX = "black-box"


@dataclass(frozen=True, eq=False)
class Knowledge:
    """What one attacker holds; make it by `of_weights` or `black_box`.

    Attributes:
        level: its name.
        partition: where the model is cut.
        vocabulary: number of token ids.
        query: rows for texts of the attacker's choice.
        bottom: the attacker's copy of the client's first blocks; None for a black box.
        checkpoint: where that copy is from; None for a black box.
        public: a whole public checkpoint with the same tokenizer: its language model is the prior.
        projection: what the client sends instead of hidden rows, None when it sends these.
        public_prefix: ids that every text begins with, known to everybody.
    """

    level: Level
    partition: Partition
    vocabulary: int
    query: Query
    bottom: Continuation | None = None
    checkpoint: Checkpoint | None = None
    public: Checkpoint | None = None
    projection: Projection | None = None
    public_prefix: tuple[int, ...] = ()

    @classmethod
    def of_weights(
        cls,
        checkpoint: Checkpoint,
        partition: Partition,
        *,
        level: Level = Level.BASE,
        public: Checkpoint | None = None,
        projection: Projection | None = None,
        public_prefix: tuple[int, ...] = (),
    ) -> Knowledge:
        """An attacker with weights: public ones, or the client's own when they leaked.

        `public` is the checkpoint of the language-model prior, `checkpoint` itself by default.

        Raises:
            ModelError: the checkpoint cannot be cut so.
        """
        if level is Level.BLACK_BOX:
            raise ConfigError("a black box has no weights: use Knowledge.black_box")
        partition.trunk_span(checkpoint.num_blocks)
        bottom = load_continuation(checkpoint, partition.bottom_span())
        return cls(
            level=level,
            partition=partition,
            vocabulary=bottom.vocabulary,
            query=bottom.rows_of,
            bottom=bottom,
            checkpoint=checkpoint,
            public=public or checkpoint,
            projection=projection,
            public_prefix=public_prefix,
        )

    @classmethod
    def black_box(
        cls,
        query: Query,
        vocabulary: int,
        partition: Partition,
        *,
        public: Checkpoint | None = None,
        projection: Projection | None = None,
        public_prefix: tuple[int, ...] = (),
    ) -> Knowledge:
        """An attacker who may only ask for rows of texts of its own."""
        return cls(
            level=Level.BLACK_BOX,
            partition=partition,
            vocabulary=vocabulary,
            query=query,
            public=public,
            projection=projection,
            public_prefix=public_prefix,
        )

    def weights(self) -> Continuation:
        """The attacker's copy of the bottom.

        Raises:
            ConfigError: a black box has none.
        """
        if self.bottom is None:
            raise ConfigError(
                "this attack needs weights and a black box has none: use the learned inverter"
            )
        return self.bottom

    @cached_property
    def top(self) -> Top:
        """The attacker's last blocks, norm and head, for the rows that come back.

        Raises:
            ConfigError: the attacker has no checkpoint.
        """
        checkpoint = self.checkpoint or self._public("reading the answer")
        return load_top(checkpoint, self.partition.top_span(checkpoint.num_blocks), Placement())

    @cached_property
    def language_model(self) -> LanguageModel:
        """The prior: the public checkpoint as a whole.

        Raises:
            ConfigError: the attacker has no checkpoint.
        """
        return LanguageModel.load(self._public("a prior"))

    def _public(self, need: str) -> Checkpoint:
        if self.public is None:
            raise ConfigError(f"{need} needs a public checkpoint: give the attacker one")
        return self.public

    def behind(self, projection: Projection) -> Knowledge:
        """The same attacker before a client whose rows a projection narrows.

        Weights are shared, the language model as well when it was loaded before.
        """
        made = replace(self, projection=projection)
        for name in ("top", "language_model"):
            if name in vars(self):
                vars(made)[name] = vars(self)[name]
        return made

    def encode(self, rows: Tensor) -> Tensor:
        """Rows [n, hidden] as the client hands them to the mechanism: [n, width]."""
        return rows if self.projection is None else self.projection.encode(rows)

    def decode(self, released: Tensor) -> Tensor:
        """Released rows [n, width] as the server computes with them: [n, hidden]."""
        return released if self.projection is None else self.projection.decode(released)

    @torch.no_grad()
    def clean_rows(self, ids: Tensor) -> Tensor:
        """What a client would hand to the mechanism for a text of ids (n,): [n, width]."""
        return self.encode(self.query(ids))
