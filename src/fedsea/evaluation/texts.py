"""Texts to attack and texts that attackers may learn from, cut from plain files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from fedsea.errors import RequestError

Encode = Callable[[str], Sequence[int]]
Ids = tuple[int, ...]

LEAST_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Texts:
    """Token ids of some texts.

    Attributes:
        secret: the texts that are attacked.
        public: texts of the same kind that everybody has; none of them is secret.
        prefix: ids that the tokenizer puts before every text, known to everybody.
    """

    secret: tuple[Ids, ...]
    public: tuple[Ids, ...]
    prefix: Ids

    @property
    def secret_tokens(self) -> int:
        """How many tokens there are to find."""
        return sum(len(ids) - len(self.prefix) for ids in self.secret)


def read_texts(
    secret: Path, encode: Encode, *, count: int, tokens: int, public: Path | None = None
) -> Texts:
    """Cut a file into secret texts, and another, or the rest of the same, into public ones.

    Args:
        secret: a UTF-8 text file; paragraphs are parted by empty lines.
        encode: the tokenizer, with the ids that it puts before and after a text.
        count: how many secret texts.
        tokens: how long each is; the public ones are as long.
        public: another file.

    Raises:
        RequestError: a file cannot be read or has too little text, or a number is too small.
    """
    if count < 1 or tokens < LEAST_TOKENS:
        raise RequestError(f"give 1 text of {LEAST_TOKENS} tokens at least")
    prefix = tuple(encode(""))
    pieces = cut(_read(secret), encode, tokens)
    found = tuple(islice(pieces, count))
    if not found or len(found[0]) <= len(prefix):
        raise RequestError(f"{secret} has no {tokens} tokens: give more text, or fewer --tokens")
    known = tuple(pieces if public is None else cut(_read(public), encode, tokens))
    if not known:
        raise RequestError(
            "there is no text left that attackers may learn from: give more text, or --public"
        )
    if any(ids[: len(prefix)] != prefix for ids in found):
        prefix = ()
    return Texts(found, known, prefix)


def cut(text: str, encode: Encode, tokens: int) -> Iterator[Ids]:
    """Texts of `tokens` tokens; short paragraphs are joined with those that follow."""
    begun = ""
    for paragraph in text.split("\n\n"):
        begun = f"{begun}\n\n{paragraph}".strip()
        ids = encode(begun) if begun else ()
        if len(ids) >= tokens:
            yield tuple(ids[:tokens])
            begun = ""


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise RequestError(f"{path} cannot be read as text: give a UTF-8 file") from None
