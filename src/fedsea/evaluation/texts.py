"""Texts to attack and texts that attackers may learn from, cut from plain files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from fedsea.errors import RequestError
from fedsea.privacy.placeholders.config import Placeholders
from fedsea.redteam.classes import kinds_of

Encode = Callable[[str], Sequence[int]]
Ids = tuple[int, ...]

LEAST_TOKENS = 8
_SPACE_MARKS = {0x2581: " ", 0x0120: " ", 0x010A: "\n"}


@dataclass(frozen=True, slots=True)
class Texts:
    """Token ids of some texts.

    Attributes:
        secret: the texts that are attacked.
        public: texts of the same kind that everybody has; none of them is secret.
        prefix: ids that the tokenizer puts before every text, known to everybody.
        kinds: what each token of the secret texts is, for rates by kind; may be empty.
    """

    secret: tuple[Ids, ...]
    public: tuple[Ids, ...]
    prefix: Ids
    kinds: tuple[tuple[str, ...], ...] = ()


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


def read_pieces(path: Path, encode: Encode, tokens: int) -> tuple[Ids, ...]:
    """All texts of `tokens` tokens of a file.

    Raises:
        RequestError: the file cannot be read, or texts are too short to be attacked.
    """
    if tokens < LEAST_TOKENS:
        raise RequestError(f"give 1 text of {LEAST_TOKENS} tokens at least")
    return tuple(cut(_read(path), encode, tokens))


def cut(text: str, encode: Encode, tokens: int) -> Iterator[Ids]:
    """Texts of `tokens` tokens; short paragraphs are joined with those that follow."""
    begun = ""
    for paragraph in text.split("\n\n"):
        begun = f"{begun}\n\n{paragraph}".strip()
        ids = encode(begun) if begun else ()
        if len(ids) >= tokens:
            yield tuple(ids[:tokens])
            begun = ""


def with_kinds(texts: Texts, pieces_of: Callable[[Ids], Sequence[str]]) -> Texts:
    """The same with kinds: private spans as placeholders find them, numbers, and the rest.

    Args:
        texts: what is attacked.
        pieces_of: tokens as the tokenizer spells them; its marks of spaces become spaces.
    """
    detectors = Placeholders()
    kinds = []
    for ids in texts.secret:
        pieces = [
            "" if index < len(texts.prefix) else piece.translate(_SPACE_MARKS)
            for index, piece in enumerate(pieces_of(ids))
        ]
        spans = [(span.start, span.end) for span in detectors.find("".join(pieces))]
        kinds.append(tuple(kind.value for kind in kinds_of(pieces, spans)))
    return replace(texts, kinds=tuple(kinds))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise RequestError(f"{path} cannot be read as text: give a UTF-8 file") from None
