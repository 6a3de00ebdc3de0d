from __future__ import annotations

import pytest

from fedsea.cli.placeholders import PlaceholderOptions, show_substituted
from fedsea.errors import ConfigError
from fedsea.privacy.placeholders.config import ALL_KINDS
from fedsea.privacy.placeholders.spans import Span


def test_nothing_is_replaced_unless_asked():
    """Without options the library gets none."""
    assert PlaceholderOptions().chosen() is None


def test_kinds_are_all_or_a_list():
    """`all` is every built-in kind."""
    everything = PlaceholderOptions(placeholders="all").chosen()
    some = PlaceholderOptions(placeholders="name, email", placeholder_keep=["Newton"]).chosen()
    assert everything is not None
    assert everything.kinds == ALL_KINDS
    assert some is not None
    assert some.kinds == ["name", "email"]
    assert some.find("He read Newton") == []


def test_own_words_come_from_a_file(tmp_path):
    """A list is a file with a phrase on each line; it is enough by itself."""
    path = tmp_path / "projects.txt"
    path.write_text("Blue Heron\n\n  Owl \n")
    chosen = PlaceholderOptions(
        placeholder_words=[f"PROJECT={path}"], placeholder_pattern=["CASE=C-=+\\d"]
    ).chosen()
    assert chosen is not None
    assert chosen.find("owl, C-=7, a@b.org") == [Span(0, 3, "PROJECT"), Span(5, 9, "CASE")]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"placeholders": "name,shoe"}, "no such kind of placeholder: shoe"),
        ({"placeholders": " , "}, "names no kind"),
        ({"placeholder_words": ["PROJECT"]}, "takes KIND=FILE"),
        ({"placeholder_words": ["PROJECT=nowhere.txt"]}, "cannot be read"),
        ({"placeholder_pattern": ["CASE=("]}, "no regular expression"),
    ],
)
def test_options_that_cannot_be(options, words):
    """What cannot be used is said before anything is loaded."""
    with pytest.raises(ConfigError, match=words):
        PlaceholderOptions(**options).chosen()


def test_the_line_has_kinds_and_numbers(capsys):
    """What a turn added, and that nothing was found."""
    show_substituted({"name": 3, "date": 1}, {"name": 1, "date": 1})
    show_substituted({})
    assert capsys.readouterr().err.splitlines() == [
        "placeholders for 2 name",
        "no placeholders: nothing was found",
    ]
