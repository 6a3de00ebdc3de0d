from __future__ import annotations

import importlib

import numpy as np
import pytest
from flwr.app import ConfigRecord
from flwr.common.secure_aggregation.secaggplus_constants import Key
from tests.federated_steps import LAYOUT, Steps

from fedsea.errors import ConfigError, PermissionDenied, PrivacyError, TrainingError
from fedsea.federated.client_app import client_app
from fedsea.federated.config import Outside, SecureSection
from fedsea.federated.local import FitSettings, LocalClient, Policy
from fedsea.federated.memory import MemoryGrid
from fedsea.federated.secure import LEVELS, MODULUS, _check_unmask, check, expand, strengthen

SECTION = SecureSection(enabled=True, least=3, clip=0.5, max_weight=100.0)


def setup(**changes):
    """What a round of four clients under the terms says."""
    said = {
        Key.SAMPLE_NUMBER: 4,
        Key.SHARE_NUMBER: 4,
        Key.THRESHOLD: 3,
        Key.CLIPPING_RANGE: 0.5,
        Key.TARGET_RANGE: LEVELS,
        Key.MOD_RANGE: MODULUS,
        Key.MAX_WEIGHT: 100.0,
    }
    return ConfigRecord({**said, **changes})


def test_masks_depend_on_every_byte_of_the_seed():
    """Seeds that Flower's own expansion cannot tell apart give other masks here."""
    one = bytes(range(32))
    other = bytes([*one[4:8], *one[:4], *one[8:]])  # the same after folding into 32 bits
    masks = [expand(seed, MODULUS, [(1000,)])[0] for seed in (one, other)]

    assert np.count_nonzero(masks[0] == masks[1]) < 5
    assert np.array_equal(masks[0], expand(one, MODULUS, [(1000,)])[0])


def test_masks_are_uniform():
    """Every bit of a mask is a fair coin, the highest and the lowest too."""
    (mask,) = expand(b"seed", MODULUS, [(1 << 16,)])

    assert 0 <= int(mask.min()) <= int(mask.max()) < MODULUS
    for bit in range(32):
        assert abs(float((mask >> bit & 1).mean()) - 0.5) < 0.01


def test_masks_have_the_shapes_that_are_asked_for():
    """A mask for each array, drawn one after the other."""
    masks = expand(b"seed", MODULUS, [(2, 3), (), (5,)])

    assert [mask.shape for mask in masks] == [(2, 3), (), (5,)]
    assert all(mask.dtype == np.int64 for mask in masks)


def test_another_modulus_is_refused():
    """Numbers below 2^32 would not be uniform below anything else."""
    with pytest.raises(ConfigError):
        expand(b"seed", 1 << 30, [(1,)])


def test_both_ends_of_flower_use_them():
    """After `strengthen`, Flower's protocol draws its masks here."""
    strengthen()

    for name in (
        "flwr.client.mod.secure_aggregation.secaggplus_mod",
        "flwr.server.workflow.secure_aggregation.secaggplus_workflow",
    ):
        assert vars(importlib.import_module(name))["pseudo_rand_gen"] is expand


def test_another_place_for_masks_is_refused(monkeypatch):
    """A version of Flower that is built otherwise does not run with weak masks."""
    module = importlib.import_module("flwr.client.mod.secure_aggregation.secaggplus_mod")
    monkeypatch.delattr(module, "pseudo_rand_gen")

    with pytest.raises(ConfigError, match=r"flwr 1\.41"):
        strengthen()


def test_agreed_terms_pass():
    """A round as the client's own settings say it."""
    check(SECTION, setup())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({Key.SAMPLE_NUMBER: 2, Key.SHARE_NUMBER: 2, Key.THRESHOLD: 2}, "3 or more"),
        ({Key.THRESHOLD: 2}, "unmasked by 2"),
        ({Key.SAMPLE_NUMBER: 9, Key.SHARE_NUMBER: 9, Key.THRESHOLD: 4}, "insists on 5"),
        ({Key.SHARE_NUMBER: 3}, "shares or modulus"),
        ({Key.MOD_RANGE: 1 << 31}, "shares or modulus"),
        ({Key.CLIPPING_RANGE: 8.0}, "clip"),
        ({Key.MAX_WEIGHT: 1.0}, "max_weight"),
        ({Key.TARGET_RANGE: 2}, "clip"),
    ],
)
def test_weaker_terms_are_refused(changes, reason):
    """A client takes part in nothing that protects it less than it asked for."""
    with pytest.raises(PermissionDenied, match=reason):
        check(SECTION, setup(**changes))


