"""`fedsea finetune`: train an adapter through the cut, and say where its parts are."""

from __future__ import annotations

import shlex
import signal
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedsea.cli import INTERRUPTED, screen
from fedsea.cli.options import AsJson, ConnectionOptions, flattened
from fedsea.cli.serve import parse_setting
from fedsea.cli.training_protection import (
    TrainingProtectionOptions,
    show_training_privacy,
    show_training_spent,
    training_privacy_summary,
)
from fedsea.errors import ConfigError

if TYPE_CHECKING:
    from fedsea.client.finetuning import FinetuneConfig, Finetuning
    from fedsea.client.trainer import Trainer
    from fedsea.client.training_run import Summary

_DATA = "Data"
_MODEL = "Model"
_TRAINING = "Training"


class LossOn(StrEnum):
    """Which tokens the loss is on."""

    ANSWER = "answer"
    ALL = "all"


@dataclass(frozen=True, slots=True)
class FinetuneOptions:
    """The settings that have an option of their own; None leaves the file's."""

    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the adapter's parts of bottom and top, checkpoints and metrics.",
            show_default=False,
            rich_help_panel=_TRAINING,
        ),
    ] = None
    name: Annotated[
        str | None,
        typer.Option(
            help="Of the trunk's part at the server, among this tenant's.",
            show_default="the name of --out",
            rich_help_panel=_TRAINING,
        ),
    ] = None
    evaluation: Annotated[
        Path | None,
        typer.Option(
            help="File of examples to evaluate on.", show_default=False, rich_help_panel=_DATA
        ),
    ] = None
    evaluation_share: Annotated[
        float | None,
        typer.Option(
            help="So large a part of DATA is for evaluation instead.",
            show_default="0",
            rich_help_panel=_DATA,
        ),
    ] = None
    loss_on: Annotated[
        LossOn | None,
        typer.Option(
            help="Tokens that the loss is on.", show_default="answer", rich_help_panel=_DATA
        ),
    ] = None
    max_tokens: Annotated[
        int | None,
        typer.Option(
            help="Most tokens of an example; longer ones are left out, or cut with "
            "--set data.too_long=cut.",
            show_default=False,
            rich_help_panel=_DATA,
        ),
    ] = None
    task: Annotated[
        str | None,
        typer.Option(
            help="DATA is a file of this task, whose template, LoRA sizes and learning rate hold.",
            show_default=False,
            rich_help_panel=_DATA,
        ),
    ] = None
    limit: Annotated[
        int | None,
        typer.Option(
            help="With --task: most records of each file.",
            show_default="all",
            rich_help_panel=_DATA,
        ),
    ] = None
    bottom: Annotated[
        int | None,
        typer.Option(
            help="Blocks after the embedding that stay here.",
            show_default="1",
            rich_help_panel=_MODEL,
        ),
    ] = None
    top: Annotated[
        int | None,
        typer.Option(
            help="Blocks before the final norm that stay here.",
            show_default="1",
            rich_help_panel=_MODEL,
        ),
    ] = None
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Number format of the blocks here: auto, fp32, bf16 or fp16.",
            show_default="auto",
            rich_help_panel=_MODEL,
        ),
    ] = None
    device: Annotated[
        str | None,
        typer.Option(
            help="Where the blocks here run: cpu, cuda or mps.",
            show_default="cpu",
            rich_help_panel=_MODEL,
        ),
    ] = None
    rank: Annotated[
        int | None,
        typer.Option(help="Of the adapter.", show_default="8", rich_help_panel=_TRAINING),
    ] = None
    epochs: Annotated[
        int | None,
        typer.Option(help="Passes over the examples.", show_default="1", rich_help_panel=_TRAINING),
    ] = None
    steps: Annotated[
        int | None,
        typer.Option(
            help="Optimizer steps, in place of --epochs.",
            show_default=False,
            rich_help_panel=_TRAINING,
        ),
    ] = None
    batch_size: Annotated[
        int | None,
        typer.Option(
            help="Examples that are run together.", show_default="8", rich_help_panel=_TRAINING
        ),
    ] = None
    learning_rate: Annotated[
        float | None,
        typer.Option(help="The largest.", show_default="0.0002", rich_help_panel=_TRAINING),
    ] = None
    patience: Annotated[
        int | None,
        typer.Option(
            help="End after so many evaluations without a better loss, at the best one.",
            show_default=False,
            rich_help_panel=_TRAINING,
        ),
    ] = None
    seed: Annotated[
        int | None,
        typer.Option(help="Start of all chance.", show_default="0", rich_help_panel=_TRAINING),
    ] = None
    tensorboard: Annotated[
        bool | None,
        typer.Option(
            "--tensorboard",
            help="Write metrics for TensorBoard too.",
            show_default=False,
            rich_help_panel=_TRAINING,
        ),
    ] = None


