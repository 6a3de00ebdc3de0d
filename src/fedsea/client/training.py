"""A split model that is trained: bottom and top here, the trunk at a server, one graph of gradients.

    embedding -> bottom blocks -> |rows| -> trunk -> |rows| -> top blocks -> norm -> head -> loss
                                <- |gradients| <-    <- |gradients| <-

The trunk is one function with a gradient (`fedsea.client.training_calls`). Whatever is trained at
the server takes its optimizer steps there. Only rows of real tokens travel, in whole sequences;
labels, losses, ids, logits and masks stay here.

Adapters are low-rank (`fedsea.model.lora`) and kept in fp32, in whatever dtype the blocks compute.

Shapes: T rows of all examples of a batch one after the other, K of them with logits.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PretrainedConfig
from transformers.modeling_outputs import CausalLMOutput

from fedsea.client.attested import Attestation
from fedsea.client.background import Background
from fedsea.client.connecting import (
    Servers,
    codec_of,
    endpoints_of,
    first_description,
    placement_of,
)
from fedsea.client.link import Patience, Tell, Traffic
from fedsea.client.servers import Endpoint, Expectation
from fedsea.client.training_calls import RemoteBlocks, RowGuard, TrunkCalls
from fedsea.client.training_trunk import TrainingPlan, TrainingTrunk
from fedsea.errors import ConfigError, FedseaError, RequestError
from fedsea.model.adapters import read_adapter
from fedsea.model.attention import RaggedBatch
from fedsea.model.checkpoint import Checkpoint
from fedsea.model.inspection import check_memory, client_weights
from fedsea.model.lora import AdaptedRows, Adapter, LoraConfig
from fedsea.model.optimization import AdamWConfig, part_seed, step_generator
from fedsea.model.partition import Partition, Span
from fedsea.model.projection import Projection
from fedsea.model.spans import BlockSpan, Placement, Top, load_bottom, load_top
from fedsea.privacy.attestation import Verifier
from fedsea.transport.credentials import ClientTLS, Plaintext
from fedsea.wire.codecs import RowFormat
from fedsea.wire.messages import Stepped

logger = logging.getLogger("fedsea.client")

PARTS = ("bottom", "trunk", "top")
IGNORED = -100
"""The label of a token that the loss is not on, as in `transformers`."""


class SplitForTraining(nn.Module):
    """A causal language model whose trunk is at a server, ready for training.

    Make one with `connect`. Its parameters are the factors of the adapters of bottom and top and
    nothing else; the trunk's are at the server and take their steps by `step`. Dropout is on in
    `train` mode. One thread at a time. Use it as a context manager, or call `close`.
    """

    # What transformers' Trainer asks for, to count the labels of a batch as the loss does.
    accepts_loss_kwargs = True
    loss_type = "ForCausalLM"

    def __init__(
        self,
        checkpoint: Checkpoint,
        bottom: BlockSpan,
        top: Top,
        calls: TrunkCalls,
        *,
        placement: Placement,
        endpoints: Sequence[Endpoint],
        lora: LoraConfig | None,
        train: Sequence[str],
        seed: int,
        projection: Projection | None = None,
    ) -> None:
        super().__init__()
        self.checkpoint = checkpoint
        self.placement = placement
        self.seed = seed
        self.lora = lora
        self.train_parts = tuple(train)
        # In lists, so that the frozen weights are no part of the module tree.
        self._bottom, self._top = [bottom], [top]
        self._calls = calls
        self._endpoints = endpoints
        self._projection = projection
        self._anchor = torch.empty(0, requires_grad=calls.trunk.plan.trains_trunk)
        self._closed = False
        self.bottom: Adapter | None = None
        self.top: Adapter | None = None
        if lora is not None:
            self.bottom = _fresh(lora, bottom, "bottom", train, seed).to(placement.device)
            self.top = _fresh(lora, top.span, "top", train, seed).to(placement.device)
            bottom.accept(self.bottom)
            top.span.accept(self.top)

    @classmethod
    def connect(
        cls,
        model: str | Path,
        servers: Servers,
        *,
        name: str,
        partition: Partition | tuple[int, int] = (1, 1),
        tls: ClientTLS | Plaintext | None = None,
        lora: LoraConfig | None = None,
        train: Sequence[str] = PARTS,
        prompt_rows: int = 0,
        optimizer: AdamWConfig | None = None,
        seed: int = 0,
        resume_steps: Sequence[int] = (0,),
        weight: float = 1.0,
        dtype: str = "auto",
        device: str = "cpu",
        codec: str = "auto",
        gradient_codec: str = "auto",
        patience: Patience | None = None,
        on_notice: Tell | None = None,
        guard: RowGuard | None = None,
        projection: Projection | None = None,
        verifier: Verifier | None = None,
        revision: str | None = None,
    ) -> Self:
        """Load bottom and top, find a server, and open a training session there.

        Args:
            model: folder of a checkpoint or of a client bundle, or a hub id.
            servers: addresses HOST:PORT in order of preference, or a mapping from names to channel
                makers.
            name: of what is trained at the server, among this tenant's.
            partition: how many blocks stay here, (bottom, top).
            tls: this client's certificate, key and CA.
            lora: what the adapters change; None trains no adapter.
            train: which of "bottom", "trunk" and "top" have one.
            prompt_rows: rows of a soft prompt at the entrance of the trunk, trained at the server.
            optimizer: AdamW's constants, for the trunk.
            seed: of the first factors and of dropout, in all three parts.
            resume_steps: the steps that this side could go on from; 0 for the start. `steps` says
                which one it is.
            weight: what this client counts where several are averaged.
            dtype: "fp32", "bf16", "fp16", or "auto" for that of the checkpoint.
            device: where bottom and top run.
            codec: how rows travel: "fp32", "bf16", "fp16", "int8", or "auto" for the dtype's.
            gradient_codec: how gradients travel, likewise.
            patience: how long to wait.
            on_notice: called with one line when a server is about to stop, or proves another state.
            guard: through which rows and gradients leave; its formats take the place of codecs.
            projection: makes rows narrow in front of the guard; the server holds its other half.
            verifier: decides whether a server may get anything; None asks for no proof.
            revision: of a hub id.

        Raises:
            CheckpointError, UnsupportedModel, PartitionError, ConfigError: local trouble.
            StaleStep: the server cannot go on from any of the steps.
            Unreachable, FingerprintMismatch, SecurityError, Refused: trouble with the server.
        """
        checkpoint = Checkpoint.open(model, revision)
        chosen = partition if isinstance(partition, Partition) else Partition(*partition)
        placement = placement_of(checkpoint, dtype, device, "none")
        _check_parts(train)
        width = checkpoint.hidden_size if projection is None else projection.width
        rows = RowFormat(codec_of(codec, placement.dtype), width)
        gradients = RowFormat(codec_of(gradient_codec, placement.dtype), checkpoint.hidden_size)
        plan = TrainingPlan(
            expectation=Expectation(
                model=checkpoint.name,
                fingerprint=checkpoint.fingerprint(),
                hidden_size=checkpoint.hidden_size,
                trunk=chosen.trunk_span(checkpoint.num_blocks),
                codecs=(rows.codec, gradients.codec),
                projection="" if projection is None else projection.fingerprint(),
            ),
            up=rows if guard is None else guard.rows_format,
            down=RowFormat(rows.codec, checkpoint.hidden_size),
            gradient=gradients if guard is None else guard.gradients_format,
            adapter=name,
            lora=_trunk_lora(lora, chosen.trunk_span(checkpoint.num_blocks), train),
            prompt_rows=prompt_rows,
            optimizer=optimizer or AdamWConfig(),
            seed=part_seed(seed, "trunk"),
            weight=weight,
        )
        tell = on_notice or logger.warning
        attestation = None if verifier is None else Attestation(verifier, tell)
        endpoints = endpoints_of(servers, tls, attestation)
        check_memory(
            client_weights(checkpoint, chosen, placement.dtype), "bottom and top", placement.device
        )
        top = load_top(checkpoint, chosen.top_span(checkpoint.num_blocks), placement)
        bottom = load_bottom(checkpoint, chosen.bottom_span(), placement)
        background = Background("fedsea-training")
        calls = TrunkCalls(
            TrainingTrunk(endpoints, plan, patience or Patience(), tell),
            background,
            guard,
            placement,
        )
        try:
            made = cls(
                checkpoint,
                bottom,
                top,
                calls,
                placement=placement,
                endpoints=endpoints,
                lora=lora,
                train=train,
                seed=seed,
                projection=projection,
            )
            background.run(first_description(endpoints, plan.expectation))
            calls.open(resume_steps)
        except FedseaError:
            calls.close(endpoints)
            raise
        return made

    @property
    def config(self) -> PretrainedConfig:
        """The model's configuration."""
        return self.checkpoint.config

    @property
    def steps(self) -> int:
        """Optimizer steps that the trunk has taken."""
        return self._calls.steps

    @property
    def traffic(self) -> Traffic:
        """Messages, bytes and rows so far."""
        return self._calls.trunk.traffic

    @property
    def address(self) -> str | None:
        """The server in use."""
        return self._calls.trunk.address

    @property
    def longest(self) -> int | None:
        """Most tokens of one example that the server in use takes; None while there is none."""
        return self._calls.trunk.longest

    @property
    def calls(self) -> TrunkCalls:
        """The trunk's side, for those who build on it."""
        return self._calls

    @property
    def loss_scale(self) -> float:
        """Gradients are so many times too large, on purpose; 1 unless set."""
        return self._calls.loss_scale

    @loss_scale.setter
    def loss_scale(self, scale: float) -> None:
        self._calls.loss_scale = scale

    def adapters(self) -> tuple[Adapter, ...]:
        """Those of bottom and top, without factors where nothing is trained; () without LoRA."""
        return () if self.bottom is None or self.top is None else (self.bottom, self.top)

    def load_adapters(self, folder: Path) -> None:
        """Take over the factors of an adapter's file for bottom and top.

        Raises:
            CheckpointError, ConfigError: it cannot be read, or is of other linears or ranks.
        """
        for adapter in self.adapters():
            if adapter.factors:
                adapter.copy_from(read_adapter(folder, adapter.span))

    def logits(self, examples: Sequence[Tensor], keep: Sequence[Tensor] | None = None) -> Tensor:
        """Logits of examples of any lengths; not a row of padding is computed or sent.

        Args:
            examples: token ids (n,) of each, at least one token.
            keep: for each example the numbers of its rows that need logits; None for all. Row i
                predicts token i + 1.

        Returns:
            (K, vocabulary), example after example. They carry gradients where they are enabled.

        Raises:
            RequestError: an example is empty or has an id outside the vocabulary.
            NotFinite: a row is NaN or infinite.
            ConnectionLost: call `reopen`, then do the step anew.
        """
        ids = self._checked(examples)
        device = self.placement.device
        counts = [len(one) for one in examples]
        calls = self._calls
        index = calls.next_forward
        rows = self._bottom[0].run(ids, self._batch(counts, self._bottom[0], self.bottom, index))
        if self._projection is not None:
            rows = self._projection.encode(rows)
        if torch.is_grad_enabled() and (rows.requires_grad or self._anchor.requires_grad):
            back = RemoteBlocks.apply(rows, self._anchor, calls, examples)  # type: ignore[no-untyped-call]
        else:
            _, back = calls.forward(rows, examples, no_grad=True)
        kept = _kept(counts, keep).to(device)
        batch = self._batch(counts, self._top[0].span, self.top, index)
        return self._top[0].run(back, batch, kept)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **_: Any,
    ) -> CausalLMOutput:
        """As `transformers` models do it.

        Padding is stripped by the mask; labels of padding, and of a row's first token, count as
        -100. In training with labels only the rows that the loss needs get logits, and `logits`
        is None.

        Args:
            input_ids: (batch, columns).
            attention_mask: (batch, columns); 0 only left or right of all tokens of a row.
            labels: (batch, columns), -100 where the loss is not.
            num_items_in_batch: what the summed loss is divided by; None for the labels in it.

        Returns:
            The loss when there are labels; logits (batch, columns, vocabulary), zero at padding.

        Raises:
            RequestError: padding between tokens, or what `logits` objects to.
        """
        real = _real(input_ids, attention_mask)
        present = [index for index in range(len(real)) if bool(real[index].any())]
        examples = [input_ids[index][real[index]] for index in present]
        if labels is None:
            return CausalLMOutput(logits=_padded(self.logits(examples), real))
        targets = [labels[index].to(real.device)[real[index]][1:] for index in present]
        keep = [(one != IGNORED).nonzero()[:, 0] for one in targets]
        wanted = torch.cat([one[one != IGNORED] for one in targets]).to(self.placement.device)
        if self.training:
            logits = self.logits(examples, keep)
            return CausalLMOutput(loss=_loss(logits, wanted, num_items_in_batch))
        every = self.logits(examples)
        chosen = every[_kept([len(one) for one in examples], keep).to(every.device)]
        loss = _loss(chosen, wanted, num_items_in_batch)
        return CausalLMOutput(loss=loss, logits=_padded(every, real))

    def step(
        self,
        learning_rate: float,
        max_grad_norm: float | None = None,
        scale: float | None = None,
    ) -> Stepped:
        """Let the trunk take its optimizer step; that of bottom and top is the caller's.

        Args:
            learning_rate: of this step.
            max_grad_norm: to which the gradient of the trunk's part is clipped, by its own norm.
            scale: its gradients are so many times too large; None for `loss_scale`.

        Returns:
            The step's number and its gradient's norm. Without `applied` the gradients were not
            finite and are forgotten, and nothing else changed.

        Raises:
            StaleStep: the server is at another step.
            ConnectionLost: it is not known whether the step was taken: `reopen` with both numbers.
        """
        return self._calls.step(
            learning_rate, max_grad_norm, self.loss_scale if scale is None else scale
        )

    def reset(self) -> None:
        """Let the server forget what was done of the step that is not finished."""
        self._calls.reset()

    def forget_releases(self) -> None:
        """Release anew, and pay anew, what is done of this step again.

        For who changes the parameters between two attempts at a step: what a guard kept of the first
        belongs to other rows.
        """
        self._calls.forget_releases()

    def save(self) -> None:
        """Let the server save its part of the last step; durable on return.

        Raises:
            CheckpointError: it could not; training can go on.
        """
        self._calls.save()

    def reopen(self, resume_steps: Sequence[int], within: float | None = None) -> int:
        """Open the session again, after the connection broke or to go on from another step.

        Args:
            resume_steps: those that this side could go on from.
            within: seconds; None for `Patience.open`.

        Returns:
            The step that the server goes on from, of whose successor nothing is done.

        Raises:
            StaleStep: it has none of them.
            Unreachable, Refused: no server took the session in time.
        """
        return self._calls.open(resume_steps, within)

    def close(self) -> None:
        """Disconnect; what is trained stays at the server for a while, and what is saved there."""
        if not self._closed:
            self._closed = True
            self._calls.close(self._endpoints)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _apply(self, fn: Callable[[Tensor], Tensor], *_: Any, **__: Any) -> Self:
        """Accept `to`, `cuda`, `half` and the like only where they change nothing.

        Raises:
            ConfigError: the factors would leave fp32, or the device of the frozen weights.
        """
        probe = torch.zeros(1, device=self.placement.device)
        moved = fn(probe)
        if (moved.dtype, moved.device) != (probe.dtype, probe.device):
            raise ConfigError(
                f"a split model in training stays on {self.placement.device} with fp32 factors; "
                "choose dtype and device when you connect"
            )
        return self

    def _checked(self, examples: Sequence[Tensor]) -> Tensor:
        """The ids of all examples (T,), where the embedding can read them."""
        if not examples or any(one.ndim != 1 or not len(one) for one in examples):
            raise RequestError("an example has no tokens; give token ids (n,) with one at least")
        ids = torch.cat(list(examples)).cpu()
        vocabulary = int(self.config.vocab_size)
        if not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
            raise RequestError(
                f"a token id is outside the vocabulary of {vocabulary}; use this model's tokenizer"
            )
        return ids.to(self.placement.device)

    def _batch(
        self, counts: Sequence[int], span: BlockSpan, adapter: Adapter | None, index: int
    ) -> RaggedBatch:
        """The examples as one batch of a part, with its adapter and the masks of its dropout."""
        device = self.placement.device
        used: tuple[AdaptedRows, ...] = ()
        span.adapters.generator = None
        if adapter is not None and adapter.factors:
            used = (AdaptedRows(0, sum(counts), adapter),)
            if self.training and adapter.config.dropout:
                part = "bottom" if adapter is self.bottom else "top"
                seed = part_seed(self.seed, part)
                span.adapters.generator = step_generator(seed, self.steps + 1, index, device)
        return RaggedBatch.whole(counts, device, used)


