"""Small files of tensors: written whole, read strictly."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from fedsea import artifacts
from fedsea.errors import CheckpointError, ConfigError

WEIGHT = torch.arange(6.0).view(2, 3)


@pytest.fixture
def file(tmp_path):
    """A file of the kind 'thing'."""
    path = tmp_path / "thing.safetensors"
    artifacts.write(path, "thing", {"size": 3, "name": "a"}, {"weight": WEIGHT})
    return path


def test_what_was_written_is_read(file):
    """Description and tensors come back as they were."""
    found = artifacts.read(file, "thing")
    assert found.description == {"size": 3, "name": "a"}
    assert torch.equal(found.tensor("weight", (2, 3)), WEIGHT)


def test_only_the_owner_reads_it(file):
    """Whatever the umask, and the mode of a file that stood there."""
    before = os.umask(0)
    try:
        file.chmod(0o644)
        artifacts.write(file, "thing", {}, {})
    finally:
        os.umask(before)
    assert file.stat().st_mode & 0o777 == 0o600


def test_equal_content_gives_equal_bytes(file, tmp_path):
    """A file depends on its content alone."""
    other = tmp_path / "other"
    artifacts.write(other, "thing", {"name": "a", "size": 3}, {"weight": WEIGHT.T.clone().T})
    assert other.read_bytes() == file.read_bytes()


def test_a_file_is_replaced_and_leaves_nothing_beside_it(file):
    """A second write stands in place of the first, without leftovers."""
    artifacts.write(file, "thing", {"size": 4}, {"weight": WEIGHT})
    assert artifacts.read(file, "thing").value("size", int) == 4
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_a_failed_write_keeps_the_older_file(file, monkeypatch):
    """Who cannot finish writing leaves what was there."""

    def full(*_):
        raise OSError(28, "No space left on device")

    before = file.read_bytes()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match="No space left"):
        artifacts.write(file, "thing", {"size": 4}, {"weight": WEIGHT})
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_a_place_that_cannot_be_written_is_an_error(tmp_path):
    """A file where a folder should be is named in the error."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        artifacts.write(tmp_path / "file" / "thing", "thing", {}, {"weight": WEIGHT})


def test_a_missing_file_is_an_error(tmp_path):
    """The error names the file."""
    with pytest.raises(CheckpointError, match="nothing"):
        artifacts.read(tmp_path / "nothing", "thing")


def test_another_kind_is_refused(file):
    """A file of one kind is not taken for another."""
    with pytest.raises(CheckpointError, match="holds no other"):
        artifacts.read(file, "other")


def test_another_format_is_refused(tmp_path):
    """A later format is not guessed at."""
    head = json.dumps({"kind": "thing", "format": 2})
    save_file({"weight": WEIGHT}, tmp_path / "later", {"fedsea": head})
    with pytest.raises(CheckpointError, match="format 2"):
        artifacts.read(tmp_path / "later", "thing")


@pytest.mark.parametrize("metadata", [None, {"other": "{}"}, {"fedsea": "[]"}, {"fedsea": "{"}])
def test_foreign_safetensors_are_refused(tmp_path, metadata):
    """A safetensors file of somebody else is no artifact."""
    save_file({"weight": WEIGHT}, tmp_path / "foreign", metadata)
    with pytest.raises(CheckpointError, match="holds no thing"):
        artifacts.read(tmp_path / "foreign", "thing")


@given(st.data())
def test_damage_is_refused_or_harmless(data):
    """Any change of the header gives one of our errors, or a description all the same."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "thing"
        artifacts.write(path, "thing", {"size": 3}, {"weight": WEIGHT})
        content = bytearray(path.read_bytes())
        place = data.draw(st.integers(0, len(content) - 25))
        content[place] ^= data.draw(st.integers(1, 255))
        path.write_bytes(content)
        with contextlib.suppress(CheckpointError):
            artifacts.read(path, "thing").tensor("weight", (2, 3))


def test_a_short_file_is_refused(file):
    """A file that ends early is corrupt, wherever it ends."""
    content = file.read_bytes()
    for length in range(0, len(content), 7):
        file.write_bytes(content[:length])
        with pytest.raises(CheckpointError):
            artifacts.read(file, "thing")


@pytest.mark.parametrize(("key", "kind"), [("absent", int), ("name", int), ("size", str)])
def test_entries_of_another_type_are_refused(file, key, kind):
    """An entry that is absent or of another type is corrupt."""
    with pytest.raises(CheckpointError, match=key):
        artifacts.read(file, "thing").value(key, kind)


def test_a_truth_value_is_no_number(tmp_path):
    """JSON's true is not taken for 1."""
    artifacts.write(tmp_path / "file", "thing", {"size": True}, {"weight": WEIGHT})
    with pytest.raises(CheckpointError, match="size"):
        artifacts.read(tmp_path / "file", "thing").value("size", int)


@pytest.mark.parametrize(
    "weight",
    [WEIGHT.double(), WEIGHT.T.contiguous(), WEIGHT / 0 * 0, torch.full((2, 3), torch.inf)],
)
def test_unusable_tensors_are_refused(tmp_path, weight):
    """Another dtype, another shape, NaN and infinity are corrupt."""
    artifacts.write(tmp_path / "file", "thing", {}, {"weight": weight})
    with pytest.raises(CheckpointError, match="weight"):
        artifacts.read(tmp_path / "file", "thing").tensor("weight", (2, 3))


def test_unknown_content_is_refused(file):
    """Keys and tensors that are not known are named."""
    found = artifacts.read(file, "thing")
    found.expect_only({"size", "name"}, {"weight"})
    with pytest.raises(CheckpointError, match="size"):
        found.expect_only({"name"}, {"weight"})
    with pytest.raises(CheckpointError, match="weight"):
        found.expect_only({"size", "name"}, set())
