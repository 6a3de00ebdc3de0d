"""Tables of GLUE: SST-2, and RTE as GLUE has it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fedsea.tasks.files import Item, table
from fedsea.tasks.records import Entry

ENTAILMENTS = ("entailment", "not_entailment")
SENTIMENTS = ("negative", "positive")
_SENTIMENT_OF = {"0": "negative", "1": "positive"}


def read_sst2(path: Path) -> Iterator[Entry]:
    """Columns `sentence` and, where known, `label`: 0 or 1."""
    for number, line in enumerate(table(path)):
        yield Entry(
            fields={"sentence": line.text("sentence").strip()},
            source=str(number),
            group=str(number),
            gold=line.label("label", _SENTIMENT_OF),
            candidates=SENTIMENTS,
        )


def read_rte_table(path: Path) -> Iterator[Entry]:
    """Columns `index`, `sentence1` (premise), `sentence2` (hypothesis) and, where known, `label`."""
    for line in table(path):
        yield pair_entry(line, ("sentence1", "sentence2"), line.name("index", ""), ENTAILMENTS)


def pair_entry(item: Item, keys: tuple[str, str], name: str, labels: tuple[str, ...]) -> Entry:
    """A premise and a hypothesis, under these keys, and how they relate."""
    premise, hypothesis = (item.text(key) for key in keys)
    return Entry(
        fields={"premise": premise, "hypothesis": hypothesis},
        source=name,
        group=name,
        gold=item.label("label", {label: label for label in labels}),
        candidates=labels,
    )
