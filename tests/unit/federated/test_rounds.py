from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from tests.federated_steps import BOTTOM_A, BOTTOM_B, LAYOUT, TOP_B

from fedsea.errors import BudgetExceeded, CheckpointError, ConfigError, TrainingError
from fedsea.federated import rounds
from fedsea.federated.arrays import packed, unpacked
from fedsea.federated.local import Policy
from fedsea.federated.secure_round import masked_mean
from fedsea.model.adapters import CONFIG, TENSORS

TWO = {"acme": (1.0, 100), "globex": (4.0, 300)}
FOUR = {"acme": (1.0, 10), "globex": (2.0, 20), "initech": (3.0, 30), "umbrella": (4.0, 40)}
SECURE = {"enabled": True, "clip": 8.0, "max_weight": 100.0, "timeout_s": 1.0}


def values(arrays):
    """The one number of which all arrays consist."""
    found = {float(value) for array in arrays.values() for value in array.ravel()}
    assert len(found) == 1
    return found.pop()


def test_fedavg_is_the_mean_weighted_by_examples(simulate):
    """One round gives (100 * 0.5 + 300 * 2) / 400."""
    federation = simulate(TWO)

    assert values(federation.run()) == pytest.approx((100 * 0.5 + 300 * 2.0) / 400, rel=1e-6)
    assert federation.reports[0].clients == ("acme", "globex")


def test_clients_may_all_weigh_the_same(simulate):
    """Without weights the mean is (0.5 + 2) / 2."""
    assert values(simulate(TWO, strategy={"weigh": False}).run()) == pytest.approx(1.25, rel=1e-6)


def test_fedprox_pulls_clients_back(simulate):
    """The proximal term reaches the clients' training."""
    federation = simulate(TWO, strategy={"kind": "fedprox", "proximal": 0.25})
    for client in federation.clients.values():
        client._training.steps = 2
    # Half of the way, then half of the rest less a quarter of the way gone.
    expected = {target: target / 2 + target / 4 - target / 8 for target in (1.0, 4.0)}

    wanted = (100 * expected[1.0] + 300 * expected[4.0]) / 400
    assert values(federation.run()) == pytest.approx(wanted, rel=1e-6)


def test_fedadam_takes_adams_step(simulate):
    """m / (sqrt(v) + tau) with Flower's correction of the rate for the first round."""
    strategy = {"kind": "fedadam", "learning_rate": 0.1, "beta1": 0.9, "beta2": 0.99, "tau": 1e-3}
    delta = 1.625
    rate = 0.1 * math.sqrt(1 - 0.99**2) / (1 - 0.9**2)
    wanted = rate * 0.1 * delta / (math.sqrt(0.01 * delta**2) + 1e-3)

    assert values(simulate(TWO, strategy=strategy).run()) == pytest.approx(wanted, rel=1e-5)


def test_normfedavg_averages_unit_updates(simulate):
    """Magnitudes are given up: two clients that agree on the direction give a step of the rate."""
    strategy = {"kind": "normfedavg", "learning_rate": 0.5}
    numbers = sum(math.prod(shape) for shape in LAYOUT.values())

    found = simulate(TWO, strategy=strategy).run()

    assert values(found) == pytest.approx(0.5 / math.sqrt(numbers), rel=1e-6)


def test_noise_of_the_aggregator_is_charged_and_told(simulate, tmp_path):
    """Every round is charged before it is kept; mechanism, unit and number are in the report."""
    privacy = {"mu": 0.5, "ledger": tmp_path / "ledger", "budget_mu": 1.0}
    federation = simulate(
        TWO, strategy={"kind": "normfedavg"}, privacy=privacy, federation={"rounds": 4}
    )

    federation.run()

    assert federation.reports[-1].privacy is not None
    assert "unit-update:mu=0.5,neighbours=replace, unit client: mu 1" in (
        federation.reports[-1].privacy
    )


def test_a_spent_budget_ends_the_federation(simulate, tmp_path):
    """Two rounds of mu 0.5 fit into 0.8; the third is not made, and the second stays saved."""
    privacy = {"mu": 0.5, "ledger": tmp_path / "ledger", "budget_mu": 0.8}
    federation = simulate(
        TWO, strategy={"kind": "normfedavg"}, privacy=privacy, federation={"rounds": 4}
    )

    with pytest.raises(BudgetExceeded):
        federation.run()
    assert [report.round for report in federation.reports] == [1, 2]


def test_a_secure_round_equals_a_plain_one(simulate):
    """SecAgg+ gives the weighted mean up to its grid, and the aggregator sees no number of examples."""
    found = values_of(simulate(FOUR, secure=SECURE).run())
    wanted = sum(target / 2 * examples for target, examples in FOUR.values()) / 100

    step = 8.0 / 2**21 * 4
    assert found == pytest.approx(wanted, abs=step)


