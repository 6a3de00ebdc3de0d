"""What attacks have in common."""

from __future__ import annotations

import pytest
import torch
from tests.unit.redteam.conftest import recorded

from fedsea.errors import ConfigError
from fedsea.privacy.gaussian import FedSEAGaussian
from fedsea.redteam.attack import likelihood
from fedsea.redteam.prefix import PrefixSearch
from fedsea.redteam.view import ServerView
from fedsea.wire.codecs import Codec, encode
from fedsea.wire.messages import Append, Begin, Open, Segment


def test_likelihoods_of_releases_multiply():
    """Several releases of a token add their log-likelihoods."""
    mechanism = FedSEAGaussian(0.5)
    releases, clean = torch.randn(3, 4), torch.randn(5, 4)
    single = [likelihood(mechanism, one[None], clean) for one in releases]

    torch.testing.assert_close(likelihood(mechanism, releases, clean), torch.stack(single).sum(0))


def test_without_a_mechanism_the_nearest_row_is_the_likeliest():
    """What the codec rounds is the only noise, also for a row of zeros."""
    clean = torch.eye(4)
    assert likelihood(None, clean[2:3] * 1.001, clean).argmax() == 2
    assert bool(torch.isfinite(likelihood(None, torch.zeros(1, 4), clean)).all())


def test_widths_must_fit():
    """Released rows of another width than the candidates hint at a missing projection."""
    with pytest.raises(ConfigError, match="projection"):
        likelihood(None, torch.ones(1, 2), torch.ones(5, 4))


def test_an_attack_reads_all_texts_of_a_recording(knowledge_of, hidden_states, secret):
    """From bytes to ids: one guess for each sequence of the recording."""
    rows = hidden_states[1]
    half = len(secret) // 2
    first = Append(0, (Segment(0, 0, len(rows)),), encode(rows, Codec.FP32))
    second = Append(1, (Segment(1, 0, half),), encode(rows[:half] * 1.0001, Codec.FP32))
    opened = Open("f00d", 1, 5, Codec.FP32, Codec.FP32)
    view = ServerView(recorded(opened, Begin(0, 99), Begin(1, 99), first, second), rows.shape[1])
    guess = PrefixSearch().run(view, knowledge_of(1), None)

    assert [text.ids for text in guess.texts] == [
        tuple(secret.tolist()),
        tuple(secret[:half].tolist()),
    ]
    assert guess.positions == len(secret) + half
    assert guess.seconds > 0
