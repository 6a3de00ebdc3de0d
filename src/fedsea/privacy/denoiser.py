"""The client's denoiser: what the trunk would have answered without the noise.

Split-and-Denoise (arXiv 2310.09130, section 3.3): only the client knows the clean rows x and the
noise z, so only it can take back part of what the noise did to the trunk's output y. Theirs reads
``[y ; x ; z]`` of a whole text; ours is causal, so that it restores an answer token by token: for
position t a Transformer reads ``(x_s, z_s)`` of the positions s <= t, each layer those of a bounded
window, and a last layer joins what it made of them with ``y_t``. Rows whose outputs are not asked
for are read all the same.

It is post-processing at the trusted side: it costs no privacy, and it guarantees none.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from fedsea import artifacts
from fedsea.errors import ConfigError, FingerprintMismatch

KIND = "denoiser"

_HEX = re.compile(r"[0-9a-f]{64}")
_FIRST_ROWS = 64


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes: rows of the model and of the noise, and those of the denoiser itself.

    `window` is how many positions a layer reads, its own included.

    Raises:
        ConfigError: a size that is not positive, or heads that do not divide the inner size.
    """

    hidden: int
    noise: int
    inner: int = 256
    layers: int = 6
    heads: int = 8
    window: int = 64

    def __post_init__(self) -> None:
        for entry in fields(self):
            if getattr(self, entry.name) < 1:
                raise ConfigError(f"a denoiser with {entry.name} below 1; use 1 or more")
        if self.inner % self.heads:
            raise ConfigError(
                f"{self.heads} heads do not divide an inner size of {self.inner}; choose another"
            )


@dataclass(frozen=True, slots=True)
class Purpose:
    """What a denoiser was trained for; elsewhere it would do harm.

    `model` and `projection` are fingerprints ("" for no projection), `mechanism` is its spec.
    """

    model: str
    bottom: int
    top: int
    mechanism: str
    projection: str = ""

    def check(self, used: Purpose) -> None:
        """Refuse another use than this.

        Raises:
            FingerprintMismatch: another checkpoint.
            ConfigError: another cut, mechanism or projection.
        """
        if used.model != self.model:
            raise FingerprintMismatch(
                f"the denoiser was trained for the checkpoint {self.model[:12]} and this one is "
                f"{used.model[:12]}; use the denoiser of this checkpoint"
            )
        for name in ("bottom", "top", "mechanism", "projection"):
            trained, wanted = getattr(self, name), getattr(used, name)
            if trained != wanted:
                raise ConfigError(
                    f"the denoiser was trained for {name} '{trained}' and '{wanted}' is used; "
                    "train one for this"
                )


