"""Attacks on a recording of real traffic: what the server could read of it, without the truth."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from fedsea.errors import ConfigError, FingerprintMismatch
from fedsea.evaluation.lineup import Lineup, check_attacks
from fedsea.evaluation.texts import Ids
from fedsea.model.checkpoint import Checkpoint
from fedsea.model.partition import Partition
from fedsea.model.projection import Projection
from fedsea.privacy.mechanism import Mechanism
from fedsea.redteam.knowledge import Knowledge
from fedsea.redteam.view import ServerView
from fedsea.transport.recording import Message


@dataclass(frozen=True, slots=True)
class Reading:
    """What one attack says that each text was, in token ids."""

    attack: str
    texts: tuple[Ids, ...]
    seconds: float


def replay(
    messages: Iterable[Message],
    checkpoint: Checkpoint,
    attacks: tuple[str, ...] = ("r1",),
    mechanism: Mechanism | None = None,
    public_prefix: Ids = (),
    public: tuple[Ids, ...] = (),
    projection: Projection | None = None,
) -> list[Reading]:
    """Attack everything that a recorded client sent; the cut is what it told the server.

    Args:
        messages: the recording.
        checkpoint: the public weights that the attacker holds.
        attacks: names from `lineup.ATTACKS`.
        mechanism: what the client used; it is no secret.
        public_prefix: ids with which every text begins.
        public: texts that an attack may learn from.
        projection: the pair that the client used; it is no secret either.

    Raises:
        ConfigError: the recording is not whole, or was made with a projection and none is given, or
            without one and one is.
        FingerprintMismatch: it is of another checkpoint, or was made with another projection.
    """
    check_attacks(attacks, has_weights=True)
    view = ServerView(messages, checkpoint.hidden_size)
    opened = view.opened
    if opened.fingerprint != checkpoint.fingerprint():
        raise FingerprintMismatch(
            f"the recording is of the checkpoint {opened.fingerprint[:12]} and this is "
            f"{checkpoint.name} ({checkpoint.fingerprint()[:12]}): give the same one"
        )
    partition = Partition(opened.first_block, checkpoint.num_blocks - opened.end_block)
    _check_projection(opened.projection, projection)
    knowledge = Knowledge.of_weights(
        checkpoint, partition, projection=projection, public_prefix=public_prefix
    )
    lineup = Lineup(knowledge, public)
    found = []
    for name in attacks:
        guess = lineup.run(name, view, mechanism)
        found.append(Reading(name, tuple(text.ids for text in guess.texts), guess.seconds))
    return found


def _check_projection(named: str, given: Projection | None) -> None:
    """Refuse another projection than the one that the client named when it opened its session."""
    if not named and given is not None:
        raise ConfigError("the recording was made without a projection: leave it out")
    if named and given is None:
        raise ConfigError(f"the recording was made with the projection {named[:12]}: give its file")
    if given is not None and given.fingerprint() != named:
        raise FingerprintMismatch(
            f"the recording was made with the projection {named[:12]} and this one is "
            f"{given.fingerprint()[:12]}: give the same one"
        )
