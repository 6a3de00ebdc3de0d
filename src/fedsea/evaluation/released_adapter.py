"""R8: what a released adapter says about its training data: membership, canaries, an audit."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fedsea.client.examples import Example
from fedsea.evaluation.finding import Finding, Score
from fedsea.redteam.canaries import Canary, audit, draw, exposure
from fedsea.redteam.intervals import clopper_pearson
from fedsea.redteam.language_model import LanguageModel
from fedsea.redteam.membership import FALSE_POSITIVES, losses, membership
from fedsea.redteam.report import Rate

CANARY_TOKENS = 6
_ALTERNATIVES = 511
_EXAMPLES, _OTHERS, _SECRETS, _CANARIES = "examples", "held out", "other secrets", "canaries"


class ReleasedAdapter:
    """The attacker of released adapters of one model and data set.

    Args:
        base: the public model.
        members: texts that were trained on.
        others: texts of the same kind that were not.
        public: texts that secrets of canaries are made of.
        prefix: ids with which every text begins.
        canaries: how many are drawn; each is put into the training data by a coin.
        seed: of canaries and coins.

    Attributes:
        planted: the canaries that belong into the training data.
    """

    def __init__(
        self,
        base: LanguageModel,
        members: Sequence[tuple[int, ...]],
        others: Sequence[tuple[int, ...]],
        public: Sequence[tuple[int, ...]],
        prefix: tuple[int, ...],
        canaries: int,
        seed: int,
    ) -> None:
        self._first = max(1, len(prefix))
        vocabulary = tuple(sorted({token for ids in public for token in ids}))
        generator = torch.Generator().manual_seed(seed)
        self._is_in = torch.rand(canaries, generator=generator) < 0.5
        drawn: tuple[Canary, ...] = ()
        secrets: tuple[Canary, ...] = ()
        if canaries:
            drawn = draw(prefix, CANARY_TOKENS, canaries, vocabulary, seed + 1)
            secrets = draw(prefix, CANARY_TOKENS, _ALTERNATIVES, vocabulary, seed + 2)
        self._texts = {
            _EXAMPLES: members,
            _OTHERS: others,
            _CANARIES: [canary.ids for canary in drawn],
            _SECRETS: [canary.ids for canary in secrets],
        }
        self._base = {
            what: losses(base, texts, self._first) for what, texts in self._texts.items() if texts
        }
        self.planted = tuple(
            Example.of(canary.ids, len(prefix))
            for canary, is_in in zip(drawn, self._is_in, strict=True)
            if is_in
        )

    def findings(self, tuned: LanguageModel, exposed: str) -> list[Finding]:
        """Attack the model with a released adapter; `exposed` says which one."""
        found = self._membership(tuned, exposed)
        if len(self._is_in):
            found += self._canaries(tuned, exposed)
        return found

    def _membership(self, tuned: LanguageModel, exposed: str) -> list[Finding]:
        found = membership(self._gain(tuned, _EXAMPLES), self._gain(tuned, _OTHERS))
        details = {"members": float(found.members), "others": float(found.others)}
        area, at_threshold = found.auc_interval, found.found_interval
        return [
            Finding(
                attack="auc",
                exposed=exposed,
                rate=Rate(found.auc, area.low, area.high, found.members),
                prior=0.5,
                details=details,
            ),
            Finding(
                attack="r8",
                exposed=exposed,
                rate=Rate(found.found, at_threshold.low, at_threshold.high, found.members),
                prior=FALSE_POSITIVES,
                details=details,
            ),
        ]

    def _canaries(self, tuned: LanguageModel, exposed: str) -> list[Finding]:
        secrets, gains = self._gain(tuned, _SECRETS), self._gain(tuned, _CANARIES)
        exposures = [exposure(-float(gain), -secrets) for gain in gains[self._is_in]]
        highest = math.log2(_ALTERNATIVES + 1)
        details = {
            "mean_exposure": sum(exposures) / max(1, len(exposures)),
            "highest_exposure": highest,
        }
        first = [Score("", value >= highest) for value in exposures]
        proved = audit(gains, self._is_in, max(2, 2 * (len(gains) // 4)))
        ends = clopper_pearson(proved.right, proved.guesses)
        return [
            Finding.of("canary", exposed, first, 1 / (_ALTERNATIVES + 1), details),
            Finding(
                attack="audit",
                exposed=exposed,
                rate=Rate(proved.right / proved.guesses, ends.low, ends.high, proved.guesses),
                prior=0.5,
                details={"epsilon": proved.epsilon, "canaries": float(proved.canaries)},
            ),
        ]

    def _gain(self, tuned: LanguageModel, what: str) -> Tensor:
        """By how many nats per token the adapter makes each text more probable."""
        return self._base[what] - losses(tuned, self._texts[what], self._first)
