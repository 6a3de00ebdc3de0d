"""The Gaussian curve that lies above a privacy loss."""

from __future__ import annotations

import math

from fedsea.privacy.gaussian_loss import gaussian_mu
from fedsea.privacy.loss import PrivacyLoss

_SLACK = 1e-8
_POINTS = 64


def dominating_mu(loss: PrivacyLoss) -> float:
    """The smallest mu of which mu-GDP holds, up to 1e-8 in delta.

    The largest mu that the curve needs at any of 64 epsilons between those where delta is
    1 - 1e-8 (or 0) and 1e-8. Enough for symmetric losses, whose curve at negative epsilon follows
    from the positive side. Infinite when delta never falls so far.
    """
    nearest, farthest = loss.epsilon(1 - _SLACK), loss.epsilon(_SLACK)
    if math.isinf(farthest):
        return math.inf
    found = 0.0
    for index in range(_POINTS):
        epsilon = nearest + (farthest - nearest) * index / _POINTS
        delta = min(loss.delta(epsilon), 1 - _SLACK)
        if delta > _SLACK:
            found = max(found, gaussian_mu(epsilon, delta))
    return found
