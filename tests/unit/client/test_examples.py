"""Examples: what is read from files, what is refused, and the order that steps see."""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.conftest import character_tokenizer
from transformers import AutoTokenizer

from fedsea.client.examples import (
    Batches,
    Example,
    ExampleSet,
    LossOn,
    Paragraphs,
    ReadOptions,
    TooLong,
    read_examples,
    record_examples,
)
from fedsea.demo import model_path
from fedsea.errors import ConfigError, DataError
from fedsea.tasks.records import Record

SECRET = "Hillary has measles"
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "A:{% generation %}{{ m.content }};{% endgeneration %}"
    "{% else %}U:{{ m.content }};{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}A:{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """One token for each character; </s> ends a text."""
    return character_tokenizer()


@pytest.fixture(scope="module")
def demo_tokenizer() -> Any:
    """The packaged model's."""
    return AutoTokenizer.from_pretrained(model_path())


def write(folder: Path, *values: object, name: str = "data.jsonl") -> Path:
    """A file with one JSON value in each line."""
    path = folder / name
    path.write_text("".join(f"{json.dumps(value)}\n" for value in values))
    return path


def text_of(tokenizer: Any, ids: tuple[int, ...]) -> str:
    """What ids stand for."""
    return str(tokenizer.decode(list(ids)))


def answers_of(tokenizer: Any, example: Example) -> list[str]:
    """What the loss is on."""
    return [text_of(tokenizer, example.ids[start:end]) for start, end in example.answers]


class TestExample:
    def test_rows_predict_targets(self):
        """Each predicting row stands one before the token that it predicts."""
        example = Example((7, 8, 9, 10, 11, 12), ((1, 2), (4, 5)))
        assert example.predicting == (0, 3)
        assert example.targets == (8, 11)
        assert example.answer_tokens == 2

    def test_nothing_after_the_last_answer_is_run(self):
        """Tokens that no loss depends on are not run, the last answer's last token among them."""
        example = Example((7, 8, 9, 10, 11, 12), ((2, 4),))
        assert example.inputs == (7, 8, 9)
        assert example.rows == 3

    @pytest.mark.parametrize("answer_from", [0, 1])
    def test_of_all(self, answer_from):
        """The first token cannot be predicted, so all means all after it."""
        assert Example.of([5, 6, 7], answer_from).answers == ((1, 3),)

    @pytest.mark.parametrize(
        "answers",
        [(), ((0, 2),), ((2, 2),), ((2, 9),), ((3, 4), (1, 2)), ((1, 3), (2, 4))],
    )
    def test_refuses_bad_answers(self, answers):
        """Empty, overlapping, descending ranges and those outside of the tokens are refused."""
        with pytest.raises(DataError):
            Example((1, 2, 3, 4), answers)

    def test_shows_no_ids(self):
        """What an example is printed as says nothing of its tokens."""
        assert "987" not in repr(Example.of([987, 988]))
        assert "987" not in repr(ExampleSet((Example.of([987, 988]),)))


