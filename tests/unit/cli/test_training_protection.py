"""Options of privacy in training become the library's choice, or one line that says why not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fedsea.cli.options import ConnectionOptions
from fedsea.cli.training_protection import (
    TrainingProtectionOptions,
    show_training_privacy,
    show_training_spent,
    training_privacy_summary,
)
from fedsea.client.training_protection import GRADIENTS_BARE, NOTHING_PROTECTED, Record
from fedsea.errors import ConfigError
from fedsea.privacy.accounts import Budget

BOTH: dict[str, Any] = {
    "privacy": "gaussian:clip_norm=2,mu=1",
    "gradient_privacy": "fedsea:scale=1,clip_norm=1",
}


def test_nothing_is_chosen_by_default() -> None:
    """Without mechanisms there is no protection."""
    assert TrainingProtectionOptions().chosen(ConnectionOptions(), "run") is None


def test_options_are_passed_on() -> None:
    """Every option reaches the library; the run names the record unless another name is given."""
    connection = ConnectionOptions(tenant="clinic")
    few = TrainingProtectionOptions(gradient_privacy=BOTH["gradient_privacy"])
    chosen = few.chosen(connection, "run")
    assert chosen is not None
    assert (chosen.rows, chosen.record, chosen.of) == (None, "run", Record.DATA)
    assert (chosen.tenant, chosen.budget) == ("clinic", None)

    every = TrainingProtectionOptions(
        **BOTH, record="set", each_example=True, epsilon=3.0, delta=1e-6, public_prefix="4"
    ).chosen(connection, "run")
    assert every is not None
    assert (every.record, every.of, every.public_prefix) == ("set", Record.EXAMPLE, 4)
    assert (every.budget, every.delta) == (Budget(3.0, 1e-6), 1e-6)


@pytest.mark.parametrize(
    ("given", "option"),
    [
        ({"record": "set"}, "--record"),
        ({"each_example": True}, "--each-example"),
        ({"epsilon": 1.0}, "--epsilon"),
        ({"delta": 0.1}, "--delta"),
        ({"public_prefix": "Dear"}, "--public-prefix"),
    ],
)
def test_an_option_without_a_mechanism_is_refused(given: dict[str, Any], option: str) -> None:
    """Who asks for a budget and names no mechanism would be protected by nothing."""
    with pytest.raises(ConfigError, match=f"{option} is given without a mechanism"):
        TrainingProtectionOptions(**given).chosen(ConnectionOptions(), "run")


def test_what_is_done_is_shown(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """One line about the account, or the one that says that nothing is protected."""
    show_training_privacy(None)
    assert capsys.readouterr().err == f"note: {NOTHING_PROTECTED}\n"
    options = TrainingProtectionOptions(**BOTH, ledger=tmp_path / "x.ledger")
    chosen = options.chosen(ConnectionOptions(), "run")
    assert chosen is not None
    policy = chosen.applied(8, ("trunk",))
    show_training_privacy(policy)
    assert "privacy: rows: gaussian:clip_norm=2,mu=1,by=row, gradients: fedsea" in (
        capsys.readouterr().err
    )
    show_training_spent(policy)
    assert "privacy: spent 0 releases" in capsys.readouterr().err
    found = training_privacy_summary(policy)
    assert found is not None
    assert (found["record"], found["releases"], found["mu"]) == ("run", 0, 0.0)
    assert found["rows"] == "gaussian:clip_norm=2,mu=1,by=row"
    policy.close()


def test_noise_without_a_guarantee_has_no_figures(tmp_path: Path) -> None:
    """What bounds nothing is not a number; without mechanisms there is nothing to tell."""
    options = TrainingProtectionOptions(privacy="fedsea:scale=0.02", ledger=tmp_path / "x.ledger")
    chosen = options.chosen(ConnectionOptions(), "run")
    assert chosen is not None
    policy = chosen.applied(8, ("trunk",))
    with policy.guard() as guard:
        guard.forward(0, [[1]], torch.ones(1, 8))
    found = training_privacy_summary(policy)
    policy.close()
    assert found is not None
    assert (found["releases"], found["mu"], found["gradients"]) == (1, None, None)
    assert found["warning"] == GRADIENTS_BARE
    assert training_privacy_summary(None) is None
    show_training_spent(None)
