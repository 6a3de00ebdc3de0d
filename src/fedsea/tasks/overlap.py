"""How much of a text stands in another one: ROUGE for summaries and for what an attacker recovered.

Both come from the libraries that the field reports with, of the extra `[tasks]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from fedsea.errors import ConfigError, DataError

if TYPE_CHECKING:
    from fedsea.tasks.records import Record

ROUGE = ("rouge1", "rouge2", "rougeL")
_ASK = 'install it with: pip install "fedsea[tasks]"'


def rouge(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Mean F of ROUGE-1, ROUGE-2 and ROUGE-L with Porter's stemmer (Lin 2004; `rouge-score`).

    Of several references to one text, the one with the highest F counts.

    Raises:
        ConfigError: the library is not installed.
        DataError: there is nothing to compare, or a text has no reference.
    """
    _check(predictions, references)
    scorer = _rouge_scorer()
    scores = [
        scorer.score_multi(list(texts), prediction)
        for prediction, texts in zip(predictions, references, strict=True)
    ]
    return {name: fmean(score[name].fmeasure for score in scores) for name in ROUGE}


def bleu(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """BLEU-4 of the corpus, and the mean of that of sentences (Papineni et al. 2002; `sacrebleu`).

    Sentences are smoothed (exponentially) and counted up to the length of n-grams that they have.

    Raises:
        ConfigError: the library is not installed.
        DataError: there is nothing to compare, or a text has no reference.
    """
    _check(predictions, references)
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ImportError:
        raise ConfigError(f"BLEU takes the library sacrebleu; {_ASK}") from None
    most = max(map(len, references))
    # A text with fewer references than another has None in their place.
    streams: list[Any] = [
        [texts[at] if at < len(texts) else None for texts in references] for at in range(most)
    ]
    sentence = BLEU(effective_order=True, force=True)
    each = [
        sentence.sentence_score(prediction, list(texts)).score
        for prediction, texts in zip(predictions, references, strict=True)
    ]
    corpus = BLEU(force=True).corpus_score(list(predictions), streams).score
    return {"bleu": _share(corpus), "sentence_bleu": _share(fmean(each))}


def summary(predictions: Sequence[str], records: Sequence[Record]) -> dict[str, float]:
    """F of ROUGE-1, ROUGE-2 and ROUGE-L, averaged over records; see `rouge`."""
    return rouge(predictions, [record.gold for record in records])


def _share(percent: float) -> float:
    return min(1.0, percent / 100)


def _check(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if not predictions or len(predictions) != len(references) or not all(references):
        raise DataError("each text needs a reference to be compared with, and one text at least")


def _rouge_scorer() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise ConfigError(f"ROUGE takes the library rouge-score; {_ASK}") from None
    return RougeScorer(ROUGE, use_stemmer=True)
