"""The attacks by name, each ready for one attacker: what it needs to learn is learnt once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from fedsea.errors import ConfigError
from fedsea.evaluation.texts import Ids
from fedsea.privacy.mechanism import Mechanism
from fedsea.redteam.attack import Attack, Guess
from fedsea.redteam.inverter import Architecture, Inverter, Recipe
from fedsea.redteam.knowledge import Knowledge
from fedsea.redteam.nearest import Metric, Nearest
from fedsea.redteam.prefix import PrefixSearch, PriorSearch
from fedsea.redteam.reading import TopReading
from fedsea.redteam.rotation import GramSearch
from fedsea.redteam.view import ServerView

Make = Callable[[Knowledge, Mechanism | None, Sequence[Ids]], Attack]


def _inverter(
    architecture: Architecture,
    knowledge: Knowledge,
    mechanism: Mechanism | None,
    public: Sequence[Ids],
) -> Attack:
    return Inverter.train(knowledge, mechanism, public, Recipe(architecture=architecture))


ATTACKS: dict[str, Make] = {
    "nn": lambda *_: Nearest(),
    "cosine": lambda *_: Nearest(Metric.COSINE),
    "r1": lambda *_: PrefixSearch(),
    "r2": lambda *_: PriorSearch(),
    "r4": partial(_inverter, Architecture.GRU),
    "r4t": partial(_inverter, Architecture.TRANSFORMER),
    "r5": lambda *_: TopReading(),
    "r6": lambda *_: GramSearch(),
}
WITHOUT_WEIGHTS = frozenset({"r4", "r4t", "r5"})


def check_attacks(names: Sequence[str], *, has_weights: bool) -> None:
    """Refuse attacks that do not exist or that this attacker cannot run.

    Raises:
        ConfigError: there is such a name, or none at all.
    """
    if not names:
        raise ConfigError(f"there is no attack: give some of {', '.join(ATTACKS)}")
    for name in names:
        if name not in ATTACKS:
            raise ConfigError(f"attack {name!r} is not known: use some of {', '.join(ATTACKS)}")
        if not has_weights and name not in WITHOUT_WEIGHTS:
            able = ", ".join(other for other in ATTACKS if other in WITHOUT_WEIGHTS)
            raise ConfigError(f"attack {name} needs weights and a black box has none: use {able}")


class Lineup:
    """All attacks of one attacker.

    Args:
        knowledge: what the attacker holds.
        public: texts that it may learn from.
    """

    def __init__(self, knowledge: Knowledge, public: Sequence[Ids]) -> None:
        self.knowledge = knowledge
        self._public = public
        self._made: dict[tuple[str, Mechanism | None], Attack] = {}

    def attack(self, name: str, mechanism: Mechanism | None) -> Attack:
        """The attack on what a mechanism releases; learns what it has to learn."""
        key = name, mechanism
        if key not in self._made:
            self._made[key] = ATTACKS[name](self.knowledge, mechanism, self._public)
        return self._made[key]

    def run(self, name: str, view: ServerView, mechanism: Mechanism | None) -> Guess:
        """Run one attack on what was released by a mechanism."""
        return self.attack(name, mechanism).run(view, self.knowledge, mechanism)
