"""`LLM` over a real server in this process: answers equal the unsplit model's, whatever happens."""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor

import pytest
import torch
from tests.conftest import memory_config
from tests.tiny_models import save_tiny

from fedsea.client.link import Patience
from fedsea.client.llm import LLM, check_unicode
from fedsea.client.sampling import FinishReason, SamplingParams, derive_seed
from fedsea.errors import (
    Capacity,
    CheckpointError,
    ConfigError,
    FingerprintMismatch,
    PartitionError,
    PromptTooLong,
    RequestError,
    Unreachable,
)
from fedsea.server.service import TrunkService
from fedsea.transport.credentials import Plaintext
from fedsea.transport.memory import MemoryChannel
from fedsea.transport.recording import Direction
from fedsea.wire.messages import Append, Open

PROMPT = "What did the doctor find?"
PROMPTS = (PROMPT, "No", "A longer one, so that lengths differ by a lot: 12345")
SAMPLED = {"temperature": 0.9, "top_p": 0.95, "seed": 7, "ignore_eos": True}
UP, DOWN = Direction.UP, Direction.DOWN
# Answers from the server in `test_a_cut_at_every_answer` without faults.
ANSWERS = 18


def ids_of(split, text):
    """Token ids of a text."""
    return split.llm.encode(text)


@pytest.mark.parametrize("partition", [(0, 0), (1, 0), (0, 1), (1, 1), (2, 2), (4, 0)])
def test_greedy_equals_the_unsplit_model(make_split, greedy, partition):
    """Wherever the model is cut, the tokens are those of `transformers`."""
    split = make_split(partition=partition)
    completion = split.llm.generate(PROMPT, max_new_tokens=40)
    assert list(completion.token_ids) == greedy(ids_of(split, PROMPT), 40)
    assert completion.prompt_tokens == len(PROMPT)
    assert 0 < completion.timing.first_token <= completion.timing.total


def test_a_long_prompt_goes_in_chunks(split, greedy, wire):
    """A prompt of several messages gives the tokens of one; progress is told after every chunk."""
    ids = [3 + number * 7 % 90 for number in range(700)]
    steps = []
    stream = split.llm.stream(ids, max_new_tokens=8, progress=lambda *step: steps.append(step))
    assert list(stream.result().token_ids) == greedy(ids, 8)
    assert steps == [(256, 700), (512, 700), (700, 700)]
    assert [append.count for append in wire.of(Append)][:3] == [256, 256, 188]


def test_a_batch_of_unequal_prompts_equals_single_runs(split, greedy):
    """Prompts of different lengths share a session and answer as if alone."""
    completions = split.llm.submit(PROMPTS, max_new_tokens=24).result()
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        assert list(completion.token_ids) == greedy(ids_of(split, prompt), 24)


def test_samples_follow_the_rule_of_seeds(split):
    """Sample i of n is the single run with the i-th derived seed."""
    whole = split.llm.generate(PROMPT, max_new_tokens=20, n=4, **SAMPLED)
    assert len({sample.token_ids for sample in whole.samples}) == 4
    for index, sample in enumerate(whole.samples):
        options = {**SAMPLED, "seed": derive_seed(7, index)}
        assert split.llm.generate(PROMPT, max_new_tokens=20, **options).samples == (sample,)


def test_samples_share_the_rows_of_the_prompt(split, wire):
    """The prompt crosses the wire once, however many samples there are."""
    split.llm.generate("x" * 100, max_new_tokens=2, n=5, **SAMPLED)
    assert sum(append.count for append in wire.of(Append)) == 100 + 5


def test_a_batch_of_samples(split):
    """Several prompts with several samples each equal the single runs."""
    both = split.llm.submit(PROMPTS[:2], max_new_tokens=10, n=2, **SAMPLED).result()
    for prompt, completion in zip(PROMPTS, both, strict=False):
        alone = split.llm.generate(prompt, max_new_tokens=10, n=2, **SAMPLED)
        assert completion.samples == alone.samples


def test_a_stop_string_ends_the_text(split):
    """The text ends before the stop string, however tokens are cut, and says why."""
    whole = split.llm.generate(PROMPT, max_new_tokens=40, ignore_eos=True)
    stop = whole.text[11:14]
    cut = split.llm.generate(PROMPT, max_new_tokens=40, ignore_eos=True, stop=stop)
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish_reason is FinishReason.STOP_STRING
    assert whole.token_ids[: len(cut.token_ids)] == cut.token_ids
    stream = split.llm.stream(PROMPT, max_new_tokens=40, ignore_eos=True, stop=[stop])
    assert "".join(stream) == cut.text


