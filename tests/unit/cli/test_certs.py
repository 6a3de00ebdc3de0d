from __future__ import annotations

import json

import pytest

from fedsea.transport.credentials import ClientTLS, ServerTLS, load_client, load_server


def test_three_commands_make_a_working_set(fedsea, tmp_path):
    """init, server and client give files that both sides accept."""
    folder = tmp_path / "certs"
    assert fedsea("certs", "init", "--dir", folder).exit_code == 0
    assert fedsea("certs", "server", "a.example", "10.0.0.1", "--dir", folder).exit_code == 0
    assert fedsea("certs", "client", "acme", "--dir", folder).exit_code == 0

    ca = folder / "ca.pem"
    load_server(ServerTLS(ca, folder / "server.pem", folder / "server.key"))
    load_client(ClientTLS(ca, folder / "client-acme.pem", folder / "client-acme.key"))


def test_commands_say_what_goes_where(fedsea, tmp_path):
    """Every file that is made is named with who may have it."""
    first = fedsea("certs", "init", "--dir", tmp_path).stderr
    server = fedsea("certs", "server", "localhost", "--dir", tmp_path).stderr
    client = fedsea("certs", "client", "acme", "--dir", tmp_path).stderr

    assert "ca.key -> nobody" in first
    assert "server.key -> the server only, never a client" in server
    assert "client-acme.key -> the client acme only, never the server" in client


@pytest.mark.parametrize(
    ("arguments", "exit_code", "words"),
    [
        (["client", "Not A Name"], 2, "cannot name a tenant"),
        (["server", "no host!"], 2, "neither a host name nor an IP address"),
        (["server", "localhost", "--days", "0"], 2, "cannot be valid for 0 days"),
        (["init"], 2, "exists: remove it"),
    ],
)
def test_bad_requests_are_refused(fedsea, certs, arguments, exit_code, words):
    """Names and dates that cannot work, and files that are there, end with one line."""
    result = fedsea("certs", *arguments, "--dir", certs)

    assert (result.exit_code, result.stderr.count("\n")) == (exit_code, 1)
    assert words in result.stderr


def test_a_client_needs_a_ca_first(fedsea, tmp_path):
    """Without a CA the fix is named."""
    result = fedsea("certs", "client", "acme", "--dir", tmp_path)

    assert result.exit_code == 6
    assert "fedsea certs init" in result.stderr


def test_force_overwrites(fedsea, tmp_path):
    """A CA can be made anew on request."""
    fedsea("certs", "init", "--dir", tmp_path)
    before = (tmp_path / "ca.pem").read_bytes()

    assert fedsea("certs", "init", "--dir", tmp_path, "--force").exit_code == 0
    assert (tmp_path / "ca.pem").read_bytes() != before


def test_a_token_is_shown_once_and_kept_as_a_hash(fedsea, tmp_path):
    """The token is the only thing on standard output; the file never holds it."""
    file = tmp_path / "tokens.json"
    result = fedsea("certs", "token", "acme", "--file", file)
    token = result.stdout.strip()

    assert result.exit_code == 0
    assert len(token) > 40
    assert token not in file.read_text(encoding="utf-8")
    assert json.loads(file.read_text(encoding="utf-8"))["tokens"][0]["tenant"] == "acme"