def values_of(arrays):
    """The mean of arrays that are constant up to rounding."""
    found = np.concatenate([array.ravel() for array in arrays.values()])
    assert float(np.ptp(found)) < 1e-4
    return float(found.mean())


@pytest.mark.parametrize("stage", range(4))
def test_a_client_may_leave_at_any_stage_of_a_secure_round(simulate, stage):
    """Whoever is lost before its update came in is left out; afterwards it counts."""
    federation = simulate(FOUR, secure=SECURE)
    seen: list[int] = []

    def down(node, message):
        if node == 11 and message.metadata.message_type == "train":
            seen.append(node)
            return len(seen) > stage
        return False

    federation.down = down
    found = values_of(federation.run())

    counted = dict(FOUR)
    if stage < 3:
        del counted["acme"]
    total = sum(examples for _, examples in counted.values())
    wanted = sum(target / 2 * examples for target, examples in counted.values()) / total
    assert found == pytest.approx(wanted, abs=1e-4)
    assert federation.reports[0].missing == (("acme",) if stage < 3 else ())


def test_too_few_for_a_secure_sum_unmasks_nothing(simulate):
    """With two of three left the round is begun again, and at the end given up; nothing is saved."""
    three = {name: FOUR[name] for name in ("acme", "globex", "initech")}
    federation = simulate(three, secure=SECURE)
    federation.down = lambda node, message: (
        node == 11 and (message.metadata.message_type == "train")
    )

    with pytest.raises(TrainingError, match="begun 3 times"):
        federation.run()
    assert federation.reports == []


def test_no_sum_is_unmasked_that_is_not_used(simulate, monkeypatch):
    """Two sums of one round that differ by a client would tell its update: there is one only."""
    federation = simulate(FOUR, secure=SECURE, federation={"least": 4})
    lost: list[int] = []

    def down(node, message):
        if node == 11 and message.metadata.message_type == "train" and len(lost) < 2:
            lost.append(node)
            return len(lost) == 2
        return False

    counts: list[int] = []

    def kept(*arguments):
        found = masked_mean(*arguments)
        counts.append(0 if found is None else len(found[1]))
        return found

    monkeypatch.setattr(rounds, "masked_mean", kept)
    federation.down = down
    federation.run()
    assert counts == [0, 4]


def test_a_lost_client_does_not_stop_a_plain_round(simulate):
    """The mean is over those who answered, and the report names who is missing."""
    federation = simulate(FOUR)
    federation.down = lambda node, message: (
        node == 12 and (message.metadata.message_type == "train")
    )

    wanted = (10 * 0.5 + 30 * 1.5 + 40 * 2.0) / 80
    assert values(federation.run()) == pytest.approx(wanted, rel=1e-6)
    assert federation.reports[0].missing == ("globex",)


def test_a_client_that_comes_back_is_counted_on_again(simulate):
    """Whoever missed a round is asked again before the next one, and takes part if it answers."""
    federation = simulate(FOUR, federation={"rounds": 2})
    federation.down = lambda node, message: (
        node == 12 and message.metadata.message_type == "train" and message.metadata.group_id == "1"
    )

    federation.run()

    assert [report.missing for report in federation.reports] == [("globex",), ()]


def test_too_few_clients_at_the_beginning(simulate):
    """Without the least number of clients the federation says so after its waiting time."""
    federation = simulate(TWO)
    federation.down = lambda node, message: node == 11

    with pytest.raises(TrainingError, match="1 of 2 clients are there"):
        federation.run()


def test_clients_of_different_adapters_are_refused(simulate):
    """A layout that differs ends the federation before anything is averaged."""
    federation = simulate(TWO)
    federation.clients["acme"]._shared = {BOTTOM_A}

    with pytest.raises(ConfigError, match="different adapters"):
        federation.run()


def test_a_node_with_a_foreign_name_is_left_out(simulate):
    """Names that are not in the configuration take no part."""
    federation = simulate(FOUR)
    federation.clients["acme"].name = "mallory"

    federation.run()

    assert federation.reports[0].missing == ("acme",)
    assert any("does not name" in notice for notice in federation.notices)


def test_a_node_that_says_another_name_than_its_certificate_is_left_out(simulate):
    """A client cannot take the place of another, and the notice says whose certificate it was."""
    federation = simulate(FOUR)
    names = dict(zip(federation.apps, federation.clients, strict=True))
    federation.owner = (names | {12: "acme"}).get

    federation.run()

    assert federation.reports[0].missing == ("globex",)
    (notice,) = federation.notices
    assert "says that it is globex and shows the certificate of acme" in notice


