"""R8: was a text among those that a released adapter was trained on?

An adapter that was trained on a text predicts it better than before. The score is how much better:

    score(x) = loss_base(x) - loss_tuned(x)        mean nats per token

which is the log of the ratio of both likelihoods and takes out how hard a text is by itself (LoRA-Leak,
arXiv 2507.18302). Two numbers say how well it parts members from others: the area under the curve of
true over false positives, which is the chance that a member scores above another text, and the share
of members found where 1 % of other texts are found too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy.stats import norm
from torch import Tensor

from fedsea.errors import ConfigError
from fedsea.redteam.intervals import CONFIDENCE, Interval, clopper_pearson
from fedsea.redteam.language_model import LanguageModel

FALSE_POSITIVES = 0.01


@dataclass(frozen=True, slots=True)
class Membership:
    """How well members are told from other texts.

    Attributes:
        auc: chance that a member scores above another text; 0.5 is a guess.
        auc_interval: 95 %, of DeLong, DeLong and Clarke-Pearson (Biometrics 44, 1988).
        found: share of members above the threshold.
        found_interval: 95 %, given the threshold.
        false_positives: share of other texts that may be above the threshold.
        members: how many texts of each kind were scored.
        others: see `members`.
    """

    auc: float
    auc_interval: Interval
    found: float
    found_interval: Interval
    false_positives: float
    members: int
    others: int


def losses(model: LanguageModel, texts: Sequence[Sequence[int]], first: int = 1) -> Tensor:
    """Mean nats per token of each text, [n], float64.

    Args:
        model: what expects the next token.
        texts: token ids.
        first: position of the first token that counts, 1 or more.

    Raises:
        ConfigError: a text has no token that counts.
    """
    if first < 1 or any(len(ids) <= first for ids in texts):
        raise ConfigError("membership needs texts of two tokens at least, the first one known")
    found = []
    for ids in texts:
        expected = model.expect(tuple(ids[:-1]))[first - 1 :]
        truth = torch.tensor(ids[first:])
        found.append(-expected.gather(1, truth[:, None]).mean())
    return torch.stack(found)


def membership(
    members: Tensor, others: Tensor, false_positives: float = FALSE_POSITIVES
) -> Membership:
    """Judge scores of members [m] and of other texts [n]; larger says member.

    Raises:
        ConfigError: too few scores, or a share of false positives that cannot be.
    """
    if min(len(members), len(others)) < 2:
        raise ConfigError("give two members and two other texts at least")
    if not 0 <= false_positives < 1:
        raise ConfigError(f"a share of {false_positives} false positives cannot be")
    allowed = math.floor(false_positives * len(others))
    threshold = others.sort(descending=True).values[allowed]
    hits = int((members > threshold).sum())
    auc, interval = _area(members.double(), others.double())
    return Membership(
        auc=auc,
        auc_interval=interval,
        found=hits / len(members),
        found_interval=clopper_pearson(hits, len(members)),
        false_positives=false_positives,
        members=len(members),
        others=len(others),
    )


def _area(members: Tensor, others: Tensor) -> tuple[float, Interval]:
    """Mann and Whitney's statistic and DeLong's interval of it."""
    above = (members[:, None] > others).double() + 0.5 * (members[:, None] == others).double()
    area = float(above.mean())
    variance = above.mean(1).var() / len(members) + above.mean(0).var() / len(others)
    reach = float(norm.ppf(0.5 + CONFIDENCE / 2)) * math.sqrt(float(variance))
    return area, Interval(max(0.0, area - reach), min(1.0, area + reach))
