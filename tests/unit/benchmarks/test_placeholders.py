from __future__ import annotations

import json
import random

import pytest
from benchmarks import placeholders
from benchmarks.placeholders import Record, halves, is_covered, load, measure, page, round_trips

from fedsea.privacy.placeholders.config import Placeholders
from fedsea.privacy.placeholders.spans import Kind, Span

TEXT = "Eva Novak wrote from eva@x.org to Blink."
RECORDS = [
    Record(TEXT, (Span(0, 9, "PERSON"), Span(21, 30, "EMAIL_ADDRESS")), 1),
    Record("nothing here", (), 2),
    Record("nothing there", (), 5),
]


def test_halves_share_no_template():
    """Sentences of one template are all on one side."""
    records = [Record("x", (), number) for number in range(7)] * 3
    random.Random(0).shuffle(records)
    development, held_out = halves(records)
    assert {r.template for r in development} == {0, 2, 4, 6}
    assert {r.template for r in held_out} == {1, 3, 5}
    assert len(development) + len(held_out) == len(records)


def test_what_is_counted():
    """Covered spans by type, and finds where nothing is marked."""
    half = measure("all", RECORDS, Placeholders())
    recall = {row.type: (row.spans, row.covered, row.typed) for row in half.recall}
    alarms = {row.kind: (row.found, row.false) for row in half.alarms}
    assert recall["PERSON"] == recall["EMAIL_ADDRESS"] == (1, 1, 1)
    assert alarms[Kind.EMAIL] == (1, 0)
    assert sum(false for _, false in alarms.values()) == 1


@pytest.mark.parametrize(
    ("spans", "expected"),
    [([(0, 9)], True), ([(0, 3), (4, 9)], True), ([(0, 8)], False), ([], False)],
)
def test_covered_is_every_letter(spans, expected):
    """A span that is covered in pieces is covered; one letter less is not."""
    found = [Span(start, end, "x") for start, end in spans]
    assert is_covered(TEXT, Span(0, 9, "PERSON"), found) is expected


@pytest.mark.parametrize("mode", ["pseudonym", "tag"])
def test_round_trips_are_counted(mode):
    """Every sentence comes back."""
    assert round_trips(RECORDS, mode) == len(RECORDS)


def test_the_report_of_a_file(tmp_path, monkeypatch, capsys):
    """The command reads the file, leaves its mistakes out and writes both reports."""
    path = tmp_path / "set.json"
    span = {"entity_type": "PERSON", "entity_value": "Eva", "start_position": 0, "end_position": 3}
    missing = {"entity_type": "GPE", "entity_value": "nan", "start_position": 8, "end_position": 11}
    entries = [
        {"full_text": "Eva met nan", "spans": [span, missing], "template_id": number}
        for number in range(2)
    ]
    path.write_text(json.dumps(entries))
    assert load(path)[0].gold == (Span(0, 3, "PERSON"),)
    monkeypatch.setattr("sys.argv", ["placeholders", str(path), "--out", str(tmp_path)])
    placeholders.main()
    (report,) = tmp_path.glob("*-placeholders.json")
    assert page(json.loads(report.read_text())) == report.with_suffix(".md").read_text()
    assert "held-out half" in capsys.readouterr().out
