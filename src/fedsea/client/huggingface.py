"""A split model with the face of a `transformers` causal language model.

Code written for `AutoModelForCausalLM` runs over the split unchanged: `generate` in all its modes,
caches that go on across calls, padded batches, pipelines. Padding never leaves this process: a row
of the batch is a sequence of its own, and only rows of real tokens are sent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, NoReturn, Self

import torch
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.generation.utils import GenerationMode
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import GENERATION_CONFIG_NAME

from fedsea.client.llm import LLM
from fedsea.client.split_cache import (
    PADDING_BETWEEN_TOKENS,
    NewColumns,
    Sessions,
    SplitCache,
    SplitLayer,
    layer_of,
    roomy,
)
from fedsea.errors import ConfigError, RequestError

# Passed along by `transformers` code and without meaning for a decoder of one stream.
_IGNORED = frozenset({"cache_position", "num_items_in_batch", "token_type_ids"})
_SPARE_DRAFT_ROWS = 64


class SplitForCausalLM(PreTrainedModel, GenerationMixin):
    """A causal language model whose trunk is served elsewhere.

    Make one with `connect` or `from_llm`. Its parameters are those of bottom and top. Outputs carry
    no gradient. Use it as a context manager, or call `close`.
    """

    main_input_name = "input_ids"
    _supports_sdpa = True

    def __init__(self, llm: LLM, *, owns_llm: bool = False) -> None:
        if llm.placeholders is not None:
            raise ConfigError(
                "placeholders need text and this model takes token ids; use LLM, Session or Chat"
            )
        folder = llm.checkpoint.folder
        super().__init__(AutoConfig.from_pretrained(folder))
        if (folder / GENERATION_CONFIG_NAME).exists():
            self.generation_config = GenerationConfig.from_pretrained(folder)
        self.bottom = llm.split.parts.bottom.span
        self.top = llm.split.parts.top
        self._placement = llm.split.parts.bottom.placement
        self._llm = llm
        self._owns_llm = owns_llm
        self._sessions = Sessions(llm.split, llm.background)
        self._closed = False
        self.eval()

    @classmethod
    def from_llm(cls, llm: LLM) -> Self:
        """A model over a connection that stays the caller's to close."""
        return cls(llm)

    @classmethod
    def connect(cls, *args: Any, **kwargs: Any) -> Self:
        """Connect as `LLM.connect` does, with the same arguments and errors."""
        return cls(LLM.connect(*args, **kwargs), owns_llm=True)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Self:
        """The name that `transformers` code knows for `connect`."""
        return cls.connect(*args, **kwargs)

    @property
    def device(self) -> torch.device:
        """Where bottom and top run, and where inputs are moved and logits come out."""
        return self._placement.device

    @property
    def dtype(self) -> torch.dtype:
        """In what bottom and top compute."""
        return self._placement.dtype

    @property
    def llm(self) -> LLM:
        """The connection."""
        return self._llm

    def make_cache(self, max_length: int = 0) -> SplitCache:
        """An empty cache for `past_key_values`, with room for `max_length` tokens in each row.

        A cache that grows beyond its room opens a larger session and computes its tokens again.
        """
        return SplitCache(SplitLayer(self._sessions, max_length))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits of the next columns of a batch.

        Args:
            input_ids: (batch, columns).
            attention_mask: (batch, columns so far + columns); 0 only left or right of all tokens.
            position_ids: what the mask gives anyway, counted over real tokens.
            past_key_values: a cache of this model, or an empty `DynamicCache`, which becomes one.
            inputs_embeds: refused.
            labels: (batch, columns); the loss is computed here, and no cache is kept.
            use_cache: return a cache; without one everything is freed at once.
            output_attentions: refused.
            output_hidden_states: refused.
            return_dict: False for a tuple.
            logits_to_keep: the number of last columns that need logits, 0 for all; or indices.
            kwargs: a few that `transformers` code passes along; others are refused.

        Returns:
            Logits (batch, columns kept, vocabulary) without gradient, zero where there is no token.

        Raises:
            RequestError: what a split model cannot represent.
            PromptTooLong, Capacity, QuotaExceeded, Unreachable: as for `LLM.generate`.
        """
        self._refuse(
            inputs_embeds=inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            **{name: value for name, value in kwargs.items() if name not in _IGNORED},
        )
        if input_ids is None or input_ids.ndim != 2 or not input_ids.numel():
            raise RequestError("there are no input_ids; give (batch, columns) with one at least")
        if past_key_values is None and self._keeps_cache(input_ids, use_cache, labels):
            past_key_values = self.make_cache()
        layer = self._layer(past_key_values, input_ids.shape[1])
        layer.check_batch(input_ids.shape[0])
        real = _real_columns(input_ids, attention_mask, layer)
        new = self._new_columns(input_ids, real)
        layer.check(new)
        _check_positions(position_ids, real, layer)
        lowest, picked = _kept_columns(logits_to_keep, input_ids.shape[1])
        if past_key_values is None:
            logits = self._logits_without_cache(new, real[:, lowest:])
        else:
            logits = self._logits(layer, new, real[:, lowest:])
        if picked is not None:
            logits = logits[:, picked]
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1])
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)
        if return_dict is None:
            return_dict = self.config.return_dict
        return output if return_dict else output.to_tuple()

    def close(self) -> None:
        """Close the sessions of all caches, and the connection when `connect` made it."""
        if self._closed:
            return
        self._closed = True
        self._sessions.close()
        if self._owns_llm:
            self._llm.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def train(self, mode: bool = True) -> Self:
        """Set the flag only: bottom and top are shared with other users of the connection."""
        self.training = mode
        return self

    def tie_weights(self, *_: Any, **__: Any) -> None:
        """Nothing to do: embedding and head were tied, or not, when they were loaded."""

    def save_pretrained(self, *_: Any, **__: Any) -> NoReturn:
        """Refused: the trunk is not here."""
        raise ConfigError(
            "a split model cannot be saved: copy the checkpoint or use `fedsea split`"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], *_: Any, **__: Any) -> Self:
        """Accept `to`, `cuda`, `half` and the like only where they change nothing.

        Raises:
            ConfigError: bottom and top would move away from their KV cache.
        """
        probe = torch.zeros(1, dtype=self.dtype, device=self.device)
        moved = fn(probe)
        if (moved.dtype, moved.device) != (probe.dtype, probe.device):
            raise ConfigError(
                f"a split model stays at {self.dtype} on {self.device}; "
                "choose dtype and device when you connect"
            )
        return self

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: GenerationMode,
        _batch_size: int,
        max_cache_length: int,
    ) -> None:
        """The cache of one call of `generate`, with room for the longest answer it may give."""
        self._check_choices(generation_config, generation_mode)
        given = model_kwargs.get("past_key_values")
        if given is None and generation_config.use_cache is False:
            return
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise RequestError(
                f"cache_implementation {generation_config.cache_implementation!r} is not for split "
                "models, whose cache is at the server; leave it out"
            )
        if given is None:
            given = self.make_cache()
            outlives = generation_config.return_dict_in_generate
        else:
            given._is_user_defined = True
            outlives = True
        if generation_mode == GenerationMode.ASSISTED_GENERATION:
            max_cache_length += _SPARE_DRAFT_ROWS
        layer = layer_of(given, self._sessions)
        layer.plan(roomy(max_cache_length) if outlives else max_cache_length)
        model_kwargs["past_key_values"] = given

    def _check_choices(self, config: GenerationConfig, mode: GenerationMode) -> None:
        """Refuse what lets tokens depend on the prompt beside what was released, where it counts.

        Raises:
            ConfigError: the unit of protection is token, and it does.
        """
        policy = self._llm.privacy
        if policy is None:
            return
        if mode == GenerationMode.ASSISTED_GENERATION:
            policy.check_choice("assisted generation")
        if config.repetition_penalty not in (None, 1):
            policy.check_choice("repetition_penalty")
        if config.no_repeat_ngram_size:
            policy.check_choice("no_repeat_ngram_size")

    def _refuse(self, **asked: Any) -> None:
        if self._closed:
            raise RequestError("this model is closed; connect again")
        if self.training and torch.is_grad_enabled():
            raise RequestError(
                "outputs of a split model carry no gradient and train() was called; "
                "call eval() for inference"
            )
        given = sorted(
            name for name, value in asked.items() if value is not None and value is not False
        )
        if given:
            raise RequestError(
                f"a split model takes no {', '.join(given)}: hidden states of the trunk stay at the "
                "server and tokens enter by input_ids"
            )

    def _keeps_cache(
        self, input_ids: Tensor, use_cache: bool | None, labels: Tensor | None
    ) -> bool:
        """Without a word about it, a cache is kept as by default, except where it is for nothing.

        That is when a loss is asked for, and when the batch is too large for this process to hold.
        """
        if use_cache is not None:
            return use_cache
        batch, columns = input_ids.shape
        wanted = labels is None and bool(getattr(self.config, "use_cache", True))
        return wanted and batch <= self._sessions.room_for(columns)

    def _layer(self, past_key_values: Cache | None, max_length: int) -> SplitLayer:
        if past_key_values is None:
            return SplitLayer(self._sessions, max_length)
        return layer_of(past_key_values, self._sessions)

    def _new_columns(self, input_ids: Tensor, real: Tensor) -> list[NewColumns]:
        """The batch as rows of tokens.

        Raises:
            RequestError: padding between tokens, or an id outside the vocabulary.
        """
        tokens = input_ids[real]
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < self._vocabulary:
            raise RequestError(
                f"a token id is outside the vocabulary of {self._vocabulary}; "
                "use this model's tokenizer"
            )
        return [
            _columns(ids, present)
            for ids, present in zip(input_ids.tolist(), real.tolist(), strict=True)
        ]

    @property
    def _vocabulary(self) -> int:
        return int(self.config.get_text_config().vocab_size)

    def _logits_without_cache(self, new: Sequence[NewColumns], wanted: Tensor) -> Tensor:
        """As `_logits`, for as many rows at once as this process has room for."""
        longest = max(len(columns.ids) for columns in new)
        size = max(1, self._sessions.room_for(longest))
        parts = []
        for first in range(0, len(new), size):
            layer = self._layer(None, max(1, longest))
            part = slice(first, first + size)
            parts.append(self._logits(layer, new[part], wanted[part]))
            layer.let_go()
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _logits(self, layer: SplitLayer, new: Sequence[NewColumns], wanted: Tensor) -> Tensor:
        """Logits (batch, kept, vocabulary) of the columns that hold tokens; zeros elsewhere."""
        keep = wanted.sum(dim=1).tolist()
        work = self._llm.background.start(layer.extend(new, keep))
        try:
            parts = work.result()
        except BaseException:
            # The session may be ahead of the rows we know of; the next call computes them again.
            work.cancel()
            layer.let_go()
            raise
        found = [part for part, count in zip(parts, keep, strict=True) if count]
        packed = torch.cat(found) if found else torch.empty(0, self._vocabulary, dtype=self.dtype)
        if packed.shape[0] == wanted.numel():
            return packed.view(*wanted.shape, -1)
        logits = packed.new_zeros(*wanted.shape, packed.shape[-1])
        logits[wanted.to(logits.device)] = packed
        return logits


def _real_columns(input_ids: Tensor, attention_mask: Tensor | None, layer: SplitLayer) -> Tensor:
    """Which of the new columns hold a token: (batch, columns), bool, on the CPU.

    Raises:
        RequestError: a mask of another shape, or one that disagrees with the cache.
    """
    past = layer.get_seq_length()
    batch, columns = input_ids.shape
    if attention_mask is None:
        if any(row.is_padded for row in layer.rows):
            raise RequestError(
                "the cache holds padding and there is no attention_mask; give the mask of all "
                f"{past + columns} columns"
            )
        return torch.ones(batch, columns, dtype=torch.bool)
    if attention_mask.shape != (batch, past + columns):
        raise RequestError(
            f"the attention mask has shape {tuple(attention_mask.shape)} and the batch needs "
            f"({batch}, {past + columns}): 1 for tokens, 0 for padding, the cached columns first"
        )
    present = attention_mask.cpu() != 0
    if layer.rows:
        cached = [len(row.ids) for row in layer.rows]
        if present[:, :past].sum(dim=1).tolist() != cached:
            raise RequestError(
                "the attention mask hides tokens that the cache holds, or shows padding; give the "
                "mask of the earlier calls, extended"
            )
    return present[:, past:]


def _columns(ids: list[int], present: list[bool]) -> NewColumns:
    if True not in present:
        return NewColumns(len(ids), (), 0)
    first = present.index(True)
    end = len(present) - present[::-1].index(True)
    if False in present[first:end]:
        raise RequestError(PADDING_BETWEEN_TOKENS)
    return NewColumns(first, tuple(ids[first:end]), len(ids) - end)


def _check_positions(position_ids: Tensor | None, real: Tensor, layer: SplitLayer) -> None:
    """Positions count the tokens of a row; nothing else crosses the wire.

    Raises:
        RequestError: other positions were given.
    """
    if position_ids is None:
        return
    batch, columns = real.shape
    cached = torch.tensor([len(row.ids) for row in layer.rows] or [0] * batch)
    counted = real.cumsum(dim=1) - 1 + cached[:, None]
    fits = position_ids.ndim == 2 and position_ids.shape in {(batch, columns), (1, columns)}
    if not fits or (position_ids.cpu().expand_as(counted) != counted)[real].any():
        raise RequestError(
            "position_ids differ from the count of tokens in each row; leave them out, or give "
            "attention_mask.cumsum(-1) - 1"
        )


def _kept_columns(logits_to_keep: int | Tensor, columns: int) -> tuple[int, Tensor | None]:
    """The first column that needs logits, and which of those from there on are returned."""
    if isinstance(logits_to_keep, int):
        return max(0, columns - logits_to_keep) if logits_to_keep > 0 else 0, None
    indices = torch.arange(columns)[logits_to_keep.cpu()]
    lowest = int(indices.min()) if indices.numel() else columns - 1
    return lowest, indices - lowest
