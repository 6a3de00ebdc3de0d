"""What a server keeps of trainings: for each tenant and name the last saved steps.

    FOLDER/TENANT/NAME/step-00000120/         adapter in PEFT's format, optimizer.safetensors
                                     prompt/  a soft prompt in PEFT's format
                                     training.json
    FOLDER/+groups/NAME/...                   what a group trains together
    FOLDER/+groups/NAME/TENANT/...            a member's own copy

No tenant's name begins with a plus, and names have no separators, so nobody reaches what belongs to
another. One server at a time uses a folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from fedsea import artifacts
from fedsea.errors import CheckpointError, ConfigError, FedseaError
from fedsea.model.adapters import read_adapter, write_adapter
from fedsea.model.checkpoints import Steps, read_optimizer, write_optimizer
from fedsea.model.lora import Adapter
from fedsea.model.partition import Span
from fedsea.model.prompts import SoftPrompt, read_prompt, write_prompt
from fedsea.server.logs import get_logger
from fedsea.server.training_run import Recipe, TrainingRun
from fedsea.wire.messages import Stepped

GROUPS: Final = "+groups"
NAME_RULE: Final = "up to 100 of A-Z, a-z, 0-9, '.', '_' and '-', not beginning with a dot"

_NAME: Final = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}")
_STEP: Final = re.compile(r"step-\d+")
_READINGS: Final = 3
_LOCK: Final = ".lock"
_ABOUT: Final = "training.json"
_PROMPT: Final = "prompt"

_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class RunKey:
    """Whose training this is: a tenant's under a name, a group's, or a member's in a group."""

    owner: str
    name: str
    member: str = ""

    @property
    def path(self) -> Path:
        """Where it is in the store."""
        return Path(self.owner, self.name, self.member)


@dataclass(frozen=True, slots=True)
class Trained:
    """What was saved at a step, to be computed with."""

    adapter: Adapter | None
    prompt: SoftPrompt | None


@dataclass(frozen=True, slots=True)
class Version:
    """One save: its step, and which of the saves of that number it is."""

    step: int
    stamp: tuple[int, int]


def check_name(name: str) -> str:
    """A name that may be part of a path.

    Raises:
        ConfigError: it may not.
    """
    if _NAME.fullmatch(name) is None or _STEP.fullmatch(name):
        raise ConfigError(f"what is trained cannot have this name; use {NAME_RULE}")
    return name


