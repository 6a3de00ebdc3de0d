"""Fixtures of the command-line tests: run a command in this process, and certificates."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from fedsea.cli.app import app
from fedsea.transport.certificates import init_ca, issue_client, issue_server


@pytest.fixture(autouse=True)
def plain_terminal(monkeypatch):
    """A wide terminal without colours, and no settings of the person who runs the tests."""
    for name in ("FEDSEA_SERVER", "FEDSEA_CERTS", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def fedsea():
    """Run `fedsea` with arguments; the result has exit_code, stdout and stderr."""

    def invoke(*arguments: object, stdin: str | None = None):
        return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)

    return invoke


@pytest.fixture(scope="session")
def certs(tmp_path_factory):
    """A folder with a CA, a server's certificate and that of the client `acme`."""
    folder = tmp_path_factory.mktemp("certs")
    init_ca(folder)
    issue_server(folder, ["localhost", "127.0.0.1"])
    issue_client(folder, "acme")
    return folder