def _fresh(
    lora: LoraConfig, span: BlockSpan, part: str, train: Sequence[str], seed: int
) -> Adapter:
    """A part's adapter, without factors when the part is not trained."""
    if part not in train:
        return Adapter(lora, span.span, {})
    generator = torch.Generator().manual_seed(part_seed(seed, part))
    return Adapter.fresh(lora, span.span, span.linears(), generator)


def _trunk_lora(lora: LoraConfig | None, trunk: Span, train: Sequence[str]) -> LoraConfig | None:
    """What the server is asked to train; None when the adapter has nothing there."""
    if lora is None or "trunk" not in train:
        return None
    blocks: tuple[int, ...] = ()
    if lora.blocks is not None:
        blocks = tuple(block for block in lora.blocks if trunk.first <= block < trunk.end)
        if not blocks:
            return None
    return replace(lora, blocks=blocks or None)


def _check_parts(train: Sequence[str]) -> None:
    unknown = [part for part in train if part not in PARTS]
    if unknown or isinstance(train, str):
        raise ConfigError(f"train={train!r} names no parts; use some of {', '.join(PARTS)}")


def _kept(counts: Sequence[int], keep: Sequence[Tensor] | None) -> Tensor:
    """Numbers of the packed rows (K,) that need logits."""
    if keep is None:
        return torch.arange(sum(counts))
    numbers, offset = [torch.empty(0, dtype=torch.long)], 0
    for count, rows in zip(counts, keep, strict=True):
        numbers.append(rows.cpu().long() + offset)
        offset += count
    return torch.cat(numbers)


