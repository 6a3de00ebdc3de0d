"""Tiny random checkpoints of every family that can be cut, with nothing left at its default.

The weights are of visible scale, so that a block left out, a multiplier applied twice or a window
ignored moves the logits far beyond the tolerance of any test.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

NUM_BLOCKS = 5
VOCABULARY = 96
WINDOW = 5

_KINDS = [
    "sliding_attention",
    "full_attention",
    "sliding_attention",
    "sliding_attention",
    "full_attention",
]
_BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": NUM_BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_HEAD = {"head_dim": 16}
_WINDOWS = {"sliding_window": WINDOW, "layer_types": _KINDS}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_GROUPS = {"n_group": 2, "topk_group": 1, "n_shared_experts": 1, "routed_scaling_factor": 1.7}
_DENSE_FIRST = {"first_k_dense_replace": 2}
_MLA = {
    "q_lora_rank": 20,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
}
_MULTIPLIERS = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.6,
    "attention_multiplier": 0.21,
    "logits_scaling": 2.5,
}

FAMILIES: Mapping[str, dict[str, Any]] = {
    "afmoe": {
        **_HEAD,
        **_WINDOWS,
        **_EXPERTS,
        "num_dense_layers": 2,
        "num_shared_experts": 1,
        "mup_enabled": True,
    },
    "apertus": {**_HEAD},
    "arcee": {**_HEAD, "attention_bias": True},
    "bitnet": {},
    "cohere": {"logit_scale": 0.3, "use_qk_norm": True, "tie_word_embeddings": True},
    "cohere2": {**_HEAD, **_WINDOWS, "logit_scale": 0.3, "tie_word_embeddings": True},
    "cohere2_moe": {**_HEAD, **_WINDOWS, **_EXPERTS, "logit_scale": 0.3},
    "cwm": {**_HEAD, **_WINDOWS},
    "deepseek_v2": {
        **_MLA,
        **_ROUTED,
        **_DENSE_FIRST,
        **_GROUPS,
        "topk_method": "group_limited_greedy",
        "num_key_value_heads": 4,
    },
    "deepseek_v3": {**_MLA, **_ROUTED, **_DENSE_FIRST, **_GROUPS, "num_key_value_heads": 4},
    "dots1": {**_HEAD, **_WINDOWS, **_ROUTED, **_DENSE_FIRST, **_GROUPS},
    "ernie4_5": {**_HEAD, "use_bias": True},
    "ernie4_5_moe": {
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": 24,
        "moe_layer_start_index": 1,
        "moe_num_shared_experts": 1,
    },
    "exaone4": {**_WINDOWS, "sliding_window_pattern": 3},
    "exaone_moe": {
        **_WINDOWS,
        **_EXPERTS,
        **_GROUPS,
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse", "sparse"],
    },
    "flex_olmo": {"num_experts": 4, "num_experts_per_tok": 2},
    "gemma": {**_HEAD, "tie_word_embeddings": True},
    "gemma2": {
        **_HEAD,
        **_WINDOWS,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
        "query_pre_attn_scalar": 40,
        "tie_word_embeddings": True,
    },
    "gemma3_text": {
        **_HEAD,
        **_WINDOWS,
        "query_pre_attn_scalar": 40,
        "final_logit_softcapping": 3.0,
        "tie_word_embeddings": True,
    },
    "glm": {**_HEAD, "attention_bias": True},
    "glm4": {**_HEAD, "attention_bias": True},
    "glm4_moe": {**_HEAD, **_ROUTED, **_DENSE_FIRST, **_GROUPS, "use_qk_norm": True},
    "glm4_moe_lite": {**_MLA, **_ROUTED, **_GROUPS, "num_key_value_heads": 4},
    "gpt_oss": {**_HEAD, **_WINDOWS, "num_local_experts": 4, "num_experts_per_tok": 2},
    "granite": {**_MULTIPLIERS, "attention_bias": True, "tie_word_embeddings": True},
    "granite_swa": {**_MULTIPLIERS, **_WINDOWS},
    "granitemoe": {**_MULTIPLIERS, "num_local_experts": 4, "num_experts_per_tok": 2},
    "granitemoe_swa": {
        **_MULTIPLIERS,
        **_WINDOWS,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "granitemoeshared": {
        **_MULTIPLIERS,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 20,
    },
    "helium": {"head_dim": 12},
    "hunyuan_v1_dense": {**_HEAD},
    "hunyuan_v1_moe": {**_HEAD, "num_experts": 4, "moe_topk": 2},
    "hyperclovax": {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.6,
        "attention_multiplier": 0.21,
        "logits_scaling": 2.5,
    },
    "jais2": {**_HEAD},
    "llama": {"attention_bias": True, "mlp_bias": True},
    "minicpm3": {**_MLA, "num_key_value_heads": 4, "scale_emb": 3.0, "scale_depth": 1.4},
    "minimax_m2": {**_HEAD, "num_local_experts": 4, "num_experts_per_tok": 2},
    "ministral": {**_HEAD, **_WINDOWS},
    "ministral3": {**_HEAD},
    "mistral": {**_HEAD, "sliding_window": WINDOW},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": WINDOW},
    "nemotron": {**_HEAD, "partial_rotary_factor": 0.5, "attention_bias": True, "mlp_bias": True},
    "olmo": {"clip_qkv": 0.8},
    "olmo2": {},
    "olmo3": {**_WINDOWS},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2, "clip_qkv": 0.8},
    "phi3": {"partial_rotary_factor": 0.5, "sliding_window": WINDOW},
    "qwen2": {
        "use_sliding_window": True,
        "max_window_layers": 2,
        "sliding_window": WINDOW,
        "tie_word_embeddings": True,
    },
    "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 20, "decoder_sparse_step": 2},
    "qwen3": {**_HEAD, **_WINDOWS, "use_sliding_window": True},
    "qwen3_moe": {**_HEAD, **_EXPERTS, "mlp_only_layers": [1], "norm_topk_prob": True},
    "seed_oss": {**_HEAD, "attention_bias": True},
    "smollm3": {"no_rope_layers": [1, 1, 0, 1, 0], "use_sliding_window": True, **_WINDOWS},
    "solar_open": {**_HEAD, **_ROUTED, **_GROUPS},
    "stablelm": {
        "partial_rotary_factor": 0.5,
        "use_qkv_bias": True,
        "qk_layernorm": True,
        "use_parallel_residual": True,
    },
    "starcoder2": {"sliding_window": WINDOW, "use_bias": True, "tie_word_embeddings": True},
    "vaultgemma": {
        **_HEAD,
        **_WINDOWS,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
        "query_pre_attn_scalar": 40,
    },
    "youtu": {**_MLA, "num_key_value_heads": 4},
}


def make_tiny(family: str, **overrides: Any) -> PreTrainedModel:
    """A random model of a family in eval mode, fp32; `overrides` go to its configuration."""
    settings = {**_BASE, **FAMILIES.get(family, {}), **overrides}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = AutoConfig.for_model(family, **settings)
        with torch.random.fork_rng():
            torch.manual_seed(hash_of(family))
            model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
            _scale(model)
    return model.eval()


def save_tiny(family: str, folder: Path, **overrides: Any) -> Path:
    """Write a random model of a family to `folder` and return the folder."""
    make_tiny(family, **overrides).save_pretrained(folder)
    return folder


def hash_of(family: str) -> int:
    """A seed that differs between families and stays the same between runs."""
    return zlib.crc32(family.encode())


@torch.no_grad()
def _scale(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            fan_in = parameter.shape[-1]
            parameter.normal_(0.0, 1.0 if "embed_tokens" in name else 1.2 * fan_in**-0.5)
        else:
            # Norm weights stay near what they were (one, or zero where one is added).
            parameter.add_(torch.randn_like(parameter) * 0.2)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(0.0, 0.2)
