"""A statistical audit: what the bytes that leave really give away, against what is claimed.

Two inputs that are as far apart as the mechanism allows, and twice as far, so that a clip that was
forgotten shows, go through the channel many times: protect, encode, decode. The test that tells
them apart best compares the log-likelihood ratio with a threshold. Half of the samples choose the
threshold, the other half certify its two error rates with Clopper-Pearson bounds, which hold
whatever the mechanism really does:

    mu >= Phi^-1(1 - fpr) - Phi^-1(fnr)              with the upper bounds of both rates

The claim is broken when 1 - fnr > e^epsilon fpr + delta(epsilon) for some epsilon, delta(.) being
the claimed curve. So laws that are not Gaussian are audited against their own curve.

An audit finds what is wrong by more than its resolution; it proves no guarantee.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import optimize, special, stats
from torch import Tensor

from fedsea.errors import ConfigError
from fedsea.privacy.gaussian import FedSEAGaussian, Gaussian
from fedsea.privacy.loss import PrivacyLoss
from fedsea.privacy.mechanism import Mechanism
from fedsea.privacy.metric import MetricDP
from fedsea.privacy.quantization import StochasticQuantization, Ternary

Channel = Callable[[Tensor], Tensor]
Progress = Callable[[int, int], None]
Floats = NDArray[np.float64]

DEFAULT_SAMPLES = 400_000
DEFAULT_CONFIDENCE = 0.999

_LEAST_SAMPLES = 400
_BEYOND_THE_CLIP = 2.0
_NUMBERS_AT_ONCE = 2**18
_THRESHOLDS = 1024
_COSINES = 129
# An output that was clipped, and then rounded to its grid, is this near to the sphere.
_SURFACE = 1 / 256


@dataclass(frozen=True, slots=True)
class Audit:
    """What an audit found.

    Attributes:
        spec: the mechanism whose claim was audited.
        samples: releases in all, of both inputs.
        confidence: the chance, at least, that `shown_mu` is no overestimate.
        claimed_mu: mu of one release, as the mechanism's loss gives it.
        shown_mu: lower bound on the real one.
        largest_mu: what so many samples could show at most.
        false_positive: upper bound on taking the second input for the first.
        false_negative: upper bound on taking the first input for the second.
        excess: 1 - false_negative minus the most that the claim allows; above 0 it is broken.
    """

    spec: str
    samples: int
    confidence: float
    claimed_mu: float
    shown_mu: float
    largest_mu: float
    false_positive: float
    false_negative: float
    excess: float

    @property
    def passed(self) -> bool:
        """Whether the samples are consistent with the claim."""
        return self.excess <= 0

    @property
    def is_blind(self) -> bool:
        """Whether the claim is too weak to be tested: no number of errors would break it."""
        return self.largest_mu <= self.claimed_mu


def audit(
    mechanism: Mechanism,
    channel: Channel,
    *,
    width: int,
    samples: int = DEFAULT_SAMPLES,
    confidence: float = DEFAULT_CONFIDENCE,
    on_progress: Progress = lambda _done, _total: None,
) -> Audit:
    """Audit the claim of `mechanism` about what comes out of `channel`.

    Args:
        mechanism: says what is claimed, and which test is the best.
        channel: from clean rows [n, width] to the numbers that the server decodes [n, width].
        width: numbers in a row.
        samples: releases in all.
        confidence: of the lower bound.
        on_progress: called with samples done and samples in all.

    Raises:
        ConfigError: the mechanism claims nothing, or a number is out of range.
    """
    loss = mechanism.loss()
    if loss is None:
        raise ConfigError(
            f"{mechanism.name} as given is not differentially private, so there is no claim to "
            "audit: give a clip norm"
        )
    if samples < _LEAST_SAMPLES:
        raise ConfigError(f"{samples} samples show nothing: use {_LEAST_SAMPLES} or more")
    if not 0.5 < confidence < 1:
        raise ConfigError(f"a confidence of {confidence} is none: give one from 0.5 to 1")
    first, second = worst_pair(mechanism, width)
    measure = likelihood_ratio(mechanism, first, second)
    half = samples // 4
    scores = []
    for number, row in enumerate((first, second)):
        done = 2 * number * half

        def advance(count: int, done: int = done) -> None:
            on_progress(done + count, 4 * half)

        scores.append(_scores(mechanism, channel, measure, row, 2 * half, advance))
    risk = (1 - confidence) / 2
    threshold = _best_threshold(scores[0][:half], scores[1][:half], risk)
    missed = int(np.count_nonzero(scores[0][half:] < threshold))
    mistaken = int(np.count_nonzero(scores[1][half:] >= threshold))
    negative = float(_upper(np.array([missed]), half, risk)[0])
    positive = float(_upper(np.array([mistaken]), half, risk)[0])
    least = float(_upper(np.array([0]), half, risk)[0])
    return Audit(
        spec=mechanism.spec(),
        samples=4 * half,
        confidence=confidence,
        claimed_mu=loss.mu(),
        shown_mu=max(0.0, _mu(positive, negative)),
        largest_mu=_mu(least, least),
        false_positive=positive,
        false_negative=negative,
        excess=1 - negative - _most_power(loss, positive),
    )


def worst_pair(mechanism: Mechanism, width: int) -> tuple[Tensor, Tensor]:
    """Two clean rows [width] whose releases differ most, beyond the clip on opposite sides.

    Clipped by a norm: opposite ends of a diameter. Clamped by coordinate: opposite corners.

    Raises:
        ConfigError: the width does not fit the mechanism, or it is of a kind unknown here.
    """
    if width < 1:
        raise ConfigError(f"rows of {width} numbers cannot be audited: give a width above 0")
    named = getattr(mechanism, "width", None)
    if named is not None and named != width:
        raise ConfigError(f"rows of width {width} do not fit a mechanism of width {named}")
    center = torch.zeros(width, dtype=torch.float64)
    match mechanism:
        case StochasticQuantization() | Ternary():
            reach = mechanism.clip
        case Gaussian():
            reach = mechanism.clip_norm / math.sqrt(width)
            if mechanism.center is not None:
                center = mechanism.center.to(torch.float64)
        case FedSEAGaussian() | MetricDP() if mechanism.clip_norm is not None:
            reach = mechanism.clip_norm / math.sqrt(width)
        case _:
            raise ConfigError(f"{mechanism.name} has no worst pair that is known here")
    away = torch.full((width,), _BEYOND_THE_CLIP * reach, dtype=torch.float64)
    return center + away, center - away


def likelihood_ratio(
    mechanism: Mechanism, first: Tensor, second: Tensor
) -> Callable[[Tensor], Floats]:
    """An increasing function of the log-likelihood ratio of two rows, for releases [n, width].

    For Gaussian noise, and for counts at opposite corners, the ratio is linear in the release:
    <y, first - second> times a constant, plus a constant. Metric noise has its own.
    """
    if isinstance(mechanism, MetricDP):
        return _metric_ratio(mechanism, first, second)
    direction = first - second
    unit = direction / torch.linalg.vector_norm(direction)

    def by_projection(released: Tensor) -> Floats:
        return np.asarray((released.to(torch.float64) @ unit).numpy())

    return by_projection


def _metric_ratio(mechanism: MetricDP, first: Tensor, second: Tensor) -> Callable[[Tensor], Floats]:
    """The ratio for metric noise and rows at +-x: by distances inside the ball of outputs.

    On its surface, where clipped outputs lie, it is a rising function of the cosine of the angle
    to x, read off the mechanism's own law at some cosines and interpolated.
    """
    assert mechanism.clip_norm is not None
    radius = mechanism.clip_norm
    rows = torch.stack([first, second])
    near = rows * (radius / torch.linalg.vector_norm(rows, dim=1, keepdim=True)).clamp(max=1.0)
    axis = near[0] / radius
    across = torch.zeros_like(axis)
    across[:2] = torch.tensor([1.0, -1.0], dtype=torch.float64) / math.sqrt(2)
    cosines = np.linspace(-1.0, 1.0, _COSINES)
    ratios = []
    for cosine in cosines.tolist():
        released = radius * (cosine * axis + math.sqrt(1 - cosine * cosine) * across)
        scores = mechanism.log_likelihood(released, rows)
        ratios.append(float(scores[0] - scores[1]))

    def by_law(released: Tensor) -> Floats:
        seen = released.to(torch.float64)
        norms = torch.linalg.vector_norm(seen, dim=1)
        away = [torch.linalg.vector_norm(seen - row, dim=1) for row in near]
        inside = mechanism.eta * (away[1] - away[0])
        surface = np.interp(((seen @ axis) / norms.clamp_min(1e-300)).numpy(), cosines, ratios)
        is_inside = norms.numpy() < radius * (1 - _SURFACE)
        return np.asarray(np.where(is_inside, inside.numpy(), surface))

    return by_law


def _scores(
    mechanism: Mechanism,
    channel: Channel,
    measure: Callable[[Tensor], Floats],
    row: Tensor,
    count: int,
    advance: Callable[[int], None],
) -> Floats:
    """The statistic of `count` independent releases of one row."""
    is_by_row = mechanism.releases(2) == 2
    at_once = max(1, _NUMBERS_AT_ONCE // len(row)) if is_by_row else 1
    found = np.empty(count)
    clean = row.to(torch.float32).expand(min(at_once, count), -1)
    for start in range(0, count, at_once):
        rows = clean[: count - start]
        found[start : start + len(rows)] = measure(channel(rows))
        advance(start + len(rows))
    return found


def _best_threshold(first: Floats, second: Floats, risk: float) -> float:
    """The threshold whose lower bound on mu is largest on these samples.

    The bound is taken at a smaller risk than the certificate's. So it falls faster away from where
    both error rates are known well, and chance in these samples moves the choice less.
    """
    risk = risk * risk
    candidates = np.unique(
        np.quantile(np.concatenate([first, second]), np.linspace(0, 1, _THRESHOLDS))
    )
    missed = np.searchsorted(np.sort(first), candidates, side="left")
    mistaken = len(second) - np.searchsorted(np.sort(second), candidates, side="left")
    bounds = special.ndtri(1 - _upper(mistaken, len(second), risk)) - special.ndtri(
        _upper(missed, len(first), risk)
    )
    return float(candidates[int(np.argmax(bounds))])


def _upper(errors: NDArray[np.int64], trials: int, risk: float) -> Floats:
    """Clopper-Pearson: the rate is above this with a chance of at most `risk`."""
    highest = stats.beta.ppf(1 - risk, errors + 1, np.maximum(trials - errors, 1))
    return np.asarray(np.where(errors >= trials, 1.0, highest), dtype=np.float64)


def _mu(positive: float, negative: float) -> float:
    if positive >= 1 or negative >= 1:
        return 0.0
    return float(special.ndtri(1 - positive) - special.ndtri(negative))


def _most_power(loss: PrivacyLoss, level: float) -> float:
    """The most that the claim lets any test of this level reach: 1 - f(level).

    The minimum over epsilon of e^epsilon level + delta(epsilon); any epsilon bounds it from above,
    so a search that stops early never breaks a claim that holds.
    """
    if level >= 1:
        return 1.0
    reach = -math.log(level) + 1.0
    found = optimize.minimize_scalar(
        lambda epsilon: math.exp(epsilon) * level + loss.delta(epsilon),
        bounds=(-reach, reach),
        method="bounded",
        options={"xatol": 1e-6},
    )
    return min(1.0, float(found.fun))
