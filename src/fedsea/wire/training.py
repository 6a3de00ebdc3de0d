"""The rules of a training session that depend on what happened before: open Forwards, answers owed.

A Forward that has activations to keep is *open* from when it is sent until its Backward, a Discard
or a Reset is sent. Answers come in the order of the events that ask for them.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from fedsea.errors import ConfigError, ProtocolError
from fedsea.wire.limits import FRAME_BYTES, Limits
from fedsea.wire.messages import (
    Activations,
    AdamW,
    Backward,
    Discard,
    Event,
    Forward,
    Gradients,
    Lora,
    OpenTraining,
    Reset,
    Save,
    Saved,
    Step,
    Stepped,
)
from fedsea.wire.text import check_text

Fault = type[ProtocolError]

MAX_NAMES: Final = 64
"""Targets of a Lora, and steps to resume from."""

MAX_BLOCKS: Final = 1024
"""Blocks that a Lora may name."""

MAX_LEARNING_RATE: Final = 1e3
"""Far above any that trains; what is trained in fp32 stays finite below it."""

MAX_WEIGHT_DECAY: Final = 1e3
"""Its product with a learning rate is 1 at most: more would turn what is trained around."""

MIN_EPS: Final = 1e-30
MAX_EPS: Final = 1.0
MAX_BETA: Final = 1 - 1e-6
"""AdamW divides by the root of a mean plus eps, and by 1 minus a power of each beta, in fp32."""

MIN_SCALE: Final = 2.0**-40
MAX_SCALE: Final = 2.0**40
"""How many times too large gradients may be."""

MAX_ALPHA: Final = 1e6
MAX_DROPOUT: Final = 0.99


@dataclass(slots=True)
class _Open:
    """A Forward that a Backward may come for: its rows, and whether its Activations were sent."""

    rows: int
    is_answered: bool = False


@dataclass(frozen=True, slots=True)
class _Owed:
    """The answer to one event: its kind, its id or number, and the bytes of its rows."""

    kind: type[Event]
    number: int
    row_bytes: int = 0


class TrainingRules:
    """Bookkeeping of one training session; `apply` refuses an event or takes it into account."""

    def __init__(self, hidden_size: int, limits: Limits) -> None:
        self._hidden_size = hidden_size
        self._limits = limits
        self._row_bytes: dict[type[Event], int] = {}
        self._weight_decay = 0.0
        self._last_id = -1
        self._forwards: dict[int, _Open] = {}
        self._owed: deque[_Owed] = deque()

    @property
    def pending(self) -> int:
        """Events that wait for their answer."""
        return len(self._owed)

    @property
    def forwards(self) -> frozenset[int]:
        """Forwards that are open."""
        return frozenset(self._forwards)

    def open(self, event: OpenTraining, fault: Fault) -> None:
        """Take the first message of the session into account, or raise `fault`."""
        check_text("adapter", event.adapter, self._limits.max_text, fault)
        if not event.adapter:
            raise fault("what is trained has no name; give the adapter one")
        if event.lora is not None:
            self._check_lora(event.lora, event, fault)
        if event.prompt_rows > self._limits.max_rows_per_message:
            raise fault(
                f"{event.prompt_rows} prompt rows are over the limit of "
                f"{self._limits.max_rows_per_message}; train fewer"
            )
        _check_optimizer(event.optimizer, fault)
        if not 1 <= len(event.resume_steps) <= MAX_NAMES:
            raise fault(
                f"{len(event.resume_steps)} steps to resume from; name 1 to {MAX_NAMES}, "
                "0 for the start"
            )
        if not 0.0 < event.weight < math.inf:
            raise fault("the weight of a client must be positive and finite; give its examples")
        self._row_bytes = self._sizes(event, fault)
        self._weight_decay = event.optimizer.weight_decay

    def apply(self, event: Event, fault: Fault) -> None:
        """Take `event` into account, or raise `fault` and change nothing."""
        rule = _RULES.get(type(event))
        if rule is not None:
            rule(self, event, fault)

    def _sizes(self, event: OpenTraining, fault: Fault) -> dict[type[Event], int]:
        hidden = self._hidden_size
        try:
            return {
                Forward: event.up_format(hidden).row_bytes,
                Activations: event.down_format(hidden).row_bytes,
                Backward: event.backward_format(hidden).row_bytes,
                Gradients: event.gradients_format(hidden).row_bytes,
            }
        except ConfigError as error:
            raise fault(str(error)) from None

    def _check_lora(self, lora: Lora, event: OpenTraining, fault: Fault) -> None:
        if lora.rank < 1:
            raise fault(f"a rank of {lora.rank} adapts nothing; give 1 or more")
        if not 0.0 < lora.alpha <= MAX_ALPHA or not 0.0 <= lora.dropout <= MAX_DROPOUT:
            raise fault(
                f"alpha must be positive and at most {MAX_ALPHA:g}, dropout from 0 to {MAX_DROPOUT}"
            )
        if not 1 <= len(lora.targets) <= MAX_NAMES:
            raise fault(f"an adapter of {len(lora.targets)} targets; name 1 to {MAX_NAMES}")
        for target in lora.targets:
            check_text("target", target, self._limits.max_text, fault)
            if not target:
                raise fault("a target has no name; name the linears to adapt")
        if len(lora.blocks) > MAX_BLOCKS:
            raise fault(f"an adapter names {len(lora.blocks)} blocks; name at most {MAX_BLOCKS}")
        if any(not event.first_block <= block < event.end_block for block in lora.blocks):
            raise fault(
                f"an adapter names blocks outside {event.first_block} to {event.end_block - 1}; "
                "name blocks of the trunk only"
            )

    def _forward(self, event: Forward, fault: Fault) -> None:
        if event.id <= self._last_id:
            raise fault(
                f"Forward {event.id} comes after {self._last_id}; ids grow within a session"
            )
        self._check_pending(fault)
        if not event.no_grad and len(self._forwards) >= self._limits.max_forwards:
            raise fault(
                f"{self._limits.max_forwards} Forwards are open, which is the limit; "
                "send a Backward or a Discard first"
            )
        self._check_counts(event, fault)
        self._check_rows(event, event.count * self._row_bytes[Forward], fault)
        self._last_id = event.id
        if not event.no_grad:
            self._forwards[event.id] = _Open(event.count)
        self._owe(Activations, event.id, event.count)

    def _check_counts(self, event: Forward, fault: Fault) -> None:
        if not 1 <= len(event.counts) <= self._limits.max_segments:
            raise fault(
                f"Forward {event.id} has {len(event.counts)} sequences; "
                f"send 1 to {self._limits.max_segments}"
            )
        if min(event.counts) < 1 or max(event.counts) > self._limits.max_capacity:
            raise fault(
                f"Forward {event.id} has a sequence of no rows or of more than "
                f"{self._limits.max_capacity}; leave it out or cut it"
            )
        count = event.count
        if count > self._limits.max_rows_per_message:
            raise fault(
                f"Forward {event.id} has {count} rows, over the limit of "
                f"{self._limits.max_rows_per_message}; send it in parts"
            )
        kinds = (Activations,) if event.no_grad else (Activations, Backward, Gradients)
        size = count * max(self._row_bytes[kind] for kind in kinds) + FRAME_BYTES
        if size > self._limits.max_message_bytes:
            raise fault(
                f"a message that answers or follows Forward {event.id} would take {size} bytes, "
                f"over the limit of {self._limits.max_message_bytes}; send it in parts"
            )

    def _backward(self, event: Backward, fault: Fault) -> None:
        opened = self._opened(event.id, fault)
        if not opened.is_answered:
            raise fault(f"Backward {event.id} comes before its Activations; wait for them")
        self._check_pending(fault)
        self._check_rows(event, opened.rows * self._row_bytes[Backward], fault)
        del self._forwards[event.id]
        self._owe(Gradients, event.id, opened.rows)

    def _discard(self, event: Discard, fault: Fault) -> None:
        self._opened(event.id, fault)
        del self._forwards[event.id]

    def _reset(self, _: Reset, __: Fault) -> None:
        self._forwards.clear()

    def _step(self, event: Step, fault: Fault) -> None:
        self._check_pending(fault)
        if self._forwards:
            raise fault(
                f"Step {event.number} comes while {len(self._forwards)} Forwards are open; "
                "send their Backwards or a Discard first"
            )
        if event.number < 1:
            raise fault("a Step has the number 0; steps count from 1")
        if not 0.0 <= event.learning_rate <= MAX_LEARNING_RATE:
            raise fault(
                f"Step {event.number}: the learning rate must be from 0 to {MAX_LEARNING_RATE:g}"
            )
        if event.learning_rate * self._weight_decay > 1.0:
            raise fault(
                f"Step {event.number}: the learning rate times the weight decay is above 1; use a "
                "smaller learning rate"
            )
        if not 0.0 <= event.max_grad_norm < math.inf:
            raise fault(f"Step {event.number}: the largest norm must be finite, 0 or more")
        if not MIN_SCALE <= event.scale <= MAX_SCALE:
            raise fault(f"Step {event.number}: the scale must be from 2^-40 to 2^40; 1 for none")
        self._owe(Stepped, event.number)

    def _save(self, event: Save, fault: Fault) -> None:
        self._check_pending(fault)
        self._owe(Saved, event.number)

    def _answer(self, event: Activations | Gradients | Stepped | Saved, fault: Fault) -> None:
        kind = type(event).__name__
        number = event.id if isinstance(event, Activations | Gradients) else event.number
        if not self._owed:
            raise fault(f"{kind} {number} answers nothing; answer each event once")
        owed = self._owed[0]
        if type(event) is not owed.kind or number != owed.number:
            raise fault(
                f"{kind} {number} came before {owed.kind.__name__} {owed.number}; answer in order"
            )
        if isinstance(event, Activations | Gradients):
            self._check_rows(event, owed.row_bytes, fault)
        elif isinstance(event, Stepped):
            _check_norm(event, fault)
        else:
            check_text("problem", event.problem, self._limits.max_text, fault)
        self._owed.popleft()
        if isinstance(event, Activations) and event.id in self._forwards:
            self._forwards[event.id].is_answered = True

    def _opened(self, number: int, fault: Fault) -> _Open:
        opened = self._forwards.get(number)
        if opened is None:
            raise fault(
                f"Forward {number} is not open; it takes one Backward or Discard, and none when it "
                "was sent with no_grad"
            )
        return opened

    def _check_pending(self, fault: Fault) -> None:
        if len(self._owed) >= self._limits.max_pending:
            raise fault(
                f"{self._limits.max_pending} events are unanswered, which is the limit; "
                "wait for an answer"
            )

    def _check_rows(
        self, event: Forward | Activations | Backward | Gradients, expected: int, fault: Fault
    ) -> None:
        size = memoryview(event.rows).nbytes
        if size != expected:
            raise fault(
                f"{type(event).__name__} {event.id} holds {size} bytes of rows where {expected} "
                "are due; check the codec and the hidden size"
            )

    def _owe(self, kind: type[Event], number: int, rows: int = 0) -> None:
        self._owed.append(_Owed(kind, number, rows * self._row_bytes.get(kind, 0)))


def _check_optimizer(optimizer: AdamW, fault: Fault) -> None:
    if not (0.0 <= optimizer.beta1 <= MAX_BETA and 0.0 <= optimizer.beta2 <= MAX_BETA):
        raise fault(f"the betas of AdamW must be from 0 to {MAX_BETA:f}")
    if not MIN_EPS <= optimizer.eps <= MAX_EPS:
        raise fault(f"eps of AdamW must be from {MIN_EPS:g} to {MAX_EPS:g}")
    if not 0.0 <= optimizer.weight_decay <= MAX_WEIGHT_DECAY:
        raise fault(f"the weight decay of AdamW must be from 0 to {MAX_WEIGHT_DECAY:g}")


def _check_norm(event: Stepped, fault: Fault) -> None:
    if math.isnan(event.grad_norm) or event.grad_norm < 0:
        raise fault(f"Stepped {event.number} holds no norm; a norm is 0 or more")
    if event.applied is not math.isfinite(event.grad_norm):
        raise fault(
            f"Stepped {event.number} is applied if, and only if, the norm of its gradients is finite"
        )


_RULES: Final[Mapping[type[Event], Callable[[TrainingRules, Any, Fault], None]]] = MappingProxyType(
    {
        Forward: TrainingRules._forward,
        Backward: TrainingRules._backward,
        Discard: TrainingRules._discard,
        Reset: TrainingRules._reset,
        Step: TrainingRules._step,
        Save: TrainingRules._save,
        Activations: TrainingRules._answer,
        Gradients: TrainingRules._answer,
        Stepped: TrainingRules._answer,
        Saved: TrainingRules._answer,
    }
)
