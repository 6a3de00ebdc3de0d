"""A training step through the cut over loopback TLS, against the unsplit model under peft."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from benchmarks import checkpoints
from benchmarks.bench import Bench, Mode
from benchmarks.measure import Row, Spread, at_most, interleave, ratios
from benchmarks.settings import LARGE, SMALL, Shape
from fedsea.client.training import SplitForTraining
from fedsea.model.lora import TARGETS, LoraConfig

CASE = "training"
BATCH, LENGTH = 4, 128
_LORA = LoraConfig(rank=8, alpha=16.0)
_RATE = 1e-4
_WARM_UP_STEPS = 2


@dataclass(frozen=True, slots=True)
class _Step:
    """Seconds of a step, its loss, and the bytes that travelled in both directions."""

    seconds: float
    loss: float
    bytes: int = 0


class _Trained:
    """A model and its optimizer; called, it takes one step on the same batch."""

    def __init__(self, model: nn.Module, ids: Tensor) -> None:
        self.model = model.train()
        self._ids = ids
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(trained, lr=_RATE)

    def __call__(self) -> _Step:
        began = time.perf_counter()
        loss = self.model(input_ids=self._ids, labels=self._ids).loss
        loss.backward()
        self._finish()
        self._optimizer.step()
        self._optimizer.zero_grad()
        return _Step(time.perf_counter() - began, float(loss.detach()))

    def _finish(self) -> None:
        """What else belongs to the step."""


class _Split(_Trained):
    """The same through the cut."""

    model: SplitForTraining

    def __call__(self) -> _Step:
        before = replace(self.model.traffic)
        step = _Trained.__call__(self)
        used = self.model.traffic.since(before)
        return replace(step, bytes=used.bytes_up + used.bytes_down)

    def _finish(self) -> None:
        self.model.step(_RATE)


def rows(bench: Bench) -> list[Row]:
    """The small shape in a quick run as well, the large one with its target."""
    return [row for shape in (SMALL, LARGE) for row in _rows_of(bench, shape)]


def _rows_of(bench: Bench, shape: Shape) -> list[Row]:
    model = bench.model(shape)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(8, shape.vocabulary - 8, (BATCH, LENGTH), generator=generator)
    folder = bench.logs / f"trainings-{shape.name}"
    mode = Mode(name="training", settings=(f"training.folder={folder}",))
    served = bench.served(model, mode)
    bench.say(f"training {shape.name}, batch {BATCH} x {LENGTH}")
    split = bench.keep(
        SplitForTraining.connect(
            model,
            served.address,
            name=f"bench-{shape.name}",
            tls=bench.tls,
            partition=checkpoints.partition_of(model),
            lora=_LORA,
        )
    )
    works = [_Trained(_whole(model), ids), _Split(split, ids)]
    for _ in range(_WARM_UP_STEPS):
        for work in works:
            work()
    whole, ours = zip(*interleave(works, bench.scale.pairs), strict=True)
    label = f"{shape.name}, batch {BATCH} x {LENGTH}"
    payload = 4 * BATCH * LENGTH * shape.hidden * torch.float32.itemsize
    return [
        Row(
            case=CASE,
            name=f"{label}: step of peft unsplit",
            unit="s",
            spread=Spread.of(step.seconds for step in whole),
        ),
        Row(
            case=CASE,
            name=f"{label}: step of the split over TLS",
            unit="s",
            spread=Spread.of(step.seconds for step in ours),
        ),
        Row(
            case=CASE,
            name=f"{label}: step of the split / of peft unsplit",
            spread=ratios((s.seconds for s in ours), (s.seconds for s in whole)),
            target=at_most(1.15) if shape is LARGE else None,
            key=f"training_step_{shape.name}" if shape is LARGE else None,
            note=f"LoRA of rank {_LORA.rank} on all linears; losses {ours[-1].loss:.4f} and "
            f"{whole[-1].loss:.4f} with other first factors",
        ),
        Row(
            case=CASE,
            name=f"{label}: bytes of a step beyond its rows and gradients",
            unit="B",
            spread=Spread.of(float(step.bytes - payload) for step in ours),
            target=at_most(1024),
            note=f"{payload:,} bytes of rows and gradients",
        ),
    ]


def _whole(model: Path) -> nn.Module:
    """The unsplit model in `transformers`, under peft."""
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    config = PeftConfig(
        r=_LORA.rank,
        lora_alpha=int(_LORA.alpha),
        target_modules=list(TARGETS),
        task_type="CAUSAL_LM",
    )
    adapted: nn.Module = get_peft_model(base, config)
    return adapted
