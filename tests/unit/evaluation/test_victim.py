"""The victim: the client's own path over a wire that is observed."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from fedsea.errors import PartitionError
from fedsea.evaluation.victim import Victim, load_trunk
from fedsea.model.partition import Partition
from fedsea.model.projection import Projection
from fedsea.redteam.view import ServerView
from fedsea.transport.recording import Direction
from fedsea.wire.framing import decode_event
from fedsea.wire.limits import DEFAULT_LIMITS
from fedsea.wire.messages import Append, Open, Role

IDS = tuple(range(5, 45))


@pytest.fixture(scope="module")
def trunk(tiny_model):
    """One trunk for all victims."""
    return load_trunk(tiny_model)


def test_logits_are_those_of_the_whole_model(tiny_model, trunk):
    """A plain victim computes what transformers computes, at every position."""
    whole = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    with torch.no_grad():
        expected = whole(torch.tensor([IDS])).logits[0]
    with Victim(tiny_model, Partition(1, 1), trunk) as victim:
        assert torch.allclose(victim.read(IDS).logits, expected, atol=1e-4)


def test_the_observer_sees_every_row_of_one_text(tiny_model, trunk):
    """The messages of a text are its own, and carry one row for every token."""
    with Victim(tiny_model, Partition(0, 1), trunk) as victim:
        victim.read(IDS[:7])
        messages = victim.read(IDS).messages
    sent = [
        decode_event(message.data, Role.CLIENT, DEFAULT_LIMITS)
        for message in messages
        if message.direction is Direction.UP
    ]
    appended = [event for event in sent if isinstance(event, Append)]
    assert sum(segment.count for event in appended for segment in event.segments) == len(IDS)


def test_answers_are_greedy_and_repeatable(tiny_model, trunk):
    """The same prompt has the same answer, also from another victim of the same trunk."""
    answers = []
    for _ in range(2):
        with Victim(tiny_model, Partition(1, 0), trunk) as victim:
            answers.append(victim.answer(IDS[:9], 6))
    assert answers[0] == answers[1]
    assert len(answers[0]) <= 6


def test_a_partition_that_does_not_fit_is_refused(tiny_model, trunk):
    """A cut without a trunk ends in the library's own error."""
    with pytest.raises(PartitionError):
        Victim(tiny_model, Partition(9, 9), trunk)


def test_a_projection_that_loses_nothing_changes_nothing(tiny_model, narrowing):
    """Turned rows that the server turns back are the model's own, and the wire names the pair."""
    pair = narrowing(48)
    with Victim(tiny_model, Partition(1, 1)) as plain:
        expected = plain.read(IDS).logits
    with Victim(tiny_model, Partition(1, 1), projection=pair) as victim:
        seen = victim.read(IDS)
    assert torch.allclose(seen.logits, expected, atol=1e-4)
    opened = decode_event(seen.messages[0].data, Role.CLIENT, DEFAULT_LIMITS)
    assert isinstance(opened, Open)
    assert opened.projection == Projection.load(pair).fingerprint()


def test_a_projection_alone_narrows_what_is_sent(tiny_model, narrowing):
    """Without a mechanism the rows on the wire are the encoder's own output."""
    pair = narrowing(8)
    with Victim(tiny_model, Partition(1, 1)) as plain:
        (chain,) = ServerView(plain.read(IDS).messages, 48).chains()
    with Victim(tiny_model, Partition(1, 1), projection=pair) as victim:
        (narrow,) = ServerView(victim.read(IDS).messages, 48).chains()
    assert torch.allclose(narrow.means(), Projection.load(pair).encode(chain.means()), atol=1e-5)
