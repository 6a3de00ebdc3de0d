"""Tables of the privacy pages say what code and committed results say now."""

from __future__ import annotations

from pathlib import Path

import pytest
from scripts.privacy_tables import PAGES, RESULTS, TABLES, with_tables

from fedsea.evaluation.verdict import Standing, settings
from fedsea.redteam.report import parse


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_tables_are_up_to_date(page: Path) -> None:
    """No number was typed; `python -m scripts.privacy_tables` brings pages up to date."""
    text = page.read_text(encoding="utf-8")

    assert with_tables(text) == text


def test_every_table_is_shown() -> None:
    """A table that no page has a place for is not computed."""
    shown = "".join(page.read_text(encoding="utf-8") for page in PAGES)

    assert all(f"<!-- {name}: written" in shown for name in TABLES)


def test_an_unknown_table_is_an_error() -> None:
    """A misspelt marker does not leave an empty place."""
    marker = "<!-- nothing: written by scripts/privacy_tables.py -->\n<!-- end of nothing -->"

    with pytest.raises(KeyError):
        with_tables(marker)


def test_what_is_said_about_the_sweep_is_true() -> None:
    """THREAT_MODEL.md says that no setting kept both text and use; no committed row says otherwise."""
    rows = parse(max(RESULTS.glob("*-redteam.json")).read_text(encoding="utf-8"))

    assert Standing.HOLDS not in {setting.standing for setting in settings(rows)}


def test_what_is_said_about_projections_is_true() -> None:
    """A projection alone hides nothing from R1, and no setting behind one kept both text and use."""
    rows = parse(max(RESULTS.glob("*-redteam-del.json")).read_text(encoding="utf-8"))
    alone = [row for row in rows if row.mechanism == "plain" and row.width and row.attack == "r1"]

    assert alone
    assert all(row.recovery == 1 for row in alone)
    assert Standing.HOLDS not in {setting.standing for setting in settings(rows)}
