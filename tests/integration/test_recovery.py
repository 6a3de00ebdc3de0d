"""Server processes that die, stop or say goodbye in mid-answer: the tokens are the same."""

from __future__ import annotations

import signal
import threading
import time

import pytest

from fedsea.client.link import Patience
from fedsea.client.sessions import Session
from fedsea.errors import Unreachable

PROMPT = "The patient came in on Monday and"
LONG = {"max_new_tokens": 400, "ignore_eos": True}


def answer_with(llm, prompt, after, act, **options):
    """The tokens of an answer, with something done once so many pieces have come."""
    stream = llm.stream(prompt, **options)
    for count, _ in enumerate(stream, start=1):
        if count == after:
            act()
    return stream.result(60).token_ids


def test_kill_and_restart_in_mid_answer(start_server, clients):
    """kill -9 and a new process at the same port: same tokens, soon after it is ready."""
    first = start_server()
    llm = clients.connect(first.address)
    expected = llm.generate(PROMPT, **LONG).token_ids
    again = []
    ready = []

    def replace():
        first.kill()
        server = start_server("--address", first.address)
        again.append(server)

        def note_when_ready():
            assert server.address
            ready.append(time.monotonic())

        threading.Thread(target=note_when_ready).start()

    tokens = answer_with(llm, PROMPT, 50, replace, **LONG)
    assert tokens == expected
    assert time.monotonic() - ready[0] < 10
    assert len(clients.notices) == 2
    assert f"connection to {first.address} lost" in clients.notices[0]
    assert f"resumed at {first.address}" in clients.notices[1]
    # The same in the prompt: the first of its chunks has come back.
    prompt = [3 + number % 90 for number in range(1500)]
    expected = llm.generate(prompt, max_new_tokens=20).token_ids
    killed = threading.Event()

    def kill_once(done, total):
        if not killed.is_set():
            killed.set()
            again[0].kill()
            again.append(start_server("--address", first.address))

    stream = llm.stream(prompt, max_new_tokens=20, progress=kill_once)
    assert stream.result(90).token_ids == expected
    assert len(clients.notices) == 4


def test_failover_to_another_process(start_server, shared_server, clients):
    """The next address takes over at once, for answers, batches and open sessions alike."""
    one, two = start_server(), shared_server
    llm = clients.connect(one.address, two.address)
    expected = llm.generate(PROMPT, **LONG).token_ids
    batch = [PROMPT, "Short", "x" * 300]
    sampled = {"max_new_tokens": 100, "temperature": 0.8, "seed": 5, "n": 2, "ignore_eos": True}
    expected_batch = llm.submit(batch, **sampled).result(60)
    pending = []
    died = []

    def die():
        pending.append(llm.submit(batch, **sampled))
        one.kill()
        died.append(time.monotonic())

    with Session.open(llm, 1024) as session:
        first = session.generate(PROMPT, max_new_tokens=40, ignore_eos=True)
        assert answer_with(llm, PROMPT, 100, die, **LONG) == expected
        assert time.monotonic() - died[0] < 20
        rest = session.generate(max_new_tokens=40, ignore_eos=True)
        assert first.token_ids + rest.token_ids == expected[:80]
    got = pending[0].result(60)
    assert [one.samples for one in got] == [one.samples for one in expected_batch]
    assert any(f"resumed at {two.address}" in notice for notice in clients.notices)


def test_a_stopped_process_is_left_for_another(start_server, shared_server, clients):
    """A server that is alive and silent is given up after the patience for answers."""
    one, two = start_server(), shared_server
    patience = Patience(open=30, recover=30, answer=1.0)
    llm = clients.connect(one.address, two.address, patience=patience)
    expected = llm.generate(PROMPT, **LONG).token_ids
    stopped = []

    def stop():
        one.send(signal.SIGSTOP)
        stopped.append(time.monotonic())

    try:
        assert answer_with(llm, PROMPT, 100, stop, **LONG) == expected
    finally:
        one.send(signal.SIGCONT)
    assert time.monotonic() - stopped[0] < 15
    assert "deadline_exceeded" in clients.notices[0]
    assert f"resumed at {two.address}" in clients.notices[1]


def test_an_outage_and_a_session_that_goes_on(start_server, clients):
    """Without any server the error comes in time; with one again the session goes on exactly."""
    server = start_server()
    llm = clients.connect(server.address, patience=Patience(open=5, recover=2, answer=30))
    expected = llm.generate(PROMPT, **LONG).token_ids
    with Session.open(llm, 1024) as session:
        began = []

        def die():
            server.kill()
            began.append(time.monotonic())

        with pytest.raises(Unreachable, match="no server answered within 2 s"):
            answer_with(session, PROMPT, 60, die, **LONG)
        assert time.monotonic() - began[0] < 6
        done = session.position - len(PROMPT)
        assert done >= 60
        assert start_server("--address", server.address).address == server.address
        session.resume()
        session.generate(max_new_tokens=400 - done, ignore_eos=True)
        assert session.token_ids[len(PROMPT) :] == expected


def test_a_drain_under_load(start_server, shared_server, clients):
    """SIGTERM with answers under way: new sessions go elsewhere, no token changes, exit code 0."""
    one = start_server("--set", "server.drain_grace_s=2")
    llm = clients.connect(one.address, shared_server.address)
    opened = shared_server.metric("fedsea_sessions_opened_total")
    prompts = [f"{PROMPT} {number}" for number in range(5)]
    expected = [one.token_ids for one in llm.submit(prompts, **LONG).result(60)]
    streams = [llm.stream(prompt, **LONG) for prompt in prompts]
    for stream in streams:
        next(iter(stream))
    one.send(signal.SIGTERM)
    later = [llm.submit([prompt], **LONG) for prompt in prompts]
    assert [stream.result(60).token_ids for stream in streams] == expected
    assert [pending.result(60)[0].token_ids for pending in later] == expected
    assert one.process.wait(20) == 0
    assert any("is shutting down" in notice for notice in clients.notices)
    assert shared_server.metric("fedsea_sessions_opened_total") >= opened + 5