def test_the_answer_ends_at_the_end_of_text(make_split, tiny_model, greedy):
    """An end-of-text token ends the answer and is not part of its text."""
    split = make_split()
    ids = greedy(ids_of(split, PROMPT), 12)
    split.llm._eos_ids = frozenset([ids[5]])
    completion = split.llm.generate(PROMPT, max_new_tokens=12)
    assert completion.finish_reason is FinishReason.EOS
    assert list(completion.token_ids) == ids[: ids.index(ids[5]) + 1]


def test_a_stream_gives_the_text_in_pieces(split):
    """Joined, the pieces of `for` and of `async for` are the text of the summary."""
    whole = split.llm.generate(PROMPT, max_new_tokens=30)
    stream = split.llm.stream(PROMPT, max_new_tokens=30)
    pieces = list(stream)
    assert len(pieces) > 3
    assert "".join(pieces) == stream.result().text == whole.text

    async def read():
        stream = split.llm.stream(PROMPT, max_new_tokens=30)
        return [piece async for piece in stream]

    assert "".join(asyncio.run(read())) == whole.text


def test_answers_can_be_awaited(split):
    """What `submit` returns serves asyncio without a second class."""

    async def both():
        return await asyncio.gather(
            split.llm.submit([PROMPT], max_new_tokens=8),
            split.llm.submit([PROMPTS[1]], max_new_tokens=8),
        )

    first, second = asyncio.run(both())
    assert first[0].token_ids == split.llm.generate(PROMPT, max_new_tokens=8).token_ids
    assert second[0].token_ids == split.llm.generate(PROMPTS[1], max_new_tokens=8).token_ids


def test_threads_share_one_client(split, greedy):
    """Requests of several threads at once answer as each alone."""
    prompts = [f"Question {number}: {'why ' * number}" for number in range(6)]

    def ask(prompt):
        return list(split.llm.generate(prompt, max_new_tokens=16).token_ids)

    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(ask, prompts))
    assert answers == [greedy(ids_of(split, prompt), 16) for prompt in prompts]


