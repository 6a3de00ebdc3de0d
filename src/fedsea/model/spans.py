"""Cutting a model: the parts of a checkpoint as modules that run ragged batches.

The blocks are transformers' own decoder layers inside transformers' own model class, so every
family keeps its own rotary embeddings, layer kinds and residual rules. A span is that class with
fewer layers, its embedding and final norm replaced where they belong to another part.
"""

from __future__ import annotations

import copy
import logging
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING, PretrainedConfig
from transformers.utils import logging as transformers_logging

from fedsea.errors import CheckpointError, PartitionError, UnsupportedModel
from fedsea.model import attention, linears
from fedsea.model.attention import KVContext, RaggedBatch
from fedsea.model.checkpoint import Checkpoint
from fedsea.model.kv_cache import KVCache, KVShape
from fedsea.model.partition import Span

FAMILIES = frozenset(
    {
        "apertus", "cohere", "cohere2", "ernie4_5", "exaone4", "gemma", "gemma2", "gemma3_text",
        "glm", "glm4", "gpt_oss", "granite", "hunyuan_v1_dense", "llama", "ministral", "mistral",
        "mixtral", "nemotron", "olmo2", "olmo3", "phi3", "qwen2", "qwen3", "qwen3_moe", "seed_oss",
        "smollm3", "stablelm", "starcoder2",
    }
)  # fmt: skip

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm."
HEAD = "lm_head.weight"

