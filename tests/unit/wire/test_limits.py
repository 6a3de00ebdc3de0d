"""Limits: sensible defaults, and no cap that could never be met."""

from __future__ import annotations

import pytest

from fedsea.errors import ConfigError
from fedsea.wire.limits import (
    DEFAULT_LIMITS,
    LARGEST_MESSAGE,
    TRAINING_LIMITS,
    Limits,
    patience_factor,
)


def test_default_message_cap_is_8_mib():
    """The documented default."""
    assert DEFAULT_LIMITS.max_message_bytes == 8 * 2**20


def test_large_messages_are_waited_for_longer():
    """In proportion, from the usual size on; smaller ones get as long as that."""
    usual = DEFAULT_LIMITS.max_message_bytes
    assert [patience_factor(size) for size in (1, usual, 4 * usual)] == [1.0, 1.0, 4.0]
    assert TRAINING_LIMITS.max_message_bytes == LARGEST_MESSAGE


@pytest.mark.parametrize("value", [0, -1, 2**32, 1.5, "8"])
@pytest.mark.parametrize("name", ["max_message_bytes", "max_pending", "max_text"])
def test_a_cap_is_a_positive_integer_of_32_bits(name, value):
    """A cap of nothing, or one that is no number, is refused by name."""
    with pytest.raises(ConfigError, match=name):
        Limits(**{name: value})
