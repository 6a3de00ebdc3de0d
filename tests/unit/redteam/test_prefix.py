"""R1 and R2 on tiny random models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.unit.redteam.conftest import chain_of
from transformers import AutoTokenizer

from fedsea.errors import ConfigError
from fedsea.model.checkpoint import Checkpoint
from fedsea.model.partition import Partition
from fedsea.privacy.gaussian import FedSEAGaussian, Gaussian
from fedsea.privacy.noise import NoiseSource
from fedsea.privacy.quantization import StochasticQuantization
from fedsea.redteam.knowledge import Knowledge, Level
from fedsea.redteam.prefix import PrefixSearch, PriorSearch
from fedsea.wire.codecs import Codec, decode, encode

ASSETS = Path(__file__).resolve().parents[4] / "shared" / "assets"


def hits(ids, secret) -> int:
    """Tokens that were named."""
    return sum(a == b for a, b in zip(ids, secret.tolist(), strict=True))


@pytest.mark.parametrize("bottom", [0, 1, 2, 3])
@pytest.mark.parametrize("codec", [Codec.FP32, Codec.BF16, Codec.INT8])
def test_a_clean_channel_is_read_completely(knowledge_of, hidden_states, secret, bottom, codec):
    """Without a mechanism every token is found, whatever the codec rounds away."""
    rows = hidden_states[bottom]
    sent = decode(encode(rows, codec), codec, *rows.shape)
    guess = PrefixSearch().read(chain_of(sent), knowledge_of(bottom), None)

    assert guess.ids == tuple(secret.tolist())


def test_weak_noise_does_not_help(knowledge_of, hidden_states, secret):
    """Noise of a tenth of the rows' size leaves everything readable."""
    rows = hidden_states[1]
    mechanism = FedSEAGaussian(0.1 * float(rows.std()))
    sent = mechanism.protect(rows, NoiseSource(seed=b"weak"))
    guess = PrefixSearch().read(chain_of(sent), knowledge_of(1), mechanism)

    assert guess.ids == tuple(secret.tolist())
    assert guess.scores is not None
    assert len(guess.scores) == len(secret)


def test_counts_are_read_by_their_own_law(knowledge_of, hidden_states, secret):
    """Counts of four bits with a little noise give every token away."""
    rows = hidden_states[0]
    mechanism = StochasticQuantization(bits=4, clip=2.0, mu=400.0, width=rows.shape[1])
    sent = mechanism.protect(rows, NoiseSource(seed=b"counts"))
    guess = PrefixSearch().read(chain_of(sent), knowledge_of(0), mechanism)

    assert guess.ids == tuple(secret.tolist())


def test_repeated_releases_average_noise_away(knowledge_of, hidden_states, secret):
    """What one release hides, sixty-four releases of the same rows do not."""
    rows = hidden_states[0]
    mechanism = Gaussian(clip_norm=float(rows.norm(dim=1).max()), mu=2.0)
    noise = NoiseSource(seed=b"again")
    sent = [mechanism.protect(rows, noise) for _ in range(64)]
    knowledge = knowledge_of(0)
    once = PrefixSearch().read(chain_of(sent[0]), knowledge, mechanism)
    often = PrefixSearch().read(chain_of(*sent), knowledge, mechanism)

    assert hits(once.ids, secret) < len(secret) / 2
    assert hits(often.ids, secret) == len(secret)


def test_strong_noise_leaves_the_prior(knowledge_of, hidden_states):
    """Where the release says nothing, R2 says what the language model expects."""
    rows = hidden_states[0]
    mechanism = FedSEAGaussian(1e4)
    sent = mechanism.protect(rows, NoiseSource(seed=b"strong"))
    knowledge = knowledge_of(0)
    found = PriorSearch(beams=1).read(chain_of(sent), knowledge, mechanism).ids
    model = knowledge.language_model
    state = model.begin((1,))
    greedy = [1]
    for _ in range(len(found) - 1):
        greedy.append(int(state.log_probabilities.argmax()))
        state = model.extend(state, greedy[-1])

    assert found == tuple(greedy)


def test_prior_search_without_weight_and_beam_is_prefix_search(knowledge_of, hidden_states):
    """R1 is R2 with no weight on the prior and one beam."""
    mechanism = FedSEAGaussian(0.8 * float(hidden_states[1].std()))
    sent = chain_of(mechanism.protect(hidden_states[1], NoiseSource(seed=b"middle")))
    knowledge = knowledge_of(1)
    plain = PrefixSearch().read(sent, knowledge, mechanism)

    assert PriorSearch(weight=0.0, beams=1).read(sent, knowledge, mechanism).ids == plain.ids


def test_bad_searches_are_refused(knowledge_of, hidden_states):
    """No beam, a missing projection, and a black box are each said to be the trouble."""
    with pytest.raises(ConfigError):
        PriorSearch(beams=0)
    with pytest.raises(ConfigError, match="projection"):
        PrefixSearch().read(chain_of(hidden_states[0][:, :7]), knowledge_of(0), None)
    box = Knowledge.black_box(lambda ids: ids[:, None].float(), 96, Partition(0, 0))
    with pytest.raises(ConfigError, match="black box"):
        PrefixSearch().read(chain_of(hidden_states[0]), box, None)
    with pytest.raises(ConfigError):
        knowledge_of(0, level=Level.BLACK_BOX)


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "bottom"),
    [("stories260K", k) for k in (0, 1, 2, 3)] + [("tinystories656K", k) for k in (0, 1)],
)
def test_pretrained_models_are_read_completely(name, bottom):
    """At least 99 % of TinyStories validation text is read off a clean channel."""
    folder = ASSETS / "models" / name
    story = ASSETS / "data" / "tinystories" / "valid_cased.txt"
    if not folder.is_dir() or not story.is_file():
        pytest.skip("the shared assets are not here")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor(tokenizer(story.read_text(encoding="utf-8")[:1200])["input_ids"][:128])
    knowledge = Knowledge.of_weights(Checkpoint.open(folder), Partition(bottom, 0))
    rows = knowledge.query(ids)
    sent = decode(encode(rows, Codec.BF16), Codec.BF16, *rows.shape)
    guess = PrefixSearch().read(chain_of(sent), knowledge, None)

    assert hits(guess.ids, ids) >= 0.99 * len(ids)
