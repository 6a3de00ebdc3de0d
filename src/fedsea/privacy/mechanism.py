"""The contract of every mechanism: what leaves the machine instead of rows, and what that costs.

A mechanism is an immutable value: parameters, no state, no randomness of its own. The same object
protects rows, says what a release costs, and scores candidates for an attacker (`log_likelihood`),
so that guarantee and attack always speak about the same law.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from enum import StrEnum
from typing import ClassVar

import torch
from torch import Tensor

from fedsea.errors import ConfigError
from fedsea.privacy.losses import PrivacyLoss
from fedsea.privacy.noise import NoiseSource

_LEAST, _MOST = 1e-12, 1e12
_NUMBERS_PER_BLOCK = 1 << 18  # candidates are scored in parts that stay in the cache


class Unit(StrEnum):
    """What a guarantee protects: one token, one prompt with its answer, or one named record."""

    TOKEN = "token"  # noqa: S105 - a unit, not a secret
    PROMPT = "prompt"
    RECORD = "record"


class Mechanism(ABC):
    """How rows are changed before they leave. Frozen dataclasses implement it.

    Two mechanisms are equal when their specs are.

    Attributes:
        name: the word in specs, options and reports.
    """

    __slots__ = ()

    name: ClassVar[str]

    @property
    def levels(self) -> int:
        """0: releases are floats. u > 0: releases are counts 0..u."""
        return 0

    @property
    def scale(self) -> float:
        """A, where `levels` is not 0: a count K stands for A (2 K / u - 1)."""
        return 0.0

    @property
    def sensitivity(self) -> float:
        """Largest Euclidean distance between the clipped inputs of one release; may be infinite."""
        return math.inf

    @abstractmethod
    def protect(self, rows: Tensor, noise: NoiseSource) -> Tensor:
        """What leaves instead of `rows`.

        Args:
            rows: [n, width], floating, on any device.
            noise: where randomness comes from.

        Returns:
            [n, width] on the CPU: fp32 on a fixed grid, or uint8 counts where `levels` is not 0.

        Raises:
            UnsafeRows: NaN or infinity.
            ConfigError: the width does not fit the mechanism.
        """

    @abstractmethod
    def loss(self) -> PrivacyLoss | None:
        """The cost of one release; None: not differentially private."""

    def releases(self, rows: int) -> int:
        """How many losses one `protect` of this many rows costs."""
        return rows

    def log_likelihood(self, released: Tensor, clean: Tensor) -> Tensor:
        """How well each candidate explains a released row, up to a constant.

        Args:
            released: [width], what left the machine (floats or counts).
            clean: [v, width], candidate rows before any protection.

        Returns:
            [v], float64.
        """
        seen = released.to(torch.float64)
        block = max(1, _NUMBERS_PER_BLOCK // max(1, clean.shape[1]))
        scores = [self._scores(seen, part.to(torch.float64)) for part in clean.split(block)]
        return torch.cat(scores)

    @abstractmethod
    def _scores(self, released: Tensor, clean: Tensor) -> Tensor:
        """`log_likelihood` of some candidates, in float64."""

    def values(self, released: Tensor) -> Tensor:
        """The numbers the server computes with, fp32: counts become A (2 K / u - 1)."""
        if self.levels == 0:
            return released.to(torch.float32)
        # In the order of operations of the wire codec, so that both give the very same numbers.
        shares = 2.0 * released.to(torch.float64) / self.levels - 1.0
        return (self.scale * shares).to(torch.float32)

    def _fits(self, rows: Tensor, width: int) -> None:
        """Refuse rows of another width than the mechanism was made for."""
        if rows.shape[1] != width:
            raise ConfigError(
                f"rows of width {rows.shape[1]} do not fit mechanism {self.name}, "
                f"made for width {width}"
            )

    @abstractmethod
    def parameters(self) -> dict[str, str]:
        """Parameters of the canonical spec, in order, as text."""

    def spec(self) -> str:
        """Canonical text, as `registry.mechanism_from_spec` reads it."""
        pairs = ",".join(f"{key}={value}" for key, value in self.parameters().items())
        return f"{self.name}:{pairs}"

    @abstractmethod
    def describe(self) -> str:
        """One line for people: what is guaranteed, or that nothing is."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mechanism) and self.spec() == other.spec()

    def __hash__(self) -> int:
        return hash(self.spec())


def number_text(value: float) -> str:
    """A number in a spec: the shortest text that reads back as the same one."""
    return repr(value).removesuffix(".0")


def positive(name: str, value: float) -> None:
    """A parameter that must be above 0, and of a size with which fp32 can compute.

    Raises:
        ConfigError: it is not.
    """
    if not _LEAST <= value <= _MOST:
        raise ConfigError(f"{name}={value}; it must be positive, {_LEAST:g} to {_MOST:g}")


def checked_width(width: int) -> int:
    """A number of coordinates.

    Raises:
        ConfigError: it is not positive.
    """
    if width < 1:
        raise ConfigError(f"width={width}; it must be 1 or more")
    return width
