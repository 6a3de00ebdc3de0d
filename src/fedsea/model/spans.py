"""Cutting a model: the parts of a checkpoint as modules that run ragged batches.

The blocks are transformers' own decoder layers inside transformers' own model class, so every
family keeps its own rotary embeddings, layer kinds and residual rules. A span is that class with
fewer layers, its embedding and final norm replaced where they belong to another part.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING, PretrainedConfig
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.utils import logging as transformers_logging

from fedsea.errors import CheckpointError, ConfigError, PartitionError, UnsupportedModel
from fedsea.model import attention, linears, quantization
from fedsea.model.attention import KVContext, RaggedBatch
from fedsea.model.checkpoint import Checkpoint, block_of
from fedsea.model.kv_cache import KVCache, KVShape
from fedsea.model.lora import (
    AdaptedLinear,
    Adapter,
    AdapterContext,
    Place,
    adapt,
    linears_of,
    sizes,
)
from fedsea.model.partition import Span
from fedsea.model.tensor_maps import TensorMaps

FAMILIES = frozenset(
    {
        "afmoe", "apertus", "arcee", "bitnet", "cohere", "cohere2", "cohere2_moe", "cwm",
        "deepseek_v2", "deepseek_v3", "dots1", "ernie4_5", "ernie4_5_moe", "exaone4",
        "exaone_moe", "flex_olmo", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "glm4_moe",
        "glm4_moe_lite", "gpt_oss", "granite", "granite_swa", "granitemoe", "granitemoe_swa",
        "granitemoeshared", "helium", "hunyuan_v1_dense", "hunyuan_v1_moe", "hyperclovax",
        "jais2", "llama", "minicpm3", "minimax_m2", "ministral", "ministral3", "mistral",
        "mixtral", "nemotron", "olmo", "olmo2", "olmo3", "olmoe", "phi3", "qwen2", "qwen2_moe",
        "qwen3", "qwen3_moe", "seed_oss", "smollm3", "solar_open", "stablelm", "starcoder2",
        "vaultgemma", "youtu",
    }
)  # fmt: skip

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm."
HEAD = "lm_head.weight"


@dataclass(frozen=True, slots=True)
class Placement:
    """Where and how a part is kept: device, dtype and weight format (`quantization.FORMATS`)."""

    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32
    quantization: str = "none"

    @property
    def kept_dtype(self) -> torch.dtype:
        """What the large weights are stored as; nf4 takes half of what this says."""
        return self.dtype if self.quantization == "none" else torch.int8


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
        self.adapters = AdapterContext()
        self.decode: Callable[[nn.Module, Tensor, Tensor], Tensor] | None = None
        self._narrowed: dict[Span, nn.Module] = {span: blocks}
        for layer, module in enumerate(attention_modules(blocks)):
            module.kv_context, module.kv_layer = self.context, layer  # type: ignore[assignment]

    def kv_shapes(self) -> list[KVShape]:
        """KV row size of each block, in order."""
        return [kv_shape(layer) for layer in attention_modules(self.blocks)]

    def new_cache(self, num_rows: int, placement: Placement) -> KVCache:
        """Make a cache of `num_rows` rows and attach it."""
        cache = KVCache(self.kv_shapes(), num_rows, placement.dtype, placement.device)
        self.context.cache = cache
        return cache

    def run(self, rows: Tensor, batch: RaggedBatch, span: Span | None = None) -> Tensor:
        """Run the packed rows of a batch: (T,) or (T, hidden) to (T, hidden).

        `span` names the blocks to run when not all of them are meant.
        """
        self.context.batch = batch
        self.adapters.rows = batch.adapters
        if not len(self.span) and not self.takes_ids:
            return self.blocks.norm(rows)  # type: ignore[operator,no-any-return]
        blocks = self.blocks if span is None else self._narrow(span)
        if self.decode is not None and batch.is_decode and not batch.adapters:
            return self.decode(blocks, rows, batch.position_ids)
        return self.forward_blocks(blocks, rows, batch.position_ids)

    def forward_blocks(self, blocks: nn.Module, rows: Tensor, position_ids: Tensor) -> Tensor:
        """One call of transformers' forward: (T,) or (T, hidden) to (T, hidden)."""
        inputs: dict[str, Any] = {"input_ids" if self.takes_ids else "inputs_embeds": rows[None]}
        output = blocks(**inputs, position_ids=position_ids, use_cache=False)
        hidden: Tensor = output.last_hidden_state
        return hidden[0]

    def replica(self) -> BlockSpan:
        """The same weights for another thread: what runs there and here do not meet.

        Modules are copied, tensors are shared. The replica has no cache, takes whole sequences
        (`RaggedBatch.whole`), and knows no adapters yet.
        """
        return BlockSpan(_with_shared_tensors(self.blocks), self.span, self.takes_ids)

    def linears(self) -> dict[Place, nn.Module]:
        """The linears of the blocks, which adapters may target."""
        return linears_of(self.blocks, self.span) if len(self.span) else {}

    def accept(self, adapter: Adapter) -> None:
        """Make the linears that an adapter targets ready for it; batches name it then.

        Raises:
            ConfigError: it targets what these blocks do not have, or is of other sizes.
        """
        linears = self.linears()
        for place, factors in adapter.factors.items():
            layer = linears.get(place)
            if layer is None or sizes(layer) != (factors.a.shape[1], factors.b.shape[0]):
                raise ConfigError(
                    f"the adapter does not fit {place.path} of block {place.block}; "
                    "use the model that it was made for"
                )
        if adapter.factors:
            adapt(self.blocks, self.span, self.adapters, adapter.config.targets)

    def _narrow(self, span: Span) -> nn.Module:
        """The same layers as a model that has only those of `span`; made once per span."""
        if span not in self._narrowed:
            inner = Span(span.first - self.span.first, span.end - self.span.first)
            whole: Any = self.blocks
            narrow = copy.copy(whole)
            narrow._modules = {**whole._modules, "layers": whole.layers[inner.first : inner.end]}
            narrow.config = span_config(whole.config, inner)
            self._narrowed[span] = narrow
        return self._narrowed[span]


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