class TestJsonLines:
    def test_completion(self, tmp_path, tokenizer):
        """The loss is on the completion and on the end of the text."""
        path = write(tmp_path, {"prompt": "two and two is", "completion": " four", "id": 3})
        (example,) = read_examples(path, tokenizer).examples
        assert answers_of(tokenizer, example) == [" four</s>"]
        assert text_of(tokenizer, example.ids) == "two and two is four</s>"

    def test_without_end_of_text(self, tmp_path, tokenizer):
        """The end of the text can be left out."""
        path = write(tmp_path, {"prompt": "ab", "completion": "c"})
        (example,) = read_examples(path, tokenizer, ReadOptions(end_of_text=False)).examples
        assert text_of(tokenizer, example.ids) == "abc"

    def test_token_over_the_seam(self, tmp_path, demo_tokenizer):
        """Where prompt and completion would share a token, the prompt stays what generate sends."""
        prompt = "The patient rep"
        path = write(tmp_path, {"prompt": prompt, "completion": "orts a cough"})
        (example,) = read_examples(path, demo_tokenizer).examples
        before = tuple(demo_tokenizer(prompt).input_ids)
        assert example.ids[: len(before)] == before
        assert example.answers[0][0] == len(before)

    def test_loss_on_all(self, tmp_path, tokenizer):
        """On request the prompt is learned too."""
        path = write(tmp_path, {"prompt": "ab", "completion": "cd"})
        (example,) = read_examples(path, tokenizer, ReadOptions(loss_on=LossOn.ALL)).examples
        assert example.answers == ((1, 5),)

    def test_last_turn(self, tmp_path, tokenizer):
        """A template without marks: the loss is on the assistant's last turn, later turns are gone."""
        turns = [
            ("user", "hi"),
            ("assistant", "yes"),
            ("user", "so"),
            ("assistant", "no"),
            ("user", "?"),
        ]
        path = write(tmp_path, {"messages": [{"role": r, "content": c} for r, c in turns]})
        (example,) = read_examples(path, tokenizer).examples
        assert answers_of(tokenizer, example) == ["no;"]
        assert text_of(tokenizer, example.ids) == "u:hi;a:yes;u:so;a:no;"

    def test_all_marked_turns(self, tmp_path):
        """A template with marks: the loss is on every turn of the assistant and nowhere else."""
        tokenizer = character_tokenizer()
        tokenizer.chat_template = MARKED
        turns = [("user", "hi"), ("assistant", "yes"), ("user", "so"), ("assistant", "no")]
        path = write(tmp_path, {"messages": [{"role": r, "content": c} for r, c in turns]})
        (example,) = read_examples(path, tokenizer).examples
        assert answers_of(tokenizer, example) == ["yes;", "no;"]

    def test_demo_template(self, tmp_path, demo_tokenizer):
        """The packaged model's template: the answer and its end-of-text token are learned."""
        turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi there"}]
        (example,) = read_examples(write(tmp_path, {"messages": turns}), demo_tokenizer).examples
        assert answers_of(demo_tokenizer, example) == ["Hi there</s>"]

    @pytest.mark.parametrize(
        "line",
        [
            f'{{"prompt": "{SECRET}"',
            f'["{SECRET}"]',
            json.dumps({"prompt": SECRET}),
            json.dumps({"prompt": SECRET, "completion": ""}),
            json.dumps({"prompt": SECRET, "completion": 3}),
            json.dumps({"prompt": SECRET, "completion": "\ud800"}),
            json.dumps({"prompt": SECRET, "completion": "x", "messages": []}),
            json.dumps({"messages": []}),
            json.dumps({"messages": SECRET}),
            json.dumps({"messages": [SECRET]}),
            json.dumps({"messages": [{"role": "user", "content": SECRET}]}),
            json.dumps({"messages": [{"role": "assistant", "content": None}]}),
            "[" * 100_000,
        ],
    )
    def test_refuses_bad_lines(self, tmp_path, tokenizer, line):
        """Whatever is no example is refused by file and line, without what stands there."""
        path = tmp_path / "data.jsonl"
        good = json.dumps({"prompt": "a", "completion": "b"})
        path.write_text(f"{good}\n\n{line}\n")
        with pytest.raises(DataError, match=r"data\.jsonl, line 3") as caught:
            read_examples(path, tokenizer)
        assert "Hillary" not in str(caught.value)

    def test_roles_that_the_template_refuses(self, tmp_path, demo_tokenizer):
        """A template's own refusal becomes an error with the line and without the text."""
        turns = [{"role": "system", "content": SECRET}, {"role": "assistant", "content": SECRET}]
        with pytest.raises(DataError, match="line 1: the chat template refuses") as caught:
            read_examples(write(tmp_path, {"messages": turns}), demo_tokenizer)
        assert "Hillary" not in str(caught.value)
        assert caught.value.__cause__ is None

    def test_an_answer_to_nothing(self, tmp_path, demo_tokenizer):
        """A conversation that begins with its last answer is an error with the line."""
        path = write(tmp_path, {"messages": [{"role": "assistant", "content": SECRET}]})
        with pytest.raises(DataError, match="line 1: nothing stands before") as caught:
            read_examples(path, demo_tokenizer)
        assert "Hillary" not in str(caught.value)

    def test_no_template(self, tmp_path):
        """Messages need a chat template."""
        tokenizer = character_tokenizer()
        tokenizer.chat_template = None
        path = write(tmp_path, {"messages": [{"role": "assistant", "content": "x"}]})
        with pytest.raises(DataError, match="no chat template"):
            read_examples(path, tokenizer)


