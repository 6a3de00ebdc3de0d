"""Write docs/reference/python-api.md from the signatures and docstrings of the public names.

    python scripts/api_reference.py

A test compares the page with what this script would write.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import fedsea
from fedsea.client.background import Pending
from fedsea.client.generation import Timing
from fedsea.client.link import Traffic
from fedsea.client.streams import Stream
from fedsea.client.trainer import Callback, StepReport
from fedsea.client.training_run import Summary

PAGE = Path(__file__).resolve().parents[1] / "docs" / "reference" / "python-api.md"
HEAD = """\
# Python API

<!-- Written by scripts/api_reference.py from the docstrings; change them there. -->

The names of the package `fedsea`, then the types of what they return. Other modules are open to
read and may change. [Use it from Python](../how-to/use-from-python.md) shows them at work,
[errors](errors.md) lists what they raise.
"""
RETURNED: tuple[type[Any], ...] = (
    Stream,
    Pending,
    Timing,
    Traffic,
    Summary,
    StepReport,
    Callback,
)

_LINE = 88
_SECTION = re.compile(r"^(Args|Attributes|Returns|Raises):$", re.MULTILINE)
_ENTRY = re.compile(r"^ {4}([\w, ]+): (.+(?:\n {8}.+)*)", re.MULTILINE)
_VERBS = {"Args": "Arguments", "Attributes": "Fields", "Returns": "Returns", "Raises": "Raises"}


def page() -> str:
    """The whole page."""
    names = [name for name in fedsea.__all__ if name != "__version__"]
    classes = [getattr(fedsea, name) for name in names]
    return "\n".join([HEAD, *(_section(cls) for cls in (*classes, *RETURNED))])


def _section(cls: type[Any]) -> str:
    lines = [f"## {cls.__name__}", "", *_import(cls), *_described(_doc(cls)), *_fields(cls)]
    for name, member in _members(cls):
        lines += [f"### {cls.__name__}.{name}", "", *_signature(name, member)]
        lines += _described(inspect.getdoc(_function(member)) or "")
    return "\n".join(lines)


def _import(cls: type[Any]) -> Iterator[str]:
    home = "fedsea" if cls.__name__ in fedsea.__all__ else cls.__module__
    yield from ("```python", f"from {home} import {cls.__name__}")
    if not issubclass(cls, Enum | Exception) and not _made_elsewhere(cls):
        yield from ("", *_call(cls.__name__, inspect.signature(cls)).splitlines())
    yield from ("```", "")


def _made_elsewhere(cls: type[Any]) -> bool:
    """Whether users get objects of this class from a method and do not construct them."""
    return "Make one with" in _doc(cls) or cls in (Stream, Pending)


def _doc(cls: type[Any]) -> str:
    text = inspect.getdoc(cls) or ""
    return "" if text.startswith(f"{cls.__name__}(") else text


def _fields(cls: type[Any]) -> Iterator[str]:
    """The strings below fields, as a table; values of an enum likewise."""
    notes = _notes(cls)
    if issubclass(cls, Enum):
        yield from ("| value | |", "|---|---|")
        yield from (f"| `{member.name}` | {notes[member.name]} |" for member in cls)
        yield ""
    elif dataclasses.is_dataclass(cls) and notes:
        yield from ("| field | |", "|---|---|")
        yield from (
            f"| `{entry.name}` | {notes[entry.name]} |" for entry in dataclasses.fields(cls)
        )
        yield ""


def _notes(cls: type[Any]) -> dict[str, str]:
    """The string literals that follow assignments in the body of a class."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    found: dict[str, str] = {}
    target = ""
    for node in tree.body if isinstance(tree, ast.ClassDef) else ():
        match node:
            case ast.AnnAssign(target=ast.Name(id=name)) | ast.Assign(targets=[ast.Name(id=name)]):
                target = name
            case ast.Expr(value=ast.Constant(value=str(text))) if target:
                found[target] = " ".join(text.split())
                target = ""
            case _:
                target = ""
    return found


def _members(cls: type[Any]) -> Iterator[tuple[str, Any]]:
    """Public methods and properties of the class itself that have a docstring."""
    for name, member in vars(cls).items():
        function = _function(member)
        is_public = callable(function) and not isinstance(member, type) and name[0] != "_"
        if is_public and inspect.getdoc(function):
            yield name, member


def _function(member: Any) -> Any:
    if isinstance(member, property):
        return member.fget
    return member.__func__ if isinstance(member, classmethod) else member


def _signature(name: str, member: Any) -> list[str]:
    function: Callable[..., Any] = _function(member)
    signature = inspect.signature(function)
    if isinstance(member, property):
        shown = f"{name}: {_annotation(signature.return_annotation)}"
    else:
        parameters = list(signature.parameters.values())[1:]
        shown = _call(name, signature.replace(parameters=parameters))
    decorator = ["@classmethod"] if isinstance(member, classmethod) else []
    return ["```python", *decorator, *shown.splitlines(), "```", ""]


def _call(name: str, signature: inspect.Signature) -> str:
    """A signature on one line, or on one line for each parameter where it is long."""
    returned = signature.return_annotation
    arrow = ""
    if returned is not inspect.Signature.empty and returned not in ("None", None):
        arrow = f" -> {_annotation(returned)}"
    parameters = [_parameter(entry) for entry in signature.parameters.values()]
    keyword = inspect.Parameter.KEYWORD_ONLY
    kinds = [entry.kind for entry in signature.parameters.values()]
    if keyword in kinds and inspect.Parameter.VAR_POSITIONAL not in kinds:
        parameters.insert(kinds.index(keyword), "*")
    line = f"{name}({', '.join(parameters)}){arrow}"
    if len(line) <= _LINE:
        return line
    return "\n".join([f"{name}(", *(f"    {entry}," for entry in parameters), f"){arrow}"])


def _parameter(entry: inspect.Parameter) -> str:
    text = str(entry.replace(annotation=entry.empty, default=entry.empty))
    if entry.annotation is not inspect.Parameter.empty:
        text += f": {_annotation(entry.annotation)}"
    if entry.default is not inspect.Parameter.empty:
        text += f" = {_default(entry.default)}"
    return text


def _default(value: object) -> str:
    if "factory" in repr(value):
        return "..."
    if isinstance(value, str):
        return f'"{value}"'
    return f"{value:_}" if isinstance(value, int) and value >= 10_000 else repr(value)


def _annotation(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)


def _described(doc: str) -> list[str]:
    """A docstring of ours as Markdown: lists for its sections."""
    first, *sections = _SECTION.split(doc)
    lines = [first.strip(), ""] if first.strip() else []
    for title, body in zip(sections[::2], sections[1::2], strict=True):
        entries = _ENTRY.findall(body) if title != "Returns" else []
        if entries:
            lines += [f"{_VERBS[title]}:", ""]
            lines += [f"* `{name}`: {' '.join(text.split())}" for name, text in entries] + [""]
        else:
            lines += [f"{_VERBS[title]}: {' '.join(body.split())}", ""]
    return lines


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
