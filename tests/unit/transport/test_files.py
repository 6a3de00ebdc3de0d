"""Writing secrets."""

from __future__ import annotations

import stat

import pytest

from fedsea.errors import ConfigError
from fedsea.transport.files import PRIVATE, write_atomically


def test_a_private_file_is_the_owners_alone(tmp_path):
    """The mode holds from the first byte on, whatever the umask."""
    path = tmp_path / "secret"
    write_atomically(path, b"x", mode=PRIVATE, overwrite=False)
    assert path.read_bytes() == b"x"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_an_existing_file_is_kept(tmp_path):
    """Without overwrite the old contents stay and nothing is left behind."""
    path = tmp_path / "secret"
    path.write_bytes(b"old")
    with pytest.raises(ConfigError, match="exists"):
        write_atomically(path, b"new", mode=PRIVATE, overwrite=False)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    write_atomically(path, b"new", mode=PRIVATE, overwrite=True)
    assert path.read_bytes() == b"new"


def test_a_missing_directory_is_named(tmp_path):
    """The error names the file that cannot be written."""
    with pytest.raises(ConfigError, match=r"absent/secret cannot be written"):
        write_atomically(tmp_path / "absent" / "secret", b"x", mode=PRIVATE, overwrite=True)
