"""The same answers from the whole model in one process, by `transformers` alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging


def tokens(
    model: Path, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> list[tuple[int, ...]]:
    """Greedy continuations of prompts in fp32, as token ids."""
    transformers_logging.disable_progress_bar()
    whole: PreTrainedModel = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    whole.eval()
    return [_continue(whole, prompt, max_new_tokens) for prompt in prompts]


def _continue(model: PreTrainedModel, prompt: Sequence[int], count: int) -> tuple[int, ...]:
    ids = torch.tensor([list(prompt)])
    grown = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False
    )
    return tuple(int(token) for token in grown[0, ids.shape[1] :])
