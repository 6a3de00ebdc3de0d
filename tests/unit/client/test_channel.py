from __future__ import annotations

import pytest
import torch

from fedsea.client.channel import format_of, wire_channel
from fedsea.errors import LocalProtocolError
from fedsea.privacy.gaussian import Gaussian
from fedsea.privacy.noise import NoiseSource
from fedsea.privacy.quantization import StochasticQuantization
from fedsea.wire.codecs import Codec, RowFormat

ROWS = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "mechanism", [Gaussian(1.0, 1.0), StochasticQuantization(3, 0.5, 2.0, 16)], ids=str
)
def test_the_channel_gives_what_the_mechanism_released(mechanism):
    """Bytes out and in again change nothing: fp32 and counts are exact."""
    rows = format_of(mechanism, 16)
    through = wire_channel(mechanism, rows, NoiseSource(b"seed"))(ROWS)

    assert torch.equal(through, mechanism.values(mechanism.protect(ROWS, NoiseSource(b"seed"))))


def test_counts_travel_as_counts():
    """A mechanism with levels has the codec counts, whatever codec floats have."""
    made = StochasticQuantization(3, 0.5, 2.0, 16)

    assert format_of(made, 16, Codec.BF16) == RowFormat(Codec.COUNTS, 16, 7, made.scale)
    assert format_of(Gaussian(1.0, 1.0), 16, Codec.BF16) == RowFormat(Codec.BF16, 16)


def test_rows_of_another_width_are_refused():
    """A format of another width is an error of the wire, before anything is scored."""
    channel = wire_channel(Gaussian(1.0, 1.0), RowFormat(Codec.FP32, 8), NoiseSource())
    with pytest.raises(LocalProtocolError):
        channel(ROWS)
