"""What a training keeps in its folder besides tensors: which run it is, where it is, how it ended.

    run.json             which run this is: model, settings, digests of the examples
    checkpoints/step-*/  what is trained here, its moments, and `state.json`
    adapter/             what is trained, once the run has ended or was asked to stop
    summary.json         how it ended

A folder that holds a run goes on with that run only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from hashlib import blake2b
from pathlib import Path
from typing import Any

from fedsea import artifacts
from fedsea.client.examples import Example
from fedsea.client.trainable import TrainableModel
from fedsea.client.training_config import SECTION, TrainerConfig
from fedsea.errors import CheckpointError, ConfigError

RUN = "run.json"
STATE = "state.json"
SUMMARY = "summary.json"
CHECKPOINTS = "checkpoints"
ADAPTER = "adapter"

_FORMAT = 1
# Settings that do not change what is computed, so that a run may go on with others.
_FREE_SETTINGS = ("keep", "reconnect_s", "save_every")


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """How a training ended.

    Attributes:
        step: the step whose adapter it is.
        steps: how many were planned.
        loss: of the last step.
        evaluation_loss: of the last evaluation, or of the best one with patience; None without any.
        tokens: tokens run.
        answer_tokens: tokens that a loss was on.
        bytes_up: bytes sent.
        bytes_down: bytes received.
        seconds: spent training.
        stopped: why it ended before its last step: "patience" or "request"; None if it did not.
    """

    step: int
    steps: int
    loss: float | None
    evaluation_loss: float | None
    tokens: int
    answer_tokens: int
    bytes_up: int
    bytes_down: int
    seconds: float
    stopped: str | None = None


@dataclass(slots=True)
class State:
    """What is saved with a step besides parameters and moments.

    `evaluated` is the step of the last evaluation, `stale` how many in a row were not better.
    `scaled` counts steps since the scale last changed.
    """

    step: int = 0
    loss: float | None = None
    evaluated: int = -1
    evaluation_loss: float | None = None
    best_step: int = 0
    best_loss: float | None = None
    stale: int = 0
    scale: float = 1.0
    scaled: int = 0
    tokens: int = 0
    answer_tokens: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    seconds: float = 0.0


def described_run(
    model: TrainableModel,
    config: TrainerConfig,
    train: Sequence[Example],
    evaluation: Sequence[Example] | None,
) -> dict[str, Any]:
    """What makes a run this run and no other."""
    settings = {key: value for key, value in asdict(config).items() if key not in _FREE_SETTINGS}
    return {
        "format": _FORMAT,
        "model": dict(model.description()),
        SECTION: settings,
        "data": {"train": _digest(train), "evaluation": _digest(evaluation or ())},
    }


def check_run(folder: Path, described: Mapping[str, Any]) -> None:
    """Refuse to go on with another run.

    Raises:
        ConfigError: the folder holds one.
        CheckpointError: the folder cannot be read.
    """
    path = folder / RUN
    if not path.exists():
        return
    there, here = _flat(_json(path)), _flat(json.loads(json.dumps(described)))
    for key in sorted(there.keys() | here.keys()):
        if there.get(key) != here.get(key):
            raise ConfigError(
                f"{folder} holds a run with {key} {_shown(there, key)}, and this one has "
                f"{_shown(here, key)}; use another folder, or the same settings and data"
            )


def write_run(folder: Path, described: Mapping[str, Any]) -> None:
    """Say in a folder which run it holds."""
    _write(folder / RUN, json.dumps(described, indent=2, sort_keys=True) + "\n")


def ended_run(folder: Path) -> Summary | None:
    """How the run in a folder ended; None while it can go on, and where there is none.

    Raises:
        CheckpointError: the folder cannot be read.
    """
    path = folder / SUMMARY
    return Summary(**_known(path, Summary)) if path.exists() else None


def write_summary(folder: Path, summary: Summary) -> None:
    """Say in a folder how its run ended."""
    _write(folder / SUMMARY, json.dumps(asdict(summary), indent=2) + "\n")


def read_state(folder: Path, step: int) -> State:
    """The state that was saved with a step.

    Raises:
        CheckpointError: it cannot be read, or is of another step.
    """
    path = folder / STATE
    state = State(**_known(path, State))
    if state.step != step:
        raise CheckpointError(f"{path} is of another step; remove its folder, and go on")
    return state


def write_state(folder: Path, state: State) -> None:
    """Put the state into the folder of its step."""
    _write(folder / STATE, json.dumps(asdict(state)))


def _digest(examples: Sequence[Example]) -> str:
    found = blake2b(digest_size=16)
    for example in examples:
        found.update(repr((example.ids, example.answers)).encode())
    return found.hexdigest()


def _flat(table: Mapping[str, Any], name: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in table.items():
        path = f"{name}.{key}" if name else key
        found |= _flat(value, path) if isinstance(value, dict) else {path: value}
    return found


def _shown(table: Mapping[str, Any], key: str) -> str:
    return json.dumps(table[key]) if key in table else "unset"


def _known(path: Path, kind: type[Any]) -> dict[str, Any]:
    found = _json(path)
    if found.keys() != {entry.name for entry in fields(kind)}:
        raise CheckpointError(f"{path} has other entries than expected; start in another folder")
    return found


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise CheckpointError(f"{path} cannot be read; start in another folder") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} is no object; start in another folder")
    return found


def _write(path: Path, text: str) -> None:
    artifacts.replace_file(path, text.encode())
