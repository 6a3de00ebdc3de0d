"""What a task is: files, templates, a metric, and what it is trained with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fedsea.errors import ConfigError
from fedsea.tasks.metrics import Metric
from fedsea.tasks.records import Entry
from fedsea.tasks.templates import Styles, Template

# The same for all tasks of the paper.
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
LORA_DROPOUT = 0.05


@dataclass(frozen=True, slots=True)
class Defaults:
    """What a task is trained and evaluated with unless something else is asked for.

    Attributes:
        max_tokens: most tokens of prompt and answer together.
        new_tokens: most tokens of a generated answer.
        learning_rate: peak of AdamW's schedule.
        rank, alpha: size and scale of LoRA.
        of_the_paper: whether learning rate, rank and alpha are those of the paper's Table 8.
    """

    max_tokens: int
    new_tokens: int
    learning_rate: float = 1e-5
    rank: int = 8
    alpha: int = 16
    of_the_paper: bool = False


@dataclass(frozen=True, slots=True)
class Task:
    """A task: files, templates, metric and defaults.

    Attributes:
        name: what it is called in commands and files.
        files: the formats, in words.
        read: gives the entries of a file.
        fields: names that templates may use.
        labels: all labels; none for open answers and for candidates that are texts.
        styles: templates by name; the first one is used unless another one is asked for.
        metric: judges predictions.
        scores: the names of what the metric gives; the first one is the one to compare by.
        defaults: for training and evaluation.
    """

    name: str
    files: str
    read: Callable[[Path], Iterator[Entry]]
    fields: tuple[str, ...]
    labels: tuple[str, ...]
    styles: Styles
    metric: Metric
    scores: tuple[str, ...]
    defaults: Defaults

    def template(self, style: str = "", styles: Styles | None = None) -> Template:
        """The template of a style, from the task's own styles or others.

        Raises:
            ConfigError: there is no such style, or its template cannot be filled.
        """
        known = self.styles if styles is None else styles
        if style and style not in known:
            raise ConfigError(f"{self.name} has no style {style!r}; use {', '.join(known)}")
        chosen = style or next(iter(known))
        known[chosen].check(f"{self.name}.{chosen}", self.fields, self.labels)
        return known[chosen]
