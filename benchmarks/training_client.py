"""One who trains, in a process of its own: a split client, or the whole model with peft.

Line by line on standard input, JSON on standard output. Times are those of the monotonic clock, which
all processes of a machine share.

    train FIRST COUNT      -> {"began": s, "ended": s, "served": s, "forward": s, "middle": s}

One step for each of COUNT examples from number FIRST on. `served` are the seconds of waiting for the
trunk, of `forward` those before a Forward and of `middle` those between its answer and the Backward.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.processes import Child

RANK = 8
ALPHA = 16.0
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
LEARNING_RATE = 1e-4
CLIP = 1.0
SHORTEST, LONGEST = 64, 192
WHOLE = "whole"

_numbers = itertools.count()


def example(number: int, vocabulary: int) -> Tensor:
    """The ids (n,) of an example of 64 to 192 tokens; the same in every process."""
    generator = torch.Generator().manual_seed(number)
    length = int(torch.randint(SHORTEST, LONGEST + 1, (1,), generator=generator))
    return torch.randint(8, vocabulary - 8, (length,), generator=generator)


@dataclass(frozen=True, slots=True)
class Trained:
    """When some steps began and ended, and where a client spent the time between."""

    began: float
    ended: float
    served: float = 0.0
    forward: float = 0.0
    middle: float = 0.0

    @property
    def seconds(self) -> float:
        """Of the wall clock."""
        return self.ended - self.began


class TrainingProcess:
    """The controlling side. Use it as a context manager.

    Args:
        model: the checkpoint.
        name: of the training at the server; `WHOLE` trains the unsplit model.
        address: of the server.
        certificates: folder with the certificate of `tenant`.
        tenant: who trains.
        threads: of this process.
    """

    def __init__(
        self,
        model: Path,
        name: str,
        address: str,
        certificates: Path,
        tenant: str,
        threads: int,
    ) -> None:
        arguments = [__name__, str(model), name, address, str(certificates), tenant]
        log = certificates.parent / f"training-{next(_numbers)}.log"
        self._child = Child(arguments, log, threads)

    def __enter__(self) -> Self:
        self._child.line()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._child.close()

    def begin(self, first: int, count: int) -> None:
        """Start some steps; `wait` follows."""
        self._child.tell(f"train {first} {count}")

    def wait(self) -> Trained:
        """When they are done.

        Raises:
            ProcessFailed: the process has ended.
        """
        return Trained(**json.loads(self._child.line()))


class _Steps(Protocol):
    """What takes a step for one example."""

    def step(self, ids: Tensor) -> None: ...


class _Whole:
    """The unsplit model in transformers with an adapter of peft."""

    def __init__(self, model: Path) -> None:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS))
        self._model: Any = get_peft_model(base, config).train()
        self._trained = [one for one in self._model.parameters() if one.requires_grad]
        self._adamw = torch.optim.AdamW(self._trained, lr=LEARNING_RATE)

    def step(self, ids: Tensor) -> None:
        loss = self._model(input_ids=ids[None], labels=ids[None]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._trained, CLIP)
        self._adamw.step()
        self._adamw.zero_grad()


@dataclass(slots=True)
class _Waits:
    """Seconds between the calls of the trunk, and inside them."""

    served: float = 0.0
    forward: float = 0.0
    middle: float = 0.0
    left: float = field(default_factory=time.monotonic)

    def enter(self, before: str) -> float:
        now = time.monotonic()
        if before:
            setattr(self, before, getattr(self, before) + now - self.left)
        return now

    def leave(self, entered: float) -> None:
        self.left = time.monotonic()
        self.served += self.left - entered


class _Split:
    """Bottom and top here, the trunk at a server."""

    def __init__(
        self, model: Path, name: str, address: str, certificates: Path, tenant: str
    ) -> None:
        from benchmarks.bench import client_tls
        from fedsea.client.training import SplitForTraining
        from fedsea.model.lora import LoraConfig
        from fedsea.model.optimization import AdamWConfig, AdapterOptimizer

        self.waits = _Waits()
        self.model = SplitForTraining.connect(
            model,
            address,
            name=name,
            tls=client_tls(certificates, tenant),
            lora=LoraConfig(rank=RANK, alpha=ALPHA, targets=TARGETS),
        ).train()
        self._adamw = AdapterOptimizer(dict(self.model.named_parameters()), AdamWConfig())
        self._watch(self.model.calls, "forward", "forward")
        self._watch(self.model.calls, "backward", "middle")

    def step(self, ids: Tensor) -> None:
        self.waits.left = time.monotonic()
        logits = self.model.logits([ids], [torch.arange(len(ids) - 1)])
        cross_entropy(logits, ids[1:]).backward()
        entered = self.waits.enter("")
        self.model.step(LEARNING_RATE, CLIP)
        self.waits.leave(entered)
        self._adamw.apply(LEARNING_RATE, CLIP)

    def _watch(self, calls: Any, name: str, before: str) -> None:
        """Time the calls of one method, and what comes before them."""
        inner = getattr(calls, name)

        def timed(*arguments: Any, **more: Any) -> Any:
            entered = self.waits.enter(before)
            found = inner(*arguments, **more)
            self.waits.leave(entered)
            return found

        setattr(calls, name, timed)


def _main(arguments: Sequence[str]) -> None:
    from benchmarks import checkpoints

    model, name = Path(arguments[0]), arguments[1]
    vocabulary = checkpoints.vocabulary_of(model)
    split = (
        None
        if name == WHOLE
        else _Split(model, name, arguments[2], Path(arguments[3]), arguments[4])
    )
    taking: _Steps = split or _Whole(model)
    print(json.dumps({}), flush=True)
    for line in sys.stdin:
        _, first, count = line.split()
        waits = _Waits()
        if split is not None:
            split.waits = waits
        began = time.monotonic()
        for number in range(int(first), int(first) + int(count)):
            taking.step(example(number, vocabulary))
        ended = time.monotonic()
        found = Trained(began, ended, waits.served, waits.forward, waits.middle)
        print(json.dumps({name: getattr(found, name) for name in Trained.__slots__}), flush=True)


if __name__ == "__main__":
    _main(sys.argv[1:])
