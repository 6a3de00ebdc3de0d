"""`fedsea privacy calibrate` and `fedsea privacy train-...`: learning from public text.

What they write may be given away, because all of it comes from text that the user declares public.
An interrupted training goes on where it was when the same command is given again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedsea.cli import screen
from fedsea.cli.options import AsJson, Bottom, Model, Top, flattened

if TYPE_CHECKING:
    from fedsea.evaluation.frozen import FrozenModel
    from fedsea.evaluation.public_text import PublicText
    from fedsea.evaluation.training import Schedule
    from fedsea.model.projection import Projection
    from fedsea.privacy.mechanism import Mechanism

_TRAINING = "Training"
_SHARES = (0.5, 0.9, 0.95, 0.99, 1.0)
_PLAIN = "plain"
_COLUMNS = {"error": "relative error", "perplexity": "perplexity", "agreement": "agreement"}


class Objective(StrEnum):
    """What a projection is trained for."""

    MSE = "mse"
    NLL = "nll"


class Part(StrEnum):
    """Whose blocks an adapter changes."""

    BOTTOM = "bottom"
    TRUNK = "trunk"
    TOP = "top"


Text = Annotated[
    Path, typer.Option(help="File of public text, UTF-8.", metavar="FILE", show_default=False)
]
Window = Annotated[
    int, typer.Option(help="Tokens of one piece of the text.", rich_help_panel=_TRAINING)
]
MechanismSpec = Annotated[
    str,
    typer.Option(
        "--mechanism",
        help="Whose noise is in sight, as NAME:KEY=VALUE,...; plain is none.",
        metavar="SPEC",
    ),
]
ProjectionFile = Annotated[
    Path | None,
    typer.Option("--projection", help="Projection at the cut.", metavar="FILE", show_default=False),
]


Calibrated = Annotated[
    Path | None,
    typer.Option(
        "--calibration", help="Centre of the mechanism.", metavar="FILE", show_default=False
    ),
]


@dataclass(frozen=True, slots=True)
class TrainingOptions:
    """How a training runs."""

    steps: Annotated[int, typer.Option(help="Gradient steps.", rich_help_panel=_TRAINING)] = 1000
    learning_rate: Annotated[
        float, typer.Option(help="The largest; it rises and falls.", rich_help_panel=_TRAINING)
    ] = 1e-3
    batch: Annotated[
        int, typer.Option(help="Pieces of text in one step.", rich_help_panel=_TRAINING)
    ] = 8
    window: Window = 128
    seed: Annotated[int, typer.Option(help="Start of all chance.", rich_help_panel=_TRAINING)] = 0
    save_seconds: Annotated[
        float,
        typer.Option(
            help="How often the state is saved, to go on after an interruption.",
            min=0,
            rich_help_panel=_TRAINING,
        ),
    ] = 30.0
    threads: Annotated[
        int,
        typer.Option(
            help="CPU threads; 0 leaves torch's own number.", min=0, rich_help_panel=_TRAINING
        ),
    ] = 0

    def schedule(self) -> Schedule:
        """Steps and their size; takes over the number of threads.

        Raises:
            ConfigError: a value out of range.
        """
        import torch

        from fedsea.evaluation.training import Schedule

        if self.threads:
            torch.set_num_threads(self.threads)
        return Schedule(self.steps, self.learning_rate, self.save_seconds)


def calibrate(
    model: Model,
    *,
    text: Text,
    out: Annotated[Path, typer.Option(help="File to write.", metavar="FILE", show_default=False)],
    bottom: Bottom = 1,
    projection: ProjectionFile = None,
    window: Window = 128,
    as_json: AsJson = False,
) -> None:
    """Measure the rows of public text at a cut: their mean, spread and norms.

    Mechanisms clip around the mean, and the quantiles say which clip norm leaves most rows as they
    are. Rows of the beginning-of-text token, which are the same for every text, do not count.
    """
    with screen.bar("measuring the rows of the public text") as advance:
        frozen, public = _open(model, bottom, 0, text, window)
        from fedsea.evaluation.releasing import Cut
        from fedsea.privacy.calibration import Calibration

        pair = _projection(projection, frozen)
        cut, chunks = Cut(public.prefix, None, pair), []
        for done, piece in enumerate(public.training):
            chunks.append(cut.narrow(frozen.rows(piece[None]))[0, public.prefix :])
            advance(done + 1, len(public.training))
        found = Calibration.of(
            chunks, bottom, frozen.fingerprint, "" if pair is None else pair.fingerprint()
        )
    found.save(out)
    if as_json:
        shares = {str(share): found.clip_norm(share) for share in _SHARES}
        screen.write_json({"file": str(out), "rows": found.rows, "clip_norm": shares})
        return
    table = screen.table(
        f"{found.rows} public rows of {found.width} numbers", "share of rows",
        *(f"{share:.0%}" for share in _SHARES),
    )  # fmt: skip
    for name, centered in (("norm around the mean", True), ("norm", False)):
        table.add_row(name, *(f"{found.clip_norm(share, centered):.4g}" for share in _SHARES))
    table.add_row("magnitude of a coordinate", *(f"{found.clip(share):.4g}" for share in _SHARES))
    screen.out.print(table)
    screen.write(f"{out}\n")


def train_projection(
    model: Model,
    *,
    text: Text,
    width: Annotated[
        int, typer.Option(help="Numbers in a row on the wire.", min=1, show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="File to write.", metavar="FILE", show_default=False)],
    bottom: Bottom = 1,
    mechanism: MechanismSpec = _PLAIN,
    objective: Annotated[
        Objective,
        typer.Option(help="Lower the loss of next tokens, or only the error of the rows."),
    ] = Objective.NLL,
    halves: Annotated[
        bool,
        typer.Option("--halves", help="Also write each side's half, as FILE.encoder and .decoder."),
    ] = False,
    training: TrainingOptions,
    as_json: AsJson = False,
) -> None:
    """Train a projection: an encoder for the client and a decoder for the server.

    With a mechanism, it is trained for rows that carry its noise.
    """
    with _progress("training the projection") as on_progress:
        from fedsea.evaluation import projection_training
        from fedsea.evaluation.training import state_file
        from fedsea.privacy.registry import mechanism_from_spec

        recipe = projection_training.Recipe(
            width,
            projection_training.Objective(objective.value),
            training.schedule(),
            training.batch,
            training.seed,
        )
        frozen, public = _open(model, bottom, 0, text, training.window)
        state = state_file(out)
        done = projection_training.train_projection(
            frozen, public, recipe, mechanism_from_spec(mechanism, width=width), state, on_progress
        )
    done.projection.save(out)
    if halves:
        done.projection.for_client().save(out.with_name(f"{out.name}.encoder"))
        done.projection.for_server().save(out.with_name(f"{out.name}.decoder"))
    state.unlink(missing_ok=True)
    _show(out, done.projection.fingerprint(), {"start": done.start, "end": done.end}, as_json)


def train_denoiser(
    model: Model,
    *,
    text: Text,
    mechanism: MechanismSpec,
    out: Annotated[Path, typer.Option(help="File to write.", metavar="FILE", show_default=False)],
    bottom: Bottom = 1,
    top: Top = 1,
    projection: ProjectionFile = None,
    calibration: Calibrated = None,
    inner: Annotated[int, typer.Option(help="Inner size of the denoiser.")] = 128,
    layers: Annotated[int, typer.Option(help="Layers of the denoiser.")] = 2,
    heads: Annotated[int, typer.Option(help="Attention heads of the denoiser.")] = 4,
    reach: Annotated[int, typer.Option(help="Positions that one layer reads.")] = 64,
    training: TrainingOptions,
    as_json: AsJson = False,
) -> None:
    """Train a denoiser: at the client, it takes back part of what noise does to the answer.

    It is for one checkpoint, one partition and one mechanism.
    """
    with _progress("training the denoiser") as on_progress:
        from fedsea.evaluation import denoiser_training
        from fedsea.evaluation.releasing import Cut
        from fedsea.evaluation.training import state_file

        recipe = denoiser_training.Recipe(
            inner, layers, heads, reach, training.schedule(), training.batch, training.seed
        )
        frozen, public = _open(model, bottom, top, text, training.window)
        pair = _projection(projection, frozen)
        chosen = _mechanism(mechanism, calibration, frozen, pair)
        state = state_file(out)
        done = denoiser_training.train_denoiser(
            frozen, public, recipe, Cut(public.prefix, chosen, pair), state, on_progress
        )
    done.denoiser.save(out)
    state.unlink(missing_ok=True)
    rows = {"without": done.without, "start": done.start, "end": done.end}
    _show(out, "", rows, as_json)


def train_prompt(
    model: Model,
    *,
    text: Text,
    out: Annotated[
        Path, typer.Option(help="Folder to write into.", metavar="FOLDER", show_default=False)
    ],
    bottom: Bottom = 1,
    top: Top = 1,
    mechanism: MechanismSpec = _PLAIN,
    projection: ProjectionFile = None,
    calibration: Calibrated = None,
    rows: Annotated[int, typer.Option(help="Rows of the prompt; 0 for none.")] = 20,
    adapter_rank: Annotated[
        int, typer.Option(help="Rank of a LoRA adapter trained with it; 0 for none.", min=0)
    ] = 0,
    adapter_part: Annotated[
        list[Part] | None,
        typer.Option(
            help="Whose blocks the adapter changes; repeat it for several.", show_default="trunk"
        ),
    ] = None,
    training: TrainingOptions,
    as_json: AsJson = False,
) -> None:
    """Train a soft prompt: rows in front of every sequence in the trunk, which make up for noise.

    It is for one checkpoint and one bottom. FOLDER/prompt and FOLDER/adapter have PEFT's format; a
    server serves them to the tenants that its configuration names.
    """
    with _progress("training the prompt") as on_progress:
        from fedsea.evaluation import prompt_training
        from fedsea.evaluation.releasing import Cut
        from fedsea.evaluation.training import state_file
        from fedsea.model.lora import LoraConfig

        recipe = prompt_training.Recipe(
            rows,
            LoraConfig(rank=adapter_rank, alpha=2.0 * adapter_rank) if adapter_rank else None,
            tuple(
                prompt_training.Part(part.value)
                for part in dict.fromkeys(adapter_part or (Part.TRUNK,))
            ),
            training.schedule(),
            training.batch,
            training.seed,
        )
        frozen, public = _open(model, bottom, top, text, training.window)
        pair = _projection(projection, frozen)
        chosen = _mechanism(mechanism, calibration, frozen, pair)
        state = state_file(out)
        done = prompt_training.train_prompt(
            frozen, public, recipe, Cut(public.prefix, chosen, pair), state, on_progress
        )
    done.tuned.save(out, frozen.checkpoint.name)
    state.unlink(missing_ok=True)
    _show(out, "", {"without": done.without, "start": done.start, "end": done.end}, as_json)


def register(app: typer.Typer) -> None:
    """Add the commands of this module to the group `fedsea privacy`."""
    app.command("calibrate")(calibrate)
    app.command("train-projection")(flattened(train_projection))
    app.command("train-denoiser")(flattened(train_denoiser))
    app.command("train-prompt")(flattened(train_prompt))


@contextmanager
def _progress(description: str) -> Iterator[Any]:
    """A bar that shows the loss and the time left."""
    with screen.training_bar(description) as advance:
        yield lambda now: advance(now.done, now.steps, now.loss)


def _open(
    model: str, bottom: int, top: int, text: Path, window: int
) -> tuple[FrozenModel, PublicText]:
    from fedsea.evaluation.frozen import FrozenModel
    from fedsea.evaluation.public_text import PublicText
    from fedsea.model.checkpoint import Checkpoint
    from fedsea.model.partition import Partition

    checkpoint = Checkpoint.open(model)
    frozen = FrozenModel(checkpoint, Partition(bottom, top))
    return frozen, PublicText.read(text, checkpoint, window)


def _projection(file: Path | None, frozen: FrozenModel) -> Projection | None:
    from fedsea.model.projection import Projection

    if file is None:
        return None
    pair = Projection.load(file)
    pair.check_fits(frozen.checkpoint.hidden_size, frozen.partition.bottom, frozen.fingerprint)
    return pair


def _mechanism(
    spec: str, calibration: Path | None, frozen: FrozenModel, pair: Projection | None
) -> Mechanism | None:
    from fedsea.privacy.calibration import Calibration
    from fedsea.privacy.registry import mechanism_from_spec

    width = frozen.checkpoint.hidden_size if pair is None else pair.width
    if calibration is None:
        return mechanism_from_spec(spec, width=width)
    found = Calibration.load(calibration)
    projection = "" if pair is None else pair.fingerprint()
    found.check_fits(width, frozen.partition.bottom, frozen.fingerprint, projection)
    return mechanism_from_spec(spec, found.mean, width)


def _show(out: Path, fingerprint: str, rows: dict[str, Any], as_json: bool) -> None:
    columns = [name for name in _COLUMNS if all(hasattr(row, name) for row in rows.values())]
    if as_json:
        figures = {
            name: {column: getattr(row, column) for column in columns} for name, row in rows.items()
        }
        screen.write_json({"file": str(out), "fingerprint": fingerprint, "held_out": figures})
        return
    table = screen.table("held-out public text", "", *(_COLUMNS[column] for column in columns))
    for name, row in rows.items():
        cells = (getattr(row, column) for column in columns)
        table.add_row(name, *("" if cell is None else f"{cell:.4g}" for cell in cells))
    screen.out.print(table)
    screen.write(f"{out}\n")
    if fingerprint:
        screen.detail(f"fingerprint {fingerprint}")
