"""What a training saves: one folder for each step, whole or not there at all.

    FOLDER/step-00000120/adapter_config.json        the adapter, in PEFT's format
                         adapter_model.safetensors
                         optimizer.safetensors      steps and moments

A step is written to a folder of another name, synchronized to the disk, and renamed. Whoever is
killed while writing leaves the earlier steps as they are. Only the owner may look into a step.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Final

from fedsea import artifacts
from fedsea.errors import CheckpointError, ConfigError
from fedsea.model.optimization import AdapterOptimizer

OPTIMIZER: Final = "optimizer.safetensors"

_KIND: Final = "optimizer"
_BEGUN: Final = ".tmp"
_REMOVED: Final = ".removed"
_OWNER_ONLY: Final = 0o700
_NAME: Final = re.compile(r"step-(\d{8,})")


class Steps:
    """The saved steps of one training. One process at a time writes to a folder.

    Args:
        folder: made when the first step is saved.
        keep: so many of the last steps stay.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        if keep < 1:
            raise ConfigError(f"{keep} checkpoints to keep; keep at least 1")
        self.folder = folder
        self._keep = keep

    def steps(self) -> list[int]:
        """The numbers of the saved steps, ascending.

        Raises:
            CheckpointError: the folder cannot be read.
        """
        try:
            names = [entry.name for entry in self.folder.iterdir() if entry.is_dir()]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise CheckpointError(
                f"{self.folder} cannot be read ({error.strerror}); check its permissions"
            ) from error
        matches = (_NAME.fullmatch(name) for name in names)
        return sorted(int(match[1]) for match in matches if match)

    def path(self, step: int) -> Path:
        """The folder of a step, whether it is saved or not."""
        return self.folder / f"step-{step:08d}"

    def save(self, step: int, writer: Callable[[Path], None]) -> None:
        """Save a step; durable on return, in place of an earlier save of the same number.

        Steps of a higher number are removed: they belong to a course that was given up when the
        training went on from an earlier step. Then all but the last `keep` are.

        Args:
            step: its number.
            writer: writes files into an empty folder.

        Raises:
            CheckpointError: it could not be written, for want of space or permission; the earlier
                steps are untouched.
        """
        begun = self.folder / _BEGUN
        try:
            _remove(begun)
            begun.mkdir(mode=_OWNER_ONLY, parents=True)
            writer(begun)
            _synchronize(begun)
            self._forget(step)
            begun.rename(self.path(step))
            _synchronize_folder(self.folder)
        except (OSError, ConfigError) as error:
            with contextlib.suppress(OSError):
                _remove(begun)
            raise self._unsaved(step, error) from error
        self.forget_after(step)
        for old in self.steps()[: -self._keep]:
            self._forget(old)

    def forget_after(self, step: int) -> None:
        """Remove the steps of a higher number, as when a training goes on from this one."""
        for later in self.steps():
            if later > step:
                self._forget(later)

    def _forget(self, step: int) -> None:
        # Renamed first, so that no half of a step is ever taken for a step.
        removed = self.folder / _REMOVED
        with contextlib.suppress(OSError):
            _remove(removed)
            self.path(step).rename(removed)
            _remove(removed)

    def _unsaved(self, step: int, error: OSError | ConfigError) -> CheckpointError:
        cause = error if isinstance(error, OSError) else error.__cause__
        reason = cause.strerror if isinstance(cause, OSError) else str(error)
        return CheckpointError(
            f"step {step} could not be saved in {self.folder} ({reason}); the earlier steps are "
            "untouched: make room there or correct its permissions, and save again"
        )


def write_optimizer(folder: Path, optimizer: AdapterOptimizer) -> None:
    """Write the state of an optimizer beside its adapter.

    Raises:
        ConfigError: it cannot be written.
    """
    description = {"steps": optimizer.steps}
    artifacts.write(folder / OPTIMIZER, _KIND, description, optimizer.state())


def read_optimizer(folder: Path, optimizer: AdapterOptimizer) -> None:
    """Bring an optimizer to the state that `write_optimizer` saved.

    Raises:
        CheckpointError: the file is missing, corrupt, or of other parameters.
    """
    found = artifacts.read(folder / OPTIMIZER, _KIND)
    found.expect_only({"steps"}, set(found.tensors))
    tensors = {
        name: found.tensor(name, tuple(tensor.shape)) for name, tensor in found.tensors.items()
    }
    optimizer.load(tensors)


def _remove(folder: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(folder)


def _synchronize(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as opened:
                os.fsync(opened.fileno())
    for path in (*(found for found in folder.rglob("*") if found.is_dir()), folder):
        _synchronize_folder(path)


def _synchronize_folder(folder: Path) -> None:
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