class TestText:
    def test_paragraphs(self, tmp_path, tokenizer):
        """Blank lines part examples; the loss is on all of the text."""
        path = tmp_path / "data.txt"
        path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n\r\n \nthree")
        found = read_examples(path, tokenizer).examples
        assert [text_of(tokenizer, example.ids)[:3] for example in found] == ["one", "thr"]
        assert all(example.answers == ((1, len(example.ids)),) for example in found)

    def test_packed(self, tmp_path, tokenizer):
        """Windows hold all tokens of all paragraphs in order, and are full but for the last."""
        path = tmp_path / "data.txt"
        path.write_text("abcde\n\nfghij\n")
        options = ReadOptions(paragraphs=Paragraphs.PACKED, max_tokens=5)
        found = read_examples(path, tokenizer, options).examples
        joined = "".join(text_of(tokenizer, example.ids) for example in found)
        assert joined == "abcde</s>fghij</s>"
        assert [len(example.ids) for example in found] == [5, 5, 2]

    def test_refuses_other_encodings(self, tmp_path, tokenizer):
        """Bytes that are no UTF-8 are refused with their line."""
        path = tmp_path / "data.txt"
        path.write_bytes(b"one\n\xff\xfe\n")
        with pytest.raises(DataError, match="line 2 is not UTF-8"):
            read_examples(path, tokenizer)

    @pytest.mark.parametrize("content", ["", "\n\n \n"])
    def test_refuses_empty_files(self, tmp_path, tokenizer, content):
        """A file without examples is an error, not a run without steps."""
        path = tmp_path / "data.txt"
        path.write_text(content)
        with pytest.raises(DataError, match="no examples"):
            read_examples(path, tokenizer)

    def test_refuses_what_is_not_there(self, tmp_path, tokenizer):
        """Missing files, folders and unknown kinds are refused by name."""
        (tmp_path / "folder.txt").mkdir()
        for name in ("missing.jsonl", "folder.txt", "data.csv"):
            with pytest.raises(DataError, match=name):
                read_examples(tmp_path / name, tokenizer)


