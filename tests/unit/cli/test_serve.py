from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from fedsea.cli import serve as serve_module
from fedsea.cli.serve import LogFormat, LogLevel, SettingOptions, parse_setting
from fedsea.errors import ConfigError
from fedsea.server.config import LOG_FORMATS, LOG_LEVELS, ServerConfig


@pytest.fixture
def configured(fedsea, monkeypatch):
    """Run `fedsea serve` with arguments as far as its settings."""

    def run(*arguments: object) -> ServerConfig:
        found: list[ServerConfig] = []

        def keep(config: ServerConfig) -> int:
            found.append(config)
            return 0

        monkeypatch.setattr(serve_module, "_serve", keep)
        result = fedsea("serve", *arguments)
        assert result.exit_code == 0, result.stderr
        return found[0]

    return run


def test_every_option_reaches_its_setting(configured):
    """Options land in the section and key that they are named for."""
    config = configured(
        "model", "--span", "1:7", "--address", "127.0.0.1:7600", "--certs", "d",
        "--tokens", "t.json", "--dtype", "bf16", "--quantization", "int8", "--device", "cpu",
        "--threads", 3, "--kv-rows", 640, "--max-context", 99, "--max-sessions", 7,
        "--metrics", "127.0.0.1:9090", "--log-format", "json", "--log-level", "debug",
    )  # fmt: skip

    assert (config.server.model, config.server.span) == ("model", "1:7")
    assert (config.server.address, config.server.max_sessions) == ("127.0.0.1:7600", 7)
    assert (config.model.dtype, config.model.quantization) == ("bf16", "int8")
    assert (config.model.device, config.model.threads) == ("cpu", 3)
    assert (config.kv.rows, config.kv.max_context) == (640, 99)
    assert config.security.ca == Path("d/ca.pem")
    assert config.security.certificate == Path("d/server.pem")
    assert config.security.key == Path("d/server.key")
    assert config.security.tokens == Path("t.json")
    assert config.metrics.address == "127.0.0.1:9090"
    assert (config.log.format, config.log.level) == ("json", "debug")


def test_an_attestation_command(configured, fedsea):
    """It is taken apart as a shell would, which never sees it; an open quotation is told."""
    config = configured("m", "--plaintext", "--attestation-command", "/opt/quote --kind 'a b'")
    assert config.attestation.command == ("/opt/quote", "--kind", "a b")
    result = fedsea("serve", "m", "--attestation-command", "/opt/quote 'a")
    assert result.exit_code == ConfigError.exit_code
    assert "open quotation" in result.stderr


def test_every_option_has_a_key(configured):
    """No option of the group is left out of the mapping to sections."""
    sections = {entry.name: entry for entry in fields(ServerConfig)}
    for entry in fields(SettingOptions):
        section, key = serve_module._KEYS.get(entry.name, ("server", entry.name))
        owner = getattr(configured("m", "--plaintext"), section)

        assert section in sections
        assert hasattr(owner, key)


def test_choices_are_those_of_the_library():
    """Choices that are written down for the help are the library's."""
    assert {kind.value for kind in LogFormat} == set(LOG_FORMATS)
    assert {level.value for level in LogLevel} == set(LOG_LEVELS)


def test_options_come_before_the_file(configured, tmp_path):
    """A file may say everything, and an option overrides a key of it."""
    file = tmp_path / "server.toml"
    file.write_text(
        '[server]\nmodel = "m"\nspan = "1:3"\n[security]\nplaintext = true\n[kv]\nrows = 64\n',
        encoding="utf-8",
    )
    config = configured("--config", file, "--span", "1:2", "--set", "kv.page_rows=8")

    assert (config.server.model, config.server.span) == ("m", "1:2")
    assert (config.kv.rows, config.kv.page_rows) == (64, 8)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("kv.page_rows=32", ("kv", "page_rows", 32)),
        ("server.idle_timeout_s=1.5", ("server", "idle_timeout_s", 1.5)),
        ("security.plaintext=true", ("security", "plaintext", True)),
        ("kv.memory=4GiB", ("kv", "memory", "4GiB")),
        ('log.format="json"', ("log", "format", "json")),
        ("server.model=a=b", ("server", "model", "a=b")),
    ],
)
def test_settings_are_read_as_toml_or_text(text, expected):
    """Numbers and booleans are TOML; what is no TOML is text without quotes."""
    assert parse_setting(text) == expected


@pytest.mark.parametrize("text", ["rows=3", "kv.rows", "kv.=3", ".rows=3", ""])
def test_malformed_settings_are_refused(text):
    """A setting without section, key or value says how to write it."""
    with pytest.raises(ConfigError, match=r"SECTION\.KEY=VALUE"):
        parse_setting(text)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "there is no model: give MODEL"),
        (["m", "--set", "kv.rowz=3"], "rowz is no key of section [kv]; did you mean rows?"),
        (["m", "--set", "kw.rows=3"], "kw is no key of the configuration; did you mean kv?"),
        (["m", "--set", "kv.rows=many"], "kv.rows is of type str; give a int"),
        (["m", "--config", "nowhere.toml"], "nowhere.toml does not exist"),
        (["m", "--ca", "a"], "security names only ca"),
        (["m", "--plaintext", "--certs", "d"], "security.plaintext is set beside certificates"),
        (["m", "--kv-rows", "1", "--kv-memory", "1GiB"], "give one of them"),
    ],
)
def test_bad_settings_end_with_one_line(fedsea, arguments, words):
    """Unknown keys, wrong types and contradictions are refused before anything is loaded."""
    result = fedsea("serve", *arguments)

    assert result.exit_code == 2
    assert words in result.stderr
    assert result.stderr.count("\n") == 1
