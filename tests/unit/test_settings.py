"""Settings out of tables: each type, each way to be wrong."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import pytest

from fedsea.errors import ConfigError
from fedsea.settings import check_keys, read_toml, section, table_at


class Colour(StrEnum):
    RED = "red"
    BLUE = "blue"


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    name: str
    count: int = 1
    share: float | None = None
    path: Path | None = None
    paths: tuple[Path, ...] = ()
    words: tuple[str, ...] = ()
    numbers: tuple[int, ...] | None = None
    colour: Colour | str = Colour.RED
    on: bool = False


def test_every_type(tmp_path):
    """Values become what their fields say; paths are relative to the file, unless absolute."""
    table = {
        "name": "n",
        "count": 3,
        "share": 1,
        "path": "a",
        "paths": ["b", "/c"],
        "words": ["x", "y"],
        "numbers": [1, 2],
        "colour": "blue",
        "on": True,
    }
    assert section(Section, "s", table, base=tmp_path) == Section(
        name="n",
        count=3,
        share=1.0,
        path=tmp_path / "a",
        paths=(tmp_path / "b", Path("/c")),
        words=("x", "y"),
        numbers=(1, 2),
        colour=Colour.BLUE,
        on=True,
    )


def test_without_a_base():
    """What comes from a command line stays relative to its folder."""
    assert section(Section, "s", {"name": "n", "path": "a"}).path == Path("a")


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("count", "3", "s.count is of type str; give a int"),
        ("count", True, "s.count is of type bool"),
        ("share", "x", "s.share is of type str; give a float"),
        ("path", 3, "s.path is of type int; give a Path"),
        ("paths", "a", "s.paths is no list of paths"),
        ("words", [1], "s.words is no list of texts"),
        ("numbers", [True], "s.numbers is no list of whole numbers"),
        ("colour", "green", "choose one of red, blue"),
        ("on", 1, "s.on is of type int"),
        ("cuont", 1, "did you mean count"),
    ],
)
def test_refuses_bad_values(key, value, expected):
    """A key is named with what it should hold."""
    with pytest.raises(ConfigError, match=expected):
        section(Section, "s", {"name": "n", key: value})


def test_missing_key():
    """A key that has no default has to be there."""
    with pytest.raises(ConfigError, match=r"s\.name is missing"):
        section(Section, "s", {})


def test_tables():
    """A single value where a section belongs is refused; a missing section is empty."""
    assert table_at({}, "s") == {}
    with pytest.raises(ConfigError, match="write a section"):
        table_at({"s": 1}, "s")
    with pytest.raises(ConfigError, match="did you mean one"):
        check_keys({"on": 1}, ("one", "two"), "it")


@pytest.mark.parametrize(
    ("content", "expected"), [(None, "does not exist"), (b"\xff", "UTF-8"), (b"[", "valid TOML")]
)
def test_unreadable_files(tmp_path, content, expected):
    """Missing and broken files are named."""
    path = tmp_path / "run.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=expected):
        read_toml(path)
