"""ROUGE and BLEU of the libraries, against cases computed by hand."""

from __future__ import annotations

import math
import sys

import pytest

from fedsea.errors import ConfigError, DataError
from fedsea.tasks.overlap import bleu, rouge, summary
from fedsea.tasks.records import Record

pytest.importorskip("rouge_score", reason="the extra [tasks] is not installed")
pytest.importorskip("sacrebleu", reason="the extra [tasks] is not installed")


def test_rouge_by_hand() -> None:
    """3 of 4 and 3 of 3 words; 1 of 3 and 1 of 2 pairs; the longest common subsequence is 2 long."""
    scores = rouge(["police killed the gunman"], [["the gunman police"]])

    assert scores["rouge1"] == pytest.approx(2 * (3 / 4) * 1 / (3 / 4 + 1))
    assert scores["rouge2"] == pytest.approx(2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2))
    assert scores["rougeL"] == pytest.approx(2 * (2 / 4) * (2 / 3) / (2 / 4 + 2 / 3))


def test_rouge_takes_the_nearest_reference_and_the_mean() -> None:
    """Equal to one of two references is 1; nothing said is 0."""
    scores = rouge(["a cat sat", ""], [["a dog", "a cat sat"], ["a dog"]])

    assert scores == {"rouge1": 0.5, "rouge2": 0.5, "rougeL": 0.5}


def test_rouge_of_summaries() -> None:
    """The right answers of a record are its references."""
    records = [Record("p", "c", gold=("a cat sat",))]

    assert summary(["a cat sat"], records)["rougeL"] == 1


def test_bleu_by_hand() -> None:
    """Precisions 4/5, 3/4, 2/3, 1/2 and no penalty for length."""
    scores = bleu(["one two three four five"], [["one two three four six"]])

    expected = math.prod([4 / 5, 3 / 4, 2 / 3, 1 / 2]) ** (1 / 4)
    assert scores["bleu"] == pytest.approx(expected)
    assert scores["sentence_bleu"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("said", "references", "score"),
    [
        (["same words here now"], [["same words here now"]], 1.0),
        (["two words"], [["two words"]], 1.0),
        ([""], [["words"]], 0.0),
        (["b c d e"], [["w x y z", "b c d e"]], 1.0),
    ],
)
def test_sentences(said, references, score) -> None:
    """Short sentences are not punished for n-grams that they cannot have."""
    assert bleu(said, references)["sentence_bleu"] == pytest.approx(score)


def test_texts_may_have_different_numbers_of_references() -> None:
    """A missing reference is none, and not an empty one."""
    scores = bleu(["b c d e", "w x y z"], [["b c d e", "q"], ["w x y z"]])

    assert scores == {"bleu": pytest.approx(1.0), "sentence_bleu": pytest.approx(1.0)}


@pytest.mark.parametrize("measure", [rouge, bleu])
@pytest.mark.parametrize("given", [([], []), (["a"], []), (["a"], [[]])])
def test_nothing_to_compare(measure, given) -> None:
    """No text, or a text without reference, has no score."""
    with pytest.raises(DataError, match="needs a reference"):
        measure(*given)


@pytest.mark.parametrize(
    ("measure", "module"), [(rouge, "rouge_score.rouge_scorer"), (bleu, "sacrebleu.metrics.bleu")]
)
def test_without_the_library(monkeypatch, measure, module) -> None:
    """What to install is said."""
    monkeypatch.setitem(sys.modules, module, None)

    with pytest.raises(ConfigError, match=r"fedsea\[tasks\]"):
        measure(["a"], [["a"]])
