"""From logits to token ids: sampling parameters, the sampler of one sequence, why a sequence ended.

The order of the steps and their arithmetic are those of `transformers` generate, so that a seeded
sampler draws the ids that generate draws after `torch.manual_seed(seed)`:

    repetition penalty -> min_new_tokens -> temperature -> top-k -> top-p -> min-p -> softmax -> draw

Greedy decoding (temperature 0) stops after the second step and takes the largest logit.
"""

from __future__ import annotations

import difflib
import hashlib
import math
import os
import reprlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import cast

import numpy as np
import torch
from torch import Tensor

from fedsea.errors import ConfigError, ModelError


class FinishReason(StrEnum):
    """Why no further token of a sequence is produced."""

    LENGTH = "length"
    """`max_new_tokens` tokens were produced."""
    EOS = "eos"
    """The model ended the text."""
    STOP_STRING = "stop_string"
    """One of the stop strings appeared in the text."""
    CANCELLED = "cancelled"
    """The caller wanted no more."""


@dataclass(frozen=True, slots=True)
class _Rule:
    """What one parameter may be, as a check and in words."""

    types: tuple[type, ...]
    holds: Callable[[float], bool]
    allowed: str

    def admits(self, value: object) -> bool:
        """Whether `value` has the right type (True and False are no numbers) and range."""
        if isinstance(value, bool) != (bool in self.types):
            return False
        return isinstance(value, self.types) and self.holds(cast("float", value))


_INTEGER = (int,)
_NUMBER = (int, float)

