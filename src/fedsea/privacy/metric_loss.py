"""The privacy loss of metric differential privacy, by numeric integration.

Noise z of density proportional to exp(-eta |z|) in d dimensions, two inputs at distance D. With
r = |z| (Gamma law of shape d, rate eta) and t the cosine of the angle to the difference (density
proportional to (1 - t^2)^((d-3)/2)), the loss is

    L = eta (sqrt(r^2 - 2 r t D + D^2) - r),         -eta D <= L <= eta D

    P[L >= l] = E_r P[t <= (D^2 - 2 r l/eta - l^2/eta^2) / (2 r D)]

    delta(epsilon) = integral over l from epsilon to eta D of e^(epsilon - l) P[L >= l]

The last line has no cancellation. delta rises with D at every epsilon (on each line along the
difference the density is log-concave), so the largest distance is the worst pair.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import special

from fedsea.privacy.discrete_loss import DiscreteLoss
from fedsea.privacy.distribution import LossDistribution, dominating

_CELLS = 600
_RADII = 64
_REACH = 12.0  # in standard deviations of the loss
_TAIL = 1e-16


@lru_cache(maxsize=64)
def metric_loss(eta: float, radius: float, width: int) -> DiscreteLoss:
    """The loss of one row when inputs are in a ball of this radius: at most 2 * radius apart.

    The reference law for recovery is the noise around the centre, `radius` away.
    """
    return DiscreteLoss(_distribution(eta * 2 * radius, width), _distribution(eta * radius, width))


def _distribution(reach: float, width: int) -> LossDistribution:
    """The dominating law for two inputs at distance reach / eta."""
    mu = reach / math.sqrt(width)
    end = min(reach, mu * mu / 2 + _REACH * mu)
    return dominating(end / _CELLS, _deltas(reach, width, end).tolist())


def _deltas(reach: float, width: int, end: float) -> NDArray[np.float64]:
    """delta at 0, end / cells, ... end, by Simpson's rule from the top down."""
    step = end / _CELLS
    tails = _tail(np.linspace(0.0, end, 2 * _CELLS + 1), reach, width)
    left, middle, right = tails[:-2:2], tails[1:-1:2], tails[2::2]
    cells = step / 6 * (left + 4 * math.exp(-step / 2) * middle + math.exp(-step) * right)
    deltas = np.empty(_CELLS + 1)
    deltas[-1] = tails[-1]
    for index in range(_CELLS - 1, -1, -1):
        deltas[index] = cells[index] + math.exp(-step) * deltas[index + 1]
    return deltas


def _tail(losses: NDArray[np.float64], reach: float, width: int) -> NDArray[np.float64]:
    """P[L >= l], l >= 0, for noise of rate 1 and distance `reach`."""
    radii, weights = _radii(width)
    r, loss = radii[None, :], losses[:, None]
    share = (reach - loss) * (reach + loss + 2 * r) / (4 * r * reach)  # (1 + cosine) / 2
    shape = (width - 1) / 2
    below = special.betainc(shape, shape, np.clip(share, 0.0, 1.0))
    return np.asarray(below @ weights)


def _radii(width: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Nodes and weights for the mean over a Gamma law of shape `width`."""
    low = float(special.gammaincinv(width, _TAIL))
    high = float(special.gammainccinv(width, _TAIL))
    nodes, weights = special.roots_legendre(_RADII)
    radii = (high + low) / 2 + (high - low) / 2 * nodes
    logs = (width - 1) * np.log(radii) - radii - special.gammaln(width)
    masses = weights * np.exp(logs)
    return radii, masses / masses.sum()
