"""A trunk that speaks the protocol of training, in this process, as small as it can be.

It shows what the client does by itself: one run, everything on the event loop, saves in memory.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor

from fedsea.errors import NotFinite, StaleStep
from fedsea.model.attention import RaggedBatch
from fedsea.model.checkpoint import Checkpoint
from fedsea.model.lora import AdaptedRows, Adapter, LoraConfig
from fedsea.model.optimization import AdamWConfig, AdapterOptimizer, step_generator
from fedsea.model.partition import Partition
from fedsea.model.projection import Projection
from fedsea.model.spans import Placement, load_trunk
from fedsea.transport.base import Peer, ServerStream
from fedsea.wire.codecs import VALUE_CODECS
from fedsea.wire.connection import Connection
from fedsea.wire.description import encode_description
from fedsea.wire.messages import (
    Activations,
    Backward,
    Description,
    Discard,
    Forward,
    Gradients,
    Lora,
    Opened,
    OpenTraining,
    Reset,
    Role,
    Save,
    Saved,
    Step,
    Stepped,
)


class TinyTrainingTrunk:
    """Serves the training of one trunk to one client at a time.

    `adapter` and `optimizer` are what is trained; `max_forwards` of 0 says that nothing is;
    `max_rows` is the cap on the rows of a message; `problem` is what a Save answers.
    """

    def __init__(
        self,
        folder: Any,
        partition: Partition,
        placement: Placement | None = None,
        *,
        max_forwards: int = 64,
        max_rows: int = 8192,
        projection: Projection | None = None,
    ) -> None:
        self.checkpoint = Checkpoint.open(folder)
        self.placement = placement or Placement()
        self.projection = projection
        self.span = partition.trunk_span(self.checkpoint.num_blocks)
        self.trunk = load_trunk(self.checkpoint, self.span, self.placement)
        self.adapter: Adapter | None = None
        self.optimizer: AdapterOptimizer | None = None
        self.last = Stepped(0, 0.0, True)
        self.saved: dict[int, Any] = {}
        self.problem = ""
        self.max_forwards = max_forwards
        self.max_rows = max_rows
        self.opened: OpenTraining | None = None

    async def describe(self, _: Peer) -> bytes:
        """What is served."""
        return encode_description(
            Description(
                model=self.checkpoint.name,
                family=str(self.checkpoint.config.model_type),
                fingerprint=self.checkpoint.fingerprint(),
                hidden_size=self.checkpoint.hidden_size,
                num_blocks=self.checkpoint.num_blocks,
                first_block=self.span.first,
                end_block=self.span.end,
                codecs=VALUE_CODECS,
                max_context=4096,
                max_rows_per_message=self.max_rows,
                max_message_bytes=8 * 2**20,
                dtype="float32",
                max_forwards=self.max_forwards,
                projections=() if self.projection is None else (self.projection.fingerprint(),),
            )
        )

    async def session(self, _: Peer, stream: ServerStream) -> None:
        """One training session."""
        connection = Connection(Role.SERVER, hidden_size=self.checkpoint.hidden_size)
        first = await stream.receive()
        assert first is not None
        opened = connection.receive(first)
        assert isinstance(opened, OpenTraining)
        self.opened = opened
        session = _Session(self, opened, self._begin(opened))
        await stream.send(connection.send(Opened("training", step=session.step)))
        while (data := await stream.receive()) is not None:
            answer = session.answer(connection.receive(data))
            if answer is not None:
                await stream.send(connection.send(answer))

    def _begin(self, opened: OpenTraining) -> int:
        if self.optimizer is None or opened.resume_steps == (0,):
            self._fresh(opened)
        assert self.optimizer is not None
        common = {0, self.optimizer.steps, *self.saved} & set(opened.resume_steps)
        if not common:
            raise StaleStep("no step in common")
        step = max(common)
        if step != self.optimizer.steps:
            adapter, state = self.saved[step]
            assert self.adapter is not None
            self.adapter.load_state_dict(adapter)
            self.optimizer.load(state)
        self.optimizer.clear()
        return step

    def _fresh(self, opened: OpenTraining) -> None:
        self.adapter = None
        parameters = {}
        if opened.lora is not None:
            generator = torch.Generator().manual_seed(opened.seed)
            config = _config(opened.lora)
            self.adapter = Adapter.fresh(config, self.span, self.trunk.linears(), generator)
            self.trunk.accept(self.adapter)
            parameters = dict(self.adapter.named_parameters())
        given = opened.optimizer
        config_of = AdamWConfig((given.beta1, given.beta2), given.eps, given.weight_decay)
        self.optimizer = AdapterOptimizer(parameters, config_of)


def _config(lora: Lora) -> LoraConfig:
    return LoraConfig(
        rank=lora.rank,
        alpha=lora.alpha,
        dropout=lora.dropout,
        targets=lora.targets,
        blocks=lora.blocks or None,
        rslora=lora.rslora,
        freeze_a=lora.freeze_a,
    )


class _Session:
    """Open forwards of one stream."""

    def __init__(self, server: TinyTrainingTrunk, opened: OpenTraining, step: int) -> None:
        hidden_size = server.checkpoint.hidden_size
        self.server = server
        self.seed = opened.seed
        self.step = step
        self.up, self.down = opened.up_format(hidden_size), opened.down_format(hidden_size)
        self.gradient = opened.backward_format(hidden_size)
        self.returned = opened.gradients_format(hidden_size)
        self.open: dict[int, tuple[Tensor, Tensor]] = {}
        self.forwards = 0

    def answer(self, event: Any) -> Any:
        """What an event is answered with; None for nothing."""
        if isinstance(event, Forward):
            return self._forward(event)
        if isinstance(event, Backward):
            return self._backward(event)
        if isinstance(event, Step):
            return self._step(event)
        if isinstance(event, Save):
            return self._save(event)
        if isinstance(event, Discard):
            del self.open[event.id]
        if isinstance(event, Reset):
            self.open.clear()
            self.forwards = 0
            assert self.server.optimizer is not None
            self.server.optimizer.clear()
        return None

    def _forward(self, event: Forward) -> Activations:
        server = self.server
        rows = self.up.decode(event.rows, event.count, server.placement.dtype)
        used: tuple[AdaptedRows, ...] = ()
        if server.adapter is not None:
            used = (AdaptedRows(0, event.count, server.adapter),)
        batch = RaggedBatch.whole(event.counts, torch.device("cpu"), used)
        server.trunk.adapters.generator = None
        with torch.set_grad_enabled(not event.no_grad):
            if not event.no_grad:
                server.trunk.adapters.generator = step_generator(
                    self.seed, self.step + 1, self.forwards
                )
                self.forwards += 1
                rows.requires_grad_()
            wide = rows if server.projection is None else server.projection.decode(rows)
            found = server.trunk.run(wide, batch)
        if not event.no_grad:
            self.open[event.id] = rows, found
        return Activations(event.id, self.down.encode(found))

    def _backward(self, event: Backward) -> Gradients:
        rows, found = self.open.pop(event.id)
        found.backward(self.gradient.decode(event.rows, len(found), found.dtype))
        assert rows.grad is not None
        return Gradients(event.id, self.returned.encode(rows.grad))

    def _step(self, event: Step) -> Stepped:
        server = self.server
        assert server.optimizer is not None
        if event.number == self.step and event.number == server.last.number:
            return server.last
        if event.number != self.step + 1:
            raise StaleStep(f"step {event.number} after {self.step}")
        try:
            norm = server.optimizer.apply(
                event.learning_rate, event.max_grad_norm or None, event.scale
            )
        except NotFinite:
            server.optimizer.clear()
            self.forwards = 0
            return Stepped(event.number, math.inf, False)
        if server.adapter is not None:
            server.adapter.changed()
        self.step, self.forwards = event.number, 0
        server.last = Stepped(event.number, norm, True)
        return server.last

    def _save(self, event: Save) -> Saved:
        server = self.server
        assert server.optimizer is not None
        if not server.problem:
            kept = {} if server.adapter is None else copy.deepcopy(server.adapter.state_dict())
            server.saved[event.number] = kept, copy.deepcopy(server.optimizer.state())
        return Saved(event.number, server.problem)
