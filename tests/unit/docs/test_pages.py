"""What holds for every page of the documentation, without running anything."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest
from tests.documents import LANGUAGES, PAGES, ROOT, blocks

EVERYWHERE = [*PAGES, *sorted(ROOT.glob("*.md"))]
# The pages whose code blocks show signatures, not programs.
SIGNATURES = ROOT / "docs" / "reference" / "python-api.md"

_LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")


def name(page: Path) -> str:
    """A page as a test id."""
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", EVERYWHERE, ids=name)
def test_links_lead_to_files(page: Path) -> None:
    """A relative link names a file of the repository."""
    targets = _LINK.findall(page.read_text(encoding="utf-8"))

    assert [target for target in targets if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", EVERYWHERE, ids=name)
def test_blocks_are_of_a_known_language(page: Path) -> None:
    """Each fenced block says what it is, so that it is run or known not to be a program."""
    unknown = [str(block) for block in blocks(page) if block.language not in LANGUAGES]

    assert unknown == []


@pytest.mark.parametrize("page", [p for p in EVERYWHERE if p != SIGNATURES], ids=name)
def test_examples_can_be_parsed(page: Path) -> None:
    """Python and TOML are valid, in blocks that are not run too."""
    for block in blocks(page):
        if block.language == "python":
            ast.parse(block.code, filename=str(block))
        elif block.language == "toml":
            tomllib.loads(block.code)


def test_every_page_has_a_place_in_the_navigation() -> None:
    """No page can be reached by its address only."""
    configuration = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")

    placed = set(re.findall(r": ([\w/-]+\.md)$", configuration, re.MULTILINE))

    assert placed == {str(page.relative_to(ROOT / "docs")) for page in PAGES}
