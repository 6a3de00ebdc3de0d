"""Metrics against cases computed by hand, other implementations, and laws."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score

from fedsea.errors import DataError
from fedsea.tasks import metrics
from fedsea.tasks.records import Choice, Record

YES_NO = (Choice("true", "yes", " yes."), Choice("false", "no", " no."))
THREE = tuple(Choice(label, label, f" {label}") for label in ("a", "b", "c"))
ALL = (
    metrics.accuracy,
    metrics.accuracy_and_macro_f1,
    metrics.multirc,
    metrics.best_span,
    metrics.conversation,
)


def binary(gold: Sequence[str], groups: Sequence[str] | None = None) -> list[Record]:
    """Records of yes or no."""
    names = groups or [str(at) for at in range(len(gold))]
    return [
        Record("p", "c", YES_NO, group, "s", (label,))
        for label, group in zip(gold, names, strict=True)
    ]


def open_answers(*gold: tuple[str, ...]) -> list[Record]:
    """Records without choices."""
    return [Record("p", "c", gold=answers) for answers in gold]


def test_accuracy() -> None:
    """Labels and words count; nothing said is wrong."""
    records = binary(["true", "false", "true", "true"])

    assert metrics.accuracy(["true", "no", "", "false"], records) == {"accuracy": 0.5}


def test_macro_f1_by_hand() -> None:
    """a: 2 of 2 found of 2 right, F1 4/5; b: F1 2/3; c never right nor predicted."""
    records = [Record("p", "c", THREE, gold=(label,)) for label in "aabb"]

    scores = metrics.accuracy_and_macro_f1(["a", "a", "b", "a"], records)

    assert scores["accuracy"] == 0.75
    assert scores["macro_f1"] == pytest.approx((4 / 5 + 2 / 3) / 2)


def test_macro_f1_without_predictions() -> None:
    """No prediction is no label of its own, and costs the label that was right."""
    records = [Record("p", "c", THREE, gold=(label,)) for label in "ab"]

    assert metrics.accuracy_and_macro_f1(["", "b"], records) == {"accuracy": 0.5, "macro_f1": 0.5}


@given(pairs=st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("abc")), min_size=1))
def test_macro_f1_is_that_of_scikit_learn(pairs: list[tuple[str, str]]) -> None:
    """The same number as f1_score(average="macro")."""
    records = [Record("p", "c", THREE, gold=(right,)) for _, right in pairs]

    ours = metrics.accuracy_and_macro_f1([found for found, _ in pairs], records)

    theirs = f1_score([r for _, r in pairs], [f for f, _ in pairs], average="macro")
    assert ours["macro_f1"] == pytest.approx(theirs)


def test_multirc_by_hand() -> None:
    """Question q: P 1/2, R 1; r: nothing predicted, P counts as 1, R 0; s: all found."""
    gold = ["true", "false", "false", "true", "true", "false"]
    records = binary(gold, ["q", "q", "q", "r", "s", "s"])

    scores = metrics.multirc(["yes", "yes", "no", "no", "yes", "no"], records)

    precision, recall = (1 / 2 + 1 + 1) / 3, (1 + 0 + 1) / 3
    assert scores == {
        "f1a": pytest.approx(2 * (2 / 3) * (2 / 3) / (2 / 3 + 2 / 3)),
        "f1m": pytest.approx(2 * precision * recall / (precision + recall)),
        "em0": pytest.approx(1 / 3),
        "em1": 1.0,
    }


@pytest.mark.parametrize(
    ("gold", "predictions", "f1a", "f1m"),
    [
        (["true"], ["no"], 0.0, 0.0),  # precision 1 by convention, recall 0
        (["false"], ["yes"], 0.0, 0.0),
        (["false"], ["no"], 1.0, 1.0),  # nothing to find, nothing found
        (["true"], ["yes"], 1.0, 1.0),
    ],
)
def test_multirc_with_nothing_in_a_denominator(gold, predictions, f1a, f1m) -> None:
    """The official script counts an empty denominator as 1; no division by zero remains."""
    scores = metrics.multirc(predictions, binary(gold))

    assert (scores["f1a"], scores["f1m"]) == (f1a, f1m)


@pytest.mark.parametrize(
    ("prediction", "gold", "f1"),
    [
        ("the big cat", "a cat", 2 / 3),
        ("Cat!", "cat", 1.0),
        ("cat cat", "cat", 2 / 3),
        ("dog", "cat", 0.0),
        ("", "cat", 0.0),
        ("the", "", 1.0),  # both empty without the article
        ("", "", 1.0),
    ],
)
def test_word_f1_by_hand(prediction: str, gold: str, f1: float) -> None:
    """Common words counted as often as both have them."""
    assert metrics.word_f1(prediction, gold) == pytest.approx(f1)


def test_exact_match_ignores_what_squad_ignores() -> None:
    """Case, punctuation, articles and spaces."""
    assert metrics.exact_match(" The U.S. ", "us") == 1
    assert metrics.exact_match("theory", "ory") == 0


def test_the_nearest_right_answer_counts() -> None:
    """ReCoRD accepts any of several names."""
    records = open_answers(("NORAD", "the Air Command"), ("Bob",))

    scores = metrics.best_span(["Air Command", "Ann"], records)

    assert scores == {"f1": 0.5, "em": 0.5}


def test_conversation_by_hand() -> None:
    """Two right answers: each is left out once; the paper's accuracy takes any."""
    records = open_answers(("a cat", "black cat"), ("yes",))

    scores = metrics.conversation(["cat", "yes"], records)

    first = (metrics.word_f1("cat", "black cat") + metrics.word_f1("cat", "a cat")) / 2
    assert scores == {
        "f1": pytest.approx((first + 1) / 2),
        "em": pytest.approx((0.5 + 1) / 2),
        "em_any": 1.0,
    }


