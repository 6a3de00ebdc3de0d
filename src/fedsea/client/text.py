"""From token ids to text while they arrive: incremental decoding and stop strings."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

# A character has at most 4 bytes, hence at most 4 tokens: the tail of the text does not depend on
# what stood more than 4 tokens before it. Cutting only now and then makes the cut almost free.
_CONTEXT_TOKENS = 8
_WINDOW_TOKENS = 32


def decode(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], *, skip_special_tokens: bool = True
) -> str:
    """The text of `ids` exactly as the model wrote it, without clean-up of spaces."""
    return str(
        tokenizer.decode(
            list(ids),
            skip_special_tokens=skip_special_tokens,
            clean_up_tokenization_spaces=False,
        )
    )


class IncrementalDecoder:
    """Turns the ids of one sequence into pieces of text, each given out as soon as it is certain.

    The pieces, joined, equal `decode` of all ids. Text is held back only while a character is
    incomplete. Tokenizers with byte fallback judge a run of byte tokens as a whole, so their text
    waits for the end of the run.

    Each token costs one decoding of a short window: the ids whose text is not certain yet and a
    few before them, which settle spaces and merges at the seam.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, skip_special_tokens: bool = True
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._special = _special_ids(tokenizer) if skip_special_tokens else frozenset()
        self._window: list[int] = []
        self._given = 0

    def push(self, token_id: int) -> str:
        """Take the next id and return the text that became certain, often one word, maybe none."""
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        # Ids without text must not separate the tokens beside them.
        if token is None or token_id in self._special:
            return ""
        self._window.append(token_id)
        if _BYTE_TOKEN.fullmatch(token):
            return ""
        text = self._decode(self._window)
        certain = len(text) - text.endswith(_REPLACEMENT)
        piece = text[self._given : certain]
        self._given = certain
        if len(self._window) >= _WINDOW_TOKENS:
            self._shorten(text, held=len(text) - certain)
        return piece

    def flush(self) -> str:
        """Return the text still held back, at the end of the sequence, and start anew."""
        piece = self._decode(self._window)[self._given :]
        self._window.clear()
        self._given = 0
        return piece

    def _shorten(self, text: str, held: int) -> None:
        """Forget all but the context; `held` is the number of characters at the end not given."""
        context = self._window[-_CONTEXT_TOKENS:]
        kept = self._decode(context)
        # A context without text would make the next token look like the first of a text. One that
        # begins inside a run of byte tokens may read differently from the whole run.
        if len(kept) > held and text.endswith(kept):
            self._window = context
            self._given = len(kept) - held

    def _decode(self, ids: Sequence[int]) -> str:
        return decode(self._tokenizer, ids, skip_special_tokens=self._skip_special_tokens)


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The ids that decoding with skip_special_tokens leaves out."""
    if not tokenizer.is_fast:
        return frozenset(tokenizer.all_special_ids)
    added = tokenizer.added_tokens_decoder
    return frozenset(token_id for token_id, token in added.items() if token.special)


class StopStrings:
    """Ends a text before the earliest occurrence of a stop string.

    Text that could be the beginning of a stop string is held back, so what was given out never has
    to be taken back and does not depend on how the text was cut into pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""
        self._stopped = False

    @property
    def stopped(self) -> bool:
        """Whether a stop string was met; all further text is dropped."""
        return self._stopped

    def push(self, text: str) -> str:
        """Take the next piece and return the text that surely stands before any stop string."""
        if self._stopped:
            return ""
        self._held += text
        stop = self._first_stop()
        open_ = self._first_beginning(stop)
        # An occurrence is final only when no earlier one can still be completed.
        self._stopped = open_ == stop < len(self._held)
        return self._release(open_)

    def flush(self) -> str:
        """Return the text still held back, at the end of the text, up to a stop string."""
        stop = self._first_stop()
        self._stopped = self._stopped or stop < len(self._held)
        return self._release(stop)

    def _release(self, end: int) -> str:
        piece = self._held[:end]
        self._held = "" if self._stopped else self._held[end:]
        return piece

    def _first_stop(self) -> int:
        """Where the earliest stop string begins; the length of the held text when there is none."""
        found = (self._held.find(stop) for stop in self._stops)
        return min((at for at in found if at >= 0), default=len(self._held))

    def _first_beginning(self, end: int) -> int:
        """Where, before `end`, the held text may be the beginning of a stop string; else `end`."""
        for at in range(max(0, len(self._held) - self._longest + 1), end):
            tail = self._held[at:]
            if any(stop.startswith(tail) for stop in self._stops):
                return at
        return end
