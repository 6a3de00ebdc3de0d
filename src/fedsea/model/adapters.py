"""Adapters as files, in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

A file may hold the adapter of the whole model; each side reads the tensors of its own blocks only.
The parts of bottom, trunk and top written together are an adapter that PEFT loads on the unsplit
model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_tensors
from torch import Tensor

from fedsea import artifacts
from fedsea.errors import CheckpointError, ConfigError
from fedsea.model.lora import Adapter, LoraConfig, Place
from fedsea.model.partition import Span

CONFIG: Final = "adapter_config.json"
TENSORS: Final = "adapter_model.safetensors"

_NAME = re.compile(r"base_model\.model\.model\.layers\.(\d+)\.(.+)\.lora_(A|B)\.weight")
# What changes the meaning of the factors and is not understood here, with the value that is.
_PLAIN: Final[Mapping[str, tuple[Any, ...]]] = {
    "use_dora": (False, None),
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "lora_bias": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "modules_to_save": ([], None),
    "use_qalora": (False, None),
    "alora_invocation_tokens": (None,),
    "trainable_token_indices": (None,),
}
# Initializations that change the base weights as well, so that the factors alone mean nothing.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq")


def read_adapter(folder: Path, span: Span) -> Adapter:
    """Read the part of an adapter that belongs to the blocks of a span.

    Raises:
        CheckpointError: a file is missing, unreadable or corrupt.
        ConfigError: the adapter is of a kind that is not understood.
    """
    described = read_description(folder)
    file = folder / TENSORS
    pairs: dict[Place, dict[str, Tensor]] = {}
    targets: set[str] = set()
    try:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - it is no mapping
                place, factor = _place(file, name)
                targets.add(place.target)
                if span.first <= place.block < span.end:
                    pairs.setdefault(place, {})[factor] = opened.get_tensor(name)
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} is not there; check the folder of the adapter") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read as safetensors; fetch it again") from error
    config = _config(folder / CONFIG, described, targets)
    factors = {place: _factors(file, place, pair, config) for place, pair in pairs.items()}
    return Adapter(config, span, factors)


def write_adapter(folder: Path, parts: Sequence[Adapter], base_model: str) -> None:
    """Write the parts of one adapter, of spans that do not overlap, as one.

    Each file is replaced as a whole; the tensors come first, so that a configuration never stands
    beside factors of another adapter's shape.

    Raises:
        ConfigError: the parts are of different adapters or overlap, or cannot be written.
    """
    places = [place for part in parts for place in part.factors]
    if len(places) != len(set(places)):
        raise _no_parts()
    config = joined([part.config for part in parts if part.factors or not places], places)
    tensors = {}
    for part in parts:
        for place, factors in part.factors.items():
            for name, factor in zip(tensor_names(place), (factors.a, factors.b), strict=True):
                tensors[name] = factor.detach().cpu().contiguous()
    described = json.dumps(description(config, base_model), indent=2, sort_keys=True)
    artifacts.replace_file(folder / TENSORS, save_tensors(tensors, {"format": "pt"}))
    artifacts.replace_file(folder / CONFIG, described.encode() + b"\n")


def joined(configs: Sequence[LoraConfig], places: Sequence[Place]) -> LoraConfig:
    """The configuration of an adapter whose parts have these, and factors at these places.

    Parts may differ in what they target: blocks of one model differ in their linears, and a part may
    name its own blocks only.

    Raises:
        ConfigError: the parts multiply by other ranks or scales.
    """
    if len({(config.rank, config.alpha, config.rslora) for config in configs}) != 1:
        raise _no_parts()
    blocks: tuple[int, ...] | None = None
    if any(config.blocks is not None for config in configs):
        named = {block for config in configs for block in config.blocks or ()}
        blocks = tuple(sorted(named | {place.block for place in places}))
    targets = tuple(sorted({target for config in configs for target in config.targets}))
    return replace(configs[0], targets=targets, blocks=blocks)


def tensor_names(place: Place) -> tuple[str, str]:
    """The names of A and B of a linear in PEFT's format."""
    stem = f"base_model.model.model.layers.{place.block}.{place.path}"
    return f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"


def base_model(folder: Path) -> str:
    """The name of the model that an adapter says it is for.

    Raises:
        CheckpointError: its configuration is missing or unreadable.
    """
    return str(read_description(folder).get("base_model_name_or_path") or "")


def read_description(folder: Path) -> dict[str, Any]:
    """The configuration of an adapter of any kind, as it stands there.

    Raises:
        CheckpointError: it is missing or unreadable.
    """
    file = folder / CONFIG
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} is not there; check the folder of the adapter") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON; fetch it again") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{file} is no object; fetch it again")
    return found


def _config(file: Path, described: Mapping[str, Any], targets: set[str]) -> LoraConfig:
    if described.get("peft_type") != "LORA":
        raise ConfigError(f"{file} is not of LoRA; use an adapter with peft_type LORA")
    for key, plain in _PLAIN.items():
        if described.get(key) not in plain:
            raise ConfigError(f"{file}: {key} is not understood; train the adapter without it")
    initial = described.get("init_lora_weights", True)
    if isinstance(initial, str) and initial.lower().startswith(_CHANGES_BASE):
        raise ConfigError(
            f"{file}: init_lora_weights {initial} changes the base weights; "
            "convert the adapter to plain LoRA with PEFT first"
        )
    if not targets:
        # A part without factors: what it would have targeted is all that can be said.
        named = described.get("target_modules")
        targets = {str(name) for name in named} if isinstance(named, list) else set()
    blocks = described.get("layers_to_transform")
    try:
        return LoraConfig(
            rank=int(described["r"]),
            alpha=float(described["lora_alpha"]),
            dropout=float(described.get("lora_dropout") or 0.0),
            targets=tuple(sorted(targets)),
            blocks=None
            if blocks is None
            else tuple([blocks] if isinstance(blocks, int) else blocks),
            rslora=bool(described.get("use_rslora")),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file} lacks r or lora_alpha, or they are no numbers") from error


def _no_parts() -> ConfigError:
    return ConfigError("these are not the parts of one adapter; write each by itself")


def _place(file: Path, name: str) -> tuple[Place, str]:
    match = _NAME.fullmatch(name)
    if match is None:
        raise ConfigError(
            f"{file} holds tensors outside of the linears of decoder blocks; "
            "use an adapter without them"
        )
    return Place(int(match[1]), match[2]), match[3]


def _factors(
    file: Path, place: Place, pair: Mapping[str, Tensor], config: LoraConfig
) -> tuple[Tensor, Tensor]:
    a, b = pair.get("A"), pair.get("B")
    if a is None or b is None or a.ndim != 2 or b.ndim != 2:
        raise CheckpointError(f"{file} lacks a factor of {place.path}; fetch it again")
    if a.shape[0] != config.rank or b.shape[1] != config.rank:
        raise CheckpointError(f"{file}: {place.path} is not of rank {config.rank}; fetch it again")
    if not (a.isfinite().all() and b.isfinite().all()):
        raise CheckpointError(f"{file}: {place.path} holds NaN or infinity; train it again")
    return a.to(torch.float32), b.to(torch.float32)


def description(config: LoraConfig, base_model: str) -> dict[str, Any]:
    """The configuration of an adapter in PEFT's format."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": int(config.alpha) if config.alpha.is_integer() else config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": sorted(config.targets),
        "layers_to_transform": None if config.blocks is None else sorted(config.blocks),
        "use_rslora": config.rslora,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }
