"""The page of tasks says what the code says now."""

from __future__ import annotations

import tomllib

from scripts.task_reference import OF_THE_PAPER, PAGE, page
from tests.documents import blocks

from fedsea.tasks.catalogue import TASKS
from fedsea.tasks.templates import read_overrides


def test_the_page_is_up_to_date() -> None:
    """It is what the script would write: python scripts/task_reference.py."""
    assert PAGE.read_text(encoding="utf-8") == page()


def test_templates_that_are_said_to_be_the_papers_exist() -> None:
    """Each is the style of a task."""
    assert all(
        style in TASKS[name].styles for style, names in OF_THE_PAPER.items() for name in names
    )


def test_templates_on_the_page_can_be_read_back(tmp_path) -> None:
    """Copied into a file, they are the templates that the task has."""
    known = {task.name: task.styles for task in TASKS.values()}
    text = "\n".join(block.code for block in blocks(PAGE))
    path = tmp_path / "all.toml"
    path.write_text(text, encoding="utf-8")

    assert set(tomllib.loads(text)) == set(TASKS)
    assert read_overrides(path, {name: {} for name in known}) == known
