"""Documents with summaries: XSum, in which some documents are blank, and CNN/DailyMail."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fedsea.tasks.files import json_lines
from fedsea.tasks.records import Entry


def read_xsum(path: Path) -> Iterator[Entry]:
    """JSON lines of `document` and, where known, `summary`."""
    yield from _documents(path, "document", "summary")


def read_cnn_dailymail(path: Path) -> Iterator[Entry]:
    """JSON lines of `article` and, where known, `highlights`."""
    yield from _documents(path, "article", "highlights")


def _documents(path: Path, document: str, summary: str) -> Iterator[Entry]:
    for at, item in enumerate(json_lines(path)):
        name = item.name("id", at)
        gold = (item.text(summary),) if summary in item else ()
        yield Entry({"document": item.any_text(document)}, name, name, gold)
