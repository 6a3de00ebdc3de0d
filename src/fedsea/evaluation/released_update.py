"""R7: what an update of the bottom's adapter, handed to be averaged, says about the batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from fedsea.evaluation.finding import Finding, Score
from fedsea.evaluation.training_victim import StepTaken
from fedsea.model.checkpoint import Checkpoint
from fedsea.model.optimization import AdamWConfig
from fedsea.model.partition import Span
from fedsea.redteam.adapter_update import Update, between, of_gradients
from fedsea.redteam.continuation import load_continuation
from fedsea.redteam.span_search import SpanSearch


def findings(
    checkpoint: Checkpoint,
    bottom: Span,
    taken: StepTaken,
    learning_rate: float,
    public: Sequence[tuple[int, ...]],
    prefix: tuple[int, ...],
    what: str,
) -> list[Finding]:
    """Attack the gradient of a step, and what AdamW made of it.

    The rate is the share of the distinct tokens of a batch among as many that the update points at;
    the guess is the most common tokens of public text.

    Args:
        checkpoint: the public one.
        bottom: the blocks that the update is of.
        taken: the step.
        learning_rate: of the step.
        public: texts to count tokens in.
        prefix: ids with which every text begins.
        what: the circumstances, for the report.
    """
    kept = 1 - learning_rate * AdamWConfig().weight_decay
    updates: dict[str, Update] = {
        "gradient": of_gradients(taken.bottom),
        "AdamW step": between(taken.bottom, taken.bottom_after, kept),
    }
    counts = Counter(token for ids in public for token in ids if token not in prefix)
    texts = [example.inputs[len(prefix) :] for example in taken.examples]
    truth = {token for ids in texts for token in ids} - {*prefix}
    common = {token for token, _ in counts.most_common(len(truth))}
    attacker = load_continuation(checkpoint, bottom, adapter=taken.bottom)
    made = []
    for name, update in updates.items():
        found = SpanSearch().run(update, attacker, prefix)
        nearest = [token for token in found.ranked if token not in prefix][: len(truth)]
        sequences = [ids[len(prefix) :] for ids in found.sequences]
        details = {
            "tokens": float(sum(map(len, texts))),
            "named": float(len(found.tokens - {*prefix})),
            "named_right": float(len(truth & found.tokens)),
            "in_order": sum(_followed(ids, sequences) for ids in texts) / len(texts),
        }
        scores = [Score("", token in nearest) for token in sorted(truth)]
        prior = len(truth & common) / max(1, len(truth))
        made.append(Finding.of("r7", f"{name}, {what}", scores, prior, details))
    return made


def _followed(truth: Sequence[int], found: Iterable[Sequence[int]]) -> float:
    """Share of a text that some recovered sequence has in place."""
    hits = [sum(a == b for a, b in zip(truth, ids, strict=False)) for ids in found]
    return max(hits, default=0) / max(1, len(truth))