@pytest.mark.parametrize("secure", [False, True])
@pytest.mark.parametrize("kind", ["fedavg", "fedadam"])
def test_a_stopped_federation_goes_on_to_the_same_bits(simulate, tmp_path, secure, kind):
    """Stopped after two rounds of four and begun again, it ends with the same adapter."""
    tables = {"strategy": {"kind": kind}}
    if secure:
        tables["secure"] = SECURE
    whole = simulate(FOUR, federation={"rounds": 4, "folder": tmp_path / "whole"}, **tables).run()
    stopped = tmp_path / "stopped"
    simulate(FOUR, federation={"rounds": 2, "folder": stopped}, **tables).run()

    later = simulate(FOUR, federation={"rounds": 4, "folder": stopped}, **tables)

    assert packed(later.run()) == packed(whole)
    assert [report.round for report in later.reports] == [3, 4]


def test_personal_parts_stay_at_home(simulate, tmp_path):
    """The top is not averaged; it never travels, and each client keeps its own after a resume."""
    policy = Policy(personal=frozenset({TOP_B}))
    federation = simulate(TWO, policy, federation={"rounds": 2})

    arrays = federation.run()

    assert set(arrays) == {BOTTOM_A, BOTTOM_B}
    tops = {
        name: client._training.arrays()[TOP_B].mean() for name, client in federation.clients.items()
    }
    assert tops == {"acme": 0.75, "globex": 3.0}
    kept = unpacked((tmp_path / "acme" / "adapter" / TENSORS).read_bytes())
    assert kept[TOP_B].mean() == 0.75
    again = simulate(TWO, policy, federation={"rounds": 3})
    again.run()
    assert again.clients["acme"]._training.arrays()[TOP_B].mean() == 0.875


def test_a_client_that_missed_a_round_goes_on_with_its_own(simulate):
    """Personal parts are those of the last round that the client was in."""
    federation = simulate(TWO, Policy(personal=frozenset({TOP_B})), federation={"rounds": 3})
    federation.down = lambda node, message: (
        node == 11
        and message.metadata.message_type == "train"
        and (message.metadata.group_id == "2")
    )
    federation.config = replace(
        federation.config, federation=replace(federation.config.federation, least=1)
    )

    federation.run()

    tops = [client._training.arrays()[TOP_B].mean() for client in federation.clients.values()]
    assert tops == [0.75, 3.5]


def test_a_client_that_lost_its_personal_parts_says_so(simulate, tmp_path):
    """Going on without what was kept would be another training."""
    policy = Policy(personal=frozenset({TOP_B}))
    simulate(TWO, policy, federation={"rounds": 2}).run()
    again = simulate(TWO, policy, federation={"rounds": 3})
    again.clients["acme"]._steps.path(2).joinpath("personal.safetensors").unlink()

    with pytest.raises(TrainingError):
        again.run()


def test_frozen_factors_do_not_travel(simulate):
    """Under FFA-LoRA only B is averaged; the saved adapter holds A as well."""
    federation = simulate(TWO, Policy(frozen=frozenset({BOTTOM_A})))

    arrays = federation.run()

    assert set(arrays) == {BOTTOM_B, TOP_B}
    folder = federation.config.federation.folder / "rounds" / "step-00000001"
    assert set(unpacked((folder / TENSORS).read_bytes())) == set(LAYOUT)
    assert json.loads((folder / CONFIG).read_text())["peft_type"] == "LORA"


def test_losses_are_told_by_those_who_agree(simulate):
    """A client that keeps its loss is not asked for it."""
    quiet = simulate(TWO, federation={"evaluate": True})
    quiet.run()
    told = simulate(TWO, Policy(share_loss=True), federation={"evaluate": True, "name": "told"})
    told.config.federation.folder.with_name("federation").rename(
        told.config.federation.folder.with_name("first")
    )
    told.run()

    assert quiet.reports[0].loss is None
    assert told.reports[0].loss == pytest.approx(
        (100 * abs(1 - 1.625) + 300 * abs(4 - 1.625)) / 400, rel=1e-6
    )


def test_a_folder_of_another_adapter_is_refused(simulate):
    """Saved rounds of another layout are not taken for this federation's."""
    simulate(TWO).run()
    other = simulate(TWO, Policy(personal=frozenset({TOP_B})), federation={"rounds": 2})

    with pytest.raises(CheckpointError, match="another adapter"):
        other.run()


def test_nothing_of_the_training_is_in_the_record(simulate):
    """rounds.jsonl holds names, times and numbers of clients; no loss unless it was asked for."""
    federation = simulate(TWO)
    federation.run()

    line = json.loads((federation.config.federation.folder / "rounds.jsonl").read_text())
    assert set(line) == {
        "round",
        "rounds",
        "clients",
        "missing",
        "scaled",
        "seconds",
        "loss",
        "privacy",
    }
    assert line["loss"] is None
