"""Tasks by name: every one of them from file to score."""

from __future__ import annotations

from typing import Any

import pytest

from fedsea.errors import ConfigError, DataError
from fedsea.tasks.catalogue import TASKS, task
from fedsea.tasks.loading import load, template
from fedsea.tasks.metrics import judged

_PAIR = {"premise": "It rains all day.", "hypothesis": "It is wet."}
FILES: dict[str, list[dict[str, Any]]] = {
    "multirc": [
        {
            "idx": 0,
            "passage": {
                "text": "Ann fed the cat.",
                "questions": [
                    {
                        "idx": 0,
                        "question": "Who was fed?",
                        "answers": [{"text": "The cat.", "label": 1}, {"text": "Ann", "label": 0}],
                    }
                ],
            },
        }
    ],
    "boolq": [{"passage": "Cats sleep.", "question": "do cats sleep", "label": True}],
    "rte": [{**_PAIR, "label": "entailment"}],
    "cb": [{**_PAIR, "label": "neutral"}],
    "copa": [
        {
            "premise": "It rained.",
            "choice1": "The clouds came.",
            "choice2": "I slept.",
            "question": "cause",
            "label": 0,
        }
    ],
    "wic": [{"word": "run", "sentence1": "They run.", "sentence2": "A run.", "label": False}],
    "wsc": [
        {
            "text": "The cat slept because it was tired.",
            "target": {"span1_text": "The cat", "span2_text": "it", "span2_index": 4},
            "label": True,
        }
    ],
    "record": [
        {
            "passage": {"text": "Ann met Bob.", "entities": [{"start": 0, "end": 2}]},
            "qas": [{"query": "Then @placeholder left.", "answers": [{"text": "Ann"}]}],
        }
    ],
    "coqa": [
        {
            "data": [
                {
                    "story": "Ann has a cat.",
                    "questions": [{"input_text": "Who?"}, {"input_text": "What has she"}],
                    "answers": [{"input_text": "Ann"}, {"input_text": "a cat"}],
                }
            ]
        }
    ],
    "quac": [
        {
            "passage": "Ann has a cat.",
            "question": "question1: Who?",
            "answer": "possible answers for question1:\nAnn has",
        }
    ],
    "xsum": [{"document": "Long.", "summary": "Short text"}],
    "cnn_dailymail": [{"article": "Long.", "highlights": "Short text"}],
    "sst2": [],
}
# What the paper prints in Tables 5 and 6, filled with the files above.
PROMPTS = {
    "multirc": ("Ann fed the cat. Question: Who was fed? Is it The cat?", " yes."),
    "boolq": ("Cats sleep. Question: do cats sleep? Answer:", " yes."),
    "rte": ('"It is wet"?', ' yes "It rains all day."'),
    "cb": ('"It is wet"?', ' maybe "It rains all day."'),
    "copa": ('"the clouds came" or "I slept"? It rained, because', " the clouds came."),
    "wic": ('"They run."/"A run." Similar sense of run?', " no."),
    "wsc": (
        "The cat slept because *it* was tired. The pronoun '*it*' refers to",
        " The cat.",
    ),
    "record": ("Ann met Bob. Then", " Ann left."),
    "coqa": (
        "[INST] <<SYS>>You are a helpful assistant.You need to answer my question base on the "
        "provided story.<</SYS>>The story is Ann has a cat.My question is Who?[/INST]",
        "Ann",
    ),
    "quac": (
        "[INST] <<SYS>>You are a helpful assistant.You need to answer my question base on the "
        "provided story.<</SYS>>The story is Ann has a cat.My question is Who?[/INST]",
        "Ann has",
    ),
    "xsum": (
        "[INST] <<SYS>>You are a helpful assistant.You need to summarize an abstract base on the "
        "provided passage.<</SYS>>The passage is Long.[/INST]",
        "Short text",
    ),
    "cnn_dailymail": (
        "[INST] <<SYS>>You are a helpful assistant.You need to summarize an abstract base on the "
        "provided passage.<</SYS>>The passage is Long.[/INST]",
        "Short text",
    ),
    "sst2": ("a fine film It was", " great."),
}


@pytest.fixture
def data(lines, file):
    """A file of a task."""

    def write(name: str) -> Any:
        if name == "sst2":
            return file("sentence\tlabel\na fine film \t1\n", "sst2.tsv")
        return lines(*FILES[name])

    return write


