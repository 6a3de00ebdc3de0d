"""The attacks by name."""

from __future__ import annotations

import pytest

from fedsea.errors import ConfigError
from fedsea.evaluation.lineup import ATTACKS, WITHOUT_WEIGHTS, Lineup, check_attacks
from fedsea.model.checkpoint import Checkpoint
from fedsea.model.partition import Partition
from fedsea.redteam.knowledge import Knowledge
from fedsea.redteam.report import TITLES


def test_every_attack_has_a_title():
    """A report can name every attack in words."""
    assert set(ATTACKS) <= set(TITLES)


@pytest.mark.parametrize(
    ("names", "has_weights", "says"),
    [
        ((), True, "no attack"),
        (("r1", "r9"), True, "'r9' is not known"),
        (("r4", "r1"), False, "r1 needs weights"),
    ],
)
def test_attacks_that_cannot_run_are_refused(names, has_weights, says):
    """Unknown names, none at all, and prefix search by a black box."""
    with pytest.raises(ConfigError, match=says):
        check_attacks(names, has_weights=has_weights)


def test_a_black_box_may_run_what_needs_no_weights():
    """Inverters and reading the answer need none."""
    check_attacks(tuple(WITHOUT_WEIGHTS), has_weights=False)


def test_what_was_learnt_is_used_again(tiny_model):
    """The same attack on the same mechanism is made once."""
    lineup = Lineup(Knowledge.of_weights(Checkpoint.open(tiny_model), Partition(1, 1)), ())
    assert lineup.attack("r1", None) is lineup.attack("r1", None)
