"""A checkpoint of a 7B model's shape without its bytes: a sparse file, all of it holes."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from benchmarks.checkpoints import llama_config, word_tokenizer
from benchmarks.settings import Shape

SEVEN_B = Shape("7b-shaped", 4096, 32, 11008, 32, 32)
_BYTES_OF_BF16 = 2


def sparse_llama(folder: Path, shape: Shape = SEVEN_B) -> Path:
    """A bf16 checkpoint whose weights read as zeros and take no disk."""
    path = folder / shape.name
    if not path.exists():
        unfinished = folder / f"{shape.name}.unfinished-{os.getpid()}"
        shutil.rmtree(unfinished, ignore_errors=True)
        config = llama_config(shape, dtype=torch.bfloat16, architectures=["LlamaForCausalLM"])
        config.save_pretrained(unfinished)
        word_tokenizer(shape.vocabulary).save_pretrained(unfinished)
        with torch.device("meta"):
            tensors = LlamaForCausalLM(config).state_dict()
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        _write_holes(unfinished / "model.safetensors", shapes)
        unfinished.rename(path)
    return path


def _write_holes(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A safetensors file with a header and nothing behind it but its length."""
    entries, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + torch.Size(shape).numel() * _BYTES_OF_BF16
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    header = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)
