"""Many at once over TLS: every answer is that of a solo run, and nothing stays reserved."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from fedsea.client.link import Patience
from fedsea.client.sessions import Session
from fedsea.errors import Capacity

ROWS = 4096
PROMPTS = [f"Note {number}: {'fever ' * number}" for number in range(10)]


def settled(server, seconds=10.0):
    """Wait until the server holds no session and no KV row, by its own numbers."""
    ends = time.monotonic() + seconds
    while server.metric("fedsea_sessions ") or server.metric("fedsea_kv_rows_unreserved") != ROWS:
        if time.monotonic() > ends:
            return False
        time.sleep(0.05)
    return True


def test_threads_of_one_client(shared_server, clients):
    """Eight threads on one client get what each would get alone."""
    llm = clients.connect(shared_server.address)
    options = {"max_new_tokens": 40, "ignore_eos": True}
    solo = [llm.generate(prompt, **options).token_ids for prompt in PROMPTS]

    def ask(prompt):
        return llm.generate(prompt, **options).token_ids

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, PROMPTS)) == solo
    assert settled(shared_server)


def test_sampled_streams_of_several_clients(shared_server, clients):
    """Clients of two tenants stream at once; seeds give the texts of solo runs."""
    llms = [clients.connect(shared_server.address) for _ in range(2)]
    llms.append(clients.connect(shared_server.address, tenant="globex"))
    options = {"max_new_tokens": 40, "temperature": 0.9, "top_k": 20, "ignore_eos": True}
    jobs = [(llm, prompt) for llm in llms for prompt in PROMPTS[:3]]
    solo = [llm.generate(prompt, seed=4, **options).text for llm, prompt in jobs]

    def read(job):
        llm, prompt = job
        return "".join(llm.stream(prompt, seed=4, **options))

    with ThreadPoolExecutor(len(jobs)) as pool:
        assert list(pool.map(read, jobs)) == solo
    assert settled(shared_server)


@pytest.mark.slow
def test_200_sessions_on_a_small_pool(shared_server, clients):
    """Most find no place at first; all of them get their tokens, in bounded time, and none leaks."""
    llm = clients.connect(shared_server.address)
    options = {"max_new_tokens": 12, "ignore_eos": True}
    solo = [llm.generate(prompt, **options).token_ids for prompt in PROMPTS]
    began = time.monotonic()
    pending = [
        (number % 10, llm.submit([PROMPTS[number % 10]], **options)) for number in range(200)
    ]
    for number, answer in pending:
        assert answer.result(60)[0].token_ids == solo[number]
    assert time.monotonic() - began < 60
    assert shared_server.metric('fedsea_ended_total{code="capacity"}') > 0
    assert settled(shared_server)
    for pool in llm.split.parts.pools:
        pool.check_integrity()
        assert pool.num_accounts == 0


def test_two_clients_queue_for_one_place(shared_server, clients):
    """Who finds the pool full waits and goes on when the other has left."""
    first, second = (clients.connect(shared_server.address) for _ in range(2))
    impatient = clients.connect(shared_server.address, patience=Patience(open=0.3))
    with Session.open(first, 2048), Session.open(first, 2040) as holder:
        waiting = second.submit(["x" * 30], max_new_tokens=10, ignore_eos=True)
        with pytest.raises(Capacity, match="retry later"):
            impatient.generate("x" * 30, max_new_tokens=10)
        assert not waiting.done()
        holder.close()
        assert len(waiting.result(20)[0].token_ids) == 10
    assert settled(shared_server)


def test_clients_that_vanish_leave_nothing(shared_server, clients):
    """Cancelled streams, dropped clients and open sessions are all freed at the server."""
    llm = clients.connect(shared_server.address)
    streams = [llm.stream(prompt, max_new_tokens=200, ignore_eos=True) for prompt in PROMPTS[:5]]
    for stream in streams:
        next(iter(stream))
    for stream in streams[:3]:
        stream.cancel()
    Session.open(llm, 512)
    llm.close()
    assert settled(shared_server)
