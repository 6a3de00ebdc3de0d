"""Metrics of a training: exact numbers, whole lines, nothing of steps that were taken back."""

from __future__ import annotations

import csv
import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fedsea.client.trainer import StepReport
from fedsea.client.training_metrics import CsvMetrics, TensorBoardMetrics
from fedsea.errors import CheckpointError, ConfigError

LOSS = 0.1 + 0.2


def report(step: int, loss: float = LOSS) -> StepReport:
    """Of one step."""
    return StepReport(step, 9, 0, loss, 1e-3, 0.5, 100, 321.0, 10**6, 10**3, 75.0)


def rows(path) -> list[dict[str, str]]:
    """The lines of a CSV file."""
    with path.open() as opened:
        return list(csv.DictReader(opened))


def test_exact_numbers(tmp_path):
    """Numbers that are read are those that were written."""
    metrics = CsvMetrics(tmp_path)
    metrics.on_start(0, 9)
    metrics.on_step(report(1))
    metrics.on_evaluation(1, LOSS)
    assert float(rows(tmp_path / "metrics.csv")[0]["loss"]) == LOSS
    assert float(rows(tmp_path / "evaluations.csv")[0]["loss"]) == LOSS


@pytest.mark.parametrize("how", ["on_rollback", "on_start"])
def test_what_was_taken_back_is_gone(tmp_path, how):
    """Going on from an earlier step leaves its lines and those before it."""
    metrics = CsvMetrics(tmp_path)
    metrics.on_start(0, 9)
    for step in range(1, 6):
        metrics.on_step(report(step))
        metrics.on_evaluation(step, LOSS)
    if how == "on_rollback":
        metrics.on_rollback(3)
    else:
        metrics = CsvMetrics(tmp_path)
        metrics.on_start(3, 9)
    metrics.on_step(report(4, loss=7.0))
    found = rows(tmp_path / "metrics.csv")
    assert [row["step"] for row in found] == ["1", "2", "3", "4"]
    assert found[-1]["loss"] == "7.0"
    assert len(rows(tmp_path / "evaluations.csv")) == 3


def test_a_line_that_was_cut_off(tmp_path):
    """What a crash left of a line does not stay, and does not spoil the next one."""
    metrics = CsvMetrics(tmp_path)
    metrics.on_start(0, 9)
    metrics.on_step(report(1))
    with (tmp_path / "metrics.csv").open("a") as opened:
        opened.write("2,9,0,0.3")
    metrics = CsvMetrics(tmp_path)
    metrics.on_start(2, 9)
    metrics.on_step(report(3))
    assert [row["step"] for row in rows(tmp_path / "metrics.csv")] == ["1", "3"]


def test_cannot_be_written(tmp_path):
    """A folder that cannot be written to is an error that names the file."""
    metrics = CsvMetrics(tmp_path / "gone")
    with pytest.raises(CheckpointError, match=r"metrics\.csv cannot be written"):
        metrics.on_step(report(1))


def test_tensorboard(tmp_path):
    """TensorBoard reads what was written, and not what was taken back."""
    metrics = TensorBoardMetrics(tmp_path)
    metrics.on_start(0, 9)
    for step in (1, 2):
        metrics.on_step(report(step))
    metrics.on_evaluation(2, 2.0)
    metrics.on_rollback(1)
    metrics.on_step(report(2, loss=7.0))
    metrics.close()
    metrics.close()

    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    losses = [(event.step, event.value) for event in found.Scalars("train/loss")]
    assert losses == [(1, pytest.approx(LOSS)), (2, 7.0)]
    assert found.Scalars("train/tokens_per_second")[0].value == 321.0
    assert found.Scalars("evaluation/loss") == []


def test_without_tensorboard(tmp_path, monkeypatch):
    """An extra that is not installed is named."""
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"fedsea\[tensorboard\]"):
        TensorBoardMetrics(tmp_path)
