"""Privacy losses of every kind: composing them, writing them, reading them back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from fedsea.errors import ConfigError
from fedsea.privacy.binomial_loss import BinomialLoss
from fedsea.privacy.discrete_loss import DiscreteLoss
from fedsea.privacy.distribution import LossDistribution
from fedsea.privacy.gaussian_loss import GaussianLoss
from fedsea.privacy.loss import Json, PrivacyLoss
from fedsea.privacy.mixed_loss import MixedLoss

__all__ = [
    "BinomialLoss",
    "DiscreteLoss",
    "GaussianLoss",
    "LossDistribution",
    "MixedLoss",
    "PrivacyLoss",
    "compose",
    "from_json",
]


def compose(losses: Sequence[PrivacyLoss]) -> PrivacyLoss:
    """The cost of all releases together; of none, a Gaussian loss with mu 0.

    Losses of one law compose as that law does (Gaussian and binomial exactly); what remains of
    different kinds is added on a grid, rounded up.
    """
    merged: list[PrivacyLoss] = []
    for loss in _flat(losses):
        for index, known in enumerate(merged):
            together = _together(known, loss)
            if together is not None:
                merged[index] = together
                break
        else:
            merged.append(loss)
    if len(merged) > 1:
        merged = [loss for loss in merged if loss != GaussianLoss(0.0)] or merged[:1]
    if not merged:
        return GaussianLoss(0.0)
    return merged[0] if len(merged) == 1 else MixedLoss(tuple(merged))


def _flat(losses: Sequence[PrivacyLoss]) -> list[PrivacyLoss]:
    found: list[PrivacyLoss] = []
    for loss in losses:
        found.extend(loss.parts if isinstance(loss, MixedLoss) else (loss,))
    return found


def _together(one: PrivacyLoss, other: PrivacyLoss) -> PrivacyLoss | None:
    """Both as one loss of the same kind, or None when their laws differ."""
    if isinstance(one, GaussianLoss) and isinstance(other, GaussianLoss):
        return one.with_other(other)
    if isinstance(one, BinomialLoss) and isinstance(other, BinomialLoss):
        if one.probability == other.probability:
            return replace(one, trials=one.trials + other.trials)
        return None
    if not (isinstance(one, DiscreteLoss) and isinstance(other, DiscreteLoss)):
        return None
    same = (one.law, one.reference) == (other.law, other.reference)
    return replace(one, times=one.times + other.times) if same else None


def from_json(text: Mapping[str, object]) -> PrivacyLoss:
    """Read what `to_json` wrote.

    Raises:
        ConfigError: it is not a loss of a known kind.
    """
    kind = text.get("kind")
    if kind == GaussianLoss.kind:
        reference = None if text.get("reference_mu") is None else _number(text, "reference_mu")
        return GaussianLoss(_number(text, "mu"), reference)
    if kind == BinomialLoss.kind:
        return BinomialLoss(_whole(text, "trials"), _number(text, "probability"))
    if kind == DiscreteLoss.kind:
        reference_law = None if text.get("reference") is None else _law(text.get("reference"))
        return DiscreteLoss(_law(text.get("law")), reference_law, _whole(text, "times"))
    if kind == MixedLoss.kind:
        return MixedLoss(tuple(from_json(_object(part)) for part in _list(text, "parts")))
    raise ConfigError(f"a privacy loss of unknown kind {kind!r}")


def _law(value: object) -> LossDistribution:
    text = _object(value)
    masses = tuple(_as_number(mass, "masses") for mass in _list(text, "masses"))
    return LossDistribution(
        _number(text, "step"), _whole(text, "lowest"), masses, _number(text, "infinite")
    )


def _object(value: object) -> Json:
    if not isinstance(value, dict):
        raise ConfigError("a privacy loss that is not an object")
    return value


def _list(text: Mapping[str, object], key: str) -> list[object]:
    value = text.get(key)
    if not isinstance(value, list):
        raise ConfigError(f"a privacy loss without the list {key!r}")
    return value


def _number(text: Mapping[str, object], key: str) -> float:
    return _as_number(text.get(key), key)


def _as_number(value: object, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"a privacy loss without the number {key!r}")
    return float(value)


def _whole(text: Mapping[str, object], key: str) -> int:
    value = _number(text, key)
    if not value.is_integer():
        raise ConfigError(f"a privacy loss in which {key!r} is not a whole number")
    return int(value)
