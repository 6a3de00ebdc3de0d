"""Mechanisms with the mistakes that an audit has to find, each beside the claim that it breaks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from fedsea.privacy.clipping import Clipping
from fedsea.privacy.gaussian import Gaussian
from fedsea.privacy.mechanism import Mechanism
from fedsea.privacy.quantization import StochasticQuantization


class SmallSigma(Gaussian):
    """Noise that is 5 % small."""

    @property
    def sigma(self) -> float:
        return 0.95 * self.sensitivity / self.mu


class HalfSensitivity(Gaussian):
    """The distance of a row from the centre taken for the distance of two rows."""

    @property
    def sigma(self) -> float:
        return self.sensitivity / 2 / self.mu


class ForgottenClip(Gaussian):
    """Rows go out as long as they are."""

    def _clipped(self, rows: Tensor, by: Clipping) -> Tensor:
        del by
        return rows


class SmallScale(StochasticQuantization):
    """A of DEL that is 10 % small."""

    @property
    def scale(self) -> float:
        correct = StochasticQuantization(self.bits, self.clip, self.mu, self.width)
        return 0.9 * correct.scale


@dataclass(frozen=True)
class Case:
    """What is claimed, and what really runs."""

    name: str
    claimed: Mechanism
    real: Mechanism
    is_broken: bool


def cases(width: int, mu: float) -> list[Case]:
    """The correct mechanisms and the broken ones, for rows of this width at this mu."""
    gaussian = Gaussian(1.0, mu)
    quantization = StochasticQuantization(4, 0.05, mu, width)
    made: list[tuple[str, Mechanism, Callable[[], Mechanism]]] = [
        ("gaussian, sigma 5 % small", gaussian, lambda: SmallSigma(1.0, mu)),
        ("gaussian, sensitivity halved", gaussian, lambda: HalfSensitivity(1.0, mu)),
        ("gaussian, clip forgotten", gaussian, lambda: ForgottenClip(1.0, mu)),
        ("DEL, scale 10 % small", quantization, lambda: SmallScale(4, 0.05, mu, width)),
    ]
    return [
        Case("gaussian, correct", gaussian, gaussian, is_broken=False),
        Case("DEL, correct", quantization, quantization, is_broken=False),
        *(Case(name, claimed, build(), is_broken=True) for name, claimed, build in made),
    ]
