"""Checkpoints to measure with: random Llamas made once, and the pretrained ones where present."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.settings import Shape
from fedsea.model.partition import Partition

PRETRAINED = ("stories260K", "tinystories656K")
_ROOT = Path(__file__).resolve().parents[1]
_ASSETS = _ROOT.parent / "shared" / "assets"
_SHARED = _ASSETS / "models"
_STORIES = _ASSETS / "data" / "tinystories" / "valid_cased.txt"


def default_folder() -> Path:
    """Where made checkpoints and logs are kept between runs; outside of version control."""
    return _ROOT / ".bench"


def prepare_folder(folder: Path) -> Path:
    """Make the folder, which ignores itself."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".gitignore").write_text("*\n", encoding="utf-8")
    return folder


def random_llama(folder: Path, shape: Shape) -> Path:
    """A checkpoint of random fp32 weights with a tokenizer, made when it is not there yet."""
    path = folder / shape.name
    if not path.exists():
        unfinished = folder / f"{shape.name}.unfinished-{os.getpid()}"
        shutil.rmtree(unfinished, ignore_errors=True)
        torch.manual_seed(0)
        LlamaForCausalLM(llama_config(shape)).save_pretrained(unfinished)
        word_tokenizer(shape.vocabulary).save_pretrained(unfinished)
        unfinished.rename(path)
    return path


def llama_config(shape: Shape, **more: Any) -> LlamaConfig:
    """The configuration of a shape; no token ends a text."""
    return LlamaConfig(
        hidden_size=shape.hidden,
        num_hidden_layers=shape.blocks,
        intermediate_size=shape.intermediate,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocabulary,
        max_position_embeddings=shape.positions,
        bos_token_id=None,
        eos_token_id=None,
        **more,
    )


def word_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """A tokenizer of as many invented words; prompts are given as ids all the same."""
    words = {f"w{number} ": number for number in range(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0 "))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def pretrained() -> dict[str, Path]:
    """The pretrained checkpoints that this machine has, by name."""
    return {name: _SHARED / name for name in PRETRAINED if (_SHARED / name).is_dir()}


def stories() -> Path | None:
    """Text that the pretrained checkpoints know and were not trained on, where present."""
    return _STORIES if _STORIES.is_file() else None


def prompt_ids(count: int, vocabulary: int, seed: int = 0) -> list[int]:
    """Random token ids; neither the first nor the last few ids, which may be special."""
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = torch.randint(8, vocabulary - 8, (count,), generator=generator).tolist()
    return ids


def vocabulary_of(path: Path) -> int:
    """Entries of a checkpoint's vocabulary."""
    return _config_number(path, "vocab_size")


def blocks_of(path: Path) -> int:
    """Decoder blocks of a checkpoint."""
    return _config_number(path, "num_hidden_layers")


def partition_of(path: Path) -> Partition:
    """One block at either end, and at least one in the trunk."""
    return Partition(1, 1 if blocks_of(path) > 2 else 0)


def hidden_of(path: Path) -> int:
    """Numbers in a row of a checkpoint."""
    return _config_number(path, "hidden_size")


def _config_number(path: Path, name: str) -> int:
    return int(json.loads((path / "config.json").read_text(encoding="utf-8"))[name])