_RULES = {
    "max_new_tokens": _Rule(_INTEGER, lambda v: v >= 1, "an integer of at least 1"),
    "temperature": _Rule(
        _NUMBER,
        lambda v: v == 0 or (v >= 1e-4 and math.isfinite(v)),
        "0 for greedy decoding, or a finite number of at least 0.0001",
    ),
    "top_k": _Rule(_INTEGER, lambda v: v >= 0, "an integer of at least 0, where 0 keeps all"),
    "top_p": _Rule(
        _NUMBER, lambda v: 0 < v <= 1, "a number above 0 and up to 1, where 1 keeps all"
    ),
    "min_p": _Rule(_NUMBER, lambda v: 0 <= v <= 1, "a number from 0 to 1, where 0 keeps all"),
    "repetition_penalty": _Rule(
        _NUMBER, lambda v: 0.01 <= v <= 100, "a number from 0.01 to 100, where 1 is no penalty"
    ),
    "seed": _Rule(
        (int, type(None)),
        lambda v: v is None or 0 <= v < 2**64,
        "None or an integer from 0 to 2**64-1",
    ),
    "n": _Rule(_INTEGER, lambda v: v >= 1, "an integer of at least 1"),
    "ignore_eos": _Rule((bool,), lambda _: True, "true or false"),
    "min_new_tokens": _Rule(_INTEGER, lambda v: v >= 0, "an integer from 0 to max_new_tokens"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the tokens of a request are chosen and when it ends.

    Raises:
        ConfigError: a value is of the wrong type or out of range; names the key, the value and
            what is allowed.
    """

    max_new_tokens: int = 128
    """Most tokens to produce."""
    temperature: float = 0.0
    """Divides the logits; 0 is greedy decoding, which ignores top-k, top-p, min-p and the seed."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of most likely tokens whose probability reaches this; 1 keeps all."""
    min_p: float = 0.0
    """Keep tokens at least this likely relative to the most likely one; 0 keeps all."""
    repetition_penalty: float = 1.0
    """Above 1 makes the tokens of prompt and answer less likely, below 1 more likely."""
    stop: tuple[str, ...] = ()
    """The text ends before the first of these strings."""
    seed: int | None = None
    """Start of the random numbers; None takes it from the operating system."""
    n: int = 1
    """Samples per prompt; sample i draws from `derive_seed(seed, i)`."""
    ignore_eos: bool = False
    """Go on after an end-of-text token."""
    min_new_tokens: int = 0
    """End-of-text tokens are not chosen before this many tokens."""

    def __post_init__(self) -> None:
        for name, rule in _RULES.items():
            value = getattr(self, name)
            if not rule.admits(value):
                raise ConfigError(f"{name} = {reprlib.repr(value)}: it must be {rule.allowed}")
        if self.min_new_tokens > self.max_new_tokens:
            raise ConfigError(
                f"min_new_tokens = {self.min_new_tokens}: it must be an integer from 0 to "
                f"max_new_tokens, which is {self.max_new_tokens}"
            )
        _check_stop(self.stop)

    @classmethod
    def from_mapping(cls, options: Mapping[str, object]) -> SamplingParams:
        """Parameters from a configuration table or keyword arguments.

        `stop` may also be one string or a list.

        Raises:
            ConfigError: an unknown key (with the nearest known one) or a value out of range.
        """
        known = [field.name for field in fields(cls)]
        unknown = [key for key in options if key not in known]
        if unknown:
            raise ConfigError("; ".join(_unknown_key(key, known) for key in unknown))
        values = dict(options)
        stop = values.get("stop")
        if isinstance(stop, str):
            values["stop"] = (stop,)
        elif isinstance(stop, list):
            values["stop"] = tuple(stop)
        return cls(**values)  # type: ignore[arg-type]  # __post_init__ checks every type


def _check_stop(stop: object) -> None:
    """Refuse anything but a tuple of non-empty strings; the strings themselves are not shown."""
    if not isinstance(stop, tuple):
        raise ConfigError(
            f"stop is a {type(stop).__name__}: it must be a tuple of non-empty strings"
        )
    for index, value in enumerate(stop):
        if not isinstance(value, str):
            raise ConfigError(
                f"stop[{index}] = {reprlib.repr(value)}: it must be a non-empty string"
            )
        if not value:
            raise ConfigError(f"stop[{index}] = '': it must be a non-empty string")


def _unknown_key(key: object, known: Sequence[str]) -> str:
    nearest = difflib.get_close_matches(str(key), known, n=1)
    advice = f"did you mean '{nearest[0]}'?" if nearest else f"known are {', '.join(known)}"
    return f"unknown sampling parameter {reprlib.repr(key)}: {advice}"


def derive_seed(seed: int, index: int) -> int:
    """The seed of sample `index` of a request.

    Sample 0 uses `seed` itself, so that n = 1 and the first of n samples agree. Sample i > 0 uses
    the first 8 bytes, little endian, of SHA-256 over `fedsea sample`, the seed and i, the numbers
    as 8 bytes little endian.
    """
    if index == 0:
        return seed
    material = b"fedsea sample" + seed.to_bytes(8, "little") + index.to_bytes(8, "little")
    return int.from_bytes(hashlib.sha256(material).digest()[:8], "little")


class Sampler:
    """Chooses the tokens of one sequence and remembers what its next choice depends on.

    Args:
        params: how to choose.
        prompt_ids: the prompt, for the repetition penalty.
        eos_ids: ids that end the text.
        device: where the logits will be; the random numbers are drawn there.
        index: which of the `params.n` samples of the request this is.
    """

    __slots__ = (
        "_eos_ids",
        "_eos_index",
        "_generated",
        "_generator",
        "_penalised",
        "_seen",
        "params",
        "seed",
    )

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        eos_ids: Collection[int],
        device: torch.device | str = "cpu",
        *,
        index: int = 0,
    ) -> None:
        start = int.from_bytes(os.urandom(8), "little") if params.seed is None else params.seed
        self.params = params
        self.seed = derive_seed(start, index)
        self._generator = torch.Generator(device).manual_seed(self.seed)
        self._generated: list[int] = []
        self._eos_ids = frozenset() if params.ignore_eos else frozenset(eos_ids)
        self._eos_index: Tensor | None = None
        self._seen = set(prompt_ids) if params.repetition_penalty != 1 else set()
        self._penalised: Tensor | None = None

    @property
    def generated(self) -> Sequence[int]:
        """The ids chosen so far, an end-of-text id included."""
        return self._generated

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why no further token is due, as far as token ids tell; None while one is."""
        if self._generated and self._generated[-1] in self._eos_ids:
            return FinishReason.EOS
        if len(self._generated) >= self.params.max_new_tokens:
            return FinishReason.LENGTH
        return None

    def sample(self, logits: Tensor) -> int:
        """Choose the next token from `logits` of shape (vocab,) and remember it.

        Raises:
            ModelError: the logits are not finite.
        """
        return sample_batch([self], logits.unsqueeze(0))[0]

    @property
    def _adjusts(self) -> bool:
        return self.params.repetition_penalty != 1 or self._holds_eos

    @property
    def _holds_eos(self) -> bool:
        return bool(self._eos_ids) and len(self._generated) < self.params.min_new_tokens

    def _adjust(self, scores: Tensor) -> None:
        """Apply repetition penalty and min_new_tokens in place to `scores` of shape (vocab,)."""
        penalty = self.params.repetition_penalty
        if penalty != 1:
            if self._penalised is None:
                self._penalised = _ids_below(scores.shape[0], self._seen, scores.device)
            seen = scores[self._penalised]
            scores[self._penalised] = torch.where(seen < 0, seen * penalty, seen / penalty)
        if self._holds_eos:
            if self._eos_index is None:
                self._eos_index = _ids_below(scores.shape[0], self._eos_ids, scores.device)
            scores[self._eos_index] = -math.inf

    def _draw(self, scores: Tensor) -> Tensor:
        """One id, shape (1, 1), drawn from adjusted `scores` of shape (1, vocab)."""
        params = self.params
        if params.temperature != 1:
            scores = scores / params.temperature
        if params.top_k:
            scores = _keep_top_k(scores, params.top_k)
        if params.top_p < 1:
            scores = _keep_top_p(scores, params.top_p)
        if params.min_p:
            scores = _keep_min_p(scores, params.min_p)
        probs = scores.softmax(dim=-1)
        # Softmax spreads one non-finite score over the whole row.
        if not math.isfinite(probs[0, 0].item()):
            raise _not_finite()
        return torch.multinomial(probs, num_samples=1, generator=self._generator)

    def _remember(self, token: int) -> None:
        self._generated.append(token)
        if self._penalised is not None and token not in self._seen:
            self._seen.add(token)
            self._penalised = torch.cat((self._penalised, self._penalised.new_tensor([token])))


def sample_batch(samplers: Sequence[Sampler], logits: Tensor) -> list[int]:
    """Choose and remember the next token of several sequences.

    Args:
        samplers: one per row; each row is chosen as if it were alone.
        logits: (rows, vocab), any floating point type; not changed.

    Returns:
        One id per row.

    Raises:
        ModelError: a row of logits is not finite; then no sampler has remembered a token.
    """
    scores = logits.detach().float()
    adjusting = [row for row, sampler in enumerate(samplers) if sampler._adjusts]
    if adjusting:
        scores = scores.clone()
        for row in adjusting:
            samplers[row]._adjust(scores[row])
    drawing = [row for row, sampler in enumerate(samplers) if sampler.params.temperature > 0]
    tokens = _argmax(scores) if len(drawing) < len(samplers) else [0] * len(samplers)
    if drawing:
        drawn = torch.cat([samplers[row]._draw(scores[row : row + 1]) for row in drawing])
        for row, token in zip(drawing, drawn[:, 0].tolist(), strict=True):
            tokens[row] = token
    for sampler, token in zip(samplers, tokens, strict=True):
        sampler._remember(token)
    return tokens


def _argmax(scores: Tensor) -> list[int]:
    """The index of the first largest value of each row of `scores` (rows, vocab)."""
    if scores.device.type == "cpu":
        # numpy's argmax is several times faster than torch's.
        rows = scores.numpy()
        indices = rows.argmax(axis=-1)
        finite = bool(np.isfinite(rows[np.arange(len(rows)), indices]).all())
        tokens = indices.tolist()
    else:
        largest, best = scores.max(dim=-1)
        finite = bool(largest.isfinite().all())
        tokens = best.tolist()
    if not finite:
        raise _not_finite()
    return cast("list[int]", tokens)


def _keep_top_k(scores: Tensor, top_k: int) -> Tensor:
    kept = torch.topk(scores, min(top_k, scores.shape[-1])).values
    return scores.masked_fill(scores < kept[:, -1:], -math.inf)


def _keep_top_p(scores: Tensor, top_p: float) -> Tensor:
    """Remove from the least likely token upwards while their sum stays within 1 - top_p.

    Which tokens go depends only on the sorted values, which numpy sorts many times faster than
    torch sorts values with indices. Only where equal values stand on both sides of the cut does
    torch's order of indices decide.
    """
    if scores.device.type != "cpu":
        return _keep_top_p_by_index(scores, top_p)
    ascending = torch.from_numpy(np.sort(scores.numpy(), axis=-1))
    removed = min(int(_removed_by_top_p(ascending, top_p).sum()), scores.shape[-1] - 1)
    if removed == 0:
        return scores
    least_kept = ascending[0, removed]
    if ascending[0, removed - 1] == least_kept:
        return _keep_top_p_by_index(scores, top_p)
    return scores.masked_fill(scores < least_kept, -math.inf)


def _keep_top_p_by_index(scores: Tensor, top_p: float) -> Tensor:
    ascending, indices = torch.sort(scores)
    removed = _removed_by_top_p(ascending, top_p)
    removed[:, -1] = False
    return scores.masked_fill(removed.scatter(1, indices, removed), -math.inf)


def _removed_by_top_p(ascending: Tensor, top_p: float) -> Tensor:
    return ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p


def _keep_min_p(scores: Tensor, min_p: float) -> Tensor:
    probs = scores.softmax(dim=-1)
    return scores.masked_fill(probs < min_p * probs.amax(dim=-1, keepdim=True), -math.inf)


def _ids_below(vocab: int, ids: Collection[int], device: torch.device) -> Tensor:
    """The ids that the logits have; a tokenizer may hold more."""
    return torch.tensor([i for i in ids if i < vocab], dtype=torch.long, device=device)


def _not_finite() -> ModelError:
    return ModelError(
        "the logits are not finite: the model overflowed; use bfloat16 or float32, or check the "
        "checkpoint"
    )
