"""Templates: how an entry becomes a prompt and what may follow it.

A template is text with names in braces. `{name}` is the field as it is, `{name:.}` ends with that
mark unless it ends in one of . ! ? already, `{name:bare}` is without its final mark, and
`{name:inline}` without its first capital too, as a sentence stands inside another one. In
`completion`, `{answer}` is the words of an answer; in `prompt`, `{history}` is the turns before.

A causal model sees nothing behind the place of its answer. Where a cloze has its gap in the middle,
`completion` goes on to the end of the text: the choice is judged by, and learned with, what follows.
"""

from __future__ import annotations

import re
import string
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from fedsea.errors import ConfigError
from fedsea.tasks.records import Choice, Entry, Record

ANSWER = "answer"
HISTORY = "history"
_MARKS = ".!?"
_CLOSING = "\"'”’)]"
_SPECS = ("", ".", "?", "!", "bare", "inline")
_FINAL_MARK = re.compile(rf"[{_MARKS}]+(?=[{re.escape(_CLOSING)}]*$)")


@dataclass(frozen=True, slots=True)
class Template:
    """How the entries of a task are put.

    Attributes:
        prompt: text before the answer.
        completion: the answer and what follows it.
        words: how each label is said; a label without words is "none of the others". Empty for
            open answers and for candidates that are texts themselves.
        turn: an earlier question and answer of a conversation, `{question}` and `{answer}`.
        turns: most earlier turns that are shown; -1 for all.
        stop: where a generated answer ends, besides the end of the text; empty for nowhere else.
    """

    prompt: str
    completion: str = " {answer}"
    words: Mapping[str, str] = field(default_factory=dict)
    turn: str = ""
    turns: int = -1
    stop: str = ""

    def check(self, where: str, names: Iterable[str], labels: Iterable[str]) -> None:
        """Refuse what cannot be filled with these fields and labels.

        Raises:
            ConfigError: a name, a form or a label is unknown, or the answer has no place.
        """
        known = set(names)
        used = _checked(where, "prompt", self.prompt, known | ({HISTORY} if self.turn else set()))
        if HISTORY not in used and self.turn:
            raise ConfigError(f"{where}: prompt has no place for {{history}}; add it or drop turn")
        if ANSWER not in _checked(where, "completion", self.completion, known | {ANSWER}):
            raise ConfigError(f"{where}: completion has no place for {{answer}}; add it")
        _checked(where, "turn", self.turn, {"question", ANSWER})
        unknown = set(self.words) - set(labels)
        if unknown:
            raise ConfigError(
                f"{where}: words has {', '.join(sorted(unknown))}; "
                f"the labels are {', '.join(labels) or 'none'}"
            )
        if labels and not self.words:
            raise ConfigError(f"{where}: there are no words for {', '.join(labels)}; give them")
        for words in self.words.values():
            _checked(where, "words", words, known)

    def render(self, entry: Entry) -> Record:
        """The record of an entry."""
        texts = dict(entry.fields)
        prompt = fill(self.prompt, {**texts, HISTORY: self._history(entry.turns)})
        shown = prompt.rstrip()
        gap = prompt[len(shown) :]

        def choice(label: str) -> Choice:
            words = fill(self.words.get(label, ""), texts) if self.words else label
            text = gap + fill(self.completion, {**texts, ANSWER: words}) if words else ""
            return Choice(label, words, text)

        return Record(
            prompt=shown,
            completion=choice(entry.gold[0]).text if entry.gold else "",
            choices=tuple(choice(label) for label in entry.candidates),
            group=entry.group,
            source=entry.source,
            gold=entry.gold,
        )

    def _history(self, turns: tuple[tuple[str, str], ...]) -> str:
        shown = turns if self.turns < 0 else turns[max(0, len(turns) - self.turns) :]
        return "".join(
            fill(self.turn, {"question": question, ANSWER: answer}) for question, answer in shown
        )


Styles = Mapping[str, Template]


def fill(text: str, values: Mapping[str, str]) -> str:
    """A checked template text with its names replaced."""
    return "".join(
        literal + ("" if name is None else _formed(values[name], spec))
        for literal, name, spec in _pieces(text)
    )


def read_overrides(path: Path, known: Mapping[str, Styles]) -> dict[str, Styles]:
    """The templates of all tasks after a TOML file, tables [TASK.STYLE], changed or added some.

    What a table leaves out stays as it is in the style of that name.

    Raises:
        ConfigError: the file cannot be read, or names a task or a key that does not exist.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; fix the path") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {_one_line(error)}") from None
    changed = dict(known)
    for task, styles in tables.items():
        if task not in known:
            raise ConfigError(f"{path}: there is no task {task!r}; use {', '.join(known)}")
        if not isinstance(styles, dict) or not all(isinstance(s, dict) for s in styles.values()):
            raise ConfigError(f"{path}: [{task}] holds no tables of styles; write [{task}.STYLE]")
        merged = dict(known[task])
        for style, table in styles.items():
            merged[style] = _merged(f"{path}: [{task}.{style}]", table, merged.get(style))
        changed[task] = merged
    return changed


def _merged(where: str, table: Mapping[str, Any], base: Template | None) -> Template:
    kinds: dict[str, type] = {entry.name: str for entry in fields(Template)}
    kinds |= {"words": dict, "turns": int}
    for key, value in table.items():
        if key not in kinds:
            raise ConfigError(f"{where}: there is no key {key!r}; use {', '.join(kinds)}")
        if type(value) is not kinds[key]:
            raise ConfigError(f"{where}: {key} must be of type {kinds[key].__name__}")
    if not all(isinstance(words, str) for words in table.get("words", {}).values()):
        raise ConfigError(f"{where}: words must be texts by label")
    if base is not None:
        return replace(base, **table)
    if "prompt" not in table:
        raise ConfigError(f"{where}: a new style needs a prompt; give one")
    return Template(**table)


def _checked(where: str, key: str, text: str, known: set[str]) -> set[str]:
    try:
        pieces = list(_pieces(text))
    except ValueError:
        raise ConfigError(
            f"{where}: the braces of {key} do not pair; write {{{{ for a brace"
        ) from None
    used = {name for _, name, _ in pieces if name is not None}
    unknown = used - known
    if unknown:
        raise ConfigError(f"{where}: {key} has {{{min(unknown)}}}; use {', '.join(sorted(known))}")
    forms = {spec for _, _, spec in pieces} - set(_SPECS)
    if forms:
        raise ConfigError(f"{where}: {key} has the form :{min(forms)}; use . ? ! bare or inline")
    return used


def _pieces(text: str) -> Iterator[tuple[str, str | None, str]]:
    for literal, name, spec, conversion in string.Formatter().parse(text):
        yield literal, name if conversion is None else f"{name}!{conversion}", spec or ""


def _formed(text: str, spec: str) -> str:
    if not spec:
        return text
    text = text.strip()
    if spec in _MARKS:
        return text if _FINAL_MARK.search(text) else text + spec
    words = _FINAL_MARK.sub("", text)
    if spec == "bare" or re.match(r"I\b", words):
        return words
    return words[:1].lower() + words[1:]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
