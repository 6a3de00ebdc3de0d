"""The packaged demo model: a small LLaMA that writes notes about invented clinic visits.

Owns the checkpoint in `model/` (weights, tokenizer, chat template, and `training.json`, the record
of how it was trained) and the prompts that it was made for. `scripts/train_demo_model.py` makes it.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Final

from fedsea.errors import CheckpointError

PROMPTS: Final = (
    "Visit note\nPatient: Maria Okafor",
    "The patient reports",
    "Dear Dr Holm,",
)
"""Beginnings of texts that the demo model continues."""

CHAT_PROMPT: Final = "Write a visit note for Peter Novak, a 44-year-old man. Reason: headache."
"""A first message of a chat with the demo model."""


def model_path() -> Path:
    """The folder of the demo checkpoint, for whatever takes a local model.

    Raises `CheckpointError` when the package was installed without it.
    """
    folder = Path(str(files("fedsea.demo"))) / "model"
    if not (folder / "model.safetensors").is_file():
        raise CheckpointError(f"no demo model in {folder}: install fedsea again, as a folder")
    return folder