_BLOCK = re.compile(r"^model\.layers\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class Placement:
    """Where and how a part is kept: device, dtype and weight format ('none' or 'int8')."""

    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32
    quantization: str = "none"


class _Passthrough(nn.Module):
    """Stands where a part does not belong to this span."""

    def forward(self, rows: Tensor) -> Tensor:
        return rows


class BlockSpan(nn.Module):
    """Consecutive decoder blocks that run ragged batches against a KV cache.

    `first_input` says what `run` takes: token ids (T,) when the embedding belongs to the span,
    hidden rows (T, hidden) otherwise. The result is (T, hidden), normalised when the final norm
    belongs to the span.
    """

    def __init__(self, blocks: nn.Module, span: Span, takes_ids: bool) -> None:
        super().__init__()
        self.blocks = blocks
        self.span = span
        self.takes_ids = takes_ids
        self.context = KVContext()
        for module in attention_modules(blocks):
            module.kv_context = self.context  # type: ignore[assignment]

    def kv_shapes(self) -> list[KVShape]:
        """KV row size of each block, in order."""
        modules = sorted(attention_modules(self.blocks), key=lambda module: int(module.layer_idx))  # type: ignore[arg-type]
        return [kv_shape(module) for module in modules]

    def new_cache(self, num_rows: int, placement: Placement) -> KVCache:
        """Make a cache of `num_rows` rows and attach it."""
        cache = KVCache(self.kv_shapes(), num_rows, placement.dtype, placement.device)
        self.context.cache = cache
        return cache

    def run(self, rows: Tensor, batch: RaggedBatch) -> Tensor:
        """Run the packed rows of a batch: (T,) or (T, hidden) to (T, hidden)."""
        self.context.batch = batch
        inputs: dict[str, Any] = {"input_ids" if self.takes_ids else "inputs_embeds": rows[None]}
        if not len(self.span) and not self.takes_ids:
            return self.blocks.norm(rows)  # type: ignore[operator,no-any-return]
        output = self.blocks(**inputs, position_ids=batch.position_ids, use_cache=False)
        hidden: Tensor = output.last_hidden_state
        return hidden[0]


class Top(nn.Module):
    """The last blocks, the final norm and the language-model head."""

    def __init__(self, span: BlockSpan, causal: nn.Module) -> None:
        super().__init__()
        self.span = span
        self.causal = causal

    def run(self, rows: Tensor, batch: RaggedBatch, keep: Tensor) -> Tensor:
        """Logits (K, vocabulary) of the packed rows that `keep` (K,) numbers.

        All rows (T, hidden) pass the blocks and fill the cache.
        """
        return self.logits(self.span.run(rows, batch)[keep])

    def logits(self, hidden: Tensor) -> Tensor:
        """Head with the family's own scaling and capping: (K, hidden) to (K, vocabulary)."""
        output = self.causal(inputs_embeds=hidden[None], use_cache=False)
        logits: Tensor = output.logits
        return logits[0]


def attention_modules(blocks: nn.Module) -> list[nn.Module]:
    """The attention layer of every block."""
    return [
        module
        for module in blocks.modules()
        if hasattr(module, "layer_idx") and hasattr(module, "o_proj")
    ] or [
        module
        for module in blocks.modules()
        if hasattr(module, "layer_idx") and hasattr(module, "scaling")
    ]


def kv_shape(module: nn.Module) -> KVShape:
    """Heads and head size of one attention layer, from its configuration."""
    config: Any = module.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = int(getattr(module, "head_dim", config.hidden_size // config.num_attention_heads))
    return KVShape(heads=int(heads), key_size=size, value_size=size)


def check_family(config: PretrainedConfig) -> None:
    """Refuse what cannot be cut, and name what can.

    Raises:
        UnsupportedModel: the family is not in `FAMILIES` or has layers of another kind.
    """
    if config.model_type not in FAMILIES:
        raise UnsupportedModel(
            f"models of type '{config.model_type}' cannot be cut; these can: "
            f"{', '.join(sorted(FAMILIES))}"
        )
    kinds = set(getattr(config, "layer_types", None) or ()) - {
        "full_attention", "sliding_attention", "dense", "sparse"
    }  # fmt: skip
    if kinds:
        raise UnsupportedModel(
            f"this model has layers of kind {', '.join(sorted(kinds))}, which cannot be cut; "
            "full and sliding attention can"
        )


def load_bottom(checkpoint: Checkpoint, span: Span, placement: Placement) -> BlockSpan:
    """Embedding and the first blocks. Embedding rows stay memory-mapped on the CPU."""
    blocks = _load_blocks(checkpoint, span, placement, multiplied=True)
    embedding = _materialize_embedding(blocks)
    weight = checkpoint.tensor(_either(checkpoint, EMBEDDING, HEAD))
    if weight.dtype != placement.dtype or placement.device.type != "cpu":
        weight = weight.to(placement.device, placement.dtype)
    embedding.weight = nn.Parameter(weight, requires_grad=False)
    blocks.embed_tokens = embedding
    return BlockSpan(blocks, span, takes_ids=True)


def load_trunk(checkpoint: Checkpoint, span: Span, placement: Placement) -> BlockSpan:
    """Middle blocks only."""
    blocks = _load_blocks(checkpoint, span, placement, multiplied=False)
    return BlockSpan(blocks, span, takes_ids=False)


def load_top(checkpoint: Checkpoint, span: Span, placement: Placement) -> Top:
    """The last blocks, the final norm and the head."""
    blocks = _load_blocks(checkpoint, span, placement, multiplied=False, final_norm=True)
    head = _load_head(checkpoint, placement)
    causal = _head_only(checkpoint.config, head)
    return Top(BlockSpan(blocks, span, takes_ids=False), causal)


def _load_blocks(
    checkpoint: Checkpoint,
    span: Span,
    placement: Placement,
    multiplied: bool,
    final_norm: bool = False,
) -> nn.Module:
    """transformers' base model with the blocks of `span` only; the embedding is left on meta."""
    check_family(checkpoint.config)
    if span.end > checkpoint.num_blocks:
        raise PartitionError(
            f"span {span} is outside the model's {checkpoint.num_blocks} blocks"
        )
    attention.register()
    config = span_config(checkpoint.config, span)
    if not multiplied and hasattr(config, "embedding_multiplier"):
        config.embedding_multiplier = 1.0
    blocks = _from_pretrained(checkpoint, config, span, placement, final_norm)
    if placement.quantization == "int8":
        linears.quantize_int8(blocks)
    elif placement.device.type == "cpu" and placement.dtype == torch.float32:
        linears.use_fast_linears(blocks)
    return blocks.requires_grad_(False)


def span_config(config: PretrainedConfig, span: Span) -> Any:
    """Configuration of a model that has the blocks of `span` only."""
    cut: Any = copy.deepcopy(config)
    cut.num_hidden_layers = len(span)
    for name in ("layer_types", "mlp_layer_types", "no_rope_layers"):
        values = getattr(config, name, None)
        if isinstance(values, list):
            setattr(cut, name, values[span.first : span.end])
    cut.tie_word_embeddings = False
    cut._attn_implementation = attention.ATTENTION_NAME
    return cut


def _span_class(config: PretrainedConfig, final_norm: bool) -> Any:
    base: Any = MODEL_MAPPING[type(config)]

    class SpanOfBlocks(base):  # type: ignore[misc]
        def __init__(self, config: PretrainedConfig) -> None:
            super().__init__(config)
            # Outside the module tree, so that loading neither fills nor misses it.
            self.own_embedding = [self.embed_tokens]
            self.embed_tokens = _Passthrough()
            if not final_norm:
                self.norm = _Passthrough()

    # transformers converts stored weights (fused experts) for classes of its own modules only.
    SpanOfBlocks.__module__ = base.__module__
    return SpanOfBlocks


def _materialize_embedding(blocks: Any) -> nn.Embedding:
    """The family's own embedding layer, off the meta device, its weight still to be set."""
    embedding: nn.Embedding = blocks.own_embedding.pop()
    embedding.weight = nn.Parameter(torch.empty(1, embedding.embedding_dim), requires_grad=False)
    embedding.padding_idx = None
    for name, buffer in list(embedding.named_buffers()):
        setattr(embedding, name, torch.empty(buffer.shape, dtype=buffer.dtype))
    blocks._init_weights(embedding)
    return embedding


def _from_pretrained(
    checkpoint: Checkpoint,
    config: Any,
    span: Span,
    placement: Placement,
    final_norm: bool,
) -> nn.Module:
    present = {int(m.group(1)) for m in map(_BLOCK.match, checkpoint.tensors) if m}
    missing = [block for block in range(span.first, span.end) if block not in present]
    if missing:
        raise CheckpointError(
            f"{checkpoint.name} lacks blocks {missing[0]}..{missing[-1]}; "
            "this bundle holds another span, or the files are not complete"
        )
    with _quiet_transformers():
        blocks, report = _span_class(checkpoint.config, final_norm).from_pretrained(
            checkpoint.folder,
            config=config,
            key_mapping=_key_mapping(present, span),
            dtype=placement.dtype,
            device_map={"": str(placement.device)},
            output_loading_info=True,
        )
    if report["missing_keys"]:
        raise CheckpointError(
            f"{checkpoint.name} lacks {sorted(report['missing_keys'])[0]} and "
            f"{len(report['missing_keys']) - 1} more tensors of span {span}; "
            "fetch the checkpoint again"
        )
    loaded: nn.Module = blocks.eval()
    return loaded


def _key_mapping(present: set[int], span: Span) -> dict[str, str]:
    """Renumber the blocks of the span from 0; send all other blocks where nothing looks."""
    mapping = {}
    for block in sorted(present):
        inside = span.first <= block < span.end
        target = f"layers.{block - span.first}." if inside else f"elsewhere.{block}."
        mapping[rf"^model\.layers\.{block}\."] = target
    return mapping


def _either(checkpoint: Checkpoint, name: str, tied: str) -> str:
    """A tied model stores the embedding and the head once, under either name."""
    tied_model = getattr(checkpoint.config, "tie_word_embeddings", False)
    return tied if name not in checkpoint.tensors and tied_model else name


def _load_head(checkpoint: Checkpoint, placement: Placement) -> nn.Linear:
    weight = checkpoint.tensor(_either(checkpoint, HEAD, EMBEDDING))
    head = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    head.weight = nn.Parameter(weight.to(placement.device, placement.dtype), requires_grad=False)
    if "lm_head.bias" in checkpoint.tensors:
        bias = checkpoint.tensor("lm_head.bias").to(placement.device, placement.dtype)
        head.bias = nn.Parameter(bias, requires_grad=False)
    return head


def _head_only(config: PretrainedConfig, head: nn.Linear) -> nn.Module:
    """transformers' causal-LM class around an empty model: it owns the scaling of the logits."""
    empty = span_config(config, Span(0, 0))
    with torch.device("meta"):
        causal: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](empty)
    causal.model = _HiddenAsOutput()
    causal.lm_head = head
    module: nn.Module = causal.eval().requires_grad_(False)
    return module


class _HiddenAsOutput(nn.Module):
    """Gives rows back in the form that a causal-LM class expects from its base model."""

    def forward(self, inputs_embeds: Tensor, **kwargs: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPast

        return BaseModelOutputWithPast(last_hidden_state=inputs_embeds)


class _quiet_transformers:
    """No load report and no progress bar: blocks of other parts are left out on purpose."""

    def __enter__(self) -> None:
        self._level = transformers_logging.get_verbosity()
        self._bar = transformers_logging.is_progress_bar_enabled()
        transformers_logging.set_verbosity(logging.CRITICAL)
        transformers_logging.disable_progress_bar()

    def __exit__(self, *exc: object) -> None:
        transformers_logging.set_verbosity(self._level)
        if self._bar:
            transformers_logging.enable_progress_bar()
