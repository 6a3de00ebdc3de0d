"""Every command and example of the documentation, run page by page as a reader would run it."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.documents import PAGES, ROOT, Workplace, blocks

from fedsea.transport.certificates import init_ca, issue_client, issue_server

TUTORIAL = ROOT / "docs" / "tutorial"
REFERENCE = ROOT / "docs" / "reference"


def runs_something(page: Path) -> bool:
    """Whether a page shows a command or an example; reference pages show signatures."""
    return not page.is_relative_to(REFERENCE) and any(
        block.language in {"console", "python"} for block in blocks(page)
    )


def needs_server(page: Path) -> bool:
    """Whether examples of a page connect to a server that the page does not start."""
    code = [block.code for block in blocks(page) if block.not_run is None]
    return any(".connect(" in text for text in code) and not any("serve" in text for text in code)


@pytest.mark.slow
@pytest.mark.timeout(300)  # a tutorial starts ten processes, one after the other
@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if runs_something(page)],
    ids=lambda page: str(page.relative_to(ROOT / "docs")),
)
def test_page(page: Path, tmp_path: Path) -> None:
    """All blocks of a page end well, in order; only the tutorial makes its own certificates."""
    with Workplace(tmp_path) as workplace:
        if not page.is_relative_to(TUTORIAL):
            init_ca(tmp_path / "certs")
            issue_server(tmp_path / "certs", ["localhost", "127.0.0.1"])
            issue_client(tmp_path / "certs", "clinic")
        if needs_server(page):
            workplace.run("fedsea serve src/fedsea/demo/model --certs certs")
        workplace.run_page(page)
