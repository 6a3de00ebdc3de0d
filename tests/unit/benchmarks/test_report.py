"""The summary line, the files, and what they say."""

import json
import os

import pytest
from benchmarks import report
from benchmarks.measure import Row, Spread, at_least


@pytest.fixture
def about():
    """Made-up circumstances."""
    return report.Circumstances(
        date="2026-01-02 03:04 UTC",
        commit="abc",
        command="python -m benchmarks.run",
        hardware={"processor": "Fast CPU (R) 9000", "cores": 2},
        versions={"torch": "2"},
        environment={"OMP_NUM_THREADS": "2"},
        load_before=0.5,
        load_after=1.5,
        others=0.25,
        seconds=12.0,
    )


@pytest.fixture
def rows():
    """One row with target and key, one without."""
    return [
        Row(
            case="decode",
            name="ours / theirs",
            spread=Spread.of([1.2345, 1.0, 2.0]),
            target=at_least(1.0),
            key="decode_512x8",
        ),
        Row(case="wire", name="bytes per token", spread=Spread.of([4133.0]), unit="B"),
    ]


def test_the_summary_has_exactly_its_keys(rows):
    """What was not measured is null, so that a reader never meets a missing key."""
    summary = report.summary(rows)
    assert tuple(summary) == report.KEYS
    assert summary.pop("decode_512x8") == 1.234
    assert set(summary.values()) == {None}


def test_a_key_given_twice_is_an_error(rows):
    """Two cases must not fight over one value."""
    with pytest.raises(ValueError, match="given twice"):
        report.summary([rows[0], rows[0]])


def test_an_unknown_key_is_an_error():
    """A misspelt key would be lost."""
    with pytest.raises(ValueError, match="unknown"):
        report.summary([Row(case="c", name="n", spread=Spread.of([1.0]), key="decode")])


def test_files_are_named_by_date_and_processor(rows, about, tmp_path):
    """JSON and Markdown beside each other, with everything needed to judge the numbers."""
    written = report.save(rows, about, tmp_path, "-quick")
    assert [path.name for path in written] == [
        "2026-01-02-fast-cpu-r-9000-quick.json",
        "2026-01-02-fast-cpu-r-9000-quick.md",
    ]
    stored = json.loads(written[0].read_text())
    assert stored["summary"]["decode_512x8"] == 1.234
    assert stored["rows"][0]["verdict"] == "met"
    assert stored["rows"][0]["low"] == 1.0
    assert stored["rows"][1]["target"] is None
    assert {"hardware", "versions", "command", "load_before", "others"} <= stored.keys()
    page = written[1].read_text()
    assert "| decode: ours / theirs | 1.23x | 1.00x to 2.00x | >= 1 | met |" in page
    assert "| wire: bytes per token | 4,133 B |  |  |" in page


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (1.048, "x", "1.05x"),
        (0.5, "ms", "0.50 ms"),
        (71.64, "tok/s", "71.6 tok/s"),
        (65.0, "B", "65 B"),
    ],
)
def test_numbers_are_as_precise_as_is_useful(value, unit, text):
    """No digits that mean nothing."""
    assert report.format_value(value, unit) == text


def test_our_own_work_is_not_that_of_others():
    """What this process computes is taken off what the machine computed."""
    clock = report.Clock()
    own = sum(range(3_000_000))
    assert own
    assert clock.others() <= (os.cpu_count() or 1) + 0.5
    assert clock.seconds() > 0
