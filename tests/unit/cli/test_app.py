from __future__ import annotations

import os
import subprocess
import sys

import pytest
import typer

from fedsea import cli
from fedsea.cli import app as app_module
from fedsea.errors import (
    BindError,
    Capacity,
    CertificateError,
    ConfigError,
    FedseaError,
    PartitionError,
    PromptTooLong,
    RemoteProtocolError,
    Unreachable,
)

COMMANDS = ["demo", "serve", "generate", "chat", "certs", "inspect", "split", "bench", "version"]


@pytest.fixture
def failing(monkeypatch):
    """Let the command `split` fail with a given exception."""

    def arrange(error: BaseException) -> None:
        command = next(c for c in app_module.app.registered_commands if c.name == "version")

        def fail() -> None:
            raise error

        monkeypatch.setattr(command, "callback", fail)

    return arrange


def test_help_names_every_command(fedsea):
    """The first help page lists all that there is."""
    result = fedsea("--help")

    assert result.exit_code == 0
    assert [name for name in COMMANDS if f" {name} " not in result.stdout] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(fedsea, command):
    """Each command has a help page that begins with a sentence."""
    result = fedsea(command, "--help")

    assert result.exit_code == 0
    assert "Usage: " in result.stdout


@pytest.mark.parametrize(
    ("error", "exit_code"),
    [
        (ConfigError("a"), 2),
        (PromptTooLong("a"), 2),
        (PartitionError("a"), 3),
        (RemoteProtocolError("a"), 4),
        (Unreachable("a"), 5),
        (BindError("a"), 5),
        (CertificateError("a"), 6),
        (Capacity("a", retry_after=1.0), 7),
        (FedseaError("a"), 1),
    ],
)
def test_errors_are_one_line_with_their_exit_code(fedsea, failing, error, exit_code):
    """A known error ends a command with its message alone, on standard error."""
    failing(error)
    result = fedsea("version")

    assert (result.exit_code, result.stdout, result.stderr) == (exit_code, "", "error: a\n")


def test_long_errors_are_not_wrapped_and_not_interpreted(fedsea, failing):
    """A message stays one line, brackets and all."""
    message = "no file [red]/a[/red]/b " + "and more words " * 40
    failing(ConfigError(message))

    assert fedsea("version").stderr == f"error: {message}\n"


def test_debug_shows_the_traceback(fedsea, failing):
    """With --debug the exception itself comes through."""
    failing(ConfigError("a"))

    assert isinstance(fedsea("--debug", "version").exception, ConfigError)


def test_other_exceptions_are_not_hidden(fedsea, failing):
    """A bug keeps its traceback."""
    failing(ZeroDivisionError("bug"))

    assert isinstance(fedsea("version").exception, ZeroDivisionError)


def test_interrupt_ends_with_130(fedsea, failing):
    """Ctrl-C is no error and shows no traceback."""
    failing(KeyboardInterrupt())
    result = fedsea("version")

    assert (result.exit_code, result.stderr) == (130, "")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "--tempp", "1"], "--tempp"),
        (["generate", "m", "hi", "--top-k", "many"], "Invalid value for '--top-k'"),
        (["generate", "m", "hi", "--codec", "fp8"], "'fp8' is not one of"),
        (["generate"], "Missing argument"),
        (["certs", "server"], "Missing argument"),
        (["talk"], "No such command 'talk'"),
        (["serve", "m", "--dtype", "auto"], "'auto' is not one of"),
    ],
)
def test_wrong_usage_is_explained(fedsea, arguments, words):
    """What is wrong about a command line is said by name, with exit code 2."""
    result = fedsea(*arguments)

    assert result.exit_code == 2
    assert words in result.stderr


def test_version_is_shown(fedsea):
    """`--version` is one line; `version` adds what fedsea runs on."""
    assert fedsea("--version").stdout.startswith("fedsea ")
    assert {line.split()[0] for line in fedsea("version").stdout.splitlines()} >= {
        "fedsea",
        "torch",
        "transformers",
    }


def test_help_and_usage_errors_import_nothing_heavy():
    """Help and errors about options come without torch, transformers and gRPC."""
    code = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from fedsea.cli.app import app\n"
        "for arguments in (['--help'], ['generate', '--help'], ['serve', '--nope']):\n"
        "    CliRunner().invoke(app, arguments)\n"
        "print(sorted({'torch', 'transformers', 'grpc', 'numpy'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout == "[]\n"


@pytest.mark.parametrize(("before", "after"), [(None, "2000"), ("7", "7")])
def test_main_sets_the_spin_count_unless_it_is_set(monkeypatch, before, after):
    """OpenMP threads of a client and a server on the same cores must not spin for long."""
    monkeypatch.delenv(cli.SPIN_VARIABLE, raising=False)
    if before is not None:
        monkeypatch.setenv(cli.SPIN_VARIABLE, before)
    monkeypatch.setattr(sys, "argv", ["fedsea", "--version"])
    with pytest.raises(SystemExit) as ended:
        cli.main()

    assert ended.value.code == 0
    assert os.environ[cli.SPIN_VARIABLE] == after


def test_completion_is_offered(fedsea):
    """The shell can be taught to complete commands and options."""
    assert "--install-completion" in fedsea("--help").stdout


def test_app_is_a_typer_app():
    """`docs/reference` and completion build on the app."""
    assert isinstance(app_module.app, typer.Typer)
