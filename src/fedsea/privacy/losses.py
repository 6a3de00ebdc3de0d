"""Privacy losses of every kind: composing them, writing them, reading them back."""

from __future__ import annotations

from collections.abc import Sequence

from fedsea.errors import ConfigError
from fedsea.privacy.gaussian_loss import GaussianLoss
from fedsea.privacy.loss import Json, PrivacyLoss

__all__ = ["GaussianLoss", "PrivacyLoss", "compose", "from_json"]


def compose(losses: Sequence[PrivacyLoss]) -> PrivacyLoss:
    """The cost of all releases together; of none, a Gaussian loss with mu 0.

    Gaussian losses compose exactly.
    """
    total = GaussianLoss(0.0, 0.0)
    for loss in losses:
        if not isinstance(loss, GaussianLoss):
            raise ConfigError(f"losses of kind {loss.kind!r} do not compose with others")
        total = total.with_other(loss)
    return total


def from_json(text: Json) -> PrivacyLoss:
    """Read what `to_json` wrote.

    Raises:
        ConfigError: it is not a loss of a known kind.
    """
    kind = text.get("kind")
    if kind == GaussianLoss.kind:
        return GaussianLoss(_number(text, "mu"), _optional(text, "reference_mu"))
    raise ConfigError(f"a privacy loss of unknown kind {kind!r}")


def _number(text: Json, key: str) -> float:
    value = text.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"a privacy loss without the number {key!r}")
    return float(value)


def _optional(text: Json, key: str) -> float | None:
    return None if text.get(key) is None else _number(text, key)
