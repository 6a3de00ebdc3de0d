"""Files of tasks into records."""

from __future__ import annotations

from pathlib import Path

from fedsea.errors import ConfigError, DataError
from fedsea.tasks.catalogue import TASKS, task
from fedsea.tasks.records import Record, sampled
from fedsea.tasks.templates import Template, read_overrides


def template(name: str, style: str = "", overrides: Path | None = None) -> Template:
    """The template of a task after a file of changed and added ones, see `read_overrides`.

    Raises:
        ConfigError: there is no such task or style, or the file cannot be used.
    """
    chosen = task(name)
    if overrides is None:
        return chosen.template(style)
    known = {each.name: each.styles for each in TASKS.values()}
    return chosen.template(style, read_overrides(overrides, known)[name])


def load(
    name: str,
    path: Path,
    *,
    limit: int | None = None,
    seed: int = 0,
    style: str = "",
    overrides: Path | None = None,
) -> list[Record]:
    """The records of a file of a task, in its order.

    Args:
        name: of the task.
        path: a file in one of the task's formats.
        limit: most records; the seed draws them, questions whole.
        seed: of the draw.
        style: of the template; empty for the task's first.
        overrides: a TOML file of templates.

    Raises:
        ConfigError: the task, the style, the templates or the limit cannot be used.
        DataError: the file cannot be read or is of another form; it names file and line.
    """
    put = template(name, style, overrides)
    if limit is not None and limit < 1:
        raise ConfigError(f"a limit of {limit} records leaves none; give 1 or more")
    entries = list(task(name).read(path))
    if not entries:
        raise DataError(f"{path} holds no records of {name}; check the file")
    if limit is not None and limit < len(entries):
        entries = sampled(entries, limit, seed)
    return [put.render(entry) for entry in entries]