class TestTooLong:
    def test_skip(self, tmp_path, tokenizer):
        """Too long examples are left out and counted."""
        path = write(
            tmp_path, {"prompt": "abcdefgh", "completion": "xy"}, {"prompt": "a", "completion": "b"}
        )
        found = read_examples(path, tokenizer, ReadOptions(max_tokens=5))
        assert (len(found), found.cut, found.skipped) == (1, 0, 1)

    def test_cut_takes_the_front_of_a_prompt(self, tmp_path, tokenizer):
        """The end of the prompt and the whole completion stay."""
        path = write(tmp_path, {"prompt": "abcdefgh", "completion": "xy"})
        found = read_examples(path, tokenizer, ReadOptions(max_tokens=5, too_long=TooLong.CUT))
        assert text_of(tokenizer, found.examples[0].ids) == "ghxy</s>"
        assert (found.cut, found.skipped) == (1, 0)

    def test_cut_keeps_the_first_special_token(self, tmp_path, demo_tokenizer):
        """What begins every text begins a shortened one."""
        path = write(tmp_path, {"prompt": "one two three four five", "completion": " six"})
        options = ReadOptions(max_tokens=5, too_long=TooLong.CUT)
        (example,) = read_examples(path, demo_tokenizer, options).examples
        assert example.ids[0] == demo_tokenizer.bos_token_id
        assert len(example.ids) == 5
        assert example.ids[-1] == demo_tokenizer.eos_token_id

    def test_cut_a_completion(self, tmp_path, tokenizer):
        """A completion that is too long by itself loses its end; one token goes before it."""
        path = write(tmp_path, {"prompt": "abc", "completion": "uvwxyz"})
        found = read_examples(path, tokenizer, ReadOptions(max_tokens=4, too_long=TooLong.CUT))
        assert text_of(tokenizer, found.examples[0].ids) == "cuvw"

    def test_cut_without_an_answer(self, tmp_path, tokenizer):
        """A conversation whose answer is cut away is left out."""
        turns = [{"role": "user", "content": "a" * 20}, {"role": "assistant", "content": "b"}]
        path = write(tmp_path, {"messages": turns}, {"prompt": "a", "completion": "b"})
        found = read_examples(path, tokenizer, ReadOptions(max_tokens=9, too_long=TooLong.CUT))
        assert (len(found), found.skipped) == (1, 1)

    def test_nothing_is_left(self, tmp_path, tokenizer):
        """When all are too long, the error says so."""
        path = write(tmp_path, {"prompt": "abcdef", "completion": "g"})
        with pytest.raises(DataError, match="do not fit"):
            read_examples(path, tokenizer, ReadOptions(max_tokens=3))

    def test_options(self):
        """Windows need a size, and one token is no example."""
        with pytest.raises(ConfigError):
            ReadOptions(max_tokens=1)
        with pytest.raises(ConfigError):
            ReadOptions(paragraphs=Paragraphs.PACKED)


def examples_of(lengths: list[int]) -> list[Example]:
    """Examples of these lengths, told apart by their ids."""
    return [Example.of([number] * length) for number, length in enumerate(lengths)]


LENGTHS = st.lists(st.integers(2, 40), min_size=1, max_size=60)


