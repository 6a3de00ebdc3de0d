"""Write docs/reference/cli.md from the commands as they are declared.

    python scripts/cli_reference.py

A test compares the page with what this script would write.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import typer
from typer.models import ArgumentInfo

from fedsea.cli.app import app

PAGE = Path(__file__).resolve().parents[1] / "docs" / "reference" / "cli.md"
HEAD = """\
# Command line

<!-- Written by scripts/cli_reference.py from the commands; change them there. -->

`fedsea COMMAND --help` shows the same in a terminal, and `fedsea --install-completion` teaches the
shell to complete commands and options. Results go to standard output; notices, figures and progress
bars go to standard error. `fedsea --debug COMMAND` shows tracebacks and details.

An error is one line on standard error: what happened, and what to do.
[Errors and exit codes](errors.md) lists what a command returns; 0 is success, 130 is Ctrl-C.
"""


def page() -> str:
    """The whole page."""
    return "\n".join([HEAD, *(section for section in _sections(app, "fedsea"))])


def _sections(typer_app: typer.Typer, path: str) -> Iterator[str]:
    for command in typer_app.registered_commands:
        if command.callback is not None and command.name is not None:
            yield _section(f"{path} {command.name}", command.callback)
    for group in typer_app.registered_groups:
        if group.typer_instance is not None and group.name is not None:
            yield from _sections(group.typer_instance, f"{path} {group.name}")


def _section(path: str, callback: Callable[..., Any]) -> str:
    parameters = list(_parameters(callback))
    arguments = [_argument(*found) for found in parameters if isinstance(found[1], ArgumentInfo)]
    options = [_option(*found) for found in parameters if not isinstance(found[1], ArgumentInfo)]
    usage = " ".join([path, *(name for name, _ in arguments), *(["[OPTIONS]"] if options else [])])
    lines = [f"## {path}", "", inspect.getdoc(callback) or "", "", "```text", usage, "```", ""]
    if arguments:
        lines += ["| argument | |", "|---|---|"]
        lines += [f"| `{name}` | {help_text} |" for name, help_text in arguments] + [""]
    if options:
        lines += ["| option | value | default | |", "|---|---|---|---|"]
        lines += [f"| {' | '.join(cells)} |" for cells in options] + [""]
    return "\n".join(lines)


def _parameters(
    callback: Callable[..., Any],
) -> Iterator[tuple[inspect.Parameter, Any, Any]]:
    """Each parameter with typer's declaration and its type."""
    hints = get_type_hints(callback, include_extras=True)
    for parameter in inspect.signature(callback).parameters.values():
        kind, info = get_args(hints[parameter.name])
        yield parameter, info, kind


def _argument(parameter: inspect.Parameter, info: Any, kind: Any) -> tuple[str, str]:
    name = parameter.name.upper() + ("..." if get_origin(kind) is list else "")
    required = parameter.default is inspect.Parameter.empty
    return name if required else f"[{name}]", info.help


def _option(parameter: inspect.Parameter, info: Any, kind: Any) -> list[str]:
    help_text = info.help + (f" Environment: `{info.envvar}`." if info.envvar else "")
    return [f"`{_name(parameter, info)}`", _value(kind), _default(parameter, info), help_text]


def _name(parameter: inspect.Parameter, info: Any) -> str:
    """The name as it is declared; typer keeps the first one where a default would be."""
    first = [info.default] if isinstance(info.default, str) else []
    declared = [*first, *(info.param_decls or ())]
    return ", ".join(declared) or f"--{parameter.name.replace('_', '-')}"


def _value(kind: Any) -> str:
    """What an option takes, in words."""
    if get_origin(kind) in (Union, UnionType):
        kind = next(member for member in get_args(kind) if member is not NoneType)
    if get_origin(kind) is list:
        return _value(get_args(kind)[0])
    if isinstance(kind, type) and issubclass(kind, Enum):
        return ", ".join(f"`{member.value}`" for member in kind)
    return {bool: "", int: "integer", float: "number", str: "text", Path: "path"}[kind]


def _default(parameter: inspect.Parameter, info: Any) -> str:
    if isinstance(info.show_default, str):
        return info.show_default
    value = parameter.default
    if value is inspect.Parameter.empty:
        return "required"
    if value is None or value is False:
        return ""
    if value is True:
        return "on"
    return f"`{value.value if isinstance(value, Enum) else value}`"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
