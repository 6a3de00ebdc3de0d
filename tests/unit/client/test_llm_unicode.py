"""Text that was read from bytes of another encoding is refused before it reaches a tokenizer."""

from __future__ import annotations

import pytest

from fedsea.client.llm import check_unicode
from fedsea.errors import RequestError


def test_text_of_another_encoding_is_refused():
    """Bytes of Latin-1 that were read as UTF-8 leave lone surrogates, which no tokenizer takes."""
    with pytest.raises(RequestError, match="not valid UTF-8"):
        check_unicode(b"caf\xe9".decode("utf-8", "surrogateescape"))


def test_any_other_text_is_taken():
    """Letters, signs outside of the basic plane and nothing at all are text."""
    check_unicode("caf\xe9 \U0001f600")
    check_unicode("")
