"""The attacks by name, each ready for one attacker: what it needs to learn is learnt once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fedsea.errors import ConfigError
from fedsea.evaluation.texts import Ids
from fedsea.privacy.mechanism import Mechanism
from fedsea.redteam.attack import Attack, Guess
from fedsea.redteam.knowledge import Knowledge
from fedsea.redteam.prefix import PrefixSearch, PriorSearch
from fedsea.redteam.view import ServerView

Make = Callable[[Knowledge, Mechanism | None, Sequence[Ids]], Attack]


def _search(*_: object) -> Attack:
    return PrefixSearch()


def _prior_search(*_: object) -> Attack:
    return PriorSearch()


ATTACKS: dict[str, Make] = {
    "r1": _search,
    "r2": _prior_search,
}
NEEDS_WEIGHTS = frozenset({"r1", "r2"})


def check_attacks(names: Sequence[str], *, has_weights: bool) -> None:
    """Refuse attacks that do not exist or that this attacker cannot run.

    Raises:
        ConfigError: there is such a name, or none at all.
    """
    known = ", ".join(ATTACKS)
    if not names:
        raise ConfigError(f"there is no attack: give some of {known}")
    for name in names:
        if name not in ATTACKS:
            raise ConfigError(f"attack {name!r} is not known: use some of {known}")
        if name in NEEDS_WEIGHTS and not has_weights:
            able = ", ".join(other for other in ATTACKS if other not in NEEDS_WEIGHTS)
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
        self._made: dict[tuple[str, str], Attack] = {}

    def run(self, name: str, view: ServerView, mechanism: Mechanism | None) -> Guess:
        """Run one attack on what was released by a mechanism."""
        key = name, "" if mechanism is None else mechanism.spec()
        if key not in self._made:
            self._made[key] = ATTACKS[name](self.knowledge, mechanism, self._public)
        return self._made[key].run(view, self.knowledge, mechanism)
