"""Public text as windows of token ids, for training and for calibration.

The user declares it public: whatever is learned from it may be given away. Nothing here shows or
keeps any of it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from fedsea.client.llm import load_tokenizer
from fedsea.errors import ConfigError
from fedsea.model.checkpoint import Checkpoint

_HELD_OUT = 10
"""One window of so many is held out, spread evenly over the text."""
_MOST_HELD_OUT = 64


@dataclass(frozen=True, slots=True, eq=False)
class PublicText:
    """Windows of equal length; each begins with the `prefix` ids that every text begins with.

    Attributes:
        training: (windows, length) token ids.
        held_out: (windows, length) token ids of other parts of the text.
        prefix: public ids at the start of a window (beginning of text); 0 or more.
    """

    training: Tensor
    held_out: Tensor
    prefix: int

    @classmethod
    def read(cls, path: Path, checkpoint: Checkpoint, length: int) -> Self:
        """Cut the text of a file.

        Raises:
            ConfigError: the file cannot be read, or gives fewer than two windows; or a length
                that the model does not hold.
            CheckpointError: the model has no tokenizer.
        """
        longest = getattr(checkpoint.config, "max_position_embeddings", length)
        if not 2 <= length <= longest:
            raise ConfigError(f"a window of {length} tokens; use 2 to {longest}")
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{path} cannot be read ({error.strerror}); fix --text") from error
        except UnicodeDecodeError:
            raise ConfigError(f"{path} is not UTF-8 text; convert it, or fix --text") from None
        tokenizer = load_tokenizer(checkpoint)
        empty: list[int] = tokenizer("").input_ids
        start = [token for token in empty[:1] if token == tokenizer.bos_token_id]
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return cls.of(torch.tensor(ids, dtype=torch.int64), start, length)

    @classmethod
    def of(cls, ids: Tensor, start: list[int], length: int) -> Self:
        """Cut token ids (n,) into windows that each begin with `start`.

        Raises:
            ConfigError: fewer than two windows.
        """
        inner = length - len(start)
        count = len(ids) // inner
        if count < 2:
            raise ConfigError(
                f"the public text has {len(ids)} tokens and two windows need {2 * inner}; "
                "give a longer text or a smaller --window"
            )
        windows = torch.cat(
            [torch.tensor(start).expand(count, -1), ids[: count * inner].view(count, inner)], 1
        ).to(torch.int64)
        apart = max(_HELD_OUT, -(-count // _MOST_HELD_OUT))
        is_held_out = torch.arange(count) % apart == min(apart, count) - 1
        return cls(windows[~is_held_out], windows[is_held_out], len(start))

    def digest(self) -> str:
        """Hex digest of the windows, to tell whether a training goes on with the same text."""
        return hashlib.sha256(self.training.numpy().tobytes()).hexdigest()

    def batch(self, size: int, seed: int, step: int) -> Tensor:
        """(size, length) windows for one step of training: a function of seed and step only."""
        chance = torch.Generator().manual_seed(seed * 1_000_003 + step)
        return self.training[torch.randint(len(self.training), (size,), generator=chance)]
