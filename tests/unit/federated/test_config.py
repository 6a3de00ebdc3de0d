from __future__ import annotations

import pytest

from fedsea.errors import ConfigError
from fedsea.federated.config import (
    AggregatorConfig,
    FederationConfig,
    Kind,
    SecureSection,
)
from fedsea.settings import from_tables

SECTION = {"name": "trial", "clients": ["acme", "globex", "initech"], "folder": "out"}


def made(**tables):
    """Settings of an aggregator; `federation` adds to the section that is needed."""
    section = {**SECTION, **tables.pop("federation", {})}
    return from_tables(FederationConfig, {"federation": section, **tables})


def test_a_file_is_read(tmp_path):
    """Paths are relative to the file, and what it does not name has its default."""
    file = tmp_path / "federation.toml"
    file.write_text(
        '[federation]\nname = "trial"\nclients = ["acme", "globex"]\nfolder = "out"\n'
        '[strategy]\nkind = "fedadam"\nlearning_rate = 1\n'
        '[aggregator]\nca = "ca.pem"\ncertificate = "s.pem"\nkey = "s.key"\n'
    )

    config = AggregatorConfig.load(file)

    assert config.federation.folder == tmp_path / "out"
    assert config.aggregator.ca == tmp_path / "ca.pem"
    assert config.strategy.kind is Kind.FEDADAM
    assert config.strategy.learning_rate == 1.0
    assert not config.secure.enabled


@pytest.mark.parametrize(
    ("tables", "reason"),
    [
        ({"federation": {"round": 3}}, "round is no key of section .federation.*rounds"),
        ({"strategie": {}}, "strategie is no key of the configuration.*strategy"),
        ({"federation": {"clients": ["acme"]}}, "two or more"),
        ({"federation": {"clients": ["acme", "acme"]}}, "different"),
        ({"federation": {"clients": ["acme", "Not A Name"]}}, "is no name"),
        ({"federation": {"clients": "acme"}}, "list of texts"),
        ({"federation": {"least": 4}}, "least is 4 of 3"),
        ({"federation": {"rounds": 0}}, "rounds is 0"),
        ({"federation": {"wait_s": 0}}, "wait_s"),
        ({"federation": {"rounds": "many"}}, "rounds"),
        ({"strategy": {"kind": "fedsgd"}}, "fedavg, fedprox, fedadam, normfedavg"),
        ({"strategy": {"beta1": 1.0}}, "beta1"),
        ({"secure": {"enabled": True, "least": 2}}, "fewer than 3"),
        ({"secure": {"enabled": True, "least": 4}}, "least is 4"),
        ({"secure": {"clip": 0}}, "clip"),
        ({"secure": {"outside": "cut"}}, "scale, refuse"),
        ({"secure": {"enabled": True}, "strategy": {"weigh": False}}, "max_weight to 1"),
        ({"secure": {"enabled": True}, "strategy": {"kind": "normfedavg"}}, "max_weight to 1"),
        ({"privacy": {"mu": 1.0}}, "use normfedavg"),
        ({"privacy": {"mu": -1.0}, "strategy": {"kind": "normfedavg"}}, "mu is -1"),
        ({"privacy": {"budget_mu": 1.0}}, "without privacy.mu"),
        ({"privacy": {"neighbours": "add"}}, "replace, remove"),
    ],
)
def test_what_cannot_be_used_is_named(tables, reason):
    """Every wrong key and value is an error that says what to write instead."""
    with pytest.raises(ConfigError, match=reason):
        made(**tables)


def test_missing_keys_are_named():
    """What has no default must be there."""
    with pytest.raises(ConfigError, match=r"federation\.folder is missing"):
        from_tables(FederationConfig, {"federation": {"name": "a", "clients": ["a", "b"]}})
    with pytest.raises(ConfigError, match=r"federation\.name is missing"):
        from_tables(FederationConfig, {})


def test_secure_aggregation_raises_the_least():
    """A round needs as many clients as the sum needs."""
    assert made(federation={"least": 2}).least == 2
    assert made(federation={"least": 2}, secure={"enabled": True}).least == 3


def test_nothing_is_secure_by_accident():
    """The switch is off unless it is set, and the terms are those of the table."""
    assert SecureSection() == made().secure
