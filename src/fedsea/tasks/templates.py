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
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from fedsea.errors import ConfigError
from fedsea.settings import Table, check_keys, need, read_toml, section, table_at
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
    tables = read_toml(path)
    check_keys(tables, known, f"{path}, which has tables [TASK.STYLE]")
    changed = dict(known)
    for task in tables:
        styles = table_at(tables, task, f"{task}.STYLE")
        changed[task] = {**known[task]} | {
            style: _merged(f"{task}.{style}", table_at(styles, style), known[task].get(style))
            for style in styles
        }
    return changed


def _merged(name: str, table: Table, base: Template | None) -> Template:
    held = {} if base is None else {key.name: getattr(base, key.name) for key in fields(base)}
    held_words = held.pop("words", {})
    texts = {key: value for key, value in {**held, **table}.items() if key != "words"}
    words = table_at(table, "words", f"{name}.words") if "words" in table else held_words
    need(all(isinstance(said, str) for said in words.values()), f"{name}.words must be texts")
    return replace(section(Template, name, texts), words=words)


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