def _real(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Which columns hold a token: (batch, columns), bool.

    Raises:
        RequestError: a mask of another shape, or padding between tokens.
    """
    if input_ids.ndim != 2:
        raise RequestError("input_ids must be (batch, columns); add the dimension that is missing")
    if attention_mask is None:
        return torch.ones_like(input_ids, dtype=torch.bool)
    if attention_mask.shape != input_ids.shape:
        raise RequestError(
            f"the attention mask has shape {tuple(attention_mask.shape)} and the batch "
            f"{tuple(input_ids.shape)}: give 1 for tokens and 0 for padding"
        )
    real = attention_mask != 0
    begins = real[:, :1].sum(dim=1) + (real[:, 1:] & ~real[:, :-1]).sum(dim=1)
    if bool((begins > 1).any()):
        raise RequestError("a row has padding between its tokens; pad left or right of them")
    return real


def _padded(packed: Tensor, real: Tensor) -> Tensor:
    """Packed rows (T, n) at their columns, zeros elsewhere: (batch, columns, n)."""
    if bool(real.all()):
        return packed.view(*real.shape, -1)
    padded = packed.new_zeros(*real.shape, packed.shape[-1])
    return padded.masked_scatter(real[..., None].to(packed.device), packed)


def _loss(logits: Tensor, targets: Tensor, items: Tensor | int | None) -> Tensor:
    """Cross-entropy, summed and divided by the number of targets or of `items`; 0 for none."""
    summed = cross_entropy(logits.float(), targets, reduction="sum")
    if items is None:
        return summed / max(1, len(targets))
    return summed / (items.to(summed.device) if isinstance(items, Tensor) else items)
