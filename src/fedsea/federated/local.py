"""One client of a federation: what it does with global arrays, and what it lets out.

`LocalClient` turns requests into calls of a `LocalTraining` and an update into what may travel:
checked, clipped, normalized, noised, charged. It knows nothing of Flower and nothing of sockets.
A round is a function of its number, of the global arrays, and of what the round before left here
(parts that are not averaged); a round that is asked for again gives the same answer.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

from fedsea import artifacts
from fedsea.errors import CheckpointError, ConfigError, NotFinite, PermissionDenied, PrivacyError
from fedsea.federated.arrays import Arrays, largest, layout_digest, norm, packed, plus, unpacked
from fedsea.federated.config import Outside
from fedsea.federated.unit_update import UnitUpdate
from fedsea.model.adapters import CONFIG, TENSORS
from fedsea.model.checkpoints import Steps
from fedsea.privacy.ledger import Account
from fedsea.privacy.noise import NoiseSource

_PERSONAL: Final = "personal.safetensors"
_KEPT: Final = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class FitSettings:
    """What the aggregator says about one round of local training.

    Attributes:
        round: number of the round, from 1.
        proximal: mu of FedProx; mu/2 |w - w_global|^2 is added to the loss.
        unit: the update is to be divided by its norm (NormFedAvg).
        weigh: the number of examples is the weight; otherwise every client weighs the same.
        layout: digest of what is averaged; it must be the client's own.
    """

    round: int
    layout: str
    proximal: float = 0.0
    unit: bool = False
    weigh: bool = True


class LocalTraining(Protocol):
    """Training of one client on its own data.

    Attributes:
        description: the adapter's configuration in PEFT's format.
    """

    @property
    def description(self) -> Mapping[str, Any]:
        """The adapter's configuration in PEFT's format."""

    def arrays(self) -> Arrays:
        """All factors by PEFT's names, as they are now: fp32, copied."""

    def load(self, arrays: Mapping[str, Any]) -> None:
        """Take over the values of some of them."""

    def fit(self, settings: FitSettings) -> int:
        """Train from the arrays as they are, with a fresh optimizer; the number of examples.

        The outcome is a function of the arrays and of `settings`.
        """

    def evaluate(self) -> tuple[float, int]:
        """Mean loss on examples kept apart, and their number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What this client allows, whatever the aggregator asks for.

    Attributes:
        personal: names of arrays that stay here and are never averaged.
        frozen: names of others that are equal at all clients and not trained (A under FFA-LoRA).
        clip: largest absolute number of an update, where secure aggregation needs one.
        outside: what becomes of an update beyond it.
        max_weight: largest number of examples that may be told.
        share_loss: the aggregator may ask for the mean loss on the examples kept apart.
    """

    personal: frozenset[str] = frozenset()
    frozen: frozenset[str] = frozenset()
    clip: float | None = None
    outside: Outside = Outside.SCALE
    max_weight: float | None = None
    share_loss: bool = False


@dataclass(slots=True)
class Contribution:
    """What leaves after a round: an update by name, its weight, and how much it was scaled."""

    update: Arrays
    weight: int
    scaled: float = 1.0


@dataclass(slots=True)
class _Release:
    key: str
    contribution: Contribution = field(repr=False)


