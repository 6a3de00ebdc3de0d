"""What a training keeps in its folder: the same run goes on, another is refused, the rest is exact."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedsea.client.examples import Example
from fedsea.client.training_config import TrainerConfig
from fedsea.client.training_run import (
    RUN,
    STATE,
    SUMMARY,
    State,
    Summary,
    check_run,
    described_run,
    ended_run,
    read_state,
    write_run,
    write_state,
    write_summary,
)
from fedsea.errors import CheckpointError, ConfigError

CONFIG = TrainerConfig(steps=3, learning_rate=0.02)
TRAIN = [Example((1, 21017, 22018, 23019), ((2, 4),)), Example((1, 24020), ((1, 2),))]
STATE_OF_TWO = State(step=2, loss=0.1 + 0.2, best_step=1, best_loss=1 / 3, scale=2.0**16, tokens=9)
END = Summary(
    step=2,
    steps=3,
    loss=0.1 + 0.2,
    evaluation_loss=None,
    tokens=9,
    answer_tokens=3,
    bytes_up=100,
    bytes_down=200,
    seconds=1 / 3,
    stopped="request",
)


class Model:
    """A model that is told apart by its rank alone."""

    def __init__(self, rank: int = 4) -> None:
        self.rank = rank

    def description(self) -> Mapping[str, Any]:
        return {"lora": {"rank": self.rank, "targets": ("q_proj",)}}


def run(
    model: Model | None = None, config: TrainerConfig = CONFIG, **data: list[Example]
) -> dict[str, Any]:
    """The description of a run."""
    given = {"train": TRAIN, "evaluation": TRAIN[:1], **data}
    return described_run(model or Model(), config, **given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (lambda: run(Model(rank=8)), r"model\.lora\.rank 4, and this one has 8"),
        (lambda: run(config=replace(CONFIG, learning_rate=0.5)), r"learning_rate 0\.02.*0\.5"),
        (lambda: run(train=TRAIN[:1]), r"data\.train"),
        (lambda: run(train=TRAIN[::-1]), r"data\.train"),
        (lambda: run(evaluation=[]), r"data\.evaluation"),
        (lambda: {**run(), "new": 1}, r"new unset, and this one has 1"),
    ],
)
def test_another_run_is_refused(
    tmp_path: Path, other: Callable[[], dict[str, Any]], named: str
) -> None:
    """Model, settings, or examples and their order: the error names what differs."""
    write_run(tmp_path, run())
    check_run(tmp_path, run())
    with pytest.raises(ConfigError, match=named):
        check_run(tmp_path, other())


def test_settings_that_change_nothing_may_change(tmp_path: Path) -> None:
    """How often and how long something is kept or waited for is no part of a run."""
    write_run(tmp_path, run())
    check_run(tmp_path, run(config=replace(CONFIG, save_every=9, keep=7, reconnect_s=1.0)))


def test_an_empty_folder(tmp_path: Path) -> None:
    """It holds no run, and none that has ended."""
    check_run(tmp_path, run())
    assert ended_run(tmp_path) is None


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    """To the last bit."""
    write_state(tmp_path, STATE_OF_TWO)
    write_summary(tmp_path, END)
    assert read_state(tmp_path, 2) == STATE_OF_TWO
    assert ended_run(tmp_path) == END


def test_a_state_of_another_step(tmp_path: Path) -> None:
    """A folder whose name and content disagree is not used."""
    write_state(tmp_path, STATE_OF_TWO)
    with pytest.raises(CheckpointError, match="of another step"):
        read_state(tmp_path, 3)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": 1}', "[" * 100_000])
def test_spoiled_files(tmp_path: Path, content: str) -> None:
    """Files that do not say what they should are refused."""
    for name in (RUN, STATE, SUMMARY):
        (tmp_path / name).write_text(content)
    with pytest.raises((CheckpointError, ConfigError)):
        check_run(tmp_path, run())
    with pytest.raises(CheckpointError):
        read_state(tmp_path, 2)
    with pytest.raises(CheckpointError):
        ended_run(tmp_path)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    """A folder in its place."""
    (tmp_path / SUMMARY).mkdir()
    with pytest.raises(CheckpointError, match="cannot be read"):
        ended_run(tmp_path)
