"""What a command shows: errors, notices, progress bars, numbers for people.

Results go to standard output, everything else to standard error, so that output can be piped.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Self

import typer
from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

_KILO = 1000.0


@dataclass(slots=True)
class _Text:
    """The result on its way to standard output: whether its last line is unfinished."""

    is_under_way: bool = False


_text = _Text()


def fail(message: str) -> None:
    """One line that says what went wrong."""
    err.print(Text.assemble(("error: ", "bold red"), message), soft_wrap=True)


def notice(message: str) -> None:
    """One line about something that the user should know, below a text that is under way."""
    if _text.is_under_way and out.is_terminal and err.is_terminal:
        err.print()
        _text.is_under_way = False
    err.print(Text.assemble(("note: ", "yellow"), message), soft_wrap=True)


class Notices(logging.Handler):
    """Shows what the library logs as notices."""

    def emit(self, record: logging.LogRecord) -> None:
        """Show one record."""
        notice(record.getMessage())


def detail(message: str) -> None:
    """One line of figures beside the result."""
    err.print(Text(message, style="dim"), soft_wrap=True)


def write(text: str) -> None:
    """A piece of the result, at once."""
    typer.echo(text, nl=False)
    _text.is_under_way = not text.endswith("\n")


def write_json(value: Mapping[str, Any]) -> None:
    """The result for programs, in one line."""
    typer.echo(json.dumps(value, ensure_ascii=False))


def table(title: str, *columns: str) -> Table:
    """An empty table; all columns but the first are numbers."""
    made = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for index, column in enumerate(columns):
        made.add_column(column, justify="right" if index else "left", no_wrap=index > 0)
    return made


def bytes_text(size: float) -> str:
    """A size as people read it: 640 B, 12.3 kB, 4.5 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < _KILO:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= _KILO
    return f"{size:.1f} TB"


def figure(value: float) -> str:
    """A number in four digits; what has no bound says so."""
    return f"{value:.4g}" if math.isfinite(value) else "no bound"


def seconds_text(seconds: float) -> str:
    """A duration as people read it: 430 µs, 12.3 ms, 4.56 s."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} µs"
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def duration_text(seconds: float) -> str:
    """A long duration as people read it: 7.5 s, 12 s, 3:05 min, 1:02:03 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02} h" if hours else f"{minutes}:{rest:02} min"


def _progress(*more: ProgressColumn) -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        *more,
        console=err,
        transient=True,
        disable=not err.is_terminal,
        redirect_stdout=False,
        redirect_stderr=False,
    )


@contextmanager
def bar(description: str) -> Iterator[Callable[[int, int], None]]:
    """A bar that is gone at the end; call what it yields with the work done and the work in all."""
    with _progress() as progress:
        task = progress.add_task(description, total=None)

        def advance(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        yield advance


@contextmanager
def training_bar(description: str) -> Iterator[Callable[[int, int, float], None]]:
    """The same with the time left; what it yields also takes the loss."""
    with _progress(TextColumn("{task.fields[loss]}"), TimeRemainingColumn()) as progress:
        task = progress.add_task(description, total=None, loss="")

        def advance(done: int, total: int, loss: float) -> None:
            progress.update(task, completed=done, total=total, loss=f"loss {loss:.4f}")

        yield advance


class StatusBar:
    """A bar with figures beside it, as many as fit; it shows from the first `show` until closed."""

    _WIDTH = 12
    _AROUND = 36  # everything but the figures

    def __init__(self, description: str) -> None:
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=self._WIDTH),
            TaskProgressColumn(),
            TextColumn("{task.fields[figures]}"),
            console=err,
            transient=True,
            disable=not err.is_terminal,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._task = self._progress.add_task(description, total=None, figures="")

    def show(self, done: int, total: int, figures: Sequence[str]) -> None:
        """Take what is done, what there is in all, and figures, the most important first."""
        self._progress.start()
        fitting, room = 0, err.width - self._AROUND
        for number in range(1, len(figures) + 1):
            if len(", ".join(figures[:number])) <= room:
                fitting = number
        shown = ", ".join(figures[:fitting])
        self._progress.update(self._task, completed=done, total=total, figures=shown)

    def close(self) -> None:
        """Remove the bar; safe to repeat."""
        self._progress.stop()


class loading:  # noqa: N801 - used as a block, like `bar`
    """A bar for as long as a model is loaded: it follows the tensors that transformers reads."""

    def __init__(self, description: str) -> None:
        self._stack = ExitStack()
        self._description = description

    def __enter__(self) -> Self:
        advance = self._stack.enter_context(bar(self._description))
        from transformers.utils import logging as transformers_logging

        def watched(factory: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
            return _Watched(args[0], advance) if args else factory(*args, **kwargs)

        previous = transformers_logging.set_tqdm_hook(watched)
        self._stack.callback(transformers_logging.set_tqdm_hook, previous)
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the bar; safe to repeat."""
        self._stack.close()


class _Watched:
    """Stands where transformers expects its own progress bar around an iterable."""

    def __init__(self, items: Iterable[Any], advance: Callable[[int, int], None]) -> None:
        self._items = list(items)
        self._advance = advance

    def __iter__(self) -> Iterator[Any]:
        for done, item in enumerate(self._items):
            self._advance(done, len(self._items))
            yield item
        self._advance(len(self._items), len(self._items))

    def __getattr__(self, name: str) -> Callable[..., None]:
        return _ignore


def _ignore(*_: Any, **__: Any) -> None:
    return None


class PromptBar:
    """A bar for a long prompt; it shows only when the prompt takes more than one step."""

    def __init__(self) -> None:
        self._progress: Progress | None = None

    def __call__(self, done: int, total: int) -> None:
        """Take the rows done and the rows in all."""
        if done >= total:
            self.close()
            return
        if self._progress is None:
            self._progress = _progress()
            self._progress.add_task("reading the prompt", total=total)
            self._progress.start()
        self._progress.update(self._progress.task_ids[0], completed=done)

    def close(self) -> None:
        """Remove the bar."""
        progress, self._progress = self._progress, None
        if progress is not None:
            progress.stop()
