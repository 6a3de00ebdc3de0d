"""Rows of a report: JSON there and back, the table, Markdown."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from fedsea.errors import ConfigError
from fedsea.redteam.report import (
    Rate,
    Row,
    Utility,
    distinct,
    dump,
    markdown,
    parse,
    percent,
    perplexity_text,
    table,
)


def row(**changed):
    """A row with every field filled."""
    values = {
        "attack": "r1",
        "model": "tiny",
        "bottom": 1,
        "top": 0,
        "mechanism": "fedsea",
        "parameters": "fedsea:scale=0.02",
        "knowledge": "base",
        "recovery": 0.75,
        "low": 0.7,
        "high": 0.8,
        "tokens": 300,
        "prior": 0.25,
        "clean": 1.0,
        "utility": Utility(perplexity=5.5, accuracy=0.5, agreement=0.75, generation=0.25),
        "clean_utility": Utility(perplexity=4.5, accuracy=0.625, agreement=1.0),
        "by_class": {"digits": Rate(0.5, 0.25, 0.75, 8)},
        "details": {"cosine": 0.5},
    }
    return Row(**{**values, **changed})


shares = st.floats(0, 1)


@given(recovery=shares, low=shares, high=shares, prior=shares, clean=st.none() | shares)
def test_rows_survive_json(recovery, low, high, prior, clean):
    """A report that is written and read again is the same report."""
    rows = [row(recovery=recovery, low=low, high=high, prior=prior, clean=clean), row(attack="nn")]
    assert parse(dump(rows)) == rows


def test_json_is_a_list_of_rows_with_the_interval_as_a_pair():
    """Programs find attack, mechanism, parameters, recovery, interval, prior, clean and utility."""
    (found,) = json.loads(dump([row()]))
    assert found["interval"] == [0.7, 0.8]
    assert found["utility"]["perplexity"] == 5.5
    assert found["by_class"]["digits"]["tokens"] == 8
    assert {"attack", "mechanism", "parameters", "recovery", "prior", "clean"} <= set(found)


def test_json_has_no_numbers_that_json_lacks():
    """A bound or a parameter that is not finite becomes null, and the file stays JSON."""
    text = dump([row(mu=math.inf, details={"cosine": math.nan})])
    (found,) = json.loads(text)
    assert found["mu"] is None
    assert found["details"]["cosine"] is None


@pytest.mark.parametrize("text", ["", "{}", "[1]", "[{}]", '[{"interval": [0, 1]}]', "nonsense"])
def test_what_is_no_report_is_refused(text):
    """A damaged or foreign file ends in a clear error."""
    with pytest.raises(ConfigError, match="--json"):
        parse(text)


def test_table_names_a_mechanism_once():
    """Attacks on one mechanism stand together below its name."""
    console = Console(width=120, record=True, force_terminal=False, quiet=False, file=None)
    with console.capture() as captured:
        console.print(table([row(), row(attack="nn", recovery=0.5)], "tiny"))
    text = captured.get()
    assert text.count("fedsea:scale=0.02") == 1
    assert "75.0 %" in text
    assert "50.0 %" in text


def test_markdown_has_a_line_for_each_row():
    """The committed table repeats every name, so that a line can be read alone."""
    lines = markdown([row(), row(attack="nn")]).splitlines()
    assert len(lines) == 4
    assert all("`fedsea:scale=0.02`" in line for line in lines[2:])
    assert len({line.count("|") for line in lines}) == 1


def test_numbers_for_people():
    """Shares and perplexities are short, and what is absent is a dash."""
    assert [percent(value) for value in (0.1234, 1.0, None, math.nan)] == [
        "12.3 %",
        "100 %",
        "–",
        "–",
    ]
    assert [perplexity_text(v) for v in (4.5678, 12345.6, math.inf)] == ["4.57", "12,346", "–"]


def test_what_stands_beside_a_mechanism_is_named():
    """A row says the width behind a projection and which one it is, and whether answers are denoised."""
    beside = row(width=16, projection="ab12" * 16, denoised=True)
    assert beside.protection == "fedsea, width 16, denoised"
    assert beside.setting == "fedsea:scale=0.02, projection ab12ab12 to width 16, denoised"
    assert beside.setting in markdown([beside])
    assert parse(dump([beside])) == [beside]
    assert row().setting == "fedsea:scale=0.02"


def test_a_projection_alone_is_not_the_clean_channel():
    """Only rows that leave as they are count as unprotected."""
    assert row(mechanism="plain", parameters="plain").is_clean
    assert not row(mechanism="plain", parameters="plain", width=16).is_clean


def test_reports_from_before_projections_are_read():
    """Rows without the newer fields are rows without a projection."""
    old = row().to_json()
    for name in ("width", "projection", "denoised"):
        del old[name]
    assert Row.from_json(old) == row()


def test_a_row_that_says_the_same_again_is_shown_once():
    """Two runs measure the clean channel twice; only what differs in more than time is kept."""
    slower, other = row(seconds=9.0), row(recovery=0.5)
    assert distinct([row(), slower, other]) == [row(), other]
