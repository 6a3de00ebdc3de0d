"""`transformers` in a process of its own: for each line with a number of tokens, the tokens/s."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from benchmarks import checkpoints
from benchmarks.engines import Whole
from benchmarks.settings import THREADS


def _main(model: Path, prompt: int) -> None:
    torch.set_num_threads(THREADS)
    whole = Whole(model)
    ids = checkpoints.prompt_ids(prompt, checkpoints.vocabulary_of(model))
    whole.generate([ids], 4)
    print("ready", flush=True)
    for line in sys.stdin:
        print(whole.generate([ids], int(line)).rate, flush=True)


if __name__ == "__main__":
    _main(Path(sys.argv[1]), int(sys.argv[2]))
