"""A projection: the pair of linear maps that makes the rows at a cut narrow for the wire.

The client encodes a row of `hidden` numbers to `width` numbers, the server decodes them back:
``decode(encode(h)) = D E h`` with E (width, hidden) and D (hidden, width), both without bias
(DEL, arXiv 2602.11513, section 4.1). A pair is trained on public text for one checkpoint and one
cut. It may be written whole or as one file for each side; all carry the fingerprint of the pair.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import linear

from fedsea import artifacts
from fedsea.errors import ConfigError, FingerprintMismatch

KIND = "projection"
PARTS = ("encoder", "decoder")

_HEX = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, eq=False)
class Projection:
    """Encoder (width, hidden) and decoder (hidden, width), fp32; a side may lack the other's.

    Attributes:
        hidden_size: numbers in a row of the model.
        width: numbers in a row on the wire.
        bottom: blocks before the cut that it was trained for.
        model: fingerprint of the checkpoint that it was trained for.
        recipe: how it was trained, for people; not part of the fingerprint.
        digests: hex digest of each half, also of one that is not here.
    """

    hidden_size: int
    width: int
    bottom: int
    model: str
    encoder: Tensor | None
    decoder: Tensor | None
    recipe: Mapping[str, Any] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        encoder: Tensor,
        decoder: Tensor,
        bottom: int,
        model: str,
        recipe: Mapping[str, Any] | None = None,
    ) -> Self:
        """A whole pair of an encoder (width, hidden) and a decoder (hidden, width).

        Raises:
            ConfigError: shapes that are no pair, or numbers that are not finite.
        """
        if encoder.dim() != 2 or decoder.shape != encoder.shape[::-1]:
            raise ConfigError(
                f"encoder {list(encoder.shape)} and decoder {list(decoder.shape)} are no pair; "
                "give [width, hidden] and [hidden, width]"
            )
        width, hidden_size = encoder.shape
        if not 1 <= width <= hidden_size:
            raise ConfigError(f"a width of {width} does not narrow {hidden_size}; use 1 to hidden")
        if bottom < 0:
            raise ConfigError(f"bottom={bottom} is negative; use 0 or more")
        if not _HEX.fullmatch(model):
            raise ConfigError(
                "the model's fingerprint is 64 hex digits; use Checkpoint.fingerprint"
            )
        halves = {"encoder": _kept(encoder), "decoder": _kept(decoder)}
        if not all(bool(torch.isfinite(half).all()) for half in halves.values()):
            raise ConfigError("a projection with NaN or infinity cannot be used; train it again")
        return cls(
            hidden_size=hidden_size,
            width=width,
            bottom=bottom,
            model=model,
            recipe=recipe or {},
            digests={name: _digest(half) for name, half in halves.items()},
            **halves,
        )

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a pair, or one side's half of it.

        Raises:
            CheckpointError: the file is missing, corrupt, or holds what is not known.
        """
        artifact = artifacts.read(Path(path), KIND)
        artifact.expect_only({"hidden", "width", "bottom", "model", "recipe", *PARTS}, {*PARTS})
        hidden_size, width, bottom = (
            artifact.value(key, int) for key in ("hidden", "width", "bottom")
        )
        if not 1 <= width <= hidden_size or bottom < 0:
            raise artifact.corrupt(f"it says width={width}, hidden={hidden_size}, bottom={bottom}")
        digests: dict[str, str] = {name: artifact.value(name, str) for name in PARTS}
        shapes = {"encoder": (width, hidden_size), "decoder": (hidden_size, width)}
        halves: dict[str, Tensor | None] = dict.fromkeys(PARTS)
        for name in artifact.tensors:
            half = artifact.tensor(name, shapes[name])
            if _digest(half) != digests[name]:
                raise artifact.corrupt(f"the {name} has not the recorded digest")
            halves[name] = half
        if not artifact.tensors:
            raise artifact.corrupt("it holds neither encoder nor decoder")
        model: str = artifact.value("model", str)
        if not all(_HEX.fullmatch(text) for text in (model, *digests.values())):
            raise artifact.corrupt("a fingerprint in it is not 64 hex digits")
        recipe: dict[str, Any] = artifact.value("recipe", dict)
        return cls(
            hidden_size=hidden_size,
            width=width,
            bottom=bottom,
            model=model,
            recipe=recipe,
            digests=digests,
            encoder=halves["encoder"],
            decoder=halves["decoder"],
        )

    def save(self, path: str | Path) -> None:
        """Write what is here into one file.

        Raises:
            ConfigError: the file cannot be written.
        """
        description = {
            "hidden": self.hidden_size,
            "width": self.width,
            "bottom": self.bottom,
            "model": self.model,
            "recipe": dict(self.recipe),
            **self.digests,
        }
        halves = {"encoder": self.encoder, "decoder": self.decoder}
        artifacts.write(
            Path(path),
            KIND,
            description,
            {name: half for name, half in halves.items() if half is not None},
        )

    def for_client(self) -> Projection:
        """The same pair with its encoder only."""
        return replace(self, decoder=None)

    def for_server(self) -> Projection:
        """The same pair with its decoder only; how it was trained stays with the data owner."""
        return replace(self, encoder=None, recipe={})

    def fingerprint(self) -> str:
        """Hex digest of the pair: the same for the whole, for either half and on every device."""
        content = [self.hidden_size, self.width, self.bottom, self.model]
        content += [self.digests[name] for name in PARTS]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def check_fits(self, hidden_size: int, bottom: int, model: str) -> None:
        """Refuse a projection that was trained for something else.

        Raises:
            ConfigError: rows of another width, or another cut.
            FingerprintMismatch: another checkpoint.
        """
        if hidden_size != self.hidden_size:
            raise ConfigError(
                f"the projection is for rows of {self.hidden_size} numbers and this model's have "
                f"{hidden_size}; train one for this model"
            )
        if bottom != self.bottom:
            raise ConfigError(
                f"the projection was trained for bottom={self.bottom} and bottom={bottom} is "
                "used; train one for this cut"
            )
        if model != self.model:
            raise FingerprintMismatch(
                f"the projection was trained for the checkpoint {self.model[:12]} and this one is "
                f"{model[:12]}; use the projection of this checkpoint"
            )

    def to(self, device: torch.device | str) -> Projection:
        """The same pair with its tensors on a device."""
        return replace(
            self,
            encoder=None if self.encoder is None else self.encoder.to(device),
            decoder=None if self.decoder is None else self.decoder.to(device),
        )

    def encode(self, rows: Tensor) -> Tensor:
        """Narrow rows: (n, hidden) of any float dtype to (n, width) fp32.

        Raises:
            ConfigError: the encoder is not here, or the rows are of another width.
        """
        return _apply(self.encoder, rows, "encoder")

    def decode(self, rows: Tensor) -> Tensor:
        """Widen rows: (n, width) of any float dtype to (n, hidden) fp32.

        Raises:
            ConfigError: the decoder is not here, or the rows are of another width.
        """
        return _apply(self.decoder, rows, "decoder")


def _apply(weight: Tensor | None, rows: Tensor, name: str) -> Tensor:
    if weight is None:
        raise ConfigError(f"this half of the projection has no {name}; load the file that has it")
    if rows.dim() != 2 or rows.shape[1] != weight.shape[1]:
        raise ConfigError(
            f"the {name} takes rows of {weight.shape[1]} numbers, not {list(rows.shape)}; "
            "use the projection of this model"
        )
    return linear(rows.to(torch.float32), weight)


def _kept(weight: Tensor) -> Tensor:
    return weight.detach().to("cpu", torch.float32).contiguous()


def _digest(half: Tensor) -> str:
    shape = json.dumps(list(half.shape)).encode()
    return hashlib.sha256(shape + half.cpu().numpy().astype("<f4").tobytes()).hexdigest()
