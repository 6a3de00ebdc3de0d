"""Tables of GLUE."""

from __future__ import annotations

import pytest

from fedsea.errors import DataError
from fedsea.tasks.glue import read_rte_table, read_sst2


def test_sst2(file) -> None:
    """0 and 1 are the two sentiments; a space at the end is not the sentence's."""
    path = file("sentence\tlabel\na fine film \t1\ndull\t0\n", "train.tsv")

    first, second = read_sst2(path)

    assert first.fields["sentence"] == "a fine film"
    assert (first.gold, second.gold) == (("positive",), ("negative",))
    assert first.group != second.group


def test_tables_without_labels(file) -> None:
    """Test splits have no column of labels."""
    (film,) = read_sst2(file("index\tsentence\n0\tdull\n", "test.tsv"))
    (pair,) = read_rte_table(file("index\tsentence1\tsentence2\n5\tp\th\n", "rte.tsv"))

    assert film.gold == pair.gold == ()
    assert pair.group == "5"


def test_a_label_that_is_none(file) -> None:
    """Another label is another task."""
    with pytest.raises(DataError, match=r"line 2: label is none of 0, 1"):
        list(read_sst2(file("sentence\tlabel\ndull\t2\n", "train.tsv")))


def test_a_table_of_another_task(file) -> None:
    """A missing column is named."""
    with pytest.raises(DataError, match="there is no sentence"):
        list(read_sst2(file("index\tsentence1\tsentence2\n5\tp\th\n", "rte.tsv")))
