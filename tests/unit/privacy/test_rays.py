"""The mass beyond a sphere along a ray."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import integrate, special

from fedsea.privacy.rays import log_ray_mass


@pytest.mark.parametrize("width", [2, 3, 16, 256])
@pytest.mark.parametrize("eta", [0.1, 5.0, 300.0])
def test_against_adaptive_integration(width, eta):
    """Seven digits, whether the peak lies inside the sphere, outside it or far out."""
    generator = torch.Generator().manual_seed(width)
    direction = torch.nn.functional.normalize(
        torch.randn(width, generator=generator, dtype=torch.float64), dim=0
    )
    centers = torch.randn(4, width, generator=generator, dtype=torch.float64) / math.sqrt(width)
    found = log_ray_mass(direction, centers, 1.0, eta)
    for center, value in zip(centers, found, strict=True):
        assert float(value) == pytest.approx(_integral(direction, center, eta), rel=1e-7, abs=1e-7)


def _integral(direction: torch.Tensor, center: torch.Tensor, eta: float) -> float:
    w, x = direction.numpy(), center.numpy()

    def log(r: float) -> float:
        return (len(w) - 1) * math.log(r) - eta * float(np.linalg.norm(r * w - x))

    grid = np.concatenate(
        [np.linspace(1, 3, 2000), np.geomspace(3, 40 + 3 * len(w) / eta + 400 / eta, 2000)]
    )
    logs = np.array([log(r) for r in grid])
    top, best = float(logs.max()), int(logs.argmax())
    kept = grid[logs > top - 45]
    points = sorted({float(kept[0]), float(grid[best]), float(kept[-1])})
    total = sum(
        integrate.quad(
            lambda r: math.exp(log(r) - top), low, high, epsabs=0, epsrel=1e-11, limit=400
        )[0]
        for low, high in itertools.pairwise(points)
    )
    return top + math.log(total)


def test_ball_and_sphere_have_all_the_mass():
    """In the plane, what stays inside and what is clipped to the circle add up to one."""
    eta, center = 2.0, torch.tensor([[0.3, 0.2]], dtype=torch.float64)
    angles = torch.linspace(0, 2 * math.pi, 201, dtype=torch.float64)[:-1]
    rays = [
        float(log_ray_mass(torch.stack([a.cos(), a.sin()]), center, 1.0, eta).exp()) for a in angles
    ]
    on_circle = 2 * math.pi * float(np.mean(rays))
    inside, _ = integrate.dblquad(
        lambda r, a: r * math.exp(-eta * math.hypot(r * math.cos(a) - 0.3, r * math.sin(a) - 0.2)),
        0, 2 * math.pi, 0, 1, epsabs=1e-9,
    )  # fmt: skip
    whole = 2 * math.pi * special.gamma(2) / eta**2
    assert (on_circle + inside) / whole == pytest.approx(1, abs=1e-6)
