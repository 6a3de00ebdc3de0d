"""`fedsea evaluate`: how well a model answers a file of a task, over the split."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedsea.cli import screen
from fedsea.cli.generate import quiet_recorder
from fedsea.cli.options import AsJson, ClientModelOptions, ConnectionOptions, flattened
from fedsea.cli.protection import ProtectionOptions, show_mode
from fedsea.cli.task_options import AnsweringOptions, RecordOptions
from fedsea.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Mapping

_PERCENT = 100


@flattened
def evaluate(
    task: Annotated[str, typer.Argument(help="Name of the task.", show_default=False)],
    file: Annotated[Path, typer.Argument(help="File of the task.", show_default=False)],
    model: Annotated[
        str,
        typer.Option(help="Folder of a checkpoint or a bundle, or a hub id.", show_default=False),
    ],
    connection: ConnectionOptions,
    parts: ClientModelOptions,
    choosing: RecordOptions,
    answering: AnsweringOptions,
    protecting: ProtectionOptions,
    as_json: AsJson = False,
) -> None:
    """Answer the records of FILE with a model whose trunk is served elsewhere, and judge that.

    Texts and answers stay here. Records whose right answer is not known are not asked.
    """
    options = answering.chosen(task, choosing.style, choosing.templates)
    records = [record for record in choosing.load(task, file) if record.gold]
    if not records:
        raise DataError(f"{file} does not say what the right answers are; take a file with labels")
    privacy, recorder = protecting.chosen(connection), quiet_recorder()
    with screen.loading(f"loading {Path(model).name}"):
        llm = parts.connect(model, connection, screen.notice, recorder, None, privacy)
    from fedsea.client.answering import ByLLM, answers
    from fedsea.tasks.catalogue import task as task_of
    from fedsea.tasks.metrics import judged

    with llm:
        if not as_json:
            show_mode(llm)
        begun = time.monotonic()
        with screen.bar(f"answering {task}") as advance:
            found = answers(ByLLM(llm), llm.tokenizer, records, options, advance)
        seconds, mode = time.monotonic() - begun, llm.mode.value
    measures = judged(task_of(task).metric, found.predictions, records)
    if as_json:
        wire = {"up": recorder.up.bytes, "down": recorder.down.bytes}
        about = {"task": task, "records": len(records), "cut": found.cut, "mode": mode}
        screen.write_json(
            {**about, "metrics": measures, "seconds": round(seconds, 3), "wire": wire}
        )
        return
    _show(f"{task}: {len(records)} records", measures)
    if found.cut:
        screen.notice(f"{found.cut} prompts were over --max-tokens and lost their front")
    screen.detail(
        f"{screen.seconds_text(seconds)}; wire: {screen.bytes_text(recorder.up.bytes)} up, "
        f"{screen.bytes_text(recorder.down.bytes)} down"
    )


def _show(title: str, measures: Mapping[str, float]) -> None:
    table = screen.table(title, "measure", "%")
    for name, value in measures.items():
        table.add_row(name, f"{_PERCENT * value:.2f}")
    screen.out.print(table)
