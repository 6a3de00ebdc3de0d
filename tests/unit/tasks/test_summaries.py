"""Readers of XSum and CNN/DailyMail."""

from __future__ import annotations

import pytest

from fedsea.errors import DataError
from fedsea.tasks.summaries import read_cnn_dailymail, read_xsum


def test_both_formats(lines) -> None:
    """A document and its summary under the names of each set."""
    (short,) = read_xsum(lines({"id": "x", "document": "d", "summary": "s"}))
    (long,) = read_cnn_dailymail(lines({"id": 3, "article": "d", "highlights": "s\nt"}))

    assert (short.fields["document"], short.gold, short.source) == ("d", ("s",), "x")
    assert (long.fields["document"], long.gold, long.source) == ("d", ("s\nt",), "3")


def test_what_may_be_missing(lines) -> None:
    """Some documents are blank in the published set; a summary may be unknown."""
    (entry,) = read_xsum(lines({"document": ""}))

    assert entry.gold == ()


def test_the_other_set_is_refused(lines) -> None:
    """A file of the other format names the key that is missing."""
    with pytest.raises(DataError, match="there is no article"):
        list(read_cnn_dailymail(lines({"document": "d", "summary": "s"})))
