"""Options of the commands that work on tasks: which records, put how, and how they are answered."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from fedsea.client.answering import AnswerOptions
    from fedsea.tasks.records import Record

_RECORDS = "Records"
_ANSWERING = "Answering"


class Method(StrEnum):
    """How an answer is found."""

    AUTO = "auto"
    LIKELIHOOD = "likelihood"
    GENERATION = "generation"


class Score(StrEnum):
    """What of a choice is compared."""

    SUM = "sum"
    MEAN = "mean"


@dataclass(frozen=True, slots=True)
class RecordOptions:
    """Which records of a task's file are taken, and the template that puts them."""

    limit: Annotated[
        int | None,
        typer.Option(
            help="Most records, drawn by --draw.", show_default="all", rich_help_panel=_RECORDS
        ),
    ] = None
    draw: Annotated[
        int, typer.Option(help="Seed of what --limit draws.", rich_help_panel=_RECORDS)
    ] = 0
    style: Annotated[
        str,
        typer.Option(
            help="Which of the task's templates.",
            show_default="the first",
            rich_help_panel=_RECORDS,
        ),
    ] = ""
    templates: Annotated[
        Path | None,
        typer.Option(
            help="TOML file that changes templates or adds some.",
            show_default=False,
            rich_help_panel=_RECORDS,
        ),
    ] = None

    def load(self, task: str, file: Path) -> list[Record]:
        """The records.

        Raises:
            ConfigError, DataError: as `fedsea.tasks.loading.load`.
        """
        from fedsea.tasks.loading import load

        return load(
            task,
            file,
            limit=self.limit,
            seed=self.draw,
            style=self.style,
            overrides=self.templates,
        )


@dataclass(frozen=True, slots=True)
class AnsweringOptions:
    """How records are answered; None leaves it to the task."""

    method: Annotated[
        Method,
        typer.Option(
            help="Compare the likelihood of choices, or let the model write; auto is likelihood "
            "wherever there are choices.",
            rich_help_panel=_ANSWERING,
        ),
    ] = Method.AUTO
    score: Annotated[
        Score,
        typer.Option(
            help="Compare log p of all tokens of a choice, or its mean.",
            rich_help_panel=_ANSWERING,
        ),
    ] = Score.SUM
    new_tokens: Annotated[
        int | None,
        typer.Option(
            help="Most tokens of an answer that is written.",
            show_default="the task's",
            rich_help_panel=_ANSWERING,
        ),
    ] = None
    max_tokens: Annotated[
        int | None,
        typer.Option(
            help="Most tokens of prompt and answer; longer prompts lose their front.",
            show_default="the task's",
            rich_help_panel=_ANSWERING,
        ),
    ] = None
    batch: Annotated[
        int,
        typer.Option(help="Records that are answered together.", rich_help_panel=_ANSWERING),
    ] = 8

    def chosen(self, task: str, style: str, templates: Path | None) -> AnswerOptions:
        """The same for the library, completed by what the task says.

        Raises:
            ConfigError: a value cannot be used.
        """
        from fedsea.client import answering
        from fedsea.tasks.catalogue import task as task_of
        from fedsea.tasks.loading import template

        defaults = task_of(task).defaults
        return answering.AnswerOptions(
            method=answering.Method(self.method.value),
            score=answering.Score(self.score.value),
            new_tokens=defaults.new_tokens if self.new_tokens is None else self.new_tokens,
            max_tokens=defaults.max_tokens if self.max_tokens is None else self.max_tokens,
            stop=template(task, style, templates).stop,
            batch=self.batch,
        )
