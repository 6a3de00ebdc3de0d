"""Settings: a TOML file becomes checked dataclasses, and every mistake in it is named."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsea.errors import ConfigError
from fedsea.server.config import (
    LimitsSection,
    QuotaSection,
    QuotasSection,
    ServerConfig,
    parse_bytes,
)

EXAMPLE = """
[server]
model = "hub/name"
span = "1:7"
address = "127.0.0.1:0"

[model]
dtype = "bf16"
threads = 2

[kv]
memory = "1.5GiB"

[quotas]
sessions = 4

[quotas.tenants.acme]
rows_per_second = 2000

[security]
ca = "certs/ca.pem"
certificate = "certs/server.pem"
key = "certs/server.key"
"""

MISTAKES = [
    ({"server": {"modle": "x"}}, r"modle is no key of section \[server\]; did you mean model"),
    ({"sever": {}}, "sever is no key of the configuration; did you mean server"),
    ({"server": {}}, "server.model is missing"),
    ({"server": {"model": ""}}, "server.model is empty"),
    ({"server": {"model": 3}}, "server.model is of type int; give a str"),
    ({"server": "m"}, r"server is a single value; write a section \[server\]"),
    ({"model": {"dtype": "fp8"}}, "model.dtype is 'fp8'; choose one of fp32, bf16, fp16"),
    ({"model": {"threads": True}}, "model.threads is of type bool"),
    ({"model": {"device": "tpu"}}, "choose one of cpu, cuda, mps"),
    ({"kv": {"rows": 0}}, "kv.rows is 0"),
    ({"kv": {"memory": "much"}}, "kv.memory is 'much'"),
    ({"kv": {"rows": 64, "memory": "1GiB"}}, "both given"),
    ({"scheduler": {"stall_factor": 0.5}}, "stall_factor is 0.5"),
    ({"scheduler": {"max_step_rows": 8}}, "max_step_rows is below"),
    ({"quotas": {"sessions": -1}}, "quotas.sessions is -1"),
    ({"quotas": {"tenants": {"acme": {"rows": 1}}}}, r"rows is no key of section \[quotas.tenants"),
    ({"quotas": {"tenants": {"acme": 1}}}, "acme is a single value"),
    ({"security": {"ca": "a"}}, "security names only ca"),
    ({"security": {"ca": "a", "plaintext": True}}, "beside certificates"),
    ({"limits": {"max_pending": 0}}, "limits.max_pending is 0"),
    ({"log": {"level": "loud"}}, "log.level"),
]


def test_a_file_is_read(tmp_path):
    """Every kind of value arrives, with paths relative to the file."""
    path = tmp_path / "server.toml"
    path.write_text(EXAMPLE)

    config = ServerConfig.load(path)

    assert (config.server.model, config.server.span) == ("hub/name", "1:7")
    assert (config.model.dtype, config.model.threads) == ("bf16", 2)
    assert config.security.key == tmp_path / "certs" / "server.key"
    assert config.quotas.of("acme") == QuotaSection(sessions=4, rows_per_second=2000.0)
    assert config.quotas.of("other") == QuotaSection(sessions=4)
    assert config.limits == LimitsSection()


def test_no_message_is_larger_than_the_largest():
    """A cap beyond what the other side takes is refused by name."""
    with pytest.raises(ConfigError, match=r"limits\.max_message_bytes is .* at most 268435456"):
        LimitsSection(max_message_bytes=2**28 + 1)


def test_a_model_folder_beside_the_file_is_found(tmp_path):
    """A relative folder that exists beside the file is meant, before a hub id of that name."""
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    path = tmp_path / "server.toml"
    path.write_text('[server]\nmodel = "models/tiny"\n')

    assert ServerConfig.load(path).server.model == str(tmp_path / "models" / "tiny")


def test_overrides_replace_single_keys(tmp_path):
    """What a command line says wins over the file, key by key, with its own relative paths."""
    path = tmp_path / "server.toml"
    path.write_text(EXAMPLE)

    config = ServerConfig.load(
        path, {"server": {"address": "[::1]:9"}, "security": {"key": Path("own.key")}}
    )

    assert (config.server.address, config.server.span) == ("[::1]:9", "1:7")
    assert config.security.key == Path("own.key")
    with pytest.raises(ConfigError, match="adress is no key"):
        ServerConfig.load(path, {"server": {"adress": "x"}})


@pytest.mark.parametrize(("table", "message"), MISTAKES)
def test_mistakes_are_named(table, message):
    """Each wrong key or value is refused with its name and the fix."""
    table = {"server": {"model": "m"}, **table}

    with pytest.raises(ConfigError, match=message):
        ServerConfig.from_table(table)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "does not exist"), (b"[server", "not valid TOML"), (b"\xff", "not UTF-8")],
)
def test_unreadable_files(tmp_path, content, message):
    """A missing, malformed or binary file is one line, not a traceback."""
    path = tmp_path / "server.toml"
    if content is not None:
        path.write_bytes(content)

    with pytest.raises(ConfigError, match=message):
        ServerConfig.load(path)


@given(
    section=st.sampled_from([f.name for f in dataclasses.fields(ServerConfig)]),
    key=st.text(st.characters(categories=["Ll"]), min_size=1, max_size=8).map("zz".__add__),
)
def test_no_unknown_key_passes(section, key):
    """Whatever the section, a key that it does not have is refused by name."""
    table: dict[str, dict[str, object]] = {"server": {"model": "m"}}
    table.setdefault(section, {})[key] = 1

    with pytest.raises(ConfigError, match=key):
        ServerConfig.from_table(table)


@pytest.mark.parametrize(
    ("text", "size"),
    [("10", 10), ("2KB", 2000), ("2KiB", 2048), ("1.5 GiB", 3 * 2**29), ("4G", 4 * 10**9)],
)
def test_sizes(text, size):
    """Sizes may be decimal or binary."""
    assert parse_bytes("kv.memory", text) == size


def test_defaults_have_no_limits_of_their_own():
    """Without quotas nobody is limited."""
    assert QuotasSection().of("anybody") == QuotaSection()


def test_lists_of_paths(tmp_path):
    """Paths in a list are relative to the file too; anything but a list of paths is refused."""
    file = tmp_path / "server.toml"
    model = '[server]\nmodel = "m"\n[model]\n'
    file.write_text(model + 'projections = ["a.safetensors", "/b"]\n')
    assert ServerConfig.load(file).model.projections == (tmp_path / "a.safetensors", Path("/b"))
    for wrong in ('"a"', "[1]", "true"):
        file.write_text(f"{model}projections = {wrong}\n")
        with pytest.raises(ConfigError, match=r"model\.projections is no list of paths"):
            ServerConfig.load(file)


TRAINING = """
[server]
model = "hub/name"

