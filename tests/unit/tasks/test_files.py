"""Reading files of data sets: what is given, and where an error points."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedsea.errors import DataError
from fedsea.tasks.files import Item, json_document, json_lines, table

SECRET = "the patient"


def test_json_lines_skip_blank_lines_and_count_them(tmp_path: Path) -> None:
    """Line numbers are those of an editor."""
    path = tmp_path / "d.jsonl"
    path.write_text('\ufeff{"a": 1}\r\n\n{"a": 2}', encoding="utf-8")

    assert [(item.where, item.number("a")) for item in json_lines(path)] == [
        (f"{path}, line 1", 1),
        (f"{path}, line 3", 2),
    ]


def test_a_line_separator_inside_a_text_ends_no_line(lines) -> None:
    """Only a newline ends a line; U+2028 may stand in a text."""
    path = lines({"a": "x"})
    path.write_text('{"a": "x\u2028y"}\n', encoding="utf-8")

    assert [item.text("a") for item in json_lines(path)] == ["x\u2028y"]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (f'{{"a": 1}}\n{{"a": "{SECRET}', "line 2: this is no JSON"),
        (f'{{"a": 1}}\n["{SECRET}"]', "line 2: this is no JSON object"),
        ("[" * 100_000, "line 1: it nests too deeply"),
    ],
)
def test_bad_lines_are_named_and_not_shown(tmp_path: Path, content: str, complaint: str) -> None:
    """The message has the file and the line, and nothing of the text."""
    path = tmp_path / "d.jsonl"
    path.write_text(content, encoding="utf-8")

    with pytest.raises(DataError, match=complaint) as caught:
        list(json_lines(path))
    assert str(path) in str(caught.value)
    assert SECRET not in str(caught.value)


def test_a_document_names_the_line_of_a_syntax_error(file) -> None:
    """JSON over several lines is pointed into."""
    with pytest.raises(DataError, match="line 3: this is no JSON"):
        json_document(file('{\n"a": 1\n"b": 2}', "d.json"))


def test_a_document_must_be_an_object(file) -> None:
    """A list at the top is another format."""
    with pytest.raises(DataError, match="no JSON object"):
        json_document(file("[1]", "d.json"))


def test_tables_take_quotes_as_they_are(file) -> None:
    """GLUE does not quote cells."""
    path = file('sentence\tlabel\nhe said "no\t1\n', "d.tsv")

    (line,) = table(path)

    assert line.text("sentence") == 'he said "no'


def test_a_row_of_another_length_is_named(file) -> None:
    """A tab too many shifts columns; it is not guessed which."""
    with pytest.raises(DataError, match="line 3: it has 3 columns and the first line has 2"):
        list(table(file(f"a\tb\n1\t2\n1\t{SECRET}\t3\n", "d.tsv")))


@pytest.mark.parametrize("reader", [lambda p: list(json_lines(p)), json_document])
def test_files_that_cannot_be_read(tmp_path: Path, reader) -> None:
    """Missing files, folders and other encodings end in one line."""
    with pytest.raises(DataError, match="does not exist"):
        reader(tmp_path / "absent")
    with pytest.raises(DataError, match="cannot be read"):
        reader(tmp_path)
    other = tmp_path / "latin"
    other.write_bytes(b'{"a": "\xe9"}')
    with pytest.raises(DataError, match="not UTF-8"):
        reader(other)


@pytest.mark.parametrize(
    ("get", "values"),
    [
        (lambda i: i.text("k"), [None, 1, " \n", ["a"], "\ud800"]),
        (lambda i: i.any_text("k"), [None, 1]),
        (lambda i: i.number("k"), [None, True, -1, 1.5, "1"]),
        (lambda i: i.name("k", 0), [True, [], 1.5]),
        (lambda i: i.item("k"), [None, [], "a"]),
        (lambda i: i.items("k"), [None, {}, [{}, 1]]),
        (lambda i: i.label("k", {1: "yes", 0: "no"}), [True, 2, "1", 1.0, [1]]),
    ],
)
def test_values_of_another_kind_are_refused_by_key(get, values) -> None:
    """Each message says where and which key."""
    for value in values:
        with pytest.raises(DataError, match=r"^here: k "):
            get(Item("here", {"k": value}))


def test_absent_keys() -> None:
    """An absent key is an error, except for labels and names, which may be absent."""
    item = Item("here", {})

    for get in (item.text, item.any_text, item.number, item.item, item.items):
        with pytest.raises(DataError, match="here: there is no k"):
            get("k")
    assert item.label("k", {1: "yes"}) == ()
    assert item.name("k", 7) == "7"
