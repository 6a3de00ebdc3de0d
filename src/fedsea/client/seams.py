"""A prompt and what follows it, as token ids: the same seam in training and in evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Seam:
    """Token ids of a prompt and of each completion that may follow it."""

    prompt: tuple[int, ...] = field(repr=False)
    completions: tuple[tuple[int, ...], ...] = field(repr=False)


def encode_seam(
    tokenizer: PreTrainedTokenizerBase, prompt: str, completions: Sequence[str]
) -> Seam:
    """The prompt as `generate` encodes it, and the tokens of every completion behind it.

    Where the tokens of both together begin with those of the prompt, the rest of them is the
    completion; otherwise a token would span the seam, and the two are encoded apart. Some
    tokenizers put a space to the word before it: where the seam fits every completion behind the
    white space that they begin with, it is there.
    """
    joined = [encode_whole(tokenizer, prompt + completion) for completion in completions]
    before = encode_whole(tokenizer, prompt)
    gap = _common_space(completions)
    places = [before, encode_whole(tokenizer, prompt + gap)] if gap else [before]
    for place in places:
        if all(_begins(ids, place) for ids in joined):
            return Seam(place, tuple(ids[len(place) :] for ids in joined))
    apart = [encode_whole(tokenizer, each, special=False) for each in completions]
    return Seam(
        before,
        tuple(
            ids[len(before) :] if _begins(ids, before) else alone
            for ids, alone in zip(joined, apart, strict=True)
        ),
    )


def encode_whole(
    tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool = True
) -> tuple[int, ...]:
    """The tokens of a text, with those that the tokenizer adds around texts unless told not to.

    A tokenizer warns about texts longer than the model's context; whoever calls cuts them.
    """
    return tuple(tokenizer(text, add_special_tokens=special, verbose=False).input_ids)


def _begins(ids: tuple[int, ...], with_: tuple[int, ...]) -> bool:
    return len(ids) > len(with_) and ids[: len(with_)] == with_


def _common_space(texts: Sequence[str]) -> str:
    """The white space that every text begins with; empty where they differ in it."""
    found = {text[: len(text) - len(text.lstrip())] for text in texts}
    return found.pop() if len(found) == 1 else ""
