"""Write docs/reference/tasks.md from the tasks as they are defined.

    python scripts/task_reference.py

A test compares the page with what this script would write.
"""

from __future__ import annotations

import inspect
from pathlib import Path

from fedsea.tasks.catalogue import TASKS
from fedsea.tasks.metrics import Metric
from fedsea.tasks.task import LORA_DROPOUT, LORA_TARGETS, Task
from fedsea.tasks.templates import Template

PAGE = Path(__file__).resolve().parents[1] / "docs" / "reference" / "tasks.md"
# Which templates are those of FedSEA-LLaMA, by task and style; all others are ours.
OF_THE_PAPER = {
    "cloze": ("multirc", "boolq", "rte", "cb", "copa", "wic", "wsc", "record"),
    "chat": ("multirc", "record", "coqa", "xsum"),
}
_TABLES = {"cloze": "the paper's Table 5", "chat": "the paper's chat form (Table 6 and code)"}

HEAD = """\
# Tasks

<!-- Written by scripts/task_reference.py from fedsea.tasks.catalogue; change it there. -->

The tasks that `fedsea evaluate` and `fedsea finetune --task` know:
[how to use them](../how-to/evaluate-on-tasks.md). Files are read as they are published; none comes
with fedsea. The paper is FedSEA-LLaMA, arXiv 2505.15683.
"""

TEMPLATES = """\
## Templates

A name in braces stands for a field of the record. `{name:.}` ends with that mark unless it ends in
one of `. ! ?` already; `{name:bare}` is without its final mark, and `{name:inline}` without its
first capital too. In a completion `{answer}` stands for the words of an answer, in a prompt
`{history}` for the turns before, each put by `turn`.

A causal model sees nothing behind the place of its answer. Where the paper's cloze has its gap in
the middle, the completion goes on to the end of the text: a choice is judged by, and learned with,
what follows it. A label without words is "none of the others": it is not learned, and a written
answer that means no other choice means it.

A TOML file changes templates, or adds styles, in tables `[TASK.STYLE]` with the keys `prompt`,
`completion`, `words`, `turn`, `turns` (most earlier turns, -1 for all) and `stop` (text that ends a
written answer). What a table leaves out stays as it is here.
"""


def page() -> str:
    """The whole page."""
    used = f"LoRA on {', '.join(f'`{name}`' for name in LORA_TARGETS)}, dropout {LORA_DROPOUT}"
    lines = [
        HEAD,
        "| task | files | styles | measures | longest | written | learning rate | r | alpha |",
        "|---|---|---|---|---|---|---|---|---|",
        *map(_row, TASKS.values()),
        "",
        "*longest*: most tokens of prompt and answer. *written*: most tokens of a written answer.",
        f"For training, with {used}; numbers in **bold** are those of the paper's Table 8.",
        "",
        "## Measures",
        "",
        *_measures(),
        TEMPLATES,
    ]
    for task in TASKS.values():
        lines += _task(task)
    return "\n".join(lines).rstrip() + "\n"


def _row(task: Task) -> str:
    defaults = task.defaults
    trained = [f"{defaults.learning_rate:g}", str(defaults.rank), str(defaults.alpha)]
    if defaults.of_the_paper:
        trained = [f"**{number}**" for number in trained]
    cells = [
        f"[{task.name}](#{task.name})",
        task.files,
        ", ".join(task.styles),
        ", ".join(task.scores),
        str(defaults.max_tokens),
        str(defaults.new_tokens),
        *trained,
    ]
    return f"| {' | '.join(cells)} |"


def _measures() -> list[str]:
    metrics: dict[Metric, list[Task]] = {task.metric: [] for task in TASKS.values()}
    for task in TASKS.values():
        metrics[task.metric].append(task)
    lines = []
    for metric, tasks in metrics.items():
        said = " ".join((inspect.getdoc(metric) or "").split())
        names = ", ".join(task.name for task in tasks)
        lines += [f"* {', '.join(f'`{name}`' for name in tasks[0].scores)} ({names}): {said}"]
    return [*lines, ""]


def _task(task: Task) -> list[str]:
    lines = [
        f"## {task.name}",
        "",
        f"Fields: {', '.join(f'`{name}`' for name in task.fields)}.",
        "",
    ]
    reads = " ".join((inspect.getdoc(task.read) or "").split())
    lines += [f"Files: {reads}", ""]
    for style, template in task.styles.items():
        paper = task.name in OF_THE_PAPER.get(style, ())
        lines += [f"`{style}`, {_TABLES[style] if paper else 'ours'}:", "", "```toml"]
        lines += [f"[{task.name}.{style}]", *_toml(template), "```", ""]
    return lines


def _toml(template: Template) -> list[str]:
    lines = [
        f"prompt = {_quoted(template.prompt)}",
        f"completion = {_quoted(template.completion)}",
    ]
    if template.words:
        words = ", ".join(f"{label} = {_quoted(said)}" for label, said in template.words.items())
        lines.append(f"words = {{ {words} }}")
    if template.turn:
        lines += [f"turn = {_quoted(template.turn)}", f"turns = {template.turns}"]
    if template.stop:
        lines.append(f"stop = {_quoted(template.stop)}")
    return lines


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
