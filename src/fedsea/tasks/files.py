"""Files of data sets: JSON lines, JSON documents and tables with tabs.

An error says which file, which line or place, and which key; never what stands there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedsea.errors import DataError


@dataclass(frozen=True, slots=True)
class Item:
    """An object of a file, and where it stands."""

    where: str
    values: Mapping[str, Any] = field(repr=False)

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def text(self, key: str) -> str:
        """A text that is not blank.

        Raises:
            DataError: there is none.
        """
        value = self.any_text(key)
        if not value.strip():
            raise self.fault(f"{key} is blank")
        return value

    def any_text(self, key: str) -> str:
        """A text, blank ones included.

        Raises:
            DataError: there is none.
        """
        value = self._value(key)
        if not isinstance(value, str):
            raise self.fault(f"{key} is no text")
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise self.fault(f"{key} is no valid Unicode") from None
        return value

    def number(self, key: str) -> int:
        """A whole number, not negative.

        Raises:
            DataError: there is none.
        """
        value = self._value(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise self.fault(f"{key} is no whole number from 0")
        return value

    def name(self, key: str, default: object) -> str:
        """What an object is called: a text or a number, or the default when it has no such key.

        Raises:
            DataError: it is something else.
        """
        value = self.values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise self.fault(f"{key} is neither a text nor a number")
        return str(value)

    def item(self, key: str) -> Item:
        """An object inside this one.

        Raises:
            DataError: there is none.
        """
        value = self._value(key)
        if not isinstance(value, dict):
            raise self.fault(f"{key} is no object")
        return Item(f"{self.where}, {key}", value)

    def items(self, key: str) -> list[Item]:
        """A list of objects inside this one.

        Raises:
            DataError: there is none.
        """
        value = self._value(key)
        if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
            raise self.fault(f"{key} is no list of objects")
        return [Item(f"{self.where}, {key} {at}", each) for at, each in enumerate(value, start=1)]

    def label(self, key: str, known: Mapping[Any, str]) -> tuple[str, ...]:
        """What a value stands for; nothing when the object has no such key.

        Raises:
            DataError: it is none of the known ones.
        """
        if key not in self.values:
            return ()
        value = self.values[key]
        for written, label in known.items():
            if type(value) is type(written) and value == written:
                return (label,)
        raise self.fault(f"{key} is none of {', '.join(map(str, known))}")

    def fault(self, what: str) -> DataError:
        """An error about this object."""
        return DataError(f"{self.where}: {what}; fix the file or choose another task")

    def _value(self, key: str) -> Any:
        if key not in self.values:
            raise self.fault(f"there is no {key}")
        return self.values[key]


def json_lines(path: Path) -> Iterator[Item]:
    """The objects of a file with one on each line; blank lines are passed over.

    Raises:
        DataError: the file cannot be read, or a line is no object.
    """
    for number, line in _lines(path):
        value = _parsed(path, line, number)
        if not isinstance(value, dict):
            raise DataError(f"{path}, line {number}: this is no JSON object; give one on each line")
        yield Item(f"{path}, line {number}", value)


def json_document(path: Path) -> Item:
    """The object that a file is.

    Raises:
        DataError: the file cannot be read, or is no object.
    """
    value = _parsed(path, _read(path), 1)
    if not isinstance(value, dict):
        raise DataError(f"{path}: this is no JSON object; fix the file or choose another task")
    return Item(str(path), value)


def table(path: Path) -> Iterator[Item]:
    """The lines of a table whose first line names the columns; tabs separate, nothing is quoted.

    Raises:
        DataError: the file cannot be read, or a line has another number of columns.
    """
    columns: list[str] = []
    for number, line in _lines(path):
        cells = line.split("\t")
        if not columns:
            columns = cells
            continue
        if len(cells) != len(columns):
            raise DataError(
                f"{path}, line {number}: it has {len(cells)} columns and the first line has "
                f"{len(columns)}; fix the file or choose another task"
            )
        yield Item(f"{path}, line {number}", dict(zip(columns, cells, strict=True)))


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(_read(path).split("\n"), start=1):
        if line.strip():
            yield number, line.removesuffix("\r")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; fix the path") from None
    except UnicodeDecodeError:
        raise DataError(f"{path} is not UTF-8 text; convert it") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); check it") from None


def _parsed(path: Path, text: str, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise DataError(f"{path}, line {line}: this is no JSON; fix the file") from None
    except RecursionError:
        raise DataError(f"{path}, line {first_line}: it nests too deeply; fix the file") from None