@pytest.mark.parametrize(
    ("active", "dead"), [([1, 2], [3]), ([1, 2, 3], [3]), ([1, 1, 1], [2]), (None, [])]
)
def test_shares_that_would_unmask_one_client_are_not_given(active, dead):
    """Both secrets of a client, or a sum of too few, are refused."""
    request = ConfigRecord({Key.DEAD_NODE_ID_LIST: dead})
    if active is not None:
        request[Key.ACTIVE_NODE_ID_LIST] = active

    with pytest.raises(PermissionDenied):
        _check_unmask(request, SECTION)


def test_a_majority_must_answer():
    """Two disjoint sets of clients that could each unmask do not exist."""
    assert [SECTION.threshold(cohort) for cohort in (3, 4, 5, 6, 9)] == [3, 3, 3, 4, 5]


def secure_federation(simulate, **changes):
    """Four clients, whose own terms may differ from the aggregator's."""
    targets = dict.fromkeys(("acme", "globex", "initech", "umbrella"), (1.0, 10))
    secure = {"enabled": True, "clip": 0.5, "max_weight": 100.0, "timeout_s": 1.0}
    federation = simulate(targets, secure=secure, federation={"attempts": 1})
    terms = SecureSection(**{**secure, **changes}) if changes.get("enabled", True) else None
    federation.apps = {node: client_app(ask, terms) for node, ask in federation.asks.items()}
    return federation


def test_a_client_with_terms_refuses_rounds_in_clear(simulate):
    """Nothing leaves when the aggregator does not ask for masked updates."""
    federation = simulate({"acme": (1.0, 1), "globex": (1.0, 1)}, federation={"attempts": 1})
    federation.apps = {node: client_app(ask, SECTION) for node, ask in federation.asks.items()}

    with pytest.raises(TrainingError, match="too few clients"):
        federation.run()
    assert all(client._training.rounds == [] for client in federation.clients.values())


def test_a_client_without_terms_refuses_masked_rounds(simulate):
    """It would not know what it agrees to."""
    federation = secure_federation(simulate, enabled=False)

    with pytest.raises(TrainingError, match="too few clients"):
        federation.run()


def test_what_travels_in_clear(simulate, monkeypatch):
    """In a masked reply there are no arrays, no numbers of examples and no metrics."""
    federation = secure_federation(simulate)
    replies = []
    answer = MemoryGrid._answer

    def keep(self, node, message):
        reply = answer(self, node, message)
        if message.metadata.message_type == "train":
            replies.append(reply)
        return reply

    monkeypatch.setattr(MemoryGrid, "_answer", keep)
    federation.run()

    masked = [
        reply
        for reply in replies
        if "masked_params" in reply.content.config_records["secaggplus_configs"]
    ]
    assert len(masked) == 4
    for reply in masked:
        content = reply.content
        assert all(len(record) == 0 for record in content.array_records.values())
        assert content.metric_records["fitres.num_examples"]["num_examples"] == 1
        assert dict(content.config_records["fitres.metrics"]) == {}


def one_client(target, policy, tmp_path):
    """A client of these tests, and the arrays it begins with."""
    client = LocalClient("acme", Steps(target, 10), policy, tmp_path)
    return client, client.arrays(), FitSettings(round=1, layout=client.layout)


def test_an_update_beyond_the_range_is_scaled_as_a_whole(tmp_path):
    """Its direction stays, its largest number is the range, and the factor is told."""
    client, arrays, settings = one_client(4.0, Policy(clip=0.5), tmp_path)

    made = client.fit(arrays, settings)

    assert made.scaled == pytest.approx(0.25)
    assert all((array == 0.5).all() for array in made.update.values())


def test_an_update_beyond_the_range_may_be_refused(tmp_path):
    """Then nothing leaves, and the message says what to do."""
    client, arrays, settings = one_client(4.0, Policy(clip=0.5, outside=Outside.REFUSE), tmp_path)

    with pytest.raises(PrivacyError, match="raise it at all sides"):
        client.fit(arrays, settings)


def test_more_examples_than_agreed_are_refused(tmp_path):
    """A weight above max_weight would overflow the sum."""
    client, arrays, settings = one_client(1.0, Policy(max_weight=5.0), tmp_path)

    with pytest.raises(ConfigError, match="max_weight"):
        client.fit(arrays, settings)
    assert set(arrays) == set(LAYOUT)
