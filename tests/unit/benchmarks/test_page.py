"""The documentation shows the committed results and no other numbers."""

import json

import pytest
from benchmarks import page

RESULT = {
    "date": "2026-01-02 03:04 UTC",
    "command": "python -m benchmarks.run",
    "commit": "abc",
    "hardware": {"processor": "Fast CPU", "cores": 2},
    "others": 0.1,
    "rows": [
        {
            "name": "ours / theirs", "unit": "x", "median": 1.5, "low": 1.0, "high": 2.0, "count": 5,
            "target": ">= 1", "verdict": "met",
        },
        {
            "name": "theirs", "unit": "tok/s", "median": 50.0, "low": 1.0, "high": 2.0, "count": 5,
            "target": None, "verdict": None,
        },
    ],
}  # fmt: skip


def test_the_page_shows_the_newest_results():
    """The page says what is committed; `python -m benchmarks.page` renews it."""
    text = page.PAGE.read_text(encoding="utf-8")
    assert text == page.with_table(text, page.table(page.newest(page.RESULTS)))


def test_a_full_run_goes_before_a_newer_quick_one(tmp_path):
    """Quick results are shown only while there are no others."""
    quick, full = tmp_path / "2026-02-02-cpu-quick.json", tmp_path / "2026-01-02-cpu.json"
    quick.write_text(json.dumps(RESULT))
    assert page.newest(tmp_path) == quick
    full.write_text(json.dumps(RESULT))
    assert page.newest(tmp_path) == full


def test_other_measurements_are_no_benchmarks(tmp_path):
    """Red team reports and the like are committed beside the benchmarks."""
    (tmp_path / "2026-03-03-redteam.json").write_text('[{"attack": "r1"}]')
    (tmp_path / "2026-03-03-placeholders.json").write_text('{"date": "2026-03-03"}')
    assert page.newest(tmp_path) is None


def test_without_results_the_page_says_how_to_get_some(tmp_path):
    """No number is made up."""
    assert page.table(page.newest(tmp_path)) == page.NOTHING


def test_renewing_twice_changes_nothing(tmp_path):
    """Only what has a target is shown, between the markers, and the rest of the page stays."""
    written = tmp_path / "performance.md"
    written.write_text(f"before\n{page.BEGIN}\nold\n{page.END}\nafter\n")
    (tmp_path / "2026-01-02-cpu.json").write_text(json.dumps(RESULT))
    assert page.renew(written, tmp_path)
    assert not page.renew(written, tmp_path)
    text = written.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "| ours / theirs | 1.50x | 1.00x to 2.00x | >= 1 | met |" in text
    assert "tok/s" not in text


def test_a_page_without_markers_is_an_error():
    """Nothing is overwritten by guessing."""
    with pytest.raises(ValueError, match="markers"):
        page.with_table("no markers", "x")
