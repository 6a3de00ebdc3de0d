"""How answers are judged: each metric takes predictions and the records that they answer.

Values are shares from 0 to 1, and do not depend on the order of the records. A prediction is the
label of a choice, or text as a model wrote it; an empty one is wrong wherever a right answer is not
empty.
"""

from __future__ import annotations

import re
import string
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean

from fedsea.errors import DataError
from fedsea.tasks.records import Record

Metric = Callable[[Sequence[str], Sequence[Record]], dict[str, float]]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def judged(
    metric: Metric, predictions: Sequence[str], records: Sequence[Record]
) -> dict[str, float]:
    """The metric over the records whose right answer is known.

    Raises:
        DataError: there are none, or not one prediction for each record.
    """
    if len(predictions) != len(records):
        raise DataError(f"{len(predictions)} predictions were made for {len(records)} records")
    known = [(p, r) for p, r in zip(predictions, records, strict=True) if r.gold]
    if not known:
        raise DataError("no record says what the right answer is; take a file with labels")
    return metric([prediction for prediction, _ in known], [record for _, record in known])


def accuracy(predictions: Sequence[str], records: Sequence[Record]) -> dict[str, float]:
    """Share of records whose label was found."""
    return {"accuracy": _accuracy(_pairs(predictions, records))}


def accuracy_and_macro_f1(
    predictions: Sequence[str], records: Sequence[Record]
) -> dict[str, float]:
    """Accuracy, and F1 = 2 TP / (2 TP + FP + FN) of each label, averaged over labels.

    The labels are those that are right or predicted somewhere; no prediction is no label.
    """
    pairs = _pairs(predictions, records)
    labels = {label for pair in pairs for label in pair if label}
    scores = []
    for label in sorted(labels):
        hits = sum(found == right == label for found, right in pairs)
        scores.append(2 * hits / sum((found == label) + (right == label) for found, right in pairs))
    return {"accuracy": _accuracy(pairs), "macro_f1": fmean(scores)}


def multirc(predictions: Sequence[str], records: Sequence[Record]) -> dict[str, float]:
    """The measures of MultiRC (Khashabi et al. 2018), as its official script computes them.

    f1a is F1 over all answers. f1m is the harmonic mean of precision and recall, each averaged over
    questions, where a question without answers in the denominator counts as 1. em0 and em1 are the
    shares of questions with no error, and with one error at most.
    """
    questions: dict[str, list[tuple[bool, bool]]] = defaultdict(list)
    for (found, right), record in zip(_pairs(predictions, records), records, strict=True):
        questions[record.group].append((found == "true", right == "true"))
    everything = [pair for pairs in questions.values() for pair in pairs]
    errors = [sum(found != right for found, right in pairs) for pairs in questions.values()]
    return {
        "f1a": _harmonic(*_precision_recall(everything)),
        "f1m": _harmonic(
            fmean(_precision_recall(pairs)[0] for pairs in questions.values()),
            fmean(_precision_recall(pairs)[1] for pairs in questions.values()),
        ),
        "em0": fmean(count <= 0 for count in errors),
        "em1": fmean(count <= 1 for count in errors),
    }


def best_span(predictions: Sequence[str], records: Sequence[Record]) -> dict[str, float]:
    """F1 and exact match of ReCoRD: that of the right answer which is nearest."""
    pairs = list(zip(predictions, records, strict=True))
    return {
        "f1": fmean(best(word_f1, prediction, record.gold) for prediction, record in pairs),
        "em": fmean(best(exact_match, prediction, record.gold) for prediction, record in pairs),
    }


def conversation(predictions: Sequence[str], records: Sequence[Record]) -> dict[str, float]:
    """F1 and exact match of CoQA and QuAC, and exact match with any right answer.

    With n > 1 right answers the official scripts leave out each one in turn, take the nearest of the
    others, and average, so that a human annotator can be judged by the same rule. em_any is the
    accuracy of the FedSEA-LLaMA paper.
    """
    pairs = list(zip(predictions, records, strict=True))
    return {
        "f1": fmean(_each_left_out(word_f1, prediction, r.gold) for prediction, r in pairs),
        "em": fmean(_each_left_out(exact_match, prediction, r.gold) for prediction, r in pairs),
        "em_any": fmean(best(exact_match, prediction, r.gold) for prediction, r in pairs),
    }


def word_f1(prediction: str, gold: str) -> float:
    """F1 of words (SQuAD): 2 c / (m + n) for c common words out of m and n, case and articles aside."""
    found, right = normal(prediction).split(), normal(gold).split()
    if not found or not right:
        return float(found == right)
    common = sum((Counter(found) & Counter(right)).values())
    return 2 * common / (len(found) + len(right))


def exact_match(prediction: str, gold: str) -> float:
    """1 when the words are the same, case, articles and punctuation aside; else 0."""
    return float(normal(prediction) == normal(gold))


def normal(text: str) -> str:
    """Lower case, without punctuation and articles, single spaces (SQuAD)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def best(score: Callable[[str, str], float], prediction: str, gold: Iterable[str]) -> float:
    """The score with the right answer that is nearest."""
    return max(score(prediction, answer) for answer in gold)


def chosen(prediction: str, record: Record) -> str:
    """The label that a prediction means; empty when it means none.

    A text means the choice that it is, or else the one whose words it says first, or else the only
    one whose words hold all of its own. What is none of these means the choice without words, if
    there is one and anything was said.
    """
    labels = {choice.label for choice in record.choices}
    if prediction in labels:
        return prediction
    said = normal(prediction)
    spoken = {choice.label: normal(choice.words) for choice in record.choices}
    same = [label for label, words in spoken.items() if words == said]
    if same and said:
        return same[0]
    places = {label: _place(words, said) for label, words in spoken.items() if words}
    first = min(
        (label for label, place in places.items() if place >= 0),
        key=lambda label: (places[label], -len(spoken[label])),
        default=None,
    )
    if first is not None:
        return first
    around = [label for label in places if set(said.split()) <= set(spoken[label].split())]
    if len(around) == 1 and said:
        return around[0]
    silent = [choice.label for choice in record.choices if not choice.words]
    return silent[0] if silent and said else ""


def _place(words: str, said: str) -> int:
    """Where the words stand in what was said; -1 for nowhere."""
    return f" {said} ".find(f" {words} ")


def _pairs(predictions: Sequence[str], records: Sequence[Record]) -> list[tuple[str, str]]:
    return [
        (chosen(prediction, record), record.gold[0])
        for prediction, record in zip(predictions, records, strict=True)
    ]


def _accuracy(pairs: Sequence[tuple[str, str]]) -> float:
    return fmean(found == right for found, right in pairs)


def _precision_recall(pairs: Sequence[tuple[bool, bool]]) -> tuple[float, float]:
    hits = sum(found and right for found, right in pairs)
    found, right = sum(pair[0] for pair in pairs), sum(pair[1] for pair in pairs)
    return (hits / found if found else 1.0), (hits / right if right else 1.0)


def _harmonic(precision: float, recall: float) -> float:
    total = precision + recall
    return 2 * precision * recall / total if total else 0.0


def _each_left_out(
    score: Callable[[str, str], float], prediction: str, gold: Sequence[str]
) -> float:
    if len(gold) == 1:
        return score(prediction, gold[0])
    return fmean(best(score, prediction, [*gold[:at], *gold[at + 1 :]]) for at in range(len(gold)))
