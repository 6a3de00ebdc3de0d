"""Settings as frozen dataclasses: read from the tables of a TOML file, checked key by key.

A section of a file is a dataclass, a key is a field. An unknown key is an error that names the
nearest known one; a value of another type names what is expected; paths are relative to the file.
"""

from __future__ import annotations

import tomllib
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, Field, fields
from difflib import get_close_matches
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from fedsea.errors import ConfigError

Table = Mapping[str, Any]
SectionReader = Callable[[type[Any], str, Table, Path | None, Table | None], Any]

_S = TypeVar("_S")
_E = TypeVar("_E", bound=StrEnum)
_LISTS: Mapping[Any, tuple[tuple[type, ...], str]] = {
    tuple[Path, ...]: ((str, Path), 'list of paths; write one, as in ["a.safetensors"]'),
    tuple[str, ...]: ((str,), 'list of texts; write one, as in ["one", "two"]'),
    tuple[int, ...]: ((int,), "list of whole numbers; write one, as in [1, 2]"),
}


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file.

    Raises:
        ConfigError: it cannot be read, or is no TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"the configuration {path} does not exist; fix the path") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ConfigError(f"the configuration {path} cannot be read: {reason}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None


def section(
    kind: type[_S],
    name: str,
    table: Table,
    base: Path | None = None,
    overrides: Table | None = None,
) -> _S:
    """The settings of one section.

    Args:
        kind: the dataclass.
        name: of the section, for errors.
        table: what the file says; its paths are relative to `base`.
        base: the folder of the file; None leaves paths as they are.
        overrides: keys of a command line, whose paths are relative to its own folder.

    Raises:
        ConfigError: a key is unknown or missing, or a value cannot be used.
    """
    values = {
        key: _resolved(value, base) for key, value in _typed(kind, name, table).items()
    } | _typed(kind, name, overrides or {})
    for key in _required(kind):
        need(key in values, f"{name}.{key} is missing; add it")
    return kind(**values)


def from_tables(
    kind: type[_S],
    table: Table,
    base: Path | None = None,
    overrides: Mapping[str, Table] | None = None,
    read: SectionReader = section,
) -> _S:
    """Settings whose fields are sections, out of nested tables.

    Args:
        kind: the dataclass of all sections.
        table: what the file says; its paths are relative to `base`.
        base: the folder of the file; None leaves paths as they are.
        overrides: by section, as for `section`.
        read: reads a section, where some hold more than keys.

    Raises:
        ConfigError: a section or key is unknown or missing, or a value cannot be used.
    """
    kinds, given = get_type_hints(kind), overrides or {}
    check_keys({**table, **given}, kinds, "the configuration")
    return kind(
        **{
            name: read(each, name, table_at(table, name), base, given.get(name))
            for name, each in kinds.items()
        }
    )


def with_model(table: Table, base: Path | None) -> Table:
    """A section in which a `model` that is a folder beside the file is meant as such."""
    model = table.get("model")
    if base is not None and isinstance(model, str) and (base / model).is_dir():
        return {**table, "model": str(base / model)}
    return table


def table_at(table: Table, key: str, name: str | None = None) -> Table:
    """The table under a key; empty when there is none.

    Raises:
        ConfigError: the key holds a single value.
    """
    value = table.get(key, {})
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name or key} is a single value; write a section [{name or key}]")
    return value


def check_keys(table: Table, known: Iterable[str], where: str) -> None:
    """Refuse keys that nobody knows.

    Raises:
        ConfigError: with the nearest known one.
    """
    names = list(known)
    for key in table:
        if key not in names:
            near = get_close_matches(key, names, n=1, cutoff=0.0)[0]
            raise ConfigError(f"{key} is no key of {where}; did you mean {near}?")


def need(fulfilled: bool, message: str) -> None:
    """Refuse settings that do not go together.

    Raises:
        ConfigError: the condition is not fulfilled.
    """
    if not fulfilled:
        raise ConfigError(message)


def choice(key: str, kind: type[_E], value: Any) -> _E:
    """A member of an enumeration by its value.

    Raises:
        ConfigError: there is none of that value.
    """
    choices = [str(member) for member in kind]
    if not isinstance(value, str) or value not in choices:
        raise ConfigError(f"{key} is {value!r}; choose one of {', '.join(choices)}")
    return kind(value)


def accepted(hint: Any) -> tuple[Any, ...]:
    """The types that a field takes."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _typed(kind: type[Any], name: str, table: Table) -> dict[str, Any]:
    hints = get_type_hints(kind)
    check_keys(table, hints, f"section [{name}]")
    return {key: _value(f"{name}.{key}", hints[key], value) for key, value in table.items()}


def _required(kind: type[Any]) -> list[str]:
    declared: tuple[Field[Any], ...] = fields(kind)
    return [
        entry.name
        for entry in declared
        if entry.default is MISSING and entry.default_factory is MISSING
    ]


def _resolved(value: Any, base: Path | None) -> Any:
    if base is not None and isinstance(value, Path):
        return base / value.expanduser()
    if base is not None and isinstance(value, tuple):
        return tuple(_resolved(item, base) for item in value)
    return value


def _value(key: str, hint: Any, value: Any) -> Any:
    kinds = [kind for kind in accepted(hint) if kind is not types.NoneType]
    for kind in kinds:
        if kind in _LISTS:
            return _list(key, kind, value)
        if isinstance(kind, type) and issubclass(kind, StrEnum):
            return choice(key, kind, value)
    if Path in kinds and isinstance(value, str | Path):
        return Path(value)
    if float in kinds and type(value) is int:
        return float(value)
    if type(value) in accepted(hint):
        return value
    names = " or ".join(kind.__name__ for kind in kinds)
    raise ConfigError(f"{key} is of type {type(value).__name__}; give a {names}")


def _list(key: str, kind: Any, value: Any) -> tuple[Any, ...]:
    items, described = _LISTS[kind]
    # A truth value is a whole number to Python, and to nobody else.
    fits = isinstance(value, list | tuple) and all(
        isinstance(item, items) and not isinstance(item, bool) for item in value
    )
    if not fits:
        raise ConfigError(f"{key} is no {described}")
    return tuple(Path(item) for item in value) if Path in items else tuple(value)