_SECTIONS = {
    **dict.fromkeys(("out", "name", "evaluation", "evaluation_share", "tensorboard"), "run"),
    **dict.fromkeys(("loss_on", "max_tokens", "task", "limit"), "data"),
    **dict.fromkeys(("bottom", "top", "dtype", "device"), "parts"),
    "rank": "lora",
}


@flattened
def finetune(
    connection: ConnectionOptions,
    settings: FinetuneOptions,
    protecting: TrainingProtectionOptions,
    data: Annotated[
        Path | None,
        typer.Argument(
            help="File of examples: JSON lines of prompt and completion or of messages, or text; with "
            "--task a file of that task.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Folder of a checkpoint or a client bundle, or a hub id.",
            show_default=False,
            rich_help_panel=_MODEL,
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="TOML file with all settings; options come before it.", show_default=False
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Any other setting, as SECTION.KEY=VALUE; repeat it for several.",
            show_default=False,
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume/--no-resume", help="Go on when --out holds this run; otherwise refuse it."
        ),
    ] = True,
    threads: Annotated[
        int,
        typer.Option(
            help="CPU threads; 0 leaves torch's own number.", min=0, rich_help_panel=_MODEL
        ),
    ] = 0,
    as_json: AsJson = False,
) -> None:
    """Fine-tune a model on data that stays here; its trunk is trained where it is served.

    Rows of hidden states and their gradients travel; text, ids, labels and losses do not. The parts
    of the adapter for bottom and top are written to --out and nowhere else, the trunk's part stays
    at the server under its name. Ctrl-C ends behind the step under way, saved; the same command goes
    on, after a crash of either side too.
    """
    chosen = _config(config, _overrides(settings, data, model, set_ or ()))
    credentials, verifier = connection.credentials(), connection.verifier()
    protection = protecting.chosen(connection, chosen.run.adapter)
    with screen.bar(f"reading {chosen.run.data.name}"):
        import torch

        from fedsea.cli.training_display import TrainingDisplay
        from fedsea.client.finetuning import Finetuning

        if threads:
            torch.set_num_threads(threads)
        run = Finetuning(chosen)
    if run.resumes and not resume:
        raise ConfigError(
            f"{chosen.run.out} holds a run already: leave --no-resume out to go on with it, "
            "or give another --out"
        )
    if not as_json:
        _show_data(run)
    policy = None if protection is None else run.protect(protection)
    with nullcontext() if policy is None else closing(policy):
        with screen.loading(f"loading {Path(chosen.run.model).name}"):
            split = run.connect(
                connection.addresses,
                tls=credentials,
                on_notice=screen.notice,
                verifier=verifier,
                policy=policy,
            )
        with split, run.metrics() as metrics, TrainingDisplay() as display:
            if not as_json:
                show_training_privacy(policy)
            trainer = run.trainer(split, [*metrics, *(() if as_json else (display,))])
            with _stopped_by_ctrl_c(trainer):
                summary = trainer.run()
            address = split.address
        if as_json:
            privacy = {"privacy": training_privacy_summary(policy)}
            screen.write_json({**asdict(summary), **_places(chosen), "server": address, **privacy})
        else:
            _show_summary(chosen, connection, summary, display.first_loss)
            show_training_spent(policy)
    if summary.stopped == "request":
        raise typer.Exit(INTERRUPTED)


def _overrides(
    settings: FinetuneOptions, data: Path | None, model: str | None, entries: Any
) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for entry in entries:
        section, key, value = parse_setting(entry)
        found.setdefault(section, {})[key] = value
    given = {"data": data, "model": model}
    given |= {entry.name: getattr(settings, entry.name) for entry in fields(settings)}
    for key, value in given.items():
        if value is not None:
            section = "run" if key in {"data", "model"} else _SECTIONS.get(key, "training")
            found.setdefault(section, {})[key] = value
    return found


