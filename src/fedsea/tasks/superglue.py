"""JSON lines of SuperGLUE: one reader for each task. Splits without labels have no gold answers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fedsea.tasks.files import Item, json_lines
from fedsea.tasks.glue import ENTAILMENTS, pair_entry, read_rte_table
from fedsea.tasks.records import Entry

PLACEHOLDER = "@placeholder"
_TRUTHS: Mapping[Any, str] = {True: "true", False: "false"}
_BITS: Mapping[Any, str] = {1: "true", 0: "false"}
COMMITMENTS = ("entailment", "contradiction", "neutral")
_TABLES = (".tsv", ".txt")
# Summary points under a news text, each after this mark on a line of its own.
_HIGHLIGHT = re.compile(r"([.?!\"'”’]?)\s*\n@highlight\s*\n")


def read_boolq(path: Path) -> Iterator[Entry]:
    """`question`, `passage`, `label` true or false."""
    for at, item in enumerate(json_lines(path)):
        texts = {key: item.text(key) for key in ("question", "passage")}
        yield _labelled(item, at, texts, _TRUTHS)


def read_rte(path: Path) -> Iterator[Entry]:
    """`premise`, `hypothesis`, `label`; or the table of GLUE."""
    if path.suffix.lower() in _TABLES:
        yield from read_rte_table(path)
        return
    for at, item in enumerate(json_lines(path)):
        yield pair_entry(item, ("premise", "hypothesis"), item.name("idx", at), ENTAILMENTS)


def read_cb(path: Path) -> Iterator[Entry]:
    """`premise`, `hypothesis`, `label`: entailment, contradiction or neutral."""
    for at, item in enumerate(json_lines(path)):
        yield pair_entry(item, ("premise", "hypothesis"), item.name("idx", at), COMMITMENTS)


def read_copa(path: Path) -> Iterator[Entry]:
    """`premise`, `choice1`, `choice2`, `question` cause or effect, `label` 0 or 1.

    `{link}` is "because" where the choices are causes and "so" where they are effects.
    """
    links: Mapping[Any, str] = {"cause": "because", "effect": "so"}
    for at, item in enumerate(json_lines(path)):
        texts = {key: item.text(key) for key in ("premise", "choice1", "choice2")}
        item.text("question")
        texts["link"] = item.label("question", links)[0]
        yield _labelled(item, at, texts, {0: "0", 1: "1"})


def read_wic(path: Path) -> Iterator[Entry]:
    """`word`, `sentence1`, `sentence2`, `label` true or false."""
    for at, item in enumerate(json_lines(path)):
        texts = {key: item.text(key) for key in ("word", "sentence1", "sentence2")}
        yield _labelled(item, at, texts, _TRUTHS)


def read_wsc(path: Path) -> Iterator[Entry]:
    """`text`, `target` with `span1_text`, `span2_text` and `span2_index`, `label` true or false.

    `{noun}` is the first span and `{pronoun}` the second; `{marked}` is the text with the pronoun
    between asterisks.
    """
    for at, item in enumerate(json_lines(path)):
        target = item.item("target")
        texts = {
            "text": item.text("text"),
            "noun": target.text("span1_text"),
            "pronoun": target.text("span2_text"),
            "marked": _marked(item, target),
        }
        yield _labelled(item, at, texts, _TRUTHS)


def read_multirc(path: Path) -> Iterator[Entry]:
    """Passages with questions with answers, one entry for an answer; `label` 1 or 0.

    `{candidate}` is the answer to judge. A group is a question.
    """
    for at, item in enumerate(json_lines(path)):
        source = item.name("idx", at)
        passage = item.item("passage")
        for number, question in enumerate(passage.items("questions")):
            group = f"{source}/{question.name('idx', number)}"
            for answer in question.items("answers"):
                yield Entry(
                    fields={
                        "passage": passage.text("text"),
                        "question": question.text("question"),
                        "candidate": answer.any_text("text"),
                    },
                    source=source,
                    group=group,
                    gold=answer.label("label", _BITS),
                    candidates=("true", "false"),
                )


def read_record(path: Path) -> Iterator[Entry]:
    """News texts with `entities` and queries with a gap; `answers` where they are known.

    `{before}` and `{after}` are the query around its first @placeholder. Entities are the candidates,
    each once.
    """
    for at, item in enumerate(json_lines(path)):
        source = item.name("idx", at)
        passage = item.item("passage")
        text = passage.text("text")
        entities = [_entity(text, span) for span in passage.items("entities")]
        for number, question in enumerate(item.items("qas")):
            query = question.text("query")
            before, gap, after = query.partition(PLACEHOLDER)
            if not gap:
                raise question.fault(f"query has no {PLACEHOLDER}")
            answers = question.items("answers") if "answers" in question else []
            yield Entry(
                fields={
                    "passage": _HIGHLIGHT.sub(_joined, text),
                    "query": query,
                    "before": before,
                    "after": after,
                },
                source=source,
                group=f"{source}/{question.name('idx', number)}",
                gold=_each_once(answer.text("text") for answer in answers),
                candidates=_each_once(entities),
            )


def _labelled(item: Item, at: int, texts: Mapping[str, str], labels: Mapping[Any, str]) -> Entry:
    name = item.name("idx", at)
    return Entry(texts, name, name, item.label("label", labels), tuple(labels.values()))


def _marked(item: Item, target: Item) -> str:
    words = item.text("text").split()
    pronoun = target.text("span2_text").lower()
    said = target.number("span2_index")
    found = [at for at, word in enumerate(words) if pronoun in word.lower()]
    if not found:
        raise item.fault("span2_text does not stand in text")
    place = min(found, key=lambda at: abs(at - said))
    marked = re.sub(re.escape(pronoun), r"*\g<0>*", words[place], count=1, flags=re.IGNORECASE)
    return " ".join([*words[:place], marked, *words[place + 1 :]])


def _entity(text: str, span: Item) -> str:
    start, end = span.number("start"), span.number("end") + 1
    if not start < end <= len(text):
        raise span.fault("start and end are no place in the passage")
    return text[start:end]


def _joined(found: re.Match[str]) -> str:
    return f"{found[1] or '.'} "


def _each_once(texts: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(texts))
