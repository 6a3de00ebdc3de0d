"""Recall and false positives of the built-in detectors of placeholders, per entity type.

    python -m benchmarks.placeholders DATASET --out FOLDER

DATASET is `synth_dataset_v2.json` of presidio-research: sentences made from templates, with spans.
The templates are split in two halves that share none: the development half, on which the detectors
were improved, and the held-out half, on which they were not. Made-up names and places fill both.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedsea.privacy.placeholders.config import MODES, Placeholders
from fedsea.privacy.placeholders.spans import Kind, Span, merged
from fedsea.redteam.intervals import clopper_pearson

KINDS = {
    "PERSON": Kind.NAME,
    "STREET_ADDRESS": Kind.ADDRESS,
    "GPE": Kind.PLACE,
    "ORGANIZATION": Kind.ORGANISATION,
    "CREDIT_CARD": Kind.CARD,
    "DATE_TIME": Kind.DATE,
    "PHONE_NUMBER": Kind.PHONE,
    "AGE": Kind.AGE,
    "EMAIL_ADDRESS": Kind.EMAIL,
    "ZIP_CODE": Kind.POSTCODE,
    "DOMAIN_NAME": Kind.URL,
    "IBAN_CODE": Kind.IBAN,
    "US_SSN": Kind.NATIONAL_ID,
    "IP_ADDRESS": Kind.IP,
    "US_DRIVER_LICENSE": Kind.NUMBER,
}
DATA = """\
synth_dataset_v2.json of presidio-research, commit 7622dec1e5f7 (MIT). Every second template, in the
order of their numbers, is development, and no rule was made from the held-out half; two of its sentences
and a random sample of the values of the whole file had been seen before. Made-up names and places of
both halves come from the same generator, and some templates of the two halves resemble each other, so
other texts will fare worse. Values `nan`, a mistake of the data set, are left out."""
NO_KIND = ("TITLE", "NRP")
MISSING = "nan"  # what the generator of the data set wrote where it had no state
NAME = "placeholders"
_WORD = re.compile(r"\w+")


@dataclass(frozen=True, slots=True)
class Record:
    """A sentence, its sensitive spans by type, and the template that it was made from."""

    text: str
    gold: tuple[Span, ...]
    template: int


@dataclass(frozen=True, slots=True)
class Recall:
    """Of the spans of a type: how many are covered whole, and by the kind that it is."""

    type: str
    spans: int
    covered: int
    typed: int


@dataclass(frozen=True, slots=True)
class Alarms:
    """Of the spans that were found as a kind: how many lie where nothing is sensitive."""

    kind: str
    found: int
    false: int
    false_per_1000_words: float


@dataclass(frozen=True, slots=True)
class Half:
    """What was measured on one half."""

    name: str
    templates: int
    sentences: int
    words: int
    recall: tuple[Recall, ...]
    alarms: tuple[Alarms, ...]
    milliseconds_per_1000_words: float


def load(path: Path) -> list[Record]:
    """The sentences of a file of presidio-research."""
    return [
        Record(
            entry["full_text"],
            tuple(
                Span(span["start_position"], span["end_position"], span["entity_type"])
                for span in entry["spans"]
                if span["entity_value"] != MISSING
            ),
            entry["template_id"],
        )
        for entry in json.loads(path.read_text(encoding="utf-8"))
    ]


def halves(records: Sequence[Record]) -> tuple[list[Record], list[Record]]:
    """Development and held-out: every second template, in the order of their numbers."""
    templates = sorted({record.template for record in records})
    development = set(templates[::2])
    return (
        [record for record in records if record.template in development],
        [record for record in records if record.template not in development],
    )


def measure(name: str, records: Sequence[Record], placeholders: Placeholders) -> Half:
    """Count what is covered and what was found for nothing."""
    spans, covered, typed = Counter[str](), Counter[str](), Counter[str]()
    found, false = Counter[str](), Counter[str]()
    words = 0
    seconds = 0.0
    for record in records:
        words += len(_WORD.findall(record.text))
        began = time.thread_time()
        detected = merged(placeholders.find(record.text))
        seconds += time.thread_time() - began
        for gold in record.gold:
            over = [span for span in detected if _overlap(span, gold)]
            spans[gold.kind] += 1
            if is_covered(record.text, gold, over):
                covered[gold.kind] += 1
                typed[gold.kind] += KINDS.get(gold.kind) in {span.kind for span in over}
        for span in detected:
            found[span.kind] += 1
            false[span.kind] += not any(_overlap(span, gold) for gold in record.gold)
    return Half(
        name,
        len({record.template for record in records}),
        len(records),
        words,
        tuple(Recall(kind, spans[kind], covered[kind], typed[kind]) for kind in (*KINDS, *NO_KIND)),
        tuple(
            Alarms(kind, found[kind], false[kind], round(1000 * false[kind] / words, 2))
            for kind in Kind
        ),
        round(1e6 * seconds / words, 2),
    )


def round_trips(records: Sequence[Record], mode: str) -> int:
    """How many sentences come back exactly, each streamed in pieces of three characters."""
    exact = 0
    for record in records:
        substitution = Placeholders(mode=mode).session()
        sent = substitution.substitute(record.text)
        restorer = substitution.restorer()
        pieces = [restorer.push(sent[at : at + 3]) for at in range(0, len(sent), 3)]
        exact += "".join([*pieces, restorer.flush()]) == record.text
    return exact


def is_covered(text: str, gold: Span, detected: Iterable[Span]) -> bool:
    """Whether every letter and digit of a span lies in what was detected."""
    inside = {at for span in detected for at in range(span.start, span.end)}
    return all(
        at in inside
        for word in _WORD.finditer(text, gold.start, gold.end)
        if word[0] != MISSING
        for at in range(word.start(), word.end())
    )


def _overlap(one: Span, other: Span) -> bool:
    return one.start < other.end and other.start < one.end


def page(report: dict[str, Any]) -> str:
    """The report for people."""
    return "\n".join(_lines(report)) + "\n"


def _lines(report: dict[str, Any]) -> Iterator[str]:
    yield "# Placeholders: what the built-in detectors find"
    yield ""
    yield f"{report['date']}, `{report['command']}`"
    yield ""
    yield f"{report['data']}"
    yield ""
    yield "*covered*: every letter and digit of the span is replaced, whatever it was taken for."
    yield "*typed*: covered, and by a substitute of its own kind."
    yield "TITLE and NRP (nationality, religion, politics) have no kind: they are not replaced on"
    yield "purpose. *false*: spans that were replaced although nothing in them is marked."
    yield ""
    trips = ", ".join(
        f"{count} of {report['sentences']} in mode {mode}"
        for mode, count in report["round_trips"].items()
    )
    yield f"Sentences that came back exactly, streamed in pieces of three characters: {trips}."
    for half in report["halves"]:
        yield ""
        yield (
            f"## {half['name']}: {half['templates']} templates, {half['sentences']} sentences, "
            f"{half['words']} words, {half['milliseconds_per_1000_words']} ms for 1,000 words"
        )
        yield ""
        yield "| type | spans | covered | 95 % interval | typed |"
        yield "|---|---|---|---|---|"
        for row in half["recall"]:
            if row["spans"]:
                between = clopper_pearson(row["covered"], row["spans"])
                yield (
                    f"| {row['type']} | {row['spans']} | {row['covered'] / row['spans']:.1%} | "
                    f"{between.low:.1%} to {between.high:.1%} | "
                    f"{row['typed'] / row['spans']:.1%} |"
                )
        yield ""
        yield "| kind | found | false | false / found | false per 1,000 words |"
        yield "|---|---|---|---|---|"
        for row in half["alarms"]:
            if row["found"]:
                yield (
                    f"| {row['kind']} | {row['found']} | {row['false']} | "
                    f"{row['false'] / row['found']:.1%} | {row['false_per_1000_words']} |"
                )


def main() -> None:
    """Measure both halves and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    placeholders = Placeholders()
    names = ("development half", "held-out half")
    records = load(options.dataset)
    found = [
        measure(name, half, placeholders) for name, half in zip(names, halves(records), strict=True)
    ]
    day = datetime.now(UTC).date().isoformat()
    report = {
        "date": day,
        "command": f"python -m benchmarks.placeholders {options.dataset}",
        "data": DATA,
        "sentences": len(records),
        "round_trips": {mode: round_trips(records, mode) for mode in MODES},
        "halves": [asdict(half) for half in found],
    }
    stem = options.out / f"{day}-{NAME}"
    stem.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    stem.with_suffix(".md").write_text(page(report), encoding="utf-8")
    print(page(report))


if __name__ == "__main__":
    main()
