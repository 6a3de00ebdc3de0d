"""`fedsea federate`: what is refused, and how rounds are shown."""

from __future__ import annotations

import importlib.util

import pytest

from fedsea.cli import federate
from fedsea.federated.rounds import RoundReport


@pytest.mark.parametrize("command", [("run",), ("client",), ("simulate", "more.toml")])
def test_a_missing_file_is_named(fedsea, command, tmp_path):
    """One line, and the exit code of a wrong setting."""
    name, *more = command
    found = fedsea("federate", name, tmp_path / "no.toml", *more)

    assert found.exit_code == 2
    assert "no.toml does not exist" in found.stderr


def test_an_unknown_key_is_named(fedsea, tmp_path):
    """With the key that was meant."""
    file = tmp_path / "federation.toml"
    file.write_text('[federation]\nname = "a"\nclients = ["a", "b"]\nfolder = "o"\nround = 3\n')

    found = fedsea("federate", "simulate", file, file)

    assert found.exit_code == 2
    assert "did you mean rounds?" in found.stderr


def test_flower_may_be_missing(fedsea, tmp_path, monkeypatch):
    """The extra is named."""
    monkeypatch.setattr(federate, "find_spec", lambda name: None)

    found = fedsea("federate", "run", tmp_path / "no.toml")

    assert found.exit_code == 2
    assert "fedsea[federated]" in found.stderr
    assert importlib.util.find_spec("flwr") is not None


def test_certificates_are_checked_first(fedsea, tmp_path):
    """An aggregator without its files does not listen."""
    file = tmp_path / "federation.toml"
    file.write_text(
        '[federation]\nname = "a"\nclients = ["a", "b"]\nfolder = "o"\n[aggregator]\n'
        'address = "127.0.0.1:0"\nca = "ca.pem"\ncertificate = "s.pem"\nkey = "s.key"\n'
    )

    found = fedsea("federate", "run", file)

    assert found.exit_code == 6
    assert "s.pem" in found.stderr or "ca.pem" in found.stderr


def test_a_client_is_told_what_its_server_can_read(fedsea, tmp_path):
    """Before anything leaves, as in `fedsea finetune` without mechanisms."""
    file = tmp_path / "acme.toml"
    file.write_text(
        '[client]\nname = "acme"\n[run]\nmodel = "absent"\ndata = "d.jsonl"\nout = "o"\n'
    )

    found = fedsea("federate", "client", file)

    assert found.exit_code != 0
    assert "whoever runs the trunk can read" in " ".join(found.stderr.split())


def test_a_round_is_one_line(capsys):
    """Who finished, who did not, what was scaled, and what privacy was spent."""
    federate._show(
        RoundReport(
            round=2,
            rounds=5,
            clients=("acme", "globex"),
            missing=("initech",),
            scaled=1,
            seconds=3.25,
            loss=0.5,
            privacy="unit-update:mu=1, unit client: mu 1.414 so far",
        )
    )

    found = capsys.readouterr()
    assert found.out == (
        "round 2 of 5: acme, globex; without initech; 1 scaled to the clip range; "
        "loss 0.5000; 3.2 s\n"
    )
    assert "unit client" in found.err


def test_a_scaled_update_is_told_at_home(capsys):
    """The client learns by how much its own update was shrunk."""
    federate._trained(3, 0.25)
    federate._trained(4, 1.0)

    assert capsys.readouterr().out == (
        "round 3: trained here; the update was scaled by 0.25 to the clip range\n"
        "round 4: trained here\n"
    )