class TestBatches:
    @given(LENGTHS, st.integers(1, 9), st.integers(39, 100), st.integers(1, 4), st.integers(0, 9))
    def test_an_epoch_sees_each_example_once(self, lengths, size, rows, accumulate, epoch):
        """Every example once, no batch over its bounds, no step over its batches."""
        examples = examples_of(lengths)
        batches = Batches(examples, batch_size=size, rows=rows, accumulate=accumulate, seed=3)
        steps = batches.epoch(epoch)
        seen = Counter(example for step in steps for batch in step.batches for example in batch)
        assert seen == Counter(examples)
        assert all(0 < len(batch) <= size for step in steps for batch in step.batches)
        assert all(
            sum(example.rows for example in batch) <= rows
            for step in steps
            for batch in step.batches
        )
        assert all(len(step.batches) == accumulate for step in steps[:-1])
        assert [step.number for step in steps] == list(range(len(steps)))

    @given(LENGTHS, st.integers(1, 9), st.integers(0, 30))
    def test_goes_on_at_any_step(self, lengths, size, start):
        """The steps from one on are those that a run from the beginning would come to."""
        batches = Batches(examples_of(lengths), batch_size=size, rows=50, accumulate=2, seed=1)
        whole = list(islice(batches.from_step(0), start + 5))
        assert list(islice(batches.from_step(start), 5)) == whole[start:]

    def test_order_is_the_seeds(self):
        """Another seed or epoch is another order; the same ones are the same order."""
        examples = examples_of([10] * 50)
        first = Batches(examples, batch_size=4, seed=1)
        assert first.epoch(0) == Batches(examples, batch_size=4, seed=1).epoch(0)
        assert first.epoch(0) != Batches(examples, batch_size=4, seed=2).epoch(0)
        orders = [[step.batches for step in first.epoch(number)] for number in (0, 1)]
        assert orders[0] != orders[1]

    def test_order_never_changes(self):
        """A run of an older version can go on: the order is part of the format."""
        steps = Batches(examples_of([2, 3, 4, 5, 6]), batch_size=2, seed=7).epoch(0)
        ids = [[example.ids[0] for batch in step.batches for example in batch] for step in steps]
        assert ids == [[0, 1], [4], [2, 3]]

    def test_lengths_are_near_each_other(self):
        """Examples of a batch differ less in length than all of them do."""
        lengths = [2 + number % 64 for number in range(640)]
        steps = Batches(examples_of(lengths), batch_size=8, seed=0).epoch(0)
        spreads = [
            max(e.rows for e in batch) - min(e.rows for e in batch)
            for step in steps
            for batch in step.batches
        ]
        assert sum(spreads) / len(spreads) < 8

    def test_refuses_what_cannot_be_cut(self):
        """No examples, no bound, bounds below one, and examples over the bound are refused."""
        examples = examples_of([5, 30])
        with pytest.raises(DataError):
            Batches([])
        for options in (
            {"batch_size": None},
            {"batch_size": 0},
            {"rows": 0},
            {"accumulate": 0},
            {"rows": 28},
        ):
            with pytest.raises(ConfigError):
                Batches(examples, **options)

    def test_steps_of_epochs(self):
        """How many steps a run takes is known before it begins."""
        batches = Batches(examples_of([5] * 10), batch_size=2, accumulate=2)
        assert batches.steps(3) == 9


class TestSplit:
    def test_share(self):
        """Both sides together are all examples, and the seed chooses."""
        whole = ExampleSet(tuple(examples_of([4] * 20)))
        training, evaluation = whole.split(0.2, seed=5)
        assert len(evaluation) == 4
        assert set(training.examples) | set(evaluation.examples) == set(whole.examples)
        assert whole.split(0.2, seed=5) == (training, evaluation)
        assert whole.split(0.2, seed=6) != (training, evaluation)

    @pytest.mark.parametrize("share", [0.01, 0.99])
    def test_refuses_empty_sides(self, share):
        """A share that leaves nothing to learn or to evaluate is refused."""
        with pytest.raises(ConfigError, match="without any"):
            ExampleSet(tuple(examples_of([4] * 20))).split(share, seed=0)


RECORDS = (Record("ab", " yes"), Record("ab", ""), Record("long prompt", " no"))


class TestRecords:
    def test_those_with_a_completion(self, tokenizer):
        """They become what a line with prompt and completion becomes."""
        found = record_examples(RECORDS, tokenizer).examples
        assert [tokenizer.decode(each.targets) for each in found] == [" yes</s>", " no</s>"]
        prompts = [tokenizer.decode(each.ids[: each.answers[0][0]]) for each in found]
        assert prompts == ["ab", "long prompt"]

    def test_those_that_are_too_long(self, tokenizer):
        """They are left out or cut, as the options say."""
        skipped = record_examples(RECORDS, tokenizer, ReadOptions(max_tokens=8))
        cut = record_examples(RECORDS, tokenizer, ReadOptions(max_tokens=8, too_long=TooLong.CUT))
        assert (len(skipped), skipped.skipped) == (1, 1)
        assert (len(cut), cut.cut) == (2, 1)

    def test_nothing_to_learn(self, tokenizer):
        """A split without labels, or one of which nothing fits, cannot be trained on."""
        with pytest.raises(DataError, match="no record says what shall be learned"):
            record_examples([Record("ab", "")], tokenizer)
        with pytest.raises(DataError, match="no record fits"):
            record_examples(RECORDS, tokenizer, ReadOptions(max_tokens=2))