class _Attention(nn.Module):
    """Self-attention over a sliding window, with a learned bias for each distance."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads, self.window = shape.heads, shape.window
        self.joined = nn.Linear(shape.inner, 3 * shape.inner)
        self.out = nn.Linear(shape.inner, shape.inner)
        self.distance = nn.Parameter(torch.zeros(shape.heads, shape.window))

    def forward(self, rows: Tensor, memory: _Memory | None) -> Tensor:
        """(B, n, inner) to the same; `memory` holds the keys and values before them."""
        parts = self.joined(rows).unflatten(-1, (3, self.heads, -1))
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        if memory is not None:
            key, value = memory.extended(key, value, self.window - 1)
        bias = self._bias(query.shape[2], key.shape[2])
        mixed = scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return self.out(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def _bias(self, count: int, length: int) -> Tensor:
        """(heads, count, length): the queries are the last `count` positions."""
        positions = torch.arange(length)
        distance = positions[length - count :, None] - positions
        bias = self.distance[:, distance.clamp(0, self.window - 1)]
        return bias.masked_fill((distance < 0) | (distance >= self.window), -math.inf)


class _Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(shape.inner)
        self.attention = _Attention(shape)
        self.norm = nn.LayerNorm(shape.inner)
        self.widen = nn.Linear(shape.inner, 4 * shape.inner)
        self.narrow = nn.Linear(4 * shape.inner, shape.inner)

    def forward(self, rows: Tensor, memory: _Memory | None) -> Tensor:
        rows = rows + self.attention(self.attention_norm(rows), memory)
        wide = nn.functional.gelu(self.widen(self.norm(rows)))
        return rows + self.narrow(wide)  # type: ignore[no-any-return]


class Denoiser(nn.Module):
    """Restores outputs of the trunk; at first it gives them back as they are.

    Args:
        shape: sizes.
        purpose: what it is for.
        recipe: how it was trained, for people.
    """

    scales: Tensor

    def __init__(
        self, shape: Shape, purpose: Purpose, recipe: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__()
        self.shape, self.purpose, self.recipe = shape, purpose, dict(recipe or {})
        width = 2 * shape.hidden + shape.noise
        self.register_buffer("scales", torch.ones(3))
        self.direct = nn.Linear(width, shape.hidden)
        self.read = nn.Linear(shape.hidden + shape.noise, shape.inner)
        self.layers = nn.ModuleList(_Layer(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.inner)
        self.join = nn.Linear(shape.inner + shape.hidden, 4 * shape.inner)
        self.out = nn.Linear(4 * shape.inner, shape.hidden)
        self._begin_as_identity()

    def forward(self, noisy: Tensor, clean: Tensor, noise: Tensor) -> Tensor:
        """Whole sequences: outputs (B, T, hidden), clean rows, noise (B, T, noise) to outputs."""
        context = self.context(clean, noise, None)
        return self.restored(noisy, clean, noise, context)

    def context(self, clean: Tensor, noise: Tensor, memories: list[_Memory] | None) -> Tensor:
        """What the Transformer makes of the rows that only the client has: (B, n, inner)."""
        rows = self.read(torch.cat([clean / self.scales[1], noise / self.scales[2]], -1))
        for number, layer in enumerate(self.layers):
            rows = layer(rows, None if memories is None else memories[number])
        normed: Tensor = self.norm(rows)
        return normed

    def restored(self, noisy: Tensor, clean: Tensor, noise: Tensor, context: Tensor) -> Tensor:
        """Outputs joined with their context, position by position."""
        scaled = [
            rows / scale for rows, scale in zip((noisy, clean, noise), self.scales, strict=True)
        ]
        wide = nn.functional.gelu(self.join(torch.cat([context, scaled[0]], -1)))
        restored: Tensor = (self.direct(torch.cat(scaled, -1)) + self.out(wide)) * self.scales[0]
        return restored

    def sequence(self) -> Restorer:
        """A new sequence to restore as it comes."""
        return Restorer(self)

    def save(self, path: str | Path) -> None:
        """Write it to a file.

        Raises:
            ConfigError: the file cannot be written.
        """
        description = {
            "shape": asdict(self.shape),
            "purpose": asdict(self.purpose),
            "recipe": self.recipe,
        }
        artifacts.write(Path(path), KIND, description, self.state_dict())

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read it from a file, ready for use.

        Raises:
            CheckpointError: the file is missing, corrupt, or holds what is not known.
        """
        artifact = artifacts.read(Path(path), KIND)
        artifact.expect_only({"shape", "purpose", "recipe"}, set(artifact.tensors))
        try:
            shape = Shape(**artifact.value("shape", dict))
            purpose = Purpose(**artifact.value("purpose", dict))
            with torch.device("meta"):
                made = cls(shape, purpose, artifact.value("recipe", dict))
        except (TypeError, ConfigError) as error:
            raise artifact.corrupt("its sizes or its purpose cannot be read") from error
        _check_purpose(artifact, purpose)
        expected = made.state_dict()
        artifact.expect_only(set(artifact.description), set(expected))
        weights = {name: artifact.tensor(name, tuple(w.shape)) for name, w in expected.items()}
        if not bool((weights["scales"] > 0).all()):
            raise artifact.corrupt("a scale in it is not positive")
        made.load_state_dict(weights, assign=True)
        return made.eval().requires_grad_(False)

    def _begin_as_identity(self) -> None:
        for part in (self.direct, self.out):
            nn.init.zeros_(part.weight)
            nn.init.zeros_(part.bias)
        if self.direct.weight.device.type != "meta":
            with torch.no_grad():
                self.direct.weight[:, : self.shape.hidden] = torch.eye(self.shape.hidden)


