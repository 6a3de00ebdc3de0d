"""Saved steps: whole or not there, the last ones kept, clear words when there is no room."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from fedsea import artifacts
from fedsea.errors import CheckpointError, ConfigError
from fedsea.model.checkpoints import OPTIMIZER, Steps, read_optimizer, write_optimizer
from fedsea.model.optimization import AdamWConfig, AdapterOptimizer


def put(text: str):
    """A writer of one file."""

    def write(folder: Path) -> None:
        (folder / "part").write_text(text)
        (folder / "inner").mkdir()
        (folder / "inner" / "other").write_text(text)

    return write


def test_last_steps_are_kept(tmp_path):
    """Saving removes all but the last ones; there is nothing else in the folder."""
    steps = Steps(tmp_path / "run", keep=2)
    assert steps.steps() == []
    for number in (0, 5, 10, 123456789):
        steps.save(number, put(str(number)))

    assert steps.steps() == [10, 123456789]
    assert (steps.path(10) / "inner" / "other").read_text() == "10"
    assert sorted(entry.name for entry in steps.folder.iterdir()) == [
        "step-00000010",
        "step-123456789",
    ]


def test_only_the_owner_looks_into_a_step(tmp_path):
    """Whatever the umask."""
    before = os.umask(0)
    try:
        steps = Steps(tmp_path)
        steps.save(1, put("secret"))
    finally:
        os.umask(before)
    assert steps.path(1).stat().st_mode & 0o777 == 0o700


def test_saving_again_replaces_and_ends_other_courses(tmp_path):
    """A step that is done again takes the place of the first, and later ones are gone."""
    steps = Steps(tmp_path, keep=3)
    for number in (1, 2, 3):
        steps.save(number, put("first"))

    steps.save(2, put("second"))

    assert steps.steps() == [1, 2]
    assert (steps.path(2) / "part").read_text() == "second"


def test_going_on_from_an_earlier_step_removes_later_ones(tmp_path):
    """`forget_after` leaves the step itself."""
    steps = Steps(tmp_path, keep=3)
    for number in (1, 2, 3):
        steps.save(number, put("kept"))
    steps.forget_after(1)
    assert steps.steps() == [1]


@pytest.mark.parametrize("through_artifacts", [False, True])
def test_no_room_leaves_earlier_steps(tmp_path, monkeypatch, through_artifacts):
    """A full disk is named with what to do; the earlier step is as it was, and saving works later."""
    steps = Steps(tmp_path)
    steps.save(1, put("one"))

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def write(folder: Path) -> None:
        (folder / "part").write_text("half")
        if through_artifacts:
            artifacts.replace_file(folder / "file", b"content")
        full()

    with monkeypatch.context() as patched:
        if through_artifacts:
            patched.setattr(os, "fsync", full)
        with pytest.raises(CheckpointError, match=r"step 2 .*No space left.*make room"):
            steps.save(2, write)

    assert steps.steps() == [1]
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-00000001"]
    steps.save(2, put("two"))
    assert steps.steps() == [1, 2]


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    """A file in the way is an error of the checkpoint, not a traceback."""
    (tmp_path / "run").write_text("a file")
    with pytest.raises(CheckpointError, match="step 1 could not be saved"):
        Steps(tmp_path / "run").save(1, put("one"))
    with pytest.raises(CheckpointError, match="cannot be read"):
        Steps(tmp_path / "run").steps()


def test_a_killed_writer_leaves_no_half_step(tmp_path):
    """A process killed while writing leaves the earlier steps, and the next save cleans up."""
    steps = Steps(tmp_path)
    steps.save(1, put("one"))
    program = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from fedsea.model.checkpoints import Steps\n"
        "def write(folder):\n"
        "    (folder / 'part').write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "Steps(Path(sys.argv[1])).save(2, write)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False)

    assert ended.returncode == -signal.SIGKILL
    assert steps.steps() == [1]
    steps.save(2, put("two"))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]
    assert (steps.path(2) / "part").read_text() == "two"


def test_other_entries_are_left_alone(tmp_path):
    """Only folders with the name of a step are steps."""
    (tmp_path / "step-12").mkdir()
    (tmp_path / "step-00000007").write_text("a file")
    (tmp_path / "notes").mkdir()
    steps = Steps(tmp_path, keep=1)
    steps.save(3, put("three"))
    assert steps.steps() == [3]
    assert (tmp_path / "notes").is_dir()
    shutil.rmtree(steps.path(3))
    assert steps.steps() == []


def test_at_least_one_step_is_kept(tmp_path):
    """Keeping none would lose the one just saved."""
    with pytest.raises(ConfigError, match="at least 1"):
        Steps(tmp_path, keep=0)


def optimizer_after(steps: int) -> tuple[AdapterOptimizer, nn.Parameter]:
    """An optimizer of one parameter after some steps."""
    parameter = nn.Parameter(torch.ones(2, 3))
    optimizer = AdapterOptimizer({"1/q/a": parameter}, AdamWConfig())
    for number in range(steps):
        parameter.grad = torch.full((2, 3), number + 1.0)
        optimizer.apply(0.1)
    return optimizer, parameter


def test_optimizer_file_is_exact(tmp_path):
    """What is read is what was written, bit for bit."""
    written, _ = optimizer_after(3)
    write_optimizer(tmp_path, written)
    read, _ = optimizer_after(0)

    read_optimizer(tmp_path, read)

    assert read.steps == 3
    before, after = written.state(), read.state()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_optimizer_file_of_another_training_is_refused(tmp_path):
    """Missing, corrupt and foreign files each have their words."""
    optimizer, _ = optimizer_after(1)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_optimizer(tmp_path, optimizer)
    (tmp_path / OPTIMIZER).write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="holds no optimizer"):
        read_optimizer(tmp_path, optimizer)
    write_optimizer(tmp_path, optimizer)
    other = AdapterOptimizer({"1/q/b": nn.Parameter(torch.ones(2, 3))}, AdamWConfig())
    with pytest.raises(CheckpointError, match="other parameters"):
        read_optimizer(tmp_path, other)
    artifacts.write(
        tmp_path / OPTIMIZER,
        "optimizer",
        {"steps": 1},
        optimizer.state() | {"1/q/a.exp_avg": torch.full((2, 3), torch.nan)},
    )
    with pytest.raises(CheckpointError, match="NaN"):
        read_optimizer(tmp_path, optimizer)