class TrainingStore:
    """Saved steps under one folder.

    Args:
        folder: made when it is missing.
        keep: so many of the last steps of each training stay.
        base_model: the name of the checkpoint, for PEFT.
        factor: of the model's embeddings, see `SoftPrompt`.
    """

    def __init__(self, folder: Path, keep: int, base_model: str, factor: float) -> None:
        self._folder = folder
        self._keep = keep
        self._base_model = base_model
        self._factor = factor
        self._lock: int | None = None

    def open(self) -> None:
        """Make the folder ours until `close`.

        Raises:
            ConfigError: it cannot be written to, or another server uses it.
        """
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self._folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"training.folder {self._folder} is used by another server; give each its own"
            ) from None
        except OSError as error:
            raise ConfigError(
                f"training.folder {self._folder} cannot be used ({error.strerror}); "
                "choose another or correct its permissions"
            ) from None

    def close(self) -> None:
        """Let others use the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def names(self, tenant: str) -> set[str]:
        """What a tenant has saved; a folder that a failed save left behind is none of it."""
        try:
            found = [entry for entry in (self._folder / tenant).iterdir() if entry.is_dir()]
        except OSError:
            return set()
        return {entry.name for entry in found if self.steps(RunKey(tenant, entry.name))}

    def steps(self, key: RunKey) -> list[int]:
        """The saved steps of a training, ascending.

        Raises:
            CheckpointError: the folder cannot be read.
        """
        try:
            return self._steps(key).steps()
        except CheckpointError as error:
            raise self._unreadable(key, error) from None

    def save(self, key: RunKey, run: TrainingRun, members: Mapping[str, int]) -> str:
        """Save the step that a run is at; durable on return.

        Args:
            key: whose it is.
            run: what to save.
            members: how many steps each member of a group has taken.

        Returns:
            Nothing when it is saved; else why not, for the client: the earlier saves are untouched.
        """
        try:
            self._steps(key).save(run.steps, lambda folder: self._write(folder, run, members))
        except FedseaError as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__cause__
            reason = (cause and cause.strerror) or "the folder cannot be written"
            _log.error("save_failed", owner=key.owner, name=key.name, reason=reason)
            return (
                f"the server could not save step {run.steps} ({reason}); earlier saves are "
                "untouched: tell its operator, and save again"
            )
        return ""

    def members(self, key: RunKey, step: int) -> dict[str, int]:
        """How many steps each member of a group had taken at a saved step; empty when unknown."""
        try:
            members = _read_about(self._steps(key).path(step)).get("members")
        except CheckpointError as error:
            raise self._unreadable(key, error) from None
        return members if isinstance(members, dict) else {}

    def load(self, key: RunKey, step: int, run: TrainingRun) -> None:
        """Bring a fresh run to a saved step.

        Raises:
            CheckpointError: the step cannot be read.
            ConfigError: it was trained with another recipe.
        """
        folder = self._steps(key).path(step)
        try:
            about = _read_about(folder)
        except CheckpointError as error:
            raise self._unreadable(key, error) from None
        check_recipe(about.get("recipe"), run.recipe)
        try:
            if run.adapter is not None:
                run.adapter.copy_from(read_adapter(folder, run.recipe.span))
            if run.prompt is not None:
                found = read_prompt(folder / _PROMPT, self._factor)
                run.prompt.rows.data.copy_(found.rows.data)
                run.prompt_drawn = True
            read_optimizer(folder, run.optimizer)
            norm = float(about.get("grad_norm", 0.0))
        except (FedseaError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise self._unreadable(key, error) from None
        if run.steps:
            run.last = Stepped(run.steps, norm, applied=True)

    def version(self, key: RunKey) -> Version | None:
        """The last save; None when there is none.

        Raises:
            CheckpointError: the folder cannot be read.
        """
        for step in reversed(self.steps(key)):
            with contextlib.suppress(FileNotFoundError):  # replaced by another save since
                status = self._steps(key).path(step).stat()
                return Version(step, (status.st_ino, status.st_mtime_ns))
        return None

    def trained(self, key: RunKey, span: Span) -> tuple[Version, Trained] | None:
        """The last save, and what it holds; None when there is none.

        A training that goes on may replace it in the meantime: then the next one is read.

        Raises:
            CheckpointError: it cannot be read.
        """
        error: BaseException | None = None
        for _ in range(_READINGS):
            version = self.version(key)
            if version is None:
                return None
            try:
                found = self._trained(self._steps(key).path(version.step), span)
            except (FedseaError, AttributeError) as failure:
                error = failure
                if self.version(key) == version:
                    break
            else:
                if self.version(key) == version:
                    return version, found
        raise self._unreadable(key, error)

    def _trained(self, folder: Path, span: Span) -> Trained:
        recipe = _read_about(folder).get("recipe") or {}
        adapter = read_adapter(folder, span) if recipe.get("lora") else None
        has_prompt = bool(recipe.get("prompt_rows"))
        return Trained(adapter, read_prompt(folder / _PROMPT, self._factor) if has_prompt else None)

    def _steps(self, key: RunKey) -> Steps:
        return Steps(self._folder / key.path, self._keep)

    def _write(self, folder: Path, run: TrainingRun, members: Mapping[str, int]) -> None:
        if run.adapter is not None:
            write_adapter(folder, [run.adapter], self._base_model)
        if run.prompt is not None:
            write_prompt(folder / _PROMPT, run.prompt, self._base_model)
        write_optimizer(folder, run.optimizer)
        norm = 0.0 if run.last is None else run.last.grad_norm
        about = {
            "format": 1,
            "recipe": _plain(run.recipe),
            "grad_norm": norm,
            "members": dict(members),
        }
        artifacts.replace_file(folder / _ABOUT, json.dumps(about, indent=2).encode())

    def _unreadable(self, key: RunKey, error: BaseException | None) -> CheckpointError:
        reason = "it is replaced all the time" if error is None else str(error)
        _log.error("load_failed", owner=key.owner, name=key.name, reason=reason)
        return CheckpointError(
            "a saved step of this training cannot be read at the server; go on from an earlier "
            "one, or tell its operator"
        )


def check_recipe(saved: Any, asked: Recipe) -> None:
    """Refuse to go on with another recipe than that of the saved step.

    Raises:
        ConfigError: naming what differs.
    """
    wanted = _plain(asked)
    found = saved if isinstance(saved, dict) else {}
    for key, value in wanted.items():
        if found.get(key) != value:
            raise ConfigError(
                f"the training that is resumed has another {key}; use the options that it began "
                "with, or begin another under a new name"
            )


def check_same(begun: Recipe, asked: Recipe) -> None:
    """Refuse another recipe than the one that a run began with.

    Raises:
        ConfigError: naming what differs.
    """
    check_recipe(_plain(begun), asked)


def _plain(recipe: Recipe) -> dict[str, Any]:
    """A recipe as it is written in JSON."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(recipe)))
    return plain


def _read_about(folder: Path) -> dict[str, Any]:
    try:
        about = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder / _ABOUT} cannot be read; use another step") from error
    if not isinstance(about, dict) or about.get("format") != 1:
        raise CheckpointError(f"{folder / _ABOUT} is of another format; use another step")
    return about