def _with_shared_tensors(module: nn.Module) -> nn.Module:
    """A copy of a tree of modules with the same tensors in it, without what adapters added."""
    if isinstance(module, AdaptedLinear):
        return _with_shared_tensors(module.base)
    twin = copy.copy(module)
    twin._parameters = dict(module._parameters)
    twin._buffers = dict(module._buffers)
    twin._modules = {
        name: None if child is None else _with_shared_tensors(child)
        for name, child in module._modules.items()
    }
    return twin


def attention_modules(blocks: nn.Module) -> list[nn.Module]:
    """The attention layer of every block, in order."""
    return [block.self_attn for block in blocks.layers]  # type: ignore[union-attr]


def kv_shape(attention_layer: nn.Module) -> KVShape:
    """Heads and head sizes that one attention layer writes to the cache."""
    layer: Any = attention_layer
    if hasattr(layer, "kv_lora_rank"):
        # Latent attention expands its keys and values before it attends.
        return KVShape(int(layer.num_heads), int(layer.qk_head_dim), int(layer.v_head_dim))
    size = int(layer.head_dim)
    if hasattr(layer, "k_proj"):
        return KVShape(int(layer.k_proj.out_features) // size, size, size)
    return KVShape(int(layer.config.num_key_value_heads), size, size)


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
    name = _either(checkpoint, EMBEDDING, HEAD)
    maps = checkpoint.map([name])
    weight = maps.tensors[name]
    if weight.dtype != placement.dtype or placement.device.type != "cpu":
        weight = weight.to(placement.device, placement.dtype)
    else:
        maps.expect_random_reads()
    embedding.weight = nn.Parameter(weight, requires_grad=False)
    blocks.embed_tokens = embedding
    return BlockSpan(blocks, span, takes_ids=True)


def load_trunk(checkpoint: Checkpoint, span: Span, placement: Placement) -> BlockSpan:
    """Middle blocks only."""
    blocks = _load_blocks(checkpoint, span, placement, multiplied=False)
    return BlockSpan(blocks, span, takes_ids=False)


def load_top(checkpoint: Checkpoint, span: Span, placement: Placement) -> Top:
    """The last blocks, the final norm and the head."""
    # The head is the largest weight: it comes first, while little else is in memory.
    head = _load_head(checkpoint, placement)
    blocks = _load_blocks(checkpoint, span, placement, multiplied=False, final_norm=True)
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
        raise PartitionError(f"span {span} is outside the model's {checkpoint.num_blocks} blocks")
    attention.register()
    cls = _span_class(checkpoint.config, span, multiplied, final_norm)
    maps = checkpoint.map(_tensor_names(checkpoint, span, final_norm))
    blocks = _from_pretrained(checkpoint, cls, maps, span, placement)
    # What was converted to another dtype is not read again, and the rest not before it is used.
    maps.release_all()
    prepared = _prepare_linears(blocks, maps, placement)
    return _convert_rest(prepared, placement.dtype).requires_grad_(False)


def _loading_dtype(maps: TensorMaps, placement: Placement) -> torch.dtype:
    """int8 weights are made from the stored numbers: a wider copy first would only take memory."""
    stored = {tensor.dtype for tensor in maps.tensors.values()}
    if quantization.is_own(placement.quantization, placement.device) and stored in (
        {torch.bfloat16},
        {torch.float16},
    ):
        return stored.pop()
    return placement.dtype


def _convert_rest(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Bring what was loaded in another dtype, and not quantized, to the dtype of the computation."""
    for child in module.modules():
        if isinstance(child, linears.Int8Linear):
            continue
        for parameter in child.parameters(recurse=False):
            if parameter.dtype in (torch.bfloat16, torch.float16):
                parameter.data = parameter.data.to(dtype)
    return module


def _prepare_linears(module: nn.Module, maps: TensorMaps, placement: Placement) -> nn.Module:
    if quantization.is_own(placement.quantization, placement.device):
        return linears.quantize_int8(module, maps.release)
    return linears.use_fast_linears(module, maps.release)


def span_config(config: PretrainedConfig, span: Span) -> Any:
    """Configuration of a model that has the blocks of `span` only."""
    cut = _own_config(config)
    cut.num_hidden_layers = len(span)
    for name in ("layer_types", "mlp_layer_types", "no_rope_layers"):
        values = getattr(config, name, None)
        if isinstance(values, list):
            setattr(cut, name, values[span.first : span.end])
    return cut


def _own_config(config: PretrainedConfig) -> Any:
    """A copy of the configuration that sends attention to `attend`."""
    own: Any = copy.deepcopy(config)
    own.tie_word_embeddings = False
    own.output_router_logits = False
    own._attn_implementation = attention.ATTENTION_NAME
    return own


def _span_class(config: PretrainedConfig, span: Span, multiplied: bool, final_norm: bool) -> Any:
    """transformers' base class, cut to `span` as it is made.

    All blocks are made (on the meta device) and the others dropped, so that whatever depends on
    a block's number or on the number of blocks comes out as in the whole model.
    """
    base: Any = MODEL_MAPPING[type(config)]

    class SpanOfBlocks(base):
        def __init__(self, config: PretrainedConfig) -> None:
            super().__init__(config)
            _cut(self, config, span)
            if not final_norm:
                self.norm = _Passthrough()
            if not multiplied:
                _leave_rows_unscaled(self)

    # transformers converts stored weights (fused experts) for classes of its own modules only.
    SpanOfBlocks.__module__ = base.__module__
    return SpanOfBlocks


def _cut(blocks: Any, config: PretrainedConfig, span: Span) -> None:
    blocks.config = span_config(config, span)
    blocks.layers = blocks.layers[span.first : span.end]
    # Outside the module tree, so that loading neither fills nor misses it.
    blocks.own_embedding = [blocks.embed_tokens]
    blocks.embed_tokens = _Passthrough()


def _leave_rows_unscaled(blocks: Any) -> None:
    """Switch off the factor that some families put on embeddings in front of the first block."""
    if hasattr(blocks, "embedding_multiplier"):
        blocks.embedding_multiplier = 1.0
    if hasattr(blocks.config, "mup_enabled"):
        blocks.config.mup_enabled = False


def embedding_factor(config: PretrainedConfig) -> float:
    """What a family multiplies embeddings by in front of the first block, beside its own layer."""
    if getattr(config, "mup_enabled", False):
        return float(config.hidden_size**0.5)
    return float(getattr(config, "embedding_multiplier", 1.0))


def _materialize_embedding(blocks: Any) -> nn.Embedding:
    """The family's own embedding layer, off the meta device, its weight still to be set."""
    embedding: nn.Embedding = blocks.own_embedding.pop()
    embedding.weight = nn.Parameter(torch.empty(1, embedding.embedding_dim), requires_grad=False)
    embedding.padding_idx = None
    for name, buffer in list(embedding.named_buffers()):
        setattr(embedding, name, torch.empty(buffer.shape, dtype=buffer.dtype))
    blocks._init_weights(embedding)
    return embedding


def _tensor_names(checkpoint: Checkpoint, span: Span, final_norm: bool) -> list[str]:
    """Names of what a span loads through transformers."""
    if not any(block_of(name) is not None for name in checkpoint.tensors) and not checkpoint.bundle:
        raise UnsupportedModel(
            f"{checkpoint.name} does not name its blocks model.layers.N, as multimodal models and "
            "bare base models do not; use a text-only checkpoint saved with its head"
        )
    norm = [name for name in checkpoint.tensors if name.startswith(FINAL_NORM)]
    return [*checkpoint.block_tensors(span), *(norm if final_norm else ())]


def _from_pretrained(
    checkpoint: Checkpoint, cls: Any, maps: TensorMaps, span: Span, placement: Placement
) -> nn.Module:
    with _QuietTransformers():
        blocks, report = cls.from_pretrained(
            None,
            config=_own_config(checkpoint.config),
            state_dict=dict(maps.tensors),
            key_mapping={
                rf"^model\.layers\.{block}\.": f"layers.{block - span.first}."
                for block in range(span.first, span.end)
            },
            dtype=_loading_dtype(maps, placement),
            quantization_config=quantization.library_config(
                placement.quantization, placement.device, placement.dtype
            ),
            device_map={"": str(placement.device)},
            output_loading_info=True,
        )
    if report["missing_keys"]:
        raise CheckpointError(
            f"there is no {min(report['missing_keys'])} (of {len(report['missing_keys'])} tensors "
            f"of span {span} that are missing): {checkpoint.contents}; use one that has them"
        )
    loaded: nn.Module = blocks.eval()
    return loaded


def _either(checkpoint: Checkpoint, name: str, tied: str) -> str:
    """A tied model stores the embedding and the head once, under either name."""
    tied_model = getattr(checkpoint.config, "tie_word_embeddings", False)
    return tied if name not in checkpoint.tensors and tied_model else name


def _load_head(checkpoint: Checkpoint, placement: Placement) -> nn.Module:
    name = _either(checkpoint, HEAD, EMBEDDING)
    maps = checkpoint.map([name])
    weight = maps.tensors[name]
    if not weight.is_floating_point():
        raise UnsupportedModel(
            f"{name} is stored quantized; use a checkpoint that leaves the head unquantized"
        )
    head = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    head.weight = nn.Parameter(weight.to(placement.device, placement.dtype), requires_grad=False)
    if "lm_head.bias" in checkpoint.tensors:
        bias = checkpoint.tensor("lm_head.bias").to(placement.device, placement.dtype)
        head.bias = nn.Parameter(bias, requires_grad=False)
    return _prepare_linears(head, maps, placement)


def _head_only(config: PretrainedConfig, head: nn.Module) -> nn.Module:
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

    def forward(self, inputs_embeds: Tensor, **_: Any) -> Any:
        return MoeModelOutputWithPast(last_hidden_state=inputs_embeds)


class _QuietTransformers:
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
