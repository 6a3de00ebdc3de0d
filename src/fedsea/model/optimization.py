"""Optimizer steps on the factors of an adapter: clipped AdamW, saved and loaded exactly.

Both sides of a training take their steps here, each on its own part. What a step computes is a
function of the parameters, the moments, the gradients and the step's number, so a training that was
interrupted goes on as if it had not been.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

from fedsea.errors import CheckpointError, ConfigError, NotFinite

_STEPS: Final = "steps"
_MOMENTS: Final = ("exp_avg", "exp_avg_sq")
# As in torch.nn.utils.clip_grad_norm_, so that clipping is the same as there.
_NORM_EPS: Final = 1e-6
# The square of a gradient has to be finite in fp32.
_LARGEST_NORM: Final = 1e18


@dataclass(frozen=True, slots=True)
class AdamWConfig:
    """Adam with decoupled weight decay (arXiv 1711.05101).

    Attributes:
        betas: decay of the running means of the gradient and of its square.
        eps: added to the root of the second.
        weight_decay: each step shrinks the parameters by learning rate times this.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01

    def __post_init__(self) -> None:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"betas must be in [0, 1): they are {self.betas}")
        if not (math.isfinite(self.eps) and self.eps > 0):
            raise ConfigError(f"eps must be positive: it is {self.eps}")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise ConfigError(f"weight_decay must be 0 or more: it is {self.weight_decay}")


class AdapterOptimizer:
    """AdamW on fp32 parameters, in whatever dtype the blocks compute.

    A gradient that is missing counts as zero. Parameters that take no gradient are left out.

    Args:
        parameters: by name; the names are kept with the state.
        config: how.

    Raises:
        ConfigError: a parameter is not fp32.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], config: AdamWConfig) -> None:
        self.config = config
        self._parameters = {
            name: parameter for name, parameter in parameters.items() if parameter.requires_grad
        }
        for name, parameter in self._parameters.items():
            if parameter.dtype != torch.float32:
                raise ConfigError(f"{name} is {parameter.dtype}; keep what is trained in fp32")
        self._steps = 0
        self._adamw: torch.optim.AdamW | None = None
        if self._parameters:
            self._adamw = torch.optim.AdamW(
                self._parameters.values(),
                betas=config.betas,
                eps=config.eps,
                weight_decay=config.weight_decay,
            )

    @property
    def steps(self) -> int:
        """Steps applied."""
        return self._steps

    def gradient_norm(self) -> float:
        """L2 norm of all gradients together.

        Raises:
            NotFinite: a gradient is NaN or infinite.
        """
        gradients = [one.grad for one in self._parameters.values() if one.grad is not None]
        norm = float(nn.utils.get_total_norm(gradients)) if gradients else 0.0
        if not math.isfinite(norm):
            raise self._not_finite()
        return norm

    def apply(
        self, learning_rate: float, max_grad_norm: float | None = None, scale: float = 1.0
    ) -> float:
        """Take one step and clear the gradients.

        Args:
            learning_rate: of this step.
            max_grad_norm: gradients of a larger norm are shrunk to it; None leaves them.
            scale: the gradients are so many times too large.

        Returns:
            The norm of the gradients, unscaled and before clipping.

        Raises:
            NotFinite: a gradient is NaN or infinite, or so large that its square is; nothing was
                changed.
            ConfigError: an argument is out of range; nothing was changed.
        """
        _check_step(learning_rate, max_grad_norm, scale)
        norm = self.gradient_norm() / scale
        if min(norm, max_grad_norm or math.inf) > _LARGEST_NORM:
            raise self._not_finite("has a square that")
        clip = 1.0 if max_grad_norm is None else min(1.0, max_grad_norm / (norm + _NORM_EPS))
        self._multiply(clip / scale)
        if self._adamw is not None:
            for group in self._adamw.param_groups:
                group["lr"] = learning_rate
            self._adamw.step()
        self.clear()
        self._steps += 1
        return norm

    def clear(self) -> None:
        """Forget the gradients."""
        for parameter in self._parameters.values():
            parameter.grad = None

    def state(self) -> dict[str, Tensor]:
        """Steps and moments by name, to be saved; all fp32, not copied."""
        found = {_STEPS: torch.tensor(float(self._steps))}
        for name, parameter in self._parameters.items():
            kept = self._adamw.state[parameter] if self._adamw is not None else {}
            for moment in _MOMENTS:
                value = kept.get(moment)
                found[f"{name}.{moment}"] = torch.zeros_like(parameter) if value is None else value
        return found

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` gave.

        Raises:
            CheckpointError: it is of other parameters; nothing was changed.
        """
        shapes = {name: tuple(kept.shape) for name, kept in self.state().items()}
        if {name: tuple(kept.shape) for name, kept in state.items()} != shapes:
            raise CheckpointError(
                "the optimizer's state is of other parameters; "
                "go on with the lora options that the training began with, or start anew"
            )
        self._steps = int(state[_STEPS])
        for name, parameter in self._parameters.items():
            moments = {
                moment: state[f"{name}.{moment}"].to(parameter.device, torch.float32).clone()
                for moment in _MOMENTS
            }
            if self._adamw is not None:
                step = torch.tensor(float(self._steps))
                self._adamw.state[parameter] = {"step": step, **moments}
        self.clear()

    def _not_finite(self, what: str = "") -> NotFinite:
        return NotFinite(
            f"a gradient of step {self._steps + 1} {what and what + ' '}is NaN or infinite; "
            "nothing was changed: use a smaller learning rate, or leave the batch out"
        )

    @torch.no_grad()
    def _multiply(self, factor: float) -> None:
        for parameter in self._parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            elif factor != 1.0:
                parameter.grad.mul_(factor)


def step_generator(
    seed: int, step: int, index: int, device: torch.device | str = "cpu"
) -> torch.Generator:
    """The generator of forward number `index` of a step.

    Its seed is the first eight bytes of SHA-256 of the text "fedsea dropout SEED STEP INDEX", so a
    forward that is computed again, in whatever process, draws the same numbers.
    """
    seeded = _hashed(f"fedsea dropout {seed} {step} {index}")
    return torch.Generator(device).manual_seed(seeded)


def part_seed(seed: int, part: str) -> int:
    """The seed of one part ("bottom", "trunk", "top"): 63 bits that do not tell `seed` to others.

    The first eight bytes of SHA-256 of the text "fedsea part SEED PART", without the highest bit.
    """
    return _hashed(f"fedsea part {seed} {part}") >> 1


def _hashed(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def _check_step(learning_rate: float, max_grad_norm: float | None, scale: float) -> None:
    if not (math.isfinite(learning_rate) and learning_rate >= 0):
        raise ConfigError(f"learning rate {learning_rate}; use 0 or a positive number")
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise ConfigError(f"max_grad_norm is {max_grad_norm}; use a positive number, or none")
    if not (math.isfinite(scale) and scale > 0):
        raise ConfigError(f"the scale of the gradients is {scale}; use a positive number")
