"""The unsplit model under PEFT, as the measure of training through the cut."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from safetensors.torch import load_file
from tests.tiny_models import VOCABULARY
from torch import Tensor
from transformers import AutoModelForCausalLM

from fedsea.model.adapters import read_adapter
from fedsea.model.lora import Adapter, LoraConfig
from fedsea.model.partition import Span

FIRST_MOMENT = "exp_avg"


def unsplit(folder: Path, adapters: Sequence[Adapter], lora: LoraConfig) -> Any:
    """The whole model with PEFT's adapter, its factors those of the parts."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    # PEFT would take the linears of dense layers and shared experts to mean fused experts.
    model.config.model_type = "llama"
    places = [place for adapter in adapters for place in adapter.factors]
    config = PeftConfig(
        r=lora.rank,
        lora_alpha=int(lora.alpha),
        target_modules=[f"model.layers.{place.block}.{place.path}" for place in places],
        task_type="CAUSAL_LM",
    )
    # In eval mode: some families have dropout of their own, which the parts do not.
    whole = get_peft_model(model, config).eval()
    state = dict(whole.named_parameters())
    with torch.no_grad():
        for name, parameter in factors(adapters):
            state[name].copy_(parameter)
    return whole


def factors(adapters: Sequence[Adapter]) -> Iterator[tuple[str, Tensor]]:
    """Our factors under PEFT's names."""
    for adapter in adapters:
        for place, pair in adapter.factors.items():
            stem = f"base_model.model.model.layers.{place.block}.{place.path}"
            yield f"{stem}.lora_A.default.weight", pair.a
            yield f"{stem}.lora_B.default.weight", pair.b


def gradients(adapters: Sequence[Adapter]) -> dict[str, Tensor | None]:
    """The gradients of our factors under PEFT's names."""
    return {name: parameter.grad for name, parameter in factors(adapters)}


def saved_gradients(step_folder: Path, span: Span) -> dict[str, Tensor]:
    """The gradients of the first step of a trunk that was saved behind it, under PEFT's names.

    The first moments are the gradients themselves when the first beta is 0.
    """
    moments = load_file(step_folder / "optimizer.safetensors")
    found = {}
    for place in read_adapter(step_folder, span).factors:
        for factor in ("a", "b"):
            kept = f"adapter/{place.block}/{place.path}/{factor}".replace(".", "/")
            stem = f"base_model.model.model.layers.{place.block}.{place.path}"
            name = f"{stem}.lora_{factor.upper()}.default.weight"
            found[name] = moments[f"{kept}.{FIRST_MOMENT}"]
    return found


def assert_equal_gradients(found: Mapping[str, Tensor | None], whole: Any) -> None:
    """Every factor's gradient is PEFT's, to 1e-5 of it or of the largest one."""
    state = {name: one for name, one in whole.named_parameters() if "lora_" in name}
    assert found.keys() == state.keys()
    largest = max(float(one.grad.abs().max()) for one in state.values())
    for name, expected in state.items():
        torch.testing.assert_close(found[name], expected.grad, rtol=1e-5, atol=1e-5 * largest)


def examples_of(lengths: Sequence[int], seed: int = 1) -> list[Tensor]:
    """Random token ids of these lengths, without the ids of padding and ends."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator) for length in lengths]


def padded(examples: Sequence[Tensor], side: str = "right") -> tuple[Tensor, Tensor, Tensor]:
    """ids, mask and labels of a padded batch."""
    longest = max(map(len, examples))
    ids = torch.zeros(len(examples), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for index, one in enumerate(examples):
        columns = slice(0, len(one)) if side == "right" else slice(longest - len(one), longest)
        ids[index, columns], mask[index, columns] = one, 1
    labels = ids.masked_fill(mask == 0, -100)
    if side == "left":
        # What padding says about the first token is nothing that is learned.
        for index, one in enumerate(examples):
            labels[index, longest - len(one)] = -100
    return ids, mask, labels
