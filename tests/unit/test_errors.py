"""The exception tree: its drawing, its codes and its page of documentation."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from fedsea import errors
from fedsea.errors import FedseaError, Refused

DOCUMENTED = Path(__file__).parents[2] / "docs" / "reference" / "errors.md"
CLASSES = {
    name: member
    for name, member in vars(errors).items()
    if inspect.isclass(member) and issubclass(member, FedseaError)
}
LEAVES = re.compile(r"^ {4}(?P<rails>(?:\|   |    )*)(?P<branch>\+-- )?(?P<name>[A-Z]\w+)\b")


def drawn_tree(docstring: str) -> dict[str, str | None]:
    """The parent of every class that the drawing shows; None for the root."""
    parents: dict[str, str | None] = {}
    path: list[str] = []
    for line in docstring.splitlines():
        match = LEAVES.match(line)
        if match is None:
            continue
        depth = len(match["rails"]) // 4 + (1 if match["branch"] else 0)
        path[depth:] = [match["name"]]
        parents[match["name"]] = path[depth - 1] if depth else None
    return parents


def test_drawn_tree_equals_the_classes():
    """Every class is drawn in the module docstring under its own parent, and nothing else is."""
    actual = {
        name: None if cls is FedseaError else cls.__bases__[0].__name__
        for name, cls in CLASSES.items()
    }

    assert errors.__doc__ is not None
    assert drawn_tree(errors.__doc__) == actual


def test_codes_are_unique():
    """No two classes share a code, so a code on the wire names one class."""
    codes = [cls.code for cls in CLASSES.values()]

    assert sorted(codes) == sorted(set(codes))


@pytest.mark.parametrize("cls", CLASSES.values(), ids=CLASSES)
def test_every_class_states_its_own_code(cls):
    """A class declares its code itself, in words that fit a metadata value."""
    assert "code" in vars(cls)
    assert re.fullmatch(r"[a-z]+(_[a-z]+)*", cls.code)


@pytest.mark.parametrize("cls", CLASSES.values(), ids=CLASSES)
def test_exit_codes_leave_room_for_signals(cls):
    """An exit code says failure and is not one that a shell uses for signals."""
    assert 1 <= cls.exit_code < 126


@pytest.mark.parametrize("cls", CLASSES.values(), ids=CLASSES)
def test_every_class_is_explained(cls):
    """Each class has a docstring of its own."""
    assert "__doc__" in vars(cls)
    assert cls.__doc__


def test_error_classes_finds_every_class_by_code():
    """The table by wire code holds the whole tree."""
    found = errors.error_classes()

    assert {found[cls.code] for cls in CLASSES.values()} == set(CLASSES.values())


def test_refusal_carries_when_to_retry():
    """A refusal keeps its message and the seconds to wait."""
    refusal = Refused("the pool is full; try again later", retry_after=0.25)

    assert str(refusal) == "the pool is full; try again later"
    assert refusal.retry_after == 0.25


@pytest.mark.parametrize(
    "cls", [cls for cls in CLASSES.values() if issubclass(cls, Refused)], ids=lambda cls: cls.code
)
def test_refusal_without_retry(cls):
    """Every refusal can say that waiting does not help."""
    assert cls("no").retry_after is None


def test_reference_page_equals_the_classes():
    """The table in the documentation states every class, parent, code and exit code."""
    row = re.compile(r"^\| `(\w+)` \| `(\w+)` \| `(\w+)` \| (\d+) \|$", re.MULTILINE)
    documented = row.findall(DOCUMENTED.read_text(encoding="utf-8"))

    assert documented == [
        (name, cls.__bases__[0].__name__, cls.code, str(cls.exit_code))
        for name, cls in CLASSES.items()
    ]
