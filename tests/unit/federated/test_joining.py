from __future__ import annotations

import pytest

from fedsea.errors import ConfigError
from fedsea.federated.config import FederationConfig
from fedsea.federated.joining import ClientConfig
from fedsea.federated.simulation import simulate
from fedsea.privacy.accounts import Budget
from fedsea.settings import from_tables

RUN = {"model": "model", "data": "train.jsonl", "out": "out"}


def made(**tables):
    """Settings of a client."""
    return ClientConfig.from_table({"client": {"name": "acme"}, "run": RUN, **tables})


def test_a_file_is_read(tmp_path):
    """Its own sections beside those of a fine-tuning; paths are relative to the file."""
    file = tmp_path / "acme.toml"
    file.write_text(
        '[client]\nname = "acme"\nservers = ["192.0.2.1:50051"]\nca = "ca.pem"\n'
        'certificate = "a.pem"\nkey = "a.key"\npersonal = ["top"]\n'
        '[secure]\nenabled = true\n[run]\nmodel = "m"\ndata = "d.jsonl"\nout = "o"\n'
        "[training]\nsteps = 7\n"
    )

    config = ClientConfig.load(file)

    assert config.client.tls.ca == tmp_path / "ca.pem"
    assert config.client.personal == ("top",)
    assert config.secure.enabled
    assert config.finetune.training.steps == 7
    assert config.finetune.run.data == tmp_path / "d.jsonl"


@pytest.mark.parametrize(
    ("tables", "reason"),
    [
        ({"client": {}}, r"client\.name is missing"),
        ({"client": {"name": "Not A Tenant"}}, "cannot name a tenant"),
        ({"client": {"name": "acme", "server": []}}, "did you mean servers"),
        ({"client": {"name": "acme", "personal": ["trunk"]}}, "use bottom and top"),
        ({"lora": {"prompt_rows": 4}}, "soft prompts"),
        ({"traning": {}}, "did you mean training"),
        ({"training": {"step": 3}}, "did you mean steps"),
        ({"secure": {"least": 2}}, "fewer than 3"),
        ({"training": {"patience": 2}}, "patience is not used in a federation"),
        ({"run": {**RUN, "tensorboard": True}}, "tensorboard is not used"),
        ({"protection": {"epsilon": 3.0}}, "protection has no mechanism"),
        ({"protection": {"row": "plain"}}, "did you mean rows"),
        ({"privacy": {"mu": 1.0, "neighbours": "remove"}}, "use replace"),
    ],
)
def test_what_cannot_be_used_is_named(tables, reason):
    """Every wrong key and value is an error that says what to write instead."""
    with pytest.raises(ConfigError, match=reason):
        made(**tables)


def test_a_protection_is_that_of_the_tenant():
    """Both directions, charged to the client's name and, unless given, the adapter's record."""
    spec = "gaussian:clip_norm=1,mu=0.5,by=frobenius"
    given = made(protection={"gradients": spec, "epsilon": 3.0, "delta": 1e-6}).protection

    chosen = given.chosen("acme", "letters")

    assert (chosen.rows, chosen.gradients) == (None, spec)
    assert (chosen.tenant, chosen.record, chosen.delta) == ("acme", "letters", 1e-6)
    assert chosen.budget == Budget(3.0, 1e-6)
    assert made().protection.chosen("acme", "letters") is None


def test_certificates_are_needed_to_join():
    """A client without them is told what to name."""
    with pytest.raises(ConfigError, match=r"client\.certificate"):
        _ = made().client.tls


def test_a_simulation_needs_the_file_of_every_client(tmp_path):
    """Names of the federation and of the files must be the same."""
    section = {"name": "trial", "clients": ["acme", "globex"], "folder": tmp_path / "out"}
    config = from_tables(FederationConfig, {"federation": section})

    with pytest.raises(ConfigError, match="give a file for each"):
        simulate(config, [made()], lambda _: None, lambda _: None)


def test_a_simulation_needs_one_model(tmp_path):
    """Clients of different checkpoints cannot share a trunk."""
    section = {"name": "trial", "clients": ["acme", "globex"], "folder": tmp_path / "out"}
    config = from_tables(FederationConfig, {"federation": section})
    other = made(client={"name": "globex"}, run={**RUN, "model": "another"})

    with pytest.raises(ConfigError, match="different models"):
        simulate(config, [made(), other], lambda _: None, lambda _: None)