[training]
folder = "trainings"
workers = 2

[training.groups.ward]
strategy = "client-batch"
tenants = ["acme", "globex"]
min_members = 2
"""


def test_training_and_its_groups_are_read(tmp_path):
    """The folder is relative to the file; a group has a section of its own."""
    file = tmp_path / "server.toml"
    file.write_text(TRAINING)
    section = ServerConfig.load(file, {"training": {"kept_rows": 5}}).training
    assert section.folder == tmp_path / "trainings"
    assert (section.workers, section.kept_rows) == (2, 5)
    group = section.groups["ward"]
    assert (group.strategy, group.tenants) == ("client-batch", ("acme", "globex"))
    assert (group.min_members, group.average_every) == (2, 1)
    assert ServerConfig.from_table({"server": {"model": "m"}}).training.folder is None


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"strategy": "clientbatch"}, "'clientbatch'; choose one of sequential, client-batch"),
        ({"tenants": []}, "without tenants"),
        ({"min_members": 3}, "above the number of tenants"),
        ({"deadline_s": 0}, "deadline_s must be positive"),
        ({"average_every": 0}, "average_every is 0; give at least 1"),
        ({"gather_s": -1.0}, "gather_s is -1.0; give at least 0"),
        ({"tenant": ["acme"]}, "tenant is no key of section .training.groups.ward."),
        ({"tenants": "acme"}, "training.groups.ward.tenants is no list of texts"),
    ],
)
def test_mistakes_in_a_group_are_named(keys, message):
    """Every key of a group is checked when the file is read."""
    group = {"strategy": "client-batch", "tenants": ["acme", "globex"], **keys}
    table = {"server": {"model": "m"}, "training": {"groups": {"ward": group}}}
    with pytest.raises(ConfigError, match=message):
        ServerConfig.from_table(table)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"workers": 0}, "training.workers is 0; give at least 1"),
        ({"kept_rows": -1}, "training.kept_rows is -1; give at least 0"),
        ({"keep": 0}, "training.keep is 0; give at least 1"),
        ({"groups": []}, "training.groups is a single value"),
        ({"groups": {"ward": {"tenants": ["acme"]}}}, "training.groups.ward.strategy is missing"),
    ],
)
def test_mistakes_in_training_are_named(keys, message):
    """So are its own."""
    with pytest.raises(ConfigError, match=message):
        ServerConfig.from_table({"server": {"model": "m"}, "training": keys})
