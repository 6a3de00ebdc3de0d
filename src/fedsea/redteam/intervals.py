"""How sure a measured rate is: the exact interval of Clopper and Pearson.

For k successes in n trials the ends are the quantiles alpha/2 of Beta(k, n - k + 1) and
1 - alpha/2 of Beta(k + 1, n - k) (Clopper and Pearson, Biometrika 26, 1934). The true rate lies
between them with at least the stated confidence, whatever it is.
"""

from __future__ import annotations

from dataclasses import dataclass

from scipy.stats import beta

from fedsea.errors import ConfigError

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Interval:
    """Both ends of an interval of rates."""

    low: float
    high: float

    def __contains__(self, rate: float) -> bool:
        return self.low <= rate <= self.high


def clopper_pearson(successes: int, trials: int, confidence: float = CONFIDENCE) -> Interval:
    """The interval of a rate of which `successes` of `trials` were seen; 0 to 1 without trials.

    Raises:
        ConfigError: counts or a confidence that cannot be.
    """
    if not 0 <= successes <= trials:
        raise ConfigError(f"{successes} successes of {trials} trials cannot be; check the counts")
    if not 0 < confidence < 1:
        raise ConfigError(f"a confidence of {confidence} cannot be; use one between 0 and 1")
    outside = (1 - confidence) / 2
    failures = trials - successes
    low = float(beta.ppf(outside, successes, failures + 1)) if successes else 0.0
    high = float(beta.ppf(1 - outside, successes + 1, failures)) if failures else 1.0
    return Interval(low, high)
