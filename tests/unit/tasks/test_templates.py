"""Templates: forms of fields, rendering, and files that change them."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedsea.errors import ConfigError
from fedsea.tasks.records import Choice, Entry
from fedsea.tasks.templates import Template, fill, read_overrides

ENTRY = Entry(
    {"text": "It rains.", "noun": "rain"},
    source="s",
    group="g",
    gold=("true",),
    candidates=("true", "false"),
)
YES_NO = {"true": "yes", "false": "no"}
KNOWN = {"weather": {"cloze": Template("{text}", words=YES_NO)}}


@pytest.mark.parametrize(
    ("template", "value", "text"),
    [
        ("<{a}>", "It rains. ", "<It rains. >"),
        ("{a:.}", "It rains", "It rains."),
        ("{a:.}", " It rains! ", "It rains!"),
        ("{a:?}", "does it", "does it?"),
        ("{a:?}", "Does it?", "Does it?"),
        ("{a:.}", 'She said "no."', 'She said "no."'),
        ("{a:bare}", "Tom sleeps...", "Tom sleeps"),
        ("{a:bare}", 'She said "no."', 'She said "no"'),
        ("{a:inline}", "The cat sleeps.", "the cat sleeps"),
        ("{a:inline}", "I sleep.", "I sleep"),
        ("{a:inline}", "I'm here.", "I'm here"),
        ("{a:inline}", "", ""),
        ("{{{a}}}", "x", "{x}"),
        ("{a}", "{b}", "{b}"),
    ],
)
def test_forms(template: str, value: str, text: str) -> None:
    """Marks are neither doubled nor lost, and braces of a field are only text."""
    assert fill(template, {"a": value}) == text


def test_a_choice_for_each_candidate() -> None:
    """The completion is the text of the choice that is right."""
    record = Template("{text} So:", " {answer}.", YES_NO).render(ENTRY)

    assert record.prompt == "It rains. So:"
    assert record.completion == " yes."
    assert record.choices == (Choice("true", "yes", " yes."), Choice("false", "no", " no."))
    assert (record.gold, record.group, record.source) == (("true",), "g", "s")


def test_white_space_before_the_answer_belongs_to_the_answer() -> None:
    """Tokenizers join a space to the word behind it, so a prompt never ends in one."""
    record = Template("So: ", "{answer}", YES_NO).render(ENTRY)

    assert (record.prompt, record.completion) == ("So:", " yes")


def test_words_may_be_fields_and_a_label_may_have_none() -> None:
    """A label without words has no completion: it is what remains."""
    template = Template("It is", " {answer}.", {"true": "{noun}"})

    record = template.render(ENTRY)
    other = template.render(Entry(ENTRY.fields, "s", "g", ("false",), ENTRY.candidates))

    assert record.choices == (Choice("true", "rain", " rain."), Choice("false", "", ""))
    assert (record.completion, other.completion) == (" rain.", "")


def test_open_answers_have_no_choices() -> None:
    """The first right answer is learned."""
    record = Template("{text}").render(Entry({"text": "t"}, "s", "g", ("one", "two")))

    assert (record.completion, record.choices) == (" one", ())


@pytest.mark.parametrize(
    ("turns", "prompt"),
    [(-1, "a-1 b-2 now"), (1, "b-2 now"), (0, "now"), (5, "a-1 b-2 now")],
)
def test_history(turns: int, prompt: str) -> None:
    """The last turns are shown, as many as there may be, oldest first."""
    entry = Entry({"q": "now"}, "s", "g", turns=(("a", "1"), ("b", "2")))

    record = Template("{history}{q}", turn="{question}-{answer} ", turns=turns).render(entry)

    assert record.prompt == prompt


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        (Template("{other}", words=YES_NO), r"prompt has \{other\}; use noun, text"),
        (Template("{answer}", words=YES_NO), r"prompt has \{answer\}"),
        (Template("{history}", words=YES_NO), r"prompt has \{history\}"),
        (Template("{text.x}", words=YES_NO), r"prompt has \{text.x\}"),
        (Template("{text[0]}", words=YES_NO), r"prompt has \{text\[0\]\}"),
        (Template("{text!r}", words=YES_NO), r"prompt has \{text!r\}"),
        (Template("{}", words=YES_NO), r"prompt has \{\}"),
        (Template("{text:>9}", words=YES_NO), "the form :>9"),
        (Template("{text", words=YES_NO), "braces of prompt do not pair"),
        (Template("t", " yes", YES_NO), r"completion has no place for \{answer\}"),
        (Template("t", words={"maybe": "m"}), "words has maybe; the labels are true, false"),
        (Template("t"), "there are no words for true, false"),
        (Template("t", words={"true": "{x}"}), r"words has \{x\}"),
        (Template("t", words=YES_NO, turn="{question}"), "no place for {history}"),
        (Template("{history}", words=YES_NO, turn="{noun}"), r"turn has \{noun\}"),
    ],
)
def test_what_cannot_be_filled_is_refused(template: Template, complaint: str) -> None:
    """Before a file is read, with the place and what may stand there."""
    with pytest.raises(ConfigError, match=rf"^here: .*{complaint}"):
        template.check("here", ("text", "noun"), ("true", "false"))


def test_overrides_change_and_add_styles(file) -> None:
    """What a table leaves out stays as it is; other tasks stay too."""
    path = file(
        '[weather.cloze]\ncompletion = "{answer}!"\n[weather.mine]\nprompt = "m"\nturns = 2\n',
        "t.toml",
    )

    styles = read_overrides(path, KNOWN)["weather"]

    assert styles["cloze"] == Template("{text}", "{answer}!", YES_NO)
    assert styles["mine"] == Template("m", turns=2)
    assert list(styles) == ["cloze", "mine"]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("x = ", "t.toml is not valid TOML"),
        ('[wether.cloze]\nprompt = "m"', "wether is no key of .*t.toml.* did you mean weather"),
        ('[weather]\nprompt = "m"', "prompt is a single value; write a section"),
        ("weather = 1", r"write a section \[weather.STYLE\]"),
        ('[weather.cloze]\nprmpt = "m"', r"\[weather.cloze\]; did you mean prompt"),
        ("[weather.cloze]\nprompt = 1", "weather.cloze.prompt is of type int; give a str"),
        ("[weather.cloze]\nturns = true", "weather.cloze.turns is of type bool"),
        ("[weather.cloze]\nwords = {true = 1}", "weather.cloze.words must be texts"),
        ("[weather.cloze]\nwords = 1", r"write a section \[weather.cloze.words\]"),
        ('[weather.new]\ncompletion = "m"', "weather.new.prompt is missing"),
    ],
)
def test_files_of_templates_that_cannot_be_used(file, content: str, complaint: str) -> None:
    """The table and the key are named, and what was probably meant."""
    with pytest.raises(ConfigError, match=complaint):
        read_overrides(file(content, "t.toml"), KNOWN)


def test_a_file_of_templates_that_is_not_there(tmp_path: Path) -> None:
    """A wrong path is one line."""
    with pytest.raises(ConfigError, match="does not exist"):
        read_overrides(tmp_path / "absent.toml", KNOWN)
