"""A prompt and what follows it, as token ids: the same seam in training and in evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Pair:
    """Token ids of a prompt and of its completion."""

    prompt: tuple[int, ...] = field(repr=False)
    completion: tuple[int, ...] = field(repr=False)


def encode_pair(tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str) -> Pair:
    """The prompt as `generate` encodes it, and the tokens of the completion behind it.

    Where the tokens of both together begin with those of the prompt, the rest of them is the
    completion; otherwise a token would span the seam, and each is encoded by itself.
    """
    before = encode_whole(tokenizer, prompt)
    joined = encode_whole(tokenizer, prompt + completion)
    count = len(before)
    if joined[:count] == before and len(joined) > count:
        return Pair(before, joined[count:])
    return Pair(before, encode_whole(tokenizer, completion, special=False))


def encode_whole(
    tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool = True
) -> tuple[int, ...]:
    """The tokens of a text, with those that the tokenizer adds around texts unless told not to.

    A tokenizer warns about texts longer than the model's context; whoever calls cuts them.
    """
    return tuple(tokenizer(text, add_special_tokens=special, verbose=False).input_ids)