@pytest.mark.parametrize(
    ("said", "label"),
    [
        ("true", "true"),
        ("Yes.", "true"),
        (" no, because yes", "false"),
        ("I think yes", "true"),
        ("nothing", ""),
        ("", ""),
        (" .", ""),
    ],
)
def test_what_a_text_chooses(said: str, label: str) -> None:
    """The label, the words, or the words that are said first; whole words only."""
    assert metrics.chosen(said, binary(["true"])[0]) == label


@pytest.mark.parametrize(
    ("said", "label"),
    [
        ("the dog", "x"),
        ("the old dog", "x"),
        ("old grey", "x"),
        ("cat", "rest"),
        ("dog grey", "x"),
        ("", ""),
    ],
)
def test_what_a_text_means_when_one_choice_is_the_rest(said: str, label: str) -> None:
    """Words in or around those of the choice mean it; anything else means the rest."""
    record = Record("p", "c", (Choice("x", "old grey dog", " d"), Choice("rest", "", "")))

    assert metrics.chosen(said, record) == label


def test_of_two_choices_the_longer_one_that_is_said_counts() -> None:
    """Saying "not true" is not saying "not"."""
    record = Record("p", "c", (Choice("0", "not", " n"), Choice("1", "not true", " t")))

    assert metrics.chosen("not true at all", record) == "1"


def test_words_that_fit_two_choices_choose_none() -> None:
    """A tie is no prediction."""
    record = Record("p", "c", (Choice("0", "red cat", " r"), Choice("1", "red dog", " d")))

    assert metrics.chosen("red", record) == ""


CASES = st.lists(
    st.tuples(
        st.sampled_from(["true", "false", "yes", "no", "", "maybe yes"]),
        st.sampled_from(["true", "false"]),
        st.sampled_from("qrs"),
    ),
    min_size=1,
    max_size=12,
)


@pytest.mark.parametrize("metric", ALL)
@given(cases=CASES, seed=st.integers(0, 9))
def test_every_metric_is_a_share_and_ignores_the_order(metric, cases, seed) -> None:
    """Between 0 and 1, and the same when records are permuted."""
    predictions = [prediction for prediction, _, _ in cases]
    records = binary([gold for _, gold, _ in cases], [group for _, _, group in cases])
    order = random.Random(seed).sample(range(len(cases)), len(cases))

    scores = metric(predictions, records)
    again = metric([predictions[at] for at in order], [records[at] for at in order])

    assert all(0 <= score <= 1 for score in scores.values())
    assert scores == {name: pytest.approx(score) for name, score in again.items()}


@pytest.mark.parametrize("metric", ALL)
@given(gold=st.lists(st.sampled_from(["true", "false"]), min_size=1, max_size=8))
def test_right_answers_score_one(metric, gold: list[str]) -> None:
    """The best there is."""
    scores = metric(gold, binary(gold))

    assert set(scores.values()) == {1.0}


def test_only_known_answers_are_judged() -> None:
    """Records without a right answer are left out; without any there is nothing to say."""
    known, unknown = Record("p", "c", YES_NO, gold=("true",)), Record("p", "", YES_NO)

    scores = metrics.judged(metrics.accuracy, ["no", "yes"], [unknown, known])

    assert scores == {"accuracy": 1.0}
    with pytest.raises(DataError, match="take a file with labels"):
        metrics.judged(metrics.accuracy, ["no"], [unknown])


def test_predictions_and_records_must_belong_together() -> None:
    """One prediction for each record."""
    with pytest.raises(DataError, match="1 predictions were made for 2 records"):
        metrics.judged(metrics.accuracy, ["yes"], binary(["true", "true"]))
