"""Reading the rows that come back."""

from __future__ import annotations

import pytest
import torch
from tests.tiny_models import NUM_BLOCKS
from tests.unit.redteam.conftest import chain_of
from transformers import AutoModelForCausalLM

from fedsea.errors import ConfigError
from fedsea.model.partition import Partition
from fedsea.redteam.attack import UNKNOWN
from fedsea.redteam.knowledge import Knowledge
from fedsea.redteam.reading import TopReading
from fedsea.redteam.view import Chain


@pytest.mark.parametrize("top", [0, 2])
def test_a_public_top_reads_what_the_client_decodes(
    tiny_model, knowledge_of, hidden_states, secret, top
):
    """The first choices are those of the whole model."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation="eager")
    seen: list[torch.Tensor] = []
    last = model.model.layers[NUM_BLOCKS - top - 1]
    last.register_forward_hook(lambda _, __, rows: seen.append(rows))
    with torch.no_grad():
        expected = model(secret[None]).logits[0].argmax(dim=-1)
    returned = dict(enumerate(seen[0].reshape(len(secret), -1)))
    sent = chain_of(hidden_states[0])
    guess = TopReading().read(
        Chain(sent.format, sent.releases, returned), knowledge_of(0, top), None
    )

    assert guess.ids == tuple(expected.tolist())


def test_rows_that_did_not_come_back_are_not_guessed(knowledge_of, hidden_states):
    """Where the client asked for one row, one is read; blocks need those before it."""
    sent = chain_of(hidden_states[0])
    chain = Chain(sent.format, sent.releases, {3: hidden_states[0][3]})
    read = TopReading().read(chain, knowledge_of(0), None).ids

    assert [place for place, token in enumerate(read) if token != UNKNOWN] == [3]
    assert set(TopReading().read(chain, knowledge_of(0, 1), None).ids) == {UNKNOWN}


def test_without_a_checkpoint_nothing_can_be_read(hidden_states):
    """A black box has no top of its own."""
    box = Knowledge.black_box(lambda ids: ids[:, None].float(), 96, Partition(0, 0))
    with pytest.raises(ConfigError):
        TopReading().read(chain_of(hidden_states[0]), box, None)
