"""Unit updates with Gaussian noise: client-level privacy of a federation.

DP-NormFedAvg (Das, Hashemi, Sanghavi, Dhillon: arXiv 2106.07094): a client's update is divided by
its norm instead of being clipped, so that small updates do not drown in the noise; the magnitude is
given up. With u_i of norm 1 (0 stays 0), one round releases

    sum_i u_i + N(0, sigma^2),  sigma = sensitivity / mu,

where the sensitivity is 2 when one client's data are replaced by any other, and 1 when a client is
added or removed. It is exactly mu-GDP for the unit *client*, and T rounds are mu sqrt(T). A client
that does not trust the aggregator adds the same noise to its own u_i: then each client's release is
mu-GDP by itself, and the sum is noisier by sqrt(clients).

It protects a client from those who receive the adapter (or, with noise of its own, the aggregator).
It does not protect it from the server that computes its rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np
import torch
from torch import Tensor

from fedsea.errors import ConfigError, UnsafeRows
from fedsea.federated.arrays import Array, Arrays, norm
from fedsea.federated.config import Neighbours, PrivacySection
from fedsea.privacy.accounts import Budget
from fedsea.privacy.clipping import checked_rows
from fedsea.privacy.gaussian_loss import GaussianLoss
from fedsea.privacy.grid import grid_step, on_grid
from fedsea.privacy.ledger import Account, Ledger
from fedsea.privacy.mechanism import Mechanism, Unit, number_text, positive
from fedsea.privacy.noise import NoiseSource

RECORD: Final = "any one client"


@dataclass(frozen=True, eq=False, slots=True)
class UnitUpdate(Mechanism):
    """Noise on a sum of unit updates, of one client or of many: exactly mu-GDP for each client.

    Args:
        mu: what one round costs.
        neighbours: "replace" or "remove".
    """

    name: ClassVar[str] = "unit-update"

    mu: float
    neighbours: Neighbours = Neighbours.REPLACE

    def __post_init__(self) -> None:
        positive("mu", self.mu)
        try:
            object.__setattr__(self, "neighbours", Neighbours(self.neighbours))
        except ValueError:
            raise ConfigError(
                f"neighbours={self.neighbours}; it must be replace or remove"
            ) from None

    @property
    def sensitivity(self) -> float:
        return 2.0 if self.neighbours is Neighbours.REPLACE else 1.0

    @property
    def sigma(self) -> float:
        """Standard deviation of the noise of each number of the sum."""
        return self.sensitivity / self.mu

    @staticmethod
    def normalized(update: Arrays) -> Arrays:
        """An update divided by its norm over all arrays; zero stays zero.

        Raises:
            UnsafeRows: NaN or infinity.
        """
        size = norm(update)
        if not np.isfinite(size):
            raise UnsafeRows("an update holds NaN or infinity; nothing was sent")
        return (
            update
            if size == 0
            else {name: (a / size).astype(np.float32) for name, a in update.items()}
        )

    def noised(self, total: Arrays, noise: NoiseSource) -> Arrays:
        """A sum of unit updates with its noise, on a fixed grid."""
        return {name: self._noised(total[name], noise) for name in sorted(total)}

    def _noised(self, array: Array, noise: NoiseSource) -> Array:
        exact = torch.from_numpy(array.astype(np.float64))
        drawn = torch.from_numpy(noise.normal(*array.shape))
        return on_grid(exact + self.sigma * drawn, grid_step(self.sigma)).numpy()

    def protect(self, rows: Tensor, noise: NoiseSource) -> Tensor:
        """One update as a matrix: its unit matrix with noise."""
        exact = checked_rows(rows)
        size = torch.linalg.vector_norm(exact)
        unit = exact / size if size > 0 else exact
        drawn = torch.from_numpy(noise.normal(*exact.shape))
        return on_grid(unit + self.sigma * drawn, grid_step(self.sigma))

    def loss(self) -> GaussianLoss:
        # A unit vector is within 1 of the zero update, which is the reference law.
        return GaussianLoss(self.mu, 1.0 / self.sigma)

    def releases(self, rows: int) -> int:
        return min(rows, 1)

    def _scores(self, released: Tensor, clean: Tensor) -> Tensor:
        sizes = torch.linalg.vector_norm(clean, dim=1, keepdim=True)
        units = clean / sizes.clamp_min(torch.finfo(torch.float64).tiny)
        scores: Tensor = (released - units).square().sum(1) / (-2 * self.sigma * self.sigma)
        return scores

    def parameters(self) -> dict[str, str]:
        return {"mu": number_text(self.mu), "neighbours": self.neighbours.value}

    def describe(self) -> str:
        return (
            f"mu = {self.mu:.4g} for each round and client "
            f"(unit client, {self.neighbours.value} one, noise of sigma {self.sigma:.4g})"
        )


def mechanism_of(section: PrivacySection) -> UnitUpdate | None:
    """The mechanism that a configuration asks for, if it asks for one."""
    if section.mu is None:
        return None
    return UnitUpdate(section.mu, section.neighbours)


def account_of(
    ledger: Ledger, tenant: str, section: PrivacySection, mechanism: UnitUpdate
) -> Account:
    """The account that rounds are charged to: the record that is protected is any one client.

    Args:
        ledger: an open one.
        tenant: the federation, or the client that adds noise of its own.
        section: with the budget.
        mechanism: of the rounds.
    """
    budget = None if section.budget_mu is None else Budget(mu=section.budget_mu)
    return ledger.account(tenant, Unit.RECORD, mechanism, record=RECORD, budget=budget)
