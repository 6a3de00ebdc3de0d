"""Options that replace sensitive spans of prompts, and the line that says what was replaced."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedsea.cli import screen
from fedsea.errors import ConfigError

if TYPE_CHECKING:
    from fedsea.privacy.placeholders.config import Placeholders

_PANEL = "Placeholders"
_ALL = "all"


class PlaceholderMode(StrEnum):
    """What stands in for a span."""

    PSEUDONYM = "pseudonym"
    TAG = "tag"


@dataclass(frozen=True, slots=True)
class PlaceholderOptions:
    """Which spans of a prompt are replaced before anything leaves."""

    placeholders: Annotated[
        str | None,
        typer.Option(
            help="Replace these kinds before anything leaves and put them back into the answer: "
            "all, or a list as in name,email,date.",
            show_default=False,
            rich_help_panel=_PANEL,
        ),
    ] = None
    placeholder_mode: Annotated[
        PlaceholderMode,
        typer.Option(help="Invented text of the kind, or [NAME_1].", rich_help_panel=_PANEL),
    ] = PlaceholderMode.PSEUDONYM
    placeholder_keep: Annotated[
        list[str] | None,
        typer.Option(
            help="A word that is no name and stays, as the name of a medicine; repeat it.",
            show_default=False,
            rich_help_panel=_PANEL,
        ),
    ] = None
    placeholder_words: Annotated[
        list[str] | None,
        typer.Option(
            help="KIND=FILE with words of your own, one a line; repeat it for several.",
            show_default=False,
            rich_help_panel=_PANEL,
        ),
    ] = None
    placeholder_pattern: Annotated[
        list[str] | None,
        typer.Option(
            help="KIND=REGEX of your own; repeat it for several.",
            show_default=False,
            rich_help_panel=_PANEL,
        ),
    ] = None

    def chosen(self) -> Placeholders | None:
        """The same for the library; None when nothing is to be replaced.

        Raises:
            ConfigError: an unknown kind, a bad pattern, a file that cannot be read.
        """
        words = dict(_pairs(self.placeholder_words, "--placeholder-words", "FILE"))
        patterns = dict(_pairs(self.placeholder_pattern, "--placeholder-pattern", "REGEX"))
        if self.placeholders is None and not words and not patterns:
            return None
        from fedsea.privacy.placeholders.config import ALL_KINDS, Placeholders

        named = [name.strip() for name in (self.placeholders or "").split(",") if name.strip()]
        if self.placeholders is not None and not named:
            raise ConfigError("--placeholders names no kind: give all, or a list as in name,email")
        return Placeholders(
            kinds=ALL_KINDS if named == [_ALL] else named,
            keep=self.placeholder_keep or (),
            mode=self.placeholder_mode.value,
            words={kind: _read_words(Path(path)) for kind, path in words.items()},
            patterns=patterns,
        )


def show_substituted(counts: Mapping[str, int], before: Mapping[str, int] | None = None) -> None:
    """A line with kinds and numbers, never with what was replaced."""
    known = before or {}
    new = {kind: count - known.get(kind, 0) for kind, count in counts.items()}
    said = ", ".join(f"{count} {kind}" for kind, count in sorted(new.items()) if count)
    screen.detail(f"placeholders for {said}" if said else "no placeholders: nothing was found")


def _pairs(given: Sequence[str] | None, option: str, what: str) -> Iterator[tuple[str, str]]:
    for entry in given or ():
        kind, is_pair, value = entry.partition("=")
        if not is_pair or not value:
            raise ConfigError(f"{option} takes KIND={what}, as in PROJECT=...")
        yield kind, value


def _read_words(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        raise ConfigError(f"the list of words {path} cannot be read: check it") from None
    return [line.strip() for line in lines if line.strip()]
