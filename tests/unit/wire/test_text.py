"""Text fields: short, printable, safe to log."""

from __future__ import annotations

import pytest

from fedsea.errors import RemoteProtocolError
from fedsea.wire.text import check_text


@pytest.mark.parametrize("value", ["", "llama", "Käse 模型", "x" * 10])
def test_names_pass(value):
    """Printable names of any script pass."""
    check_text("model", value, 16, RemoteProtocolError)


@pytest.mark.parametrize(
    "value", ["a\nb", "\x1b[2J", "a\x00", "\u202egnp", "x" * 17, "ä" * 9, "\ud800"]
)
def test_control_characters_and_long_texts_are_refused(value):
    """Line breaks, escapes, direction marks and too many bytes are refused with the field's name."""
    with pytest.raises(RemoteProtocolError, match="model"):
        check_text("model", value, 16, RemoteProtocolError)