@pytest.mark.parametrize("codec", ["bf16", "fp16", "int8"])
def test_smaller_rows_still_answer(make_split, wire, codec):
    """Every codec runs and takes the bytes that it should."""
    split = make_split(codec=codec)
    split.llm.generate(PROMPT, max_new_tokens=5, ignore_eos=True)
    row_bytes = {"bf16": 96, "fp16": 96, "int8": 50}[codec]
    assert {len(append.rows) // append.count for append in wire.of(Append)} == {row_bytes}


def test_a_chat_template_makes_the_prompt(split):
    """A conversation becomes token ids in the template of the model."""
    ids = split.llm.encode_chat([{"role": "user", "content": "Hi"}])
    assert split.llm.tokenizer.decode(ids) == "u:Hi;a:"


# Faults


@pytest.mark.parametrize("number", range(1, ANSWERS + 1))
def test_a_cut_at_every_answer(split, wire, number):
    """Two prompts of two samples: whichever answer is lost, all tokens are the same."""
    options = {"max_new_tokens": 14, "n": 2, **SAMPLED}
    prompts = [PROMPTS[0], "z" * 300]
    expected = split.llm.submit(prompts, **options).result()
    assert wire.counts[DOWN] <= ANSWERS + 14
    bottom = split.count_bottom()
    split.llm.submit(prompts, **options).result()
    tokens = sum(bottom)
    bottom.clear()
    wire.cut_at = DOWN, wire.counts[DOWN] + number
    again = split.llm.submit(prompts, **options).result()
    assert [one.samples for one in again] == [one.samples for one in expected]
    # A replay sends kept releases: the bottom computes every token once.
    assert sum(bottom) == tokens
    assert wire.connections == 4
    if number > 1:
        assert "lost (connection_lost); resuming" in split.notices[0]
        assert "rows sent again" in split.notices[1]


def test_an_outage_that_is_too_long(make_split, wire):
    """When nobody answers any more the call ends in time, with all addresses in the error."""
    split = make_split(patience=Patience(open=0.3, recover=0.3))
    wire.hold_at = DOWN, 5
    pending = split.llm.submit([PROMPT, "z" * 900], max_new_tokens=10)
    assert wire.holding.wait(10)
    wire.down = True
    wire.cut_at = wire.hold_at
    began = time.monotonic()
    split.llm.background.run(_release(wire))
    with pytest.raises(Unreachable, match=r"no server answered within 0.3 s \(memory\)"):
        pending.result(5)
    assert time.monotonic() - began < 2
    with pytest.raises(Unreachable):
        split.llm.generate(PROMPT)
    wire.down = False
    assert split.llm.generate(PROMPT, max_new_tokens=2).token_ids


async def _release(wire):
    wire.release.set()


def test_a_failed_request_leaves_no_complaints_of_the_loop(make_split, wire, caplog):
    """Chunks that nobody will read any more are not reported as forgotten errors."""
    split = make_split(patience=Patience(open=0.2, recover=0.2))
    wire.cut_at = DOWN, 2

    def fail():
        wire.down = True

    split.llm.background.run(_hold_down(wire, fail))
    with caplog.at_level(logging.ERROR, "asyncio"), pytest.raises(Unreachable):
        split.llm.generate([5] * 1200, max_new_tokens=4)
    gc.collect()
    assert not [record for record in caplog.records if record.name == "asyncio"]


async def _hold_down(wire, then):
    """Once the session is open, let nobody answer a second time."""
    channel_note = wire.note

    def note(*message):
        number = channel_note(*message)
        if number == 2:
            then()
        return number

    wire.note = note


# Cancelling and closing


@pytest.mark.parametrize("number", [1, 2, 3, 6])
def test_a_cancelled_stream_frees_both_sides(split, wire, number):
    """Wherever the answer is when it is cancelled, nothing stays reserved and later ones work."""
    wire.hold_at = DOWN, number
    stream = split.llm.stream([7] * 600, max_new_tokens=50, ignore_eos=True)
    assert wire.holding.wait(10)
    assert not split.settled()
    stream.cancel()
    split.wait_until(split.settled)
    pieces = "".join(stream)
    assert len(pieces) < 50
    with pytest.raises(CancelledError):
        stream.result(5)
    wire.hold_at = None
    assert split.llm.generate(PROMPT, max_new_tokens=3).token_ids


def test_a_stream_cancelled_at_once_ends(split):
    """Cancelling before anything has begun leaves no reader waiting."""
    for _ in range(20):
        stream = split.llm.stream(PROMPT, max_new_tokens=50, ignore_eos=True)
        stream.cancel()
        assert len("".join(stream)) < 50
        with pytest.raises(CancelledError):
            stream.result(5)
    split.wait_until(split.settled)


def test_cancelling_a_finished_stream_changes_nothing(split):
    """The answer stays the answer."""
    stream = split.llm.stream(PROMPT, max_new_tokens=4)
    text = stream.result().text
    stream.cancel()
    assert "".join(stream) == text
    assert stream.result().text == text


def test_pending_answers_can_be_cancelled(split, wire):
    """A batch that nobody wants any more is freed as well."""
    wire.hold_at = DOWN, 4
    pending = split.llm.submit(PROMPTS, max_new_tokens=50, n=2, **SAMPLED)
    assert wire.holding.wait(10)
    pending.cancel()
    with pytest.raises(CancelledError):
        pending.result(5)
    split.wait_until(split.settled)


def test_closing_while_an_answer_is_under_way(split, wire):
    """Who reads on gets an error that says so; nothing hangs, and the server is free."""
    wire.hold_at = DOWN, 5
    stream = split.llm.stream(PROMPT, max_new_tokens=500, ignore_eos=True)
    assert wire.holding.wait(10)
    began = time.monotonic()
    split.llm.close()
    assert time.monotonic() - began < 5
    with pytest.raises(RequestError, match="closed before the answer was complete"):
        list(stream)
    with pytest.raises(RequestError, match="closed before"):
        stream.result(1)
    assert split.settled()
    assert not split.notices


def test_a_closed_client_says_so(split):
    """Every call after `close` is refused by name; a second close is harmless."""
    split.llm.close()
    split.llm.close()
    for call in (
        lambda: split.llm.generate(PROMPT),
        lambda: split.llm.submit([PROMPT]),
        lambda: split.llm.stream(PROMPT),
    ):
        with pytest.raises(RequestError, match="this client is closed"):
            call()


def test_the_client_is_a_context(tiny_model, make_split):
    """Leaving the block closes the client."""
    split = make_split()
    with split.llm as llm:
        assert llm.generate(PROMPT, max_new_tokens=1).token_ids
    with pytest.raises(RequestError):
        llm.generate(PROMPT)


# Bad input


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_new_token": 5}, "did you mean 'max_new_tokens'"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"params": SamplingParams(), "seed": 1}, "not both"),
    ],
)
def test_unknown_and_impossible_options(split, options, words):
    """The option is named, with what is allowed."""
    with pytest.raises(ConfigError, match=words):
        split.llm.generate(PROMPT, **options)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("", "prompt is empty"),
        ([], "prompt is empty"),
        ([3, 96], "vocabulary of 96"),
        ([-1], "vocabulary of 96"),
    ],
)
def test_prompts_that_are_none(split, prompt, words):
    """An empty prompt and ids that the model does not have are refused before anything is sent."""
    with pytest.raises(RequestError, match=words):
        split.llm.generate(prompt)


def test_no_prompt_at_all(split):
    """An empty batch is a mistake of the caller."""
    with pytest.raises(RequestError, match="there is no prompt"):
        split.llm.submit([])


