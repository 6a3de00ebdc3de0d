"""Soft prompts: virtual rows that stand in front of every sequence where it enters the trunk.

A prompt E of r rows is trained while all else is frozen (prompt tuning, arXiv 2104.08691). DEL
(arXiv 2602.11513, eq. 13) trains it at the server under the very noise of the mechanism at the cut:

    min_E  sum_i -log Pr[x_(i+1) | e_1 .. e_r, x^_1 .. x^_i]

Inside the trunk the rows of a sequence stand at positions r, r + 1, ...; bottom and top know
nothing of the prompt. Files have PEFT's prompt-tuning format. With a trunk that begins at block 0
and a top without blocks the result is PEFT's on the unsplit model; a prompt that enters at a later
block says so in its configuration under a key that PEFT does not know and warns about.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from fedsea import artifacts
from fedsea.errors import CheckpointError, ConfigError, FingerprintMismatch
from fedsea.model.adapters import CONFIG, TENSORS, read_description

_ROWS: Final = "prompt_embeddings"
_ENTRANCE: Final = "fedsea_entrance"
_MODEL: Final = "fedsea_model"


class SoftPrompt(nn.Module):
    """Virtual rows (r, hidden), fp32, for one place of entry.

    Args:
        rows: (r, hidden); taken over as fp32.
        entrance: number of the block that they enter.
        model: fingerprint of the checkpoint that they were made for; empty when it is not known.
        factor: what some families multiply embeddings by in front of the first block. Rows of a
            prompt that enters there are kept as PEFT keeps them, before that factor.

    Raises:
        ConfigError: the rows are no finite (r, hidden) with r of 1 or more.
    """

    def __init__(self, rows: Tensor, entrance: int, model: str = "", factor: float = 1.0) -> None:
        super().__init__()
        if rows.dim() != 2 or not rows.numel():
            raise ConfigError(
                f"a soft prompt of shape {list(rows.shape)} has no rows; give [rows, hidden]"
            )
        if not bool(rows.isfinite().all()):
            raise ConfigError("a soft prompt with NaN or infinity cannot be used; train it again")
        self.rows = nn.Parameter(rows.detach().to(torch.float32).clone())
        self.entrance = entrance
        self.model = model
        self.factor = factor if entrance == 0 else 1.0

    @property
    def count(self) -> int:
        """Rows of the prompt, r."""
        return self.rows.shape[0]

    def entering(self, dtype: torch.dtype) -> Tensor:
        """The rows (r, hidden) as they enter the trunk, with gradients to the prompt."""
        return (self.rows * self.factor).to(dtype)

    def prepended(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """Put the prompt in front of every sequence.

        Args:
            rows: (T, hidden) packed rows of sequences.
            counts: rows of each sequence; T in all.

        Returns:
            (T + r * len(counts), hidden); sequence i has ``r + counts[i]`` rows.
        """
        first = self.entering(rows.dtype)
        parts = [part for own in rows.split(list(counts)) for part in (first, own)]
        return torch.cat(parts)

    def stripped(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """The rows of the sequences without those of the prompt: what `prepended` added, undone."""
        parts = rows.split([self.count + count for count in counts])
        return torch.cat([part[self.count :] for part in parts])

    def check_fits(self, hidden_size: int, entrance: int, model: str) -> None:
        """Refuse a prompt that was made for something else.

        Raises:
            ConfigError: rows of another width, or another place of entry.
            FingerprintMismatch: another checkpoint.
        """
        if self.rows.shape[1] != hidden_size:
            raise ConfigError(
                f"the soft prompt has rows of {self.rows.shape[1]} numbers and this model's have "
                f"{hidden_size}; train one for this model"
            )
        if self.entrance != entrance:
            raise ConfigError(
                f"the soft prompt enters block {self.entrance} and the trunk begins with block "
                f"{entrance}; train one for this cut"
            )
        if self.model and self.model != model:
            raise FingerprintMismatch(
                f"the soft prompt was made for the checkpoint {self.model[:12]} and this one is "
                f"{model[:12]}; use the prompt of this checkpoint"
            )


def read_prompt(folder: Path, factor: float = 1.0) -> SoftPrompt:
    """Read a prompt in PEFT's prompt-tuning format, also one that PEFT wrote.

    Args:
        folder: where it is.
        factor: the model's, see `fedsea.model.spans.embedding_factor`.

    Raises:
        CheckpointError: a file is missing, unreadable or corrupt.
        ConfigError: it is an adapter of another kind.
    """
    described = read_description(folder)
    if described.get("peft_type") != "PROMPT_TUNING":
        raise ConfigError(
            f"{folder / CONFIG} is not of a soft prompt; use an adapter with peft_type "
            "PROMPT_TUNING"
        )
    entrance = described.get(_ENTRANCE, 0)
    count = described.get("num_virtual_tokens")
    if not all(type(number) is int and number >= 0 for number in (entrance, count)):
        raise CheckpointError(
            f"{folder / CONFIG} lacks num_virtual_tokens, or a number in it is none; fetch it again"
        )
    rows, model = _read_rows(folder / TENSORS)
    if rows.dim() != 2 or rows.shape[0] != count or not rows.numel():
        raise CheckpointError(
            f"{folder / TENSORS} has no {count} rows, as {CONFIG} beside it says; fetch it again"
        )
    if not bool(rows.isfinite().all()):
        raise CheckpointError(f"{folder / TENSORS} holds NaN or infinity; train it again")
    return SoftPrompt(rows, entrance, model, factor)


def write_prompt(folder: Path, prompt: SoftPrompt, base_model: str) -> None:
    """Write a prompt in PEFT's format; each file is replaced as a whole, the rows first.

    Raises:
        ConfigError: it cannot be written.
    """
    count, hidden_size = prompt.rows.shape
    described: dict[str, Any] = {
        "peft_type": "PROMPT_TUNING",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "num_virtual_tokens": count,
        "token_dim": hidden_size,
        "num_transformer_submodules": 1,
        "prompt_tuning_init": "RANDOM",
    }
    if prompt.entrance:
        described[_ENTRANCE] = prompt.entrance
    text = json.dumps(described, indent=2, sort_keys=True)
    rows = {_ROWS: prompt.rows.detach().cpu().contiguous()}
    head = {"format": "pt", _MODEL: prompt.model}
    artifacts.replace_file(folder / TENSORS, save_tensors(rows, head))
    artifacts.replace_file(folder / CONFIG, text.encode() + b"\n")


def _read_rows(file: Path) -> tuple[Tensor, str]:
    """The rows in a file, and the fingerprint of their model."""
    try:
        with safe_open(file, framework="pt") as opened:
            if list(opened.keys()) != [_ROWS]:
                raise CheckpointError(f"{file} holds no {_ROWS} alone; fetch it again")
            model = (opened.metadata() or {}).get(_MODEL, "")
            rows: Tensor = opened.get_tensor(_ROWS)
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} is not there; check the folder of the prompt") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read as safetensors; fetch it again") from error
    if not rows.is_floating_point():
        raise CheckpointError(f"{file} holds no floating-point rows; fetch it again")
    return rows.to(torch.float32), model