@pytest.mark.parametrize("name", TASKS)
def test_the_first_template(data, name: str) -> None:
    """Each task puts its first record as the paper does, or as we do where it says nothing."""
    record = load(name, data(name))[0]

    assert (record.prompt, record.completion) == PROMPTS[name]


@pytest.mark.parametrize(("name", "style"), [(n, s) for n in TASKS for s in TASKS[n].styles])
def test_every_style(data, name: str, style: str) -> None:
    """Templates can be filled, and the right answers of a file score 1 in every measure."""
    records = load(name, data(name), style=style)
    answers = [record.gold[0] for record in records]

    scores = judged(task(name).metric, answers, records)

    assert tuple(scores) == task(name).scores
    assert set(scores.values()) == {1.0}
    assert all(record.prompt == record.prompt.rstrip() for record in records)


def test_the_passage_of_record_stands_in_a_prompt_once(data) -> None:
    """In training and evaluation alike; the query is in the place of the query."""
    for style in TASKS["record"].styles:
        (record,) = load("record", data("record"), style=style)

        assert record.prompt.count("Ann met Bob.") == 1
        assert "Then" in record.prompt


def test_a_conversation_carries_its_history(data) -> None:
    """The second question comes after the first one and its answer."""
    chat = load("coqa", data("coqa"))[1].prompt
    plain = load("coqa", data("coqa"), style="plain")[1]

    assert chat.endswith(
        "The story is Ann has a cat.My question was Who?Your answer was Ann."
        "My question is What has she.[/INST]"
    )
    assert plain.prompt.endswith("Question: Who?\nAnswer: Ann\nQuestion: What has she?\nAnswer:")
    assert plain.completion == " a cat"


def test_a_limit_is_seeded(lines) -> None:
    """The same seed, the same records; never more than asked for."""
    path = lines(*({"document": f"d{at}", "summary": "s"} for at in range(30)))

    def drawn(seed: int) -> list[str]:
        return [record.source for record in load("xsum", path, limit=5, seed=seed)]

    assert len(drawn(0)) == 5
    assert drawn(0) == drawn(0) != drawn(1)
    assert len(load("xsum", path, limit=100)) == 30


def test_templates_of_ones_own(data, file) -> None:
    """A TOML file changes the words of a task, and the style that it adds can be chosen."""
    overrides = file(
        '[boolq.short]\nprompt = "{question:?}"\nwords = {true = "ja", false = "nein"}\n',
        "t.toml",
    )

    (record,) = load("boolq", data("boolq"), style="short", overrides=overrides)

    assert (record.prompt, record.completion) == ("do cats sleep?", " ja")


def test_a_changed_template_is_checked(data, file) -> None:
    """A misspelt field is named with the file's style, before the data is read."""
    overrides = file('[boolq.cloze]\nprompt = "{pasage}"\n', "t.toml")

    with pytest.raises(ConfigError, match=r"boolq.cloze: prompt has \{pasage\}"):
        load("boolq", data("boolq"), overrides=overrides)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"limit": 0}, "a limit of 0"),
        ({"style": "haiku"}, "boolq has no style 'haiku'; use cloze"),
    ],
)
def test_options_that_cannot_be_used(data, options: dict[str, Any], complaint: str) -> None:
    """What was asked for and what there is."""
    with pytest.raises(ConfigError, match=complaint):
        load("boolq", data("boolq"), **options)


def test_a_task_that_does_not_exist(data) -> None:
    """All names are listed."""
    with pytest.raises(ConfigError, match="there is no task 'mnli'; use multirc, boolq"):
        load("mnli", data("boolq"))
    with pytest.raises(ConfigError, match="no task"):
        template("mnli")


def test_an_empty_file(lines) -> None:
    """Nothing to ask is an error."""
    with pytest.raises(DataError, match="holds no records of boolq"):
        load("boolq", lines())


def test_sizes_of_the_paper() -> None:
    """Learning rate, rank and alpha of Table 8."""
    found = {
        name: (each.defaults.learning_rate, each.defaults.rank, each.defaults.alpha)
        for name, each in TASKS.items()
        if each.defaults.of_the_paper
    }

    assert found == {
        "coqa": (1e-4, 4, 32),
        "xsum": (3e-5, 16, 32),
        "multirc": (1e-5, 32, 32),
        "record": (2e-5, 32, 32),
    }
