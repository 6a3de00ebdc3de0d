"""A split model and its trunk in one process, for tests of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import torch
from tests.training_trunk import TinyTrainingTrunk
from tests.unit.client.conftest import BRIEF, Wire

from fedsea.client.training import SplitForTraining
from fedsea.model.lora import Adapter, LoraConfig
from fedsea.model.partition import Partition
from fedsea.model.spans import Placement

LORA = LoraConfig(rank=4, alpha=12.0)
ONE_EACH = Partition(1, 1)
LENGTHS = (7, 3, 11)


class Split:
    """A split model and its trunk in this process."""

    def __init__(
        self,
        folder: Path,
        partition: Partition = ONE_EACH,
        *,
        served: Partition | None = None,
        placement: Placement | None = None,
        max_forwards: int = 64,
        max_rows: int = 8192,
        **options: Any,
    ) -> None:
        self.wire = Wire()
        self.server = TinyTrainingTrunk(
            folder,
            served or partition,
            placement,
            max_forwards=max_forwards,
            max_rows=max_rows,
            projection=options.get("projection"),
        )
        options = {"lora": LORA, "name": "run", "seed": 5, "patience": BRIEF, **options}
        self.model = SplitForTraining.connect(
            folder,
            {"memory": lambda: self.wire.channel(self.server)},
            partition=partition,
            **options,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.model.close()

    def adapters(self) -> list[Adapter]:
        """Those of all three parts."""
        trunk = [] if self.server.adapter is None else [self.server.adapter]
        return [*self.model.adapters(), *trunk]

    def randomize(self) -> None:
        """Factors of visible size, B included."""
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for adapter in self.adapters():
                for parameter in adapter.parameters():
                    parameter.normal_(std=0.1, generator=generator)
                adapter.changed()