class Restorer:
    """A denoiser along one sequence: rows are appended, forgotten and forked like a KV chain.

    Work for a position is bounded by the window; memory grows with the length, so that a
    rollback to any position is exact.
    """

    def __init__(self, denoiser: Denoiser, memories: list[_Memory] | None = None) -> None:
        self._denoiser = denoiser
        layers = range(denoiser.shape.layers)
        self._memories = [_Memory() for _ in layers] if memories is None else memories

    @property
    def length(self) -> int:
        """Positions read so far."""
        return self._memories[0].length

    @torch.inference_mode()
    def restore(self, noisy_output_rows: Tensor, clean_rows: Tensor, noise_rows: Tensor) -> Tensor:
        """Read the next n positions and restore the outputs of the last k of them.

        Args:
            noisy_output_rows: (k, hidden) what the trunk answered; k may be 0.
            clean_rows: (n, hidden) what the bottom gave, before any projection.
            noise_rows: (n, noise) what was released minus what would have been without noise.

        Returns:
            (k, hidden) fp32.

        Raises:
            ConfigError: rows of other shapes.
        """
        shape, count = self._denoiser.shape, len(noisy_output_rows)
        clean, noise = clean_rows.float(), noise_rows.float()
        if (
            noisy_output_rows.shape != (count, shape.hidden)
            or clean.shape != (len(clean), shape.hidden)
            or noise.shape != (len(clean), shape.noise)
            or count > len(clean)
        ):
            raise ConfigError(
                f"the denoiser takes rows of {shape.hidden} numbers and noise of {shape.noise}, "
                "for at least as many positions as outputs; use the one of this model"
            )
        if not len(clean):
            return noisy_output_rows.float()
        context = self._denoiser.context(clean[None], noise[None], self._memories)[0]
        last = slice(len(clean) - count, None)
        return self._denoiser.restored(
            noisy_output_rows.float(), clean[last], noise[last], context[last]
        )

    def rollback(self, length: int) -> None:
        """Forget positions from `length` on."""
        for memory in self._memories:
            memory.length = min(memory.length, length)

    def fork(self, length: int) -> Restorer:
        """A new sequence that begins with the first `length` positions of this one."""
        return Restorer(self._denoiser, [memory.copy(length) for memory in self._memories])


@dataclass(slots=True)
class _Memory:
    """Keys and values of one layer along one sequence, in buffers that grow by doubling."""

    length: int = 0
    stores: list[Tensor] = field(default_factory=list)

    def extended(self, key: Tensor, value: Tensor, before: int) -> tuple[Tensor, Tensor]:
        """Append (1, heads, n, size) each; give back the last `before` old ones with the new."""
        first, end = max(0, self.length - before), self.length + key.shape[2]
        if not self.stores or end > self.stores[0].shape[2]:
            rows = max(_FIRST_ROWS, 2 * end)
            self.stores = [
                self._grown(number, new, rows) for number, new in enumerate((key, value))
            ]
        for store, new in zip(self.stores, (key, value), strict=True):
            store[:, :, self.length : end] = new
        self.length = end
        return self.stores[0][:, :, first:end], self.stores[1][:, :, first:end]

    def copy(self, length: int) -> _Memory:
        """The first `length` positions, in memory of their own."""
        kept = min(length, self.length)
        return _Memory(kept, [store[:, :, :kept].clone() for store in self.stores])

    def _grown(self, number: int, new: Tensor, rows: int) -> Tensor:
        grown = new.new_zeros(*new.shape[:2], rows, new.shape[3])
        if self.stores:
            grown[:, :, : self.length] = self.stores[number][:, :, : self.length]
        return grown


def _check_purpose(artifact: artifacts.Artifact, purpose: Purpose) -> None:
    texts = (purpose.model, purpose.mechanism, purpose.projection)
    if not all(isinstance(text, str) for text in texts):
        raise artifact.corrupt("its purpose cannot be read")
    prints = (purpose.model, purpose.projection or purpose.model)
    if not all(_HEX.fullmatch(text) for text in prints):
        raise artifact.corrupt("a fingerprint in it is not 64 hex digits")
    if any(type(number) is not int or number < 0 for number in (purpose.bottom, purpose.top)):
        raise artifact.corrupt("its cut cannot be read")