class LocalClient:
    """Answers the requests of a federation for one client.

    Args:
        name: under which the aggregator expects it.
        training: trains.
        policy: what is allowed.
        folder: where personal parts are kept between rounds; None keeps them in memory only.
        protection: makes unit updates private against the aggregator too, and what they are
            charged to. None: unit updates leave without noise of this client.
    """

    def __init__(
        self,
        name: str,
        training: LocalTraining,
        policy: Policy,
        folder: Path | None = None,
        protection: tuple[UnitUpdate, Account] | None = None,
    ) -> None:
        self.name = name
        self._training = training
        self._policy = policy
        self._protection = protection
        self._noise = NoiseSource()
        self._folder = folder
        self._steps = None if folder is None else Steps(folder / "rounds", keep=_KEPT)
        self._personal: dict[int, Arrays] = {}
        self._last: _Release | None = None
        everything = training.arrays()
        self._shared = {
            name for name in everything if not self._is_personal(name) and not self._is_frozen(name)
        }
        self._fixed = {name for name in everything if self._is_frozen(name)}
        if not self._shared:
            raise ConfigError("everything is personal or frozen; leave something to be averaged")

    def describe(self) -> dict[str, Any]:
        """Name, layout, and the adapter's configuration; nothing about the data."""
        return {
            "client": self.name,
            "layout": self.layout,
            "shared": {name: list(array.shape) for name, array in sorted(self.shared().items())},
            "fixed": sorted(self._fixed),
            "adapter": dict(self._training.description),
            "share_loss": self._policy.share_loss,
        }

    @property
    def layout(self) -> str:
        """Digest of what is averaged."""
        everything = self._training.arrays()
        return layout_digest(
            {name: everything[name] for name in self._shared},
            {name: everything[name] for name in self._fixed},
        )

    def shared(self) -> Arrays:
        """What is averaged, as it is now."""
        everything = self._training.arrays()
        return {name: everything[name] for name in sorted(self._shared)}

    def arrays(self) -> Arrays:
        """What is averaged and what is frozen, as they are now: the beginning of a federation."""
        everything = self._training.arrays()
        return {name: everything[name] for name in sorted(self._shared | self._fixed)}

    def fit(self, arrays: Arrays, settings: FitSettings) -> Contribution:
        """One round of local training.

        Args:
            arrays: the global ones.
            settings: of the round.

        Raises:
            ConfigError: the aggregator averages another adapter.
            NotFinite: training gave NaN or infinity; nothing leaves.
            PrivacyError: the update may not leave; nothing was sent.
        """
        self._check(arrays, settings.layout)
        key = hashlib.sha256(repr(settings).encode() + packed(arrays)).hexdigest()
        if self._last is not None and self._last.key == key:
            return self._last.contribution
        self._enter(settings.round - 1)
        self._training.load(arrays)
        examples = self._training.fit(settings)
        trained = self._training.arrays()
        self._leave(settings.round, trained)
        update = {name: trained[name] - arrays[name] for name in arrays}
        contribution = self._released(update, examples, settings)
        self._last = _Release(key, contribution)
        return contribution

    def evaluate(self, arrays: Arrays, layout: str, after: int) -> tuple[float, int]:
        """Mean loss under global arrays with this client's personal parts of round `after`.

        Raises:
            PermissionDenied: the policy keeps the loss here.
        """
        if not self._policy.share_loss:
            raise PermissionDenied("this client keeps its loss to itself (share_loss is off)")
        self._check(arrays, layout)
        self._enter(after)
        self._training.load(arrays)
        return self._training.evaluate()

    def finish(self, arrays: Arrays, layout: str, rounds: int) -> Arrays:
        """Take over the final global arrays; all arrays of this client, personal ones included."""
        self._check(arrays, layout)
        self._enter(rounds)
        self._training.load(arrays)
        everything = self._training.arrays()
        if self._folder is not None:
            write_adapter(self._folder / "adapter", everything, self._training.description)
        return everything

    def _check(self, arrays: Arrays, layout: str) -> None:
        if layout != self.layout or set(arrays) != self._shared:
            raise ConfigError(
                "the aggregator averages another adapter than this client trains; agree on model, "
                "lora options, seed, and on what is personal"
            )

    def _is_personal(self, name: str) -> bool:
        return name in self._policy.personal

    def _is_frozen(self, name: str) -> bool:
        return name in self._policy.frozen and not self._is_personal(name)

    def _enter(self, finished: int) -> None:
        """Bring the personal parts to where they were after a round, or the last one before it.

        A client that missed rounds goes on with what it had.
        """
        if not self._personal_names():
            return
        if not self._personal:
            everything = self._training.arrays()
            self._personal[0] = {name: everything[name] for name in self._personal_names()}
        saved = set() if self._steps is None else set(self._steps.steps())
        known = max(number for number in saved | self._personal.keys() if number <= finished)
        if known not in self._personal:
            self._personal[known] = self._read(known)
        self._training.load(self._personal[known])

    def _leave(self, finished: int, trained: Arrays) -> None:
        if not self._personal_names():
            return
        mine = {name: trained[name] for name in self._personal_names()}
        earlier = sorted(number for number in self._personal if number < finished)
        kept = {0, *earlier[-_KEPT:]} & set(earlier)
        self._personal = {number: self._personal[number] for number in kept}
        self._personal[finished] = mine
        if self._steps is not None:
            self._steps.save(finished, lambda folder: _write(folder / _PERSONAL, mine))

    def _read(self, finished: int) -> Arrays:
        path = None if self._steps is None else self._steps.path(finished) / _PERSONAL
        if path is None or not path.is_file():
            raise CheckpointError(
                f"what is personal here was not kept after round {finished}; restore this client's "
                "folder, or begin the federation anew"
            )
        found = unpacked(path.read_bytes())
        if set(found) != self._personal_names():
            raise CheckpointError(f"{path} is of another adapter; restore this client's folder")
        return found

    def _personal_names(self) -> set[str]:
        return {name for name in self._training.arrays() if self._is_personal(name)}

    def _released(self, update: Arrays, examples: int, settings: FitSettings) -> Contribution:
        size = norm(update)
        if not math.isfinite(size):
            raise NotFinite(
                "the update of this round holds NaN or infinity; nothing was sent: "
                "look at the data and the learning rate"
            )
        weight = examples if settings.weigh else 1
        most = self._policy.max_weight
        if most is not None and weight > most:
            raise ConfigError(
                f"this client has {weight} examples and secure.max_weight is {most:g}; raise it at "
                "all sides"
            )
        if settings.unit:
            return Contribution(self._unit(update), 1)
        if self._protection is not None:
            raise PrivacyError(
                "this client protects unit updates only, and the aggregator asked for another kind; "
                "nothing was sent"
            )
        return self._clipped(update, weight)

    def _unit(self, update: Arrays) -> Arrays:
        if self._protection is None:
            return UnitUpdate.normalized(update)
        mechanism, account = self._protection
        reservation = account.reserve(1)
        protected = mechanism.noised(UnitUpdate.normalized(update), self._noise)
        reservation.settle(1)
        clip = self._policy.clip
        if clip is None or largest(protected) <= clip:
            return protected
        raise PrivacyError(
            "noise took the update beyond secure.clip; nothing was sent: raise it at all sides"
        )

    def _clipped(self, update: Arrays, weight: int) -> Contribution:
        clip, reach = self._policy.clip, largest(update)
        if clip is None or reach <= clip:
            return Contribution(update, weight)
        if self._policy.outside is Outside.REFUSE:
            raise PrivacyError(
                f"the update reaches {reach:.3g} and secure.clip is {clip:g}; nothing was sent: "
                "raise it at all sides, or let it be scaled"
            )
        factor = clip / reach
        shrunk = plus({name: array * 0 for name, array in update.items()}, update, factor)
        return Contribution(shrunk, weight, factor)


def write_adapter(folder: Path, arrays: Arrays, description: Mapping[str, Any]) -> None:
    """Write arrays as an adapter in PEFT's format, each file as a whole.

    Raises:
        ConfigError: it cannot be written.
    """
    artifacts.replace_file(folder / TENSORS, packed(arrays))
    text = json.dumps(dict(description), indent=2, sort_keys=True)
    artifacts.replace_file(folder / CONFIG, text.encode() + b"\n")


def _write(path: Path, arrays: Arrays) -> None:
    path.write_bytes(packed(arrays))