def _config(path: Path | None, overrides: dict[str, dict[str, Any]]) -> FinetuneConfig:
    from fedsea.client.finetuning import FinetuneConfig

    if path is not None:
        return FinetuneConfig.load(path, overrides)
    options = {"data": "DATA", "model": "--model", "out": "--out"}
    missing = [option for key, option in options.items() if key not in overrides.get("run", {})]
    if missing:
        raise ConfigError(f"give {', '.join(missing)}, or a --config that says it")
    return FinetuneConfig.from_table({}, overrides)


def _show_data(run: Finetuning) -> None:
    """What is learned from, and what does not fit."""
    config, training, evaluation = run.config.run, run.train_set, run.evaluation_set
    line = f"{len(training)} examples, {training.tokens} tokens, {training.answer_tokens} to learn"
    if evaluation is not None:
        line += f"; {len(evaluation)} examples to evaluate on"
    screen.detail(line)
    for found in (training, *(() if evaluation is None else (evaluation,))):
        if found.skipped:
            screen.notice(f"{found.skipped} examples were left out: they are over data.max_tokens")
        if found.cut:
            screen.notice(f"{found.cut} examples were cut to data.max_tokens")
    if run.ended is None and run.resumes:
        screen.detail(f"going on with the run in {config.out}")


def _places(config: FinetuneConfig) -> dict[str, str]:
    """Where the parts of the adapter are."""
    from fedsea.client.training_run import ADAPTER

    return {"adapter": str(config.run.out / ADAPTER), "trunk_adapter": config.run.adapter}


def _show_summary(
    config: FinetuneConfig, connection: ConnectionOptions, summary: Summary, first: float | None
) -> None:
    places, run = _places(config), config.run
    table = screen.table(f"{run.data.name} -> {run.adapter}", "", "")
    table.show_header = False
    steps = f"{summary.step} of {summary.steps}"
    reasons = {"patience": "the best; patience ran out", "request": "stopped"}
    if summary.stopped is not None:
        steps += f" ({reasons[summary.stopped]})"
    table.add_row("steps", steps)
    if summary.loss is not None:
        loss = f"{summary.loss:.4f}"
        table.add_row("loss", loss if first is None else f"{first:.4f} -> {loss}")
    if summary.evaluation_loss is not None:
        table.add_row("evaluation loss", f"{summary.evaluation_loss:.4f}")
    table.add_row("tokens", f"{summary.tokens}, {summary.answer_tokens} of them learned")
    up, down = screen.bytes_text(summary.bytes_up), screen.bytes_text(summary.bytes_down)
    table.add_row("wire", f"{up} up, {down} down")
    table.add_row("time", screen.duration_text(summary.seconds))
    if "bottom" in config.lora.train or "top" in config.lora.train:
        table.add_row("bottom and top", places["adapter"])
    if "trunk" in config.lora.train or config.lora.prompt_rows:
        table.add_row("trunk", f"{places['trunk_adapter']}, at the server")
    screen.out.print(table)
    if summary.stopped == "request":
        screen.detail("the same command goes on")
    else:
        screen.write(f"{_command(config, connection)}\n")


def _command(config: FinetuneConfig, connection: ConnectionOptions) -> str:
    """What uses the adapter."""
    parts, lora, places = config.parts, config.lora, _places(config)
    words = ["fedsea", "generate", config.run.model, "PROMPT"]
    words += ["--bottom", str(parts.bottom), "--top", str(parts.top)]
    if "bottom" in lora.train or "top" in lora.train:
        words += ["--adapter", places["adapter"]]
    if "trunk" in lora.train:
        words += ["--trunk-adapter", places["trunk_adapter"]]
    if lora.prompt_rows:
        words += ["--trunk-prompt", places["trunk_adapter"]]
    for server in connection.server or ():
        words += ["--server", server]
    for option in ("certs", "tenant", "ca", "cert", "key", "token_file", "server_name"):
        value = getattr(connection, option)
        if value is not None:
            words += [f"--{option.replace('_', '-')}", str(value)]
    if connection.plaintext:
        words.append("--plaintext")
    return shlex.join(words)


@contextmanager
def _stopped_by_ctrl_c(trainer: Trainer) -> Iterator[None]:
    """The first Ctrl-C, and SIGTERM, let the step under way end; another Ctrl-C is one as always."""

    def stop(*_: object) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        screen.notice("ending behind this step; Ctrl-C again ends at once")
        trainer.stop()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
