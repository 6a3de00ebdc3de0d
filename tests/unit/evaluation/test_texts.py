"""Texts are cut from files, and secret ones are never public."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsea.errors import RequestError
from fedsea.evaluation.texts import cut, read_texts

BOS = 999


def encode(text):
    """One token for each character, after a beginning."""
    return [BOS, *map(ord, text)]


def written(tmp_path, text):
    """A file with a text."""
    path = tmp_path / "text.txt"
    path.write_text(text, encoding="utf-8")
    return path


def test_secret_texts_come_first_and_the_rest_is_public(tmp_path):
    """Without another file, what is not attacked is what attackers learn from."""
    path = written(tmp_path, "\n\n".join(letter * 9 for letter in "abcd"))
    found = read_texts(path, encode, count=2, tokens=8)
    assert [ids[1] for ids in found.secret] == [ord("a"), ord("b")]
    assert [ids[1] for ids in found.public] == [ord("c"), ord("d")]
    assert found.prefix == (BOS,)


def test_public_texts_may_come_from_another_file(tmp_path):
    """The whole other file is public then."""
    public = tmp_path / "public.txt"
    public.write_text("z" * 20, encoding="utf-8")
    path = written(tmp_path, "a" * 20)
    found = read_texts(path, encode, count=1, tokens=8, public=public)
    assert found.public == ((BOS, *[ord("z")] * 7),)


@given(st.lists(st.text("ab ", max_size=12), max_size=8), st.integers(2, 9))
def test_every_text_has_the_length_asked_for(paragraphs, tokens):
    """Whatever the paragraphs are, a text that is yielded is complete."""
    assert all(len(ids) == tokens for ids in cut("\n\n".join(paragraphs), encode, tokens))


def test_short_paragraphs_are_joined():
    """Two short paragraphs make one text."""
    assert len(list(cut("abc\n\ndefghijk", encode, 10))) == 1


@pytest.mark.parametrize(
    ("text", "count", "tokens", "says"),
    [
        ("", 1, 8, "has no 8 tokens"),
        ("abc", 1, 8, "has no 8 tokens"),
        ("a" * 20, 1, 8, "learn from"),
        ("a" * 20, 0, 8, "at least"),
        ("a" * 20, 1, 2, "at least"),
    ],
)
def test_too_little_text_is_refused(tmp_path, text, count, tokens, says):
    """Each lack is named."""
    with pytest.raises(RequestError, match=says):
        read_texts(written(tmp_path, text), encode, count=count, tokens=tokens)


def test_what_is_no_text_is_refused(tmp_path):
    """A missing file and one of other bytes end in the same clear error."""
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\xfd")
    for path in (binary, tmp_path / "absent", tmp_path):
        with pytest.raises(RequestError, match="cannot be read as text"):
            read_texts(path, encode, count=1, tokens=8)
