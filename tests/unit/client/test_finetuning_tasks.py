"""Fine-tuning on the files of a task: its settings, its records, and whole sources on one side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import character_tokenizer

from fedsea.client.finetuning import FinetuneConfig, Finetuning
from fedsea.errors import ConfigError, DataError

TOKENIZER = character_tokenizer()


@pytest.fixture
def multirc(tmp_path: Path) -> Path:
    """Ten passages with a question of three answers each."""
    answers = [{"text": f"Ann {at}", "label": at % 2} for at in range(3)]
    path = tmp_path / "train.jsonl"
    path.write_text(
        "".join(
            json.dumps(
                {
                    "idx": at,
                    "passage": {
                        "text": f"Passage {at}.",
                        "questions": [{"idx": at, "question": "Who?", "answers": answers}],
                    },
                }
            )
            + "\n"
            for at in range(10)
        ),
        encoding="utf-8",
    )
    return path


@pytest.fixture
def config(multirc: Path, tiny_model: Path, tmp_path: Path):
    """Settings of a run on that file, with sections changed."""

    def make(overrides: Any = None, **sections: dict[str, Any]) -> FinetuneConfig:
        run = {"model": str(tiny_model), "data": str(multirc), "out": str(tmp_path / "out")}
        table: dict[str, dict[str, Any]] = {"run": run, "data": {"task": "multirc"}}
        for name, keys in sections.items():
            table.setdefault(name, {}).update(keys)
        return FinetuneConfig.from_table(table, overrides)

    return make


def test_what_the_task_says_holds(config) -> None:
    """Learning rate, LoRA and length of the paper."""
    found = config()

    assert (found.lora.rank, found.lora.alpha, found.lora.dropout) == (32, 32.0, 0.05)
    assert found.lora.targets == ("q_proj", "k_proj", "v_proj", "o_proj")
    assert (found.training.learning_rate, found.data.max_tokens) == (1e-5, 1024)


def test_what_is_given_comes_before_it(config) -> None:
    """A key of the file or of the command line wins, and the rest of its section stays."""
    found = config({"training": {"learning_rate": 0.5}}, lora={"rank": 2})

    assert (found.lora.rank, found.lora.alpha) == (2, 32.0)
    assert found.training.learning_rate == 0.5


def test_a_task_of_the_command_line(config) -> None:
    """It decides what holds, also where the file names another one."""
    assert config({"data": {"task": "boolq"}}).lora.rank == 8


def test_records_are_learned(config) -> None:
    """Each answer is an example; the loss is on the words of the right judgement."""
    run = Finetuning(config())

    assert len(run.train_set) == 30
    first = run.train_set.examples[0]
    assert TOKENIZER.decode(first.ids) == "Passage 0. Question: Who? Is it Ann 0? no.</s>"
    assert TOKENIZER.decode(first.targets) == " no.</s>"


def test_a_passage_is_on_one_side(config) -> None:
    """A share for evaluation is one of passages, so that none is learned and judged."""
    run = Finetuning(config(run={"evaluation_share": 0.2}))

    def passages(examples: Any) -> set[str]:
        return {TOKENIZER.decode(example.ids)[:10] for example in examples.examples}

    assert run.evaluation_set is not None
    assert (len(run.train_set), len(run.evaluation_set)) == (24, 6)
    assert not passages(run.train_set) & passages(run.evaluation_set)


def test_a_limit_holds_for_each_file(config, multirc: Path) -> None:
    """Whole questions, at most so many records."""
    run = Finetuning(config(run={"evaluation": str(multirc)}, data={"limit": 7}))

    assert run.evaluation_set is not None
    assert (len(run.train_set), len(run.evaluation_set)) == (6, 6)


def test_a_style(config) -> None:
    """Another template of the task."""
    run = Finetuning(config(data={"style": "chat"}))

    assert TOKENIZER.decode(run.train_set.examples[0].targets) == "No</s>"


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        ({"task": "mnli"}, "there is no task 'mnli'"),
        ({"task": "", "style": "chat"}, "data.style is given without data.task"),
        ({"task": "", "limit": 3}, "data.limit is given without data.task"),
        ({"task": 3}, "data.task is of type int"),
    ],
)
def test_settings_that_cannot_be_used(config, data: dict[str, Any], complaint: str) -> None:
    """Named before anything is read."""
    with pytest.raises(ConfigError, match=complaint):
        config(data=data)


def test_a_file_of_another_task(config) -> None:
    """The place in the file is named."""
    with pytest.raises(DataError, match=r"train\.jsonl, line 1: there is no question"):
        Finetuning(config(data={"task": "boolq"}))
