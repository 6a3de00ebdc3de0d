"""From clean rows to the numbers that a server decodes: mechanism and wire format together."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from fedsea.privacy.mechanism import Mechanism
from fedsea.privacy.noise import NoiseSource
from fedsea.wire.codecs import Codec, RowFormat


def format_of(mechanism: Mechanism, width: int, codec: Codec = Codec.FP32) -> RowFormat:
    """How releases travel: counts as counts, floats in `codec`."""
    if mechanism.levels:
        return RowFormat(Codec.COUNTS, width, mechanism.levels, mechanism.scale)
    return RowFormat(codec, width)


def wire_channel(
    mechanism: Mechanism, rows: RowFormat, noise: NoiseSource
) -> Callable[[Tensor], Tensor]:
    """Protect, write as bytes, read the bytes as the server does: [n, width] to [n, width]."""

    def through(clean: Tensor) -> Tensor:
        return rows.decode(rows.encode(mechanism.protect(clean, noise)), len(clean))

    return through
