"""Text of one sample while its tokens come, and what a completion says of itself."""

from __future__ import annotations

import asyncio

import pytest
import torch
from tests.conftest import character_tokenizer

from fedsea.client.generation import Completion, Request, Sample, TextWriter, Timing
from fedsea.client.local import BottomJob, TopJob, TopResult
from fedsea.client.sampling import FinishReason, SamplingParams
from fedsea.client.split_cache import CachedRow, NewColumns


@pytest.fixture(scope="module")
def tokenizer():
    """One token for each character."""
    return character_tokenizer()


def written(tokenizer, text, stop=(), wants_pieces=True):
    """The pieces and the whole text that a writer makes, and how many tokens it took."""
    pieces: list[str] = []

    async def work():
        writer = TextWriter(tokenizer, stop, pieces.append if wants_pieces else None)
        taken = []
        for token in tokenizer(text).input_ids:
            if writer.stopped:
                break
            writer.add(token)
            taken.append(token)
            await asyncio.sleep(0)
        return writer.finish(taken), len(taken)

    whole, count = asyncio.run(work())
    return pieces, whole, count


def test_text_without_readers_is_made_once_at_the_end(tokenizer):
    """Nobody reads pieces, so none are made."""
    pieces, whole, _ = written(tokenizer, "some words", wants_pieces=False)
    assert (pieces, whole) == ([], "some words")


def test_pieces_join_to_the_text(tokenizer):
    """Whatever the moment at which pieces are written, nothing is lost or repeated."""
    pieces, whole, _ = written(tokenizer, "some words to stream")
    assert "".join(pieces) == whole == "some words to stream"


def test_text_is_made_a_little_later(tokenizer):
    """Tokens go on their way first; their text follows within a moment."""

    async def work():
        pieces: list[str] = []
        arrived = asyncio.Event()

        def take(piece):
            pieces.append(piece)
            arrived.set()

        writer = TextWriter(tokenizer, (), take)
        for token in tokenizer("ab").input_ids:
            writer.add(token)
        assert not pieces
        await asyncio.wait_for(arrived.wait(), 5)
        return pieces

    assert asyncio.run(work()) == ["a", "b"]


def test_stop_strings_decide_at_once(tokenizer):
    """No token is taken after the stop string is complete, and its text never comes out."""
    pieces, whole, count = written(tokenizer, "one, two, three", stop=("two",))
    assert "".join(pieces) == whole == "one, "
    assert count == len("one, two")


def test_what_could_have_been_a_stop_string_is_given_out_at_the_end(tokenizer):
    """Text held back for a stop string that did not come is part of the answer."""
    pieces, whole, _ = written(tokenizer, "nearly sto", stop=("stop",))
    assert "".join(pieces) == whole == "nearly sto"


def test_a_request_knows_its_capacity():
    """Prompt and new tokens, of one sample."""
    assert Request((1, 2, 3), SamplingParams(max_new_tokens=7, n=4)).capacity == 10


def test_a_completion_speaks_for_its_first_sample():
    """Shortcuts are those of sample 0; speed counts all samples after their first token."""
    samples = (
        Sample("a", (5, 6, 7), FinishReason.LENGTH),
        Sample("b", (8, 9), FinishReason.EOS),
    )
    completion = Completion(samples, 4, Timing(first_token=1.0, total=3.0))
    assert completion.text == "a"
    assert completion.token_ids == (5, 6, 7)
    assert completion.finish_reason is FinishReason.LENGTH
    assert completion.tokens_per_second == pytest.approx(3 / 2)


def test_results_and_requests_show_no_text():
    """What asyncio, pytest or a crash report print of them holds neither text nor token ids."""
    sample = Sample("secret", (98765, 43210), FinishReason.EOS)
    shown = [
        repr(Completion((sample,), 4, Timing(1.0, 2.0))),
        repr(Request((98765, 43210), SamplingParams())),
        repr(BottomJob(0, 0, torch.tensor([98765, 43210]))),
        repr(TopJob(0, 0, 1, torch.full((1, 2), 98765.0), 1)),
        repr(TopResult(torch.full((1, 2), 98765.0), 43210)),
        repr(NewColumns(0, (98765, 43210), 0)),
        repr(CachedRow([98765, 43210])),
    ]
    assert not [text for text in shown if "secret" in text or "98765" in text or "43210" in text]


def test_a_completion_of_one_token_has_a_finite_speed():
    """No time passes after the only token."""
    completion = Completion((Sample("a", (5,), FinishReason.EOS),), 1, Timing(1.0, 1.0))
    assert completion.tokens_per_second == 0
