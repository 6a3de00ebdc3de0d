"""Files of tasks, written for the tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def lines(tmp_path: Path) -> Callable[..., Path]:
    """Write objects as JSON lines."""

    def write(*objects: Any, name: str = "data.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(each) + "\n" for each in objects), encoding="utf-8")
        return path

    return write


@pytest.fixture
def file(tmp_path: Path) -> Callable[..., Path]:
    """Write a text or an object as a file."""

    def write(content: Any, name: str) -> Path:
        path = tmp_path / name
        text = content if isinstance(content, str) else json.dumps(content)
        path.write_text(text, encoding="utf-8")
        return path

    return write