def test_a_stream_has_one_sample(split):
    """Several samples have no order to stream in."""
    with pytest.raises(RequestError, match="use submit"):
        split.llm.stream(PROMPT, n=2)


def test_a_prompt_longer_than_the_context(make_split):
    """Prompt and new tokens over the context are refused with both numbers, by either side's."""
    split = make_split({"kv": {"max_context": 64}})
    with pytest.raises(PromptTooLong, match="need 65 positions and the context is 64"):
        split.llm.generate("x" * 60, max_new_tokens=5)
    assert split.llm.generate("x" * 60, max_new_tokens=4).token_ids


def test_more_requests_than_local_memory(make_split):
    """The client's own KV memory has an end, and says so."""
    split = make_split(kv_rows=64)
    with pytest.raises(Capacity):
        split.llm.generate("x" * 60, max_new_tokens=5)
    assert split.llm.generate("x" * 50, max_new_tokens=4).token_ids


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "fp8"}, "use auto, fp32, bf16, fp16"),
        ({"device": "abacus"}, "use cpu, cuda or mps"),
        ({"codec": "zip"}, "use auto, fp32"),
        ({"quantization": "int3"}, "use none, int8, nf4"),
    ],
)
def test_settings_that_do_not_exist(tiny_model, options, words):
    """A wrong setting is refused before anything is loaded or connected."""
    with pytest.raises(ConfigError, match=words):
        LLM.connect(tiny_model, {"memory": _never}, **options)


def _never():
    raise AssertionError("nobody should connect")


@pytest.mark.parametrize("partition", [(3, 2), (5, 0), (0, 9)])
def test_a_partition_without_a_trunk(tiny_model, partition):
    """The number of blocks is named."""
    with pytest.raises(PartitionError, match="leave no trunk in a model of 5 blocks"):
        LLM.connect(tiny_model, {"memory": _never}, partition=partition)


def test_a_partition_that_the_server_does_not_serve(tiny_model):
    """The error names both spans."""
    service = TrunkService.load(memory_config(tiny_model, server={"span": "1:4"}))
    with pytest.raises(PartitionError, match=r"serves blocks 1:4 and this partition needs 0:4"):
        LLM.connect(tiny_model, {"memory": lambda: MemoryChannel(service)}, partition=(0, 1))


def test_a_server_of_another_model(tiny_model, other_model):
    """Another checkpoint of the same shape is refused at once, by name."""
    service = TrunkService.load(memory_config(other_model))
    with pytest.raises(FingerprintMismatch, match="use the same checkpoint"):
        LLM.connect(tiny_model, {"memory": lambda: MemoryChannel(service)})


def test_servers_without_a_certificate(tiny_model):
    """There is no connection without TLS unless it is asked for."""
    with pytest.raises(ConfigError, match="fedsea certs client"):
        LLM.connect(tiny_model, "127.0.0.1:1")
    with pytest.raises(ConfigError, match="give HOST:PORT"):
        LLM.connect(tiny_model, [], tls=Plaintext(allow_insecure=True))
    with pytest.raises(ConfigError, match="give HOST:PORT"):
        LLM.connect(tiny_model, {})


def test_a_checkpoint_without_a_tokenizer(tmp_path):
    """The missing file is named before a server is asked."""
    folder = save_tiny("llama", tmp_path)
    with pytest.raises(CheckpointError, match=r"add tokenizer.json"):
        LLM.connect(folder, {"memory": _never})


def test_a_model_without_a_chat_template(split):
    """Chat is refused with what to use instead."""
    split.llm.tokenizer.chat_template = None
    with pytest.raises(RequestError, match="use generate with plain prompts"):
        split.llm.encode_chat([{"role": "user", "content": "Hi"}])


def test_the_session_reserves_what_it_needs(split, wire):
    """KV rows are reserved in whole pages of the server, for each sample."""
    split.llm.submit(["x" * 9, "y"], max_new_tokens=4, n=2, **SAMPLED).result()
    assert wire.of(Open)[0].reserve_rows == 2 * 16 + 2 * 8


def test_default_threads_are_left_alone(split):
    """A client changes nothing of torch that its caller has set."""
    threads = torch.get_num_threads()
    split.llm.generate(PROMPT, max_new_tokens=2)
    assert torch.get_num_threads() == threads


def test_text_of_another_encoding_is_refused():
    """Bytes of Latin-1 that were read as UTF-8 leave lone surrogates, which no tokenizer takes."""
    with pytest.raises(RequestError, match="not valid UTF-8"):
        check_unicode(b"caf\xe9".decode("utf-8", "surrogateescape"))


def test_any_other_text_is_taken():
    """Letters, signs outside of the basic plane and nothing at all are text."""
    check_unicode("caf\xe9 \U0001f600")
    check_unicode("")
