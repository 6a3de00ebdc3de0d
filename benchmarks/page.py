"""Writes the newest committed results into the documentation: `python -m benchmarks.page`.

The numbers of `docs/explanation/performance.md` stand between two markers and come from nowhere
else; a test compares them with the results.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.measure import Spread
from benchmarks.report import format_value

_ROOT = Path(__file__).resolve().parents[1]
RESULTS = _ROOT / "benchmarks" / "results"
PAGE = _ROOT / "docs" / "explanation" / "performance.md"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
NOTHING = "No results have been committed yet: run `make bench`, then `python -m benchmarks.page`."


def newest(folder: Path) -> Path | None:
    """The newest benchmarks, a full run before a quick one; None when there are none."""
    found = [path for path in sorted(folder.glob("*.json")) if _is_benchmark(path)]
    whole = [path for path in found if not path.stem.endswith("-quick")]
    candidates = whole or found
    return candidates[-1] if candidates else None


def _is_benchmark(path: Path) -> bool:
    """Other measurements are kept in the same folder; only benchmarks name the hardware."""
    about = json.loads(path.read_text(encoding="utf-8"))
    return isinstance(about, dict) and "hardware" in about


def table(results: Path | None) -> str:
    """The rows with a target, and how they were measured."""
    if results is None:
        return NOTHING
    about: dict[str, Any] = json.loads(results.read_text(encoding="utf-8"))
    hardware = about["hardware"]
    lines = [
        f"Measured on {about['date']} with `{about['command']}` on {hardware['processor']}, "
        f"{hardware['cores']} cores, commit {about['commit']}; other processes used "
        f"{about['others']:.2f} cores meanwhile. "
        f"All rows: `benchmarks/results/{results.stem}.md`.",
        "",
        "| | median | least to greatest | target | |",
        "|---|---:|---:|---:|---|",
    ]
    lines += [_line(row) for row in about["rows"] if row["target"]]
    return "\n".join(lines)


def renew(page: Path = PAGE, results: Path = RESULTS) -> bool:
    """Write the newest results between the markers; returns whether anything changed."""
    before = page.read_text(encoding="utf-8")
    after = with_table(before, table(newest(results)))
    if after != before:
        page.write_text(after, encoding="utf-8")
    return after != before


def with_table(page: str, shown: str) -> str:
    """The page with what stands between the markers replaced.

    Raises:
        ValueError: a marker is missing.
    """
    head, begin, rest = page.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page has no markers {BEGIN} and {END}")
    return f"{head}{BEGIN}\n{shown}\n{END}{tail}"


def _line(row: dict[str, Any]) -> str:
    spread = Spread(row["median"], row["low"], row["high"], row["count"])
    median, low, high = (
        format_value(value, row["unit"]) for value in (spread.median, spread.low, spread.high)
    )
    return f"| {row['name']} | {median} | {low} to {high} | {row['target']} | {row['verdict']} |"


if __name__ == "__main__":
    print("renewed" if renew() else "nothing to renew")
