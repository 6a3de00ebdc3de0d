"""The page: one file that asks for nothing, says its verdicts in words, and can be drawn twice."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from importlib import util

import pytest

from fedsea.errors import ConfigError
from fedsea.evaluation import page as pages
from fedsea.evaluation.page import About, markdown, page
from fedsea.redteam.report import Rate, Utility

ABOUT = About("2026-11-21", "fedsea redteam --text a.txt", "0.1.0", "a <b>.txt", ("One & two.",))


@pytest.fixture
def rows(make_row):
    """Two cuts, the clean channel and FedSEA's noise at two scales, three attacks each."""
    found = []
    for bottom in (0, 1):
        found.append(make_row(attack="prior", bottom=bottom, recovery=0.3, low=0.28, high=0.33))
        for spec, noise, recovery in (
            ("plain", 0.0, 1.0),
            ("fedsea:scale=0.1", 0.3, 1.0),
            ("fedsea:scale=2", 6.0, 0.31),
        ):
            found += [
                make_row(
                    attack=attack,
                    bottom=bottom,
                    mechanism=spec.partition(":")[0],
                    parameters=spec,
                    noise=noise,
                    recovery=recovery,
                    utility=Utility(5 + noise, 0.5 if noise < 1 else 0.1, 0.9),
                    by_class={"numbers": Rate(recovery, 0.1, 1.0, 12)},
                )
                for attack in ("nn", "r1")
            ]
    return found


class Checker(HTMLParser):
    """Notes identifiers, and whether every tag is closed."""

    def __init__(self):
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in {"meta", "wbr", "path", "use", "rect", "stop", "br"}:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.ids += [value or "" for name, value in attrs if name == "id"]

    def handle_endtag(self, tag):
        if self.open and self.open[-1] == tag:
            self.open.pop()


def test_the_page_is_whole_and_names_are_unique(rows):
    """Every element is closed, and two drawings never share an identifier."""
    checker = Checker()
    checker.feed(page(rows, ABOUT))
    assert checker.open == []
    assert len(checker.ids) == len(set(checker.ids))


def test_the_page_asks_for_nothing_from_outside(rows):
    """No scripts, and no addresses but the names of XML's own vocabularies."""
    html = page(rows, ABOUT)
    assert "<script" not in html
    assert "src=" not in html
    assert "@import" not in html
    addresses = set(re.findall(r"https?://[^\s\"'<>)]+", html))
    assert all(address.startswith("http://www.w3.org/") for address in addresses)
    assert not re.search(r"""(?:href|url)\s*[=(]\s*["']?https?:""", html)


def test_the_page_says_its_verdicts_in_words(rows):
    """The named verdict, the mechanism's, and what the words mean."""
    html = page(rows, ABOUT)
    assert "fedsea-scale" in html
    assert "not protective: at fedsea:scale=0.1" in html
    assert "splitting alone hides nothing" in html
    assert "no setting kept both text and use" in html
    assert "This report is void" not in html
    assert html.count("<svg") == 4


def test_a_failed_floor_stands_above_everything(rows, make_row):
    """A report whose attacks are broken says so first."""
    html = page([*rows, make_row(bottom=2, recovery=0.5)], ABOUT)
    assert html.index("This report is void") < html.index("fedsea-scale")
    assert "the attacks failed their own check" in markdown([make_row(recovery=0.5)], ABOUT)


def test_text_from_outside_is_escaped(rows):
    """File names and facts cannot add markup."""
    html = page(rows, ABOUT)
    assert "a &lt;b&gt;.txt" in html
    assert "One &amp; two." in html


def test_the_same_rows_make_the_same_page(rows):
    """A committed page changes only when its rows do."""
    assert page(rows, ABOUT) == page(rows, ABOUT)


def test_nothing_is_no_report():
    """Without rows there is no page."""
    with pytest.raises(ConfigError, match="nothing to report"):
        page([], ABOUT)


def test_without_matplotlib_the_extra_is_named(rows, monkeypatch):
    """Whoever lacks the extra is told how to get it."""
    monkeypatch.setattr(pages, "find_spec", lambda name: None)
    assert util.find_spec("matplotlib") is not None
    with pytest.raises(ConfigError, match=r"fedsea\[redteam\]"):
        page(rows, ABOUT)


def test_markdown_has_verdicts_command_and_rows(rows):
    """What is committed names how it was made, and every row."""
    text = markdown(rows, ABOUT)
    assert ABOUT.command in text
    assert "**fedsea-scale** (not protective)" in text
    assert text.count("| tiny |") == len(rows)


def test_the_page_names_the_width_of_a_projection(rows, make_row):
    """A mechanism behind a projection stands beside the same one without, under a name of its own."""
    behind = make_row(
        mechanism="fedsea", parameters="fedsea:scale=2", noise=3.0, width=16, projection="c" * 64
    )
    html = page([*rows, behind], ABOUT)
    assert "<th scope=row>fedsea, width 16</th>" in html
    assert "projection cccccccc to width 16" in html.replace("<wbr>", "")
    assert "projection cccccccc to width 16" in markdown([*rows, behind], ABOUT)
