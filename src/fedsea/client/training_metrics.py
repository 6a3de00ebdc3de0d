"""What a training wrote down of its steps: CSV files, and TensorBoard's on request."""

from __future__ import annotations

import csv
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any

from fedsea import artifacts
from fedsea.client.trainer import Callback, StepReport
from fedsea.errors import CheckpointError, ConfigError

STEPS = "metrics.csv"
EVALUATIONS = "evaluations.csv"
TENSORBOARD = "tensorboard"

_OWNER_ONLY = 0o700
_EVALUATION_COLUMNS = ("step", "loss")


class CsvMetrics(Callback):
    """`metrics.csv` with a line for each step, `evaluations.csv` with one for each evaluation.

    When a run goes on from an earlier step, the lines of later ones are taken out first. Numbers are
    written so that reading them gives the same numbers.
    """

    def __init__(self, folder: Path) -> None:
        columns = tuple(entry.name for entry in fields(StepReport))
        self._steps = _Table(folder / STEPS, columns)
        self._evaluations = _Table(folder / EVALUATIONS, _EVALUATION_COLUMNS)

    def on_start(self, step: int, steps: int) -> None:
        del steps
        self.on_rollback(step)

    def on_rollback(self, step: int) -> None:
        self._steps.cut(step)
        self._evaluations.cut(step)

    def on_step(self, report: StepReport) -> None:
        self._steps.add(astuple(report))

    def on_evaluation(self, step: int, loss: float) -> None:
        self._evaluations.add((step, loss))


class _Table:
    """A CSV file whose first column is a step."""

    def __init__(self, path: Path, columns: tuple[str, ...]) -> None:
        self._path = path
        self._columns = columns

    def cut(self, step: int) -> None:
        """Keep the lines of steps up to this one; one that was cut off by a crash goes too."""
        kept = [",".join(self._columns)]
        if self._path.exists():
            lines = self._path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept += [line.rstrip() for line in lines[1:] if self._is_kept(line, step)]
        try:
            artifacts.replace_file(self._path, ("\n".join(kept) + "\n").encode())
        except ConfigError as error:
            raise CheckpointError(str(error)) from error

    def add(self, row: tuple[Any, ...]) -> None:
        try:
            with self._path.open("a", encoding="utf-8", newline="") as opened:
                csv.writer(opened, lineterminator="\n").writerow(map(repr, row))
        except OSError as error:
            raise CheckpointError(
                f"{self._path} cannot be written ({error.strerror}); make room there, and go on "
                "with the same command"
            ) from error

    def _is_kept(self, line: str, step: int) -> bool:
        cells = line.rstrip("\n").split(",")
        whole = line.endswith("\n") and len(cells) == len(self._columns)
        return whole and cells[0].isdigit() and int(cells[0]) <= step


class TensorBoardMetrics(Callback):
    """The same for TensorBoard, in the folder `tensorboard`.

    Raises:
        ConfigError: TensorBoard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ConfigError(
                "TensorBoard is not installed: install fedsea[tensorboard], or leave it out"
            ) from None
        self._make: Any = SummaryWriter
        self._folder = folder / TENSORBOARD
        self._writer: Any = None

    def on_start(self, step: int, steps: int) -> None:
        del steps
        self.on_rollback(step)

    def on_rollback(self, step: int) -> None:
        self.close()
        self._folder.mkdir(mode=_OWNER_ONLY, parents=True, exist_ok=True)
        self._writer = self._make(log_dir=str(self._folder), purge_step=step + 1)

    def on_step(self, report: StepReport) -> None:
        for name in ("loss", "learning_rate", "grad_norm", "tokens_per_second"):
            self._writer.add_scalar(f"train/{name}", getattr(report, name), report.step)

    def on_evaluation(self, step: int, loss: float) -> None:
        self._writer.add_scalar("evaluation/loss", loss, step)
        self._writer.flush()

    def close(self) -> None:
        """Write what is not written yet."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
