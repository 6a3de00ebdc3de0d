"""The mass of metric noise on the part of a ray beyond a sphere: outputs that are clipped to it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scipy import special
from torch import Tensor

_NODES = 64
_PEAK_BISECTIONS = 40
_END_BISECTIONS = 16
_E_FOLDS = 40.0


def log_ray_mass(direction: Tensor, centers: Tensor, radius: float, eta: float) -> Tensor:
    """log of the integral over r >= radius of r^(d-1) exp(-eta |r w - x|), for many x.

    The logarithm of the integrand is concave in r. It is integrated by Gauss-Legendre nodes
    between the points, not below `radius`, where it is forty e-folds under its greatest value.

    Args:
        direction: [d], unit vector w; d >= 2.
        centers: [v, d], the x.
        radius: of the sphere, positive.
        eta: rate of the noise.

    Returns:
        [v], float64.
    """
    along = centers @ direction
    across = (centers.square().sum(1) - along.square()).clamp_min(0.0)
    integrand = _Integrand(direction.shape[0] - 1, along, across, eta)
    peak = integrand.peak().clamp_min(radius)
    floor = integrand.log(peak) - _E_FOLDS
    start = integrand.crossing(torch.full_like(peak, radius), peak, floor)
    end = integrand.crossing(integrand.beyond(peak, floor), peak, floor)
    nodes, weights = special.roots_legendre(_NODES)
    half = (end - start) / 2
    r = start[:, None] + half[:, None] * (1 + torch.from_numpy(nodes))
    logs = _Integrand(integrand.power, along[:, None], across[:, None], eta).log(r)
    return torch.logsumexp(logs + torch.from_numpy(weights).log(), dim=1) + half.log()


@dataclass(frozen=True, slots=True)
class _Integrand:
    """r^power exp(-eta sqrt((r - along)^2 + across)), elementwise."""

    power: int
    along: Tensor
    across: Tensor
    eta: float

    def log(self, r: Tensor) -> Tensor:
        return self.power * r.log() - self.eta * ((r - self.along).square() + self.across).sqrt()

    def peak(self) -> Tensor:
        """Where it is greatest: the root of power / r = eta (r - along) / distance."""
        low = self.along.clamp_min(0.0)
        high = 2 * self.power / self.eta + 2 * (self.along.abs() + self.across.sqrt())
        for _ in range(_PEAK_BISECTIONS):
            r = (low + high) / 2
            distance = ((r - self.along).square() + self.across).sqrt()
            rising = self.power * distance > self.eta * r * (r - self.along)
            low, high = torch.where(rising, r, low), torch.where(rising, high, r)
        return high

    def beyond(self, peak: Tensor, floor: Tensor) -> Tensor:
        """Points to the right of the peak where it is under `floor`."""
        step = torch.full_like(peak, _E_FOLDS / self.eta)
        while bool((above := self.log(peak + step) > floor).any()):
            step = torch.where(above, 2 * step, step)
        return peak + step

    def crossing(self, outer: Tensor, peak: Tensor, floor: Tensor) -> Tensor:
        """Where it rises over `floor` between `outer` and the peak; `outer` if it is over there."""
        low, high = outer, peak
        for _ in range(_END_BISECTIONS):
            r = (low + high) / 2
            under = self.log(r) < floor
            low, high = torch.where(under, r, low), torch.where(under, high, r)
        return torch.where(self.log(outer) < floor, low, outer)
