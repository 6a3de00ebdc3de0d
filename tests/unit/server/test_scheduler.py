"""The scheduler's laws: budgets hold, nobody starves, tenants get equal shares, decoding is quick."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsea.server.config import SchedulerSection
from fedsea.server.quotas import TokenBucket
from fedsea.server.scheduler import Grant, Scheduler, StepCost

OPTIONS = SchedulerSection(max_step_rows=64, small_append_rows=8, min_prefill_rows=4)


def scheduler(rate=None, **sessions):
    """A scheduler with sessions named like a0, a1, b0: the letter is the tenant."""
    made = Scheduler(OPTIONS, lambda _: None if rate is None else TokenBucket(rate, 0.0))
    numbers = {name: number for number, name in enumerate(sessions)}
    for name, number in numbers.items():
        made.add(number, name[0])
        if sessions[name]:
            made.offer(number, sessions[name], 0.0)
    return made


def learned(cost, decode=0.010, row=0.001):
    """Teach a cost what a decoding step and a prefill row take."""
    cost.record(1, 0, decode)
    cost.record(1, 10, decode + 10 * row)


def test_an_empty_scheduler_has_nothing_to_do():
    """Without work there is no step and nothing to wait for."""
    idle = scheduler(a0=0)

    assert idle.schedule(0.0) == []
    assert idle.next_ready(0.0) is None
    assert not idle.is_waiting


def test_all_small_appends_share_the_next_step():
    """Decoding sessions of all tenants take part in one step."""
    busy = scheduler(a0=1, a1=8, b0=3)

    grants = busy.schedule(0.0)

    assert sorted((grant.session, grant.rows) for grant in grants) == [(0, 1), (1, 8), (2, 3)]
    assert not any(grant.is_prefill for grant in grants)


def test_a_lone_prompt_gets_whole_steps():
    """When nobody decodes, a prompt takes all of every step."""
    busy = scheduler(a0=150)

    assert [busy.schedule(0.0)[0].rows for _ in range(3)] == [64, 64, 22]
    assert busy.schedule(0.0) == []


def test_a_prompt_waits_once_until_decoding_is_measured():
    """Nothing is known at first, so one step only decodes; then the least chunk joins."""
    busy = scheduler(a0=1, a1=500)

    assert [grant.session for grant in busy.schedule(0.0)] == [0]
    busy.cost.record(1, 0, 0.01)
    busy.offer(0, 1, 0.0)
    assert Grant(1, OPTIONS.min_prefill_rows, is_prefill=True) in busy.schedule(0.0)


@given(
    decode=st.floats(0.001, 0.1),
    row=st.floats(0.00001, 0.01),
    stall=st.floats(1.1, 3.0),
)
def test_a_chunk_keeps_the_step_within_the_stall_factor(decode, row, stall):
    """The estimated step is at most stall_factor times the decoding step, except for the floor."""
    options = SchedulerSection(stall_factor=stall)
    made = Scheduler(options)
    learned(made.cost, decode, row)
    made.add(0, "a")
    made.add(1, "a")
    made.offer(0, 1, 0.0)
    made.offer(1, 4096, 0.0)

    rows = sum(grant.rows for grant in made.schedule(0.0) if grant.is_prefill)

    assert 0 < rows <= options.max_step_rows - 1
    if rows > options.min_prefill_rows:
        assert decode + rows * row <= stall * decode * 1.01


def test_learning_ignores_one_slow_step():
    """One step that took far longer than the others changes no estimate."""
    cost = StepCost()
    for seconds in (0.01, 0.01, 5.0, 0.01, 0.01):
        cost.record(1, 0, seconds)

    assert cost.decode_seconds(1) == pytest.approx(0.01)


def test_the_nearest_measured_size_stands_in():
    """A number of decoding sessions that was never measured takes the time of the nearest one."""
    cost = StepCost()
    cost.record(1, 0, 0.01)
    cost.record(16, 0, 0.02)

    assert cost.decode_seconds(2) == pytest.approx(0.01)
    assert cost.decode_seconds(12) == pytest.approx(0.02)


def test_decoding_is_measured_again_now_and_then():
    """Under steady mixed load a pure decoding step comes from time to time."""
    busy = scheduler(a0=0, a1=0)
    learned(busy.cost)
    pure = 0
    for _ in range(3 * StepCost.MIXED_STEPS):
        busy.offer(0, 1, 0.0) if 0 not in waiting(busy) else None
        busy.offer(1, 500, 0.0) if 1 not in waiting(busy) else None
        grants = busy.schedule(0.0)
        prefill = sum(grant.rows for grant in grants if grant.is_prefill)
        busy.cost.record(1, prefill, 0.01 + 0.001 * prefill)
        pure += not prefill

    assert 2 <= pure <= 4


def waiting(made):
    """Sessions whose Append is not done."""
    return {claim.session for claim in made._waiting()}


def simulate(away, decode=0.006, row=0.0007, prompt=2048, decoders=1):
    """Decoding clients that take `away` per row, beside one prompt: step times seen by clients.

    Returns the longest time from row to row, and how long the prompt took.
    """
    made = Scheduler(SchedulerSection())
    for number in range(decoders):
        made.add(number, f"t{number}")
    made.add(decoders, "prompt")
    comes = dict.fromkeys(range(decoders), 0.0)
    sent, lasted = {}, []
    now, left, began = 0.0, 0, 0.0
    for _ in range(20_000):
        for number, time in list(comes.items()):
            if time <= now:
                made.offer(number, 1, time)
                sent[number] = comes.pop(number)
        if now > 1.0 and not began:
            began, left = now, prompt
            made.offer(decoders, prompt, now)
        grants = made.schedule(now)
        if not grants:
            ready = made.next_ready(now)
            now = min([*comes.values(), *([ready] if ready is not None else [])])
            continue
        prefill = sum(grant.rows for grant in grants if grant.is_prefill)
        tokens = sum(grant.rows for grant in grants) - prefill
        seconds = decode + row * prefill
        now += seconds
        made.cost.record(tokens, prefill, seconds)
        left -= prefill
        for grant in grants:
            if not grant.is_prefill:
                made.answered(grant.session, now)
                if began:
                    lasted.append(now - sent[grant.session] + away)
                comes[grant.session] = now + away
        if began and not left:
            return max(lasted[1:]), now - began
    raise AssertionError("the prompt starves")


@pytest.mark.parametrize("decoders", [1, 2, 5])
@pytest.mark.parametrize("away", [0.0002, 0.002, 0.02, 0.08])
def test_decoding_is_at_most_twice_as_slow_beside_a_prompt(away, decoders):
    """From row to row a decoding client never waits twice its normal time, wherever it is."""
    alone = 0.006 + away
    if decoders > 1:
        alone += 0.006  # a row that comes while another's step runs waits for it

    longest, _ = simulate(away, decoders=decoders)

    assert longest <= 2 * alone


def test_a_distant_decoder_leaves_its_gaps_to_the_prompt():
    """While a client is away for long, the prompt advances nearly as fast as alone."""
    _, took = simulate(away=0.08)

    assert took < 2 * (2048 * 0.0007)


def test_a_decoder_that_falls_silent_is_soon_forgotten():
    """A session that stops decoding holds a prompt back for no more than a moment."""
    busy = scheduler(a0=1, b0=0)
    learned(busy.cost)
    busy.schedule(0.0)
    busy.answered(0, 0.01)
    busy.offer(0, 1, 0.012)
    busy.schedule(0.012)
    busy.answered(0, 0.02)
    busy.offer(1, 2048, 0.021)

    assert busy.schedule(0.021) == []
    wait = busy.next_ready(0.021)
    assert 0.022 < wait < 0.03
    assert 0 < busy.schedule(wait)[0].rows < 64
    assert busy.schedule(1.5)[0].rows == 64


@st.composite
def loads(draw):
    """Tenants with sessions, and the size of the Appends that each session sends for ever."""
    tenants = draw(st.lists(st.integers(1, 4), min_size=2, max_size=4))
    return [
        (f"t{tenant}", draw(st.integers(1, 200)))
        for tenant, sessions in enumerate(tenants)
        for _ in range(sessions)
    ]


@given(loads())
def test_steps_stay_in_budget_and_everybody_advances(load):
    """No step exceeds max_step_rows, no Append gets more than its rows, and all of them end."""
    made = Scheduler(OPTIONS)
    left = {}
    for number, (tenant, rows) in enumerate(load):
        made.add(number, tenant)
        made.offer(number, rows, 0.0)
        left[number] = rows
    learned(made.cost)

    for _ in range(sum(left.values()) + 1):
        grants = made.schedule(0.0)
        assert sum(grant.rows for grant in grants) <= OPTIONS.max_step_rows
        assert len({grant.session for grant in grants}) == len(grants)
        for grant in grants:
            assert 0 < grant.rows <= left[grant.session]
            left[grant.session] -= grant.rows
        if not grants:
            break

    assert set(left.values()) == {0}
    assert made.waiting_rows == 0


@pytest.mark.parametrize("size", [8, 200])
@given(sessions=st.lists(st.integers(1, 8), min_size=2, max_size=5))
def test_tenants_that_fill_every_step_get_equal_shares(size, sessions):
    """Whatever their number of sessions, the rows of such tenants differ by two steps at most."""
    options = SchedulerSection(max_step_rows=8, small_append_rows=8, min_prefill_rows=4)
    made = Scheduler(options)
    tenants: dict[int, int] = {}
    for tenant, count in enumerate(sessions):
        for _ in range(count):
            number = len(tenants)
            tenants[number] = tenant
            made.add(number, str(tenant))
            made.offer(number, size, 0.0)
    served = dict.fromkeys(range(len(sessions)), 0)

    for _ in range(200):
        for grant in made.schedule(0.0):
            served[tenants[grant.session]] += grant.rows
        for number in tenants.keys() - waiting(made):
            made.offer(number, size, 0.0)

    assert max(served.values()) - min(served.values()) <= 2 * options.max_step_rows


def test_sessions_of_a_tenant_get_equal_shares():
    """Within a tenant the prompts of all sessions advance alike."""
    busy = scheduler(a0=5000, a1=5000, a2=5000)
    served = dict.fromkeys(range(3), 0)
    for _ in range(30):
        for grant in busy.schedule(0.0):
            served[grant.session] += grant.rows

    assert max(served.values()) - min(served.values()) <= OPTIONS.max_step_rows


def test_a_pause_saves_up_no_claim():
    """A tenant that was silent while another was served does not then block it."""
    busy = scheduler(a0=6400, b0=0)
    for _ in range(50):
        busy.schedule(0.0)
    busy.offer(1, 6400, 0.0)

    order = [busy.schedule(0.0)[0].session for _ in range(10)]

    assert 4 <= order.count(0) <= 6


def test_decoding_never_starves_a_prompt():
    """Even when decoding alone could fill every step, a prompt advances."""
    busy = scheduler(**{f"a{n}": 1 for n in range(100)}, b0=40)
    learned(busy.cost)
    steps = 0
    while 100 in waiting(busy):
        busy.schedule(0.0)
        steps += 1
        for number in set(range(100)) - waiting(busy):
            busy.offer(number, 1, 0.0)

    assert steps <= 40 / OPTIONS.min_prefill_rows + 1


@given(
    rate=st.integers(1, 100),
    steps=st.lists(st.floats(0.001, 0.5), min_size=5, max_size=60),
)
def test_a_rate_is_never_exceeded_and_used_up(rate, steps):
    """A tenant over its rate waits, and gets what the rate allows."""
    busy = scheduler(rate=float(rate), a0=100_000)
    now, served = 0.0, 0
    for seconds in steps:
        now += seconds
        served += sum(grant.rows for grant in busy.schedule(now))
        assert served <= rate * now + max(rate, 1)

    assert served >= min(rate, OPTIONS.max_step_rows)


def test_a_limited_tenant_says_when_it_may_go_on():
    """With its bucket empty a tenant waits until the named time, and another one goes on."""
    busy = scheduler(rate=10.0, a0=1000)
    busy.schedule(0.0)
    assert busy.schedule(0.0) == []

    ready = busy.next_ready(0.0)

    assert ready == pytest.approx(0.1)
    assert busy.schedule(ready + 1e-6) == [Grant(0, 1, is_prefill=True)]


def test_opening_again_refills_no_bucket():
    """A tenant that closes its sessions and comes back finds its bucket as it was."""
    busy = scheduler(rate=10.0, a0=10)
    busy.schedule(0.0)
    busy.remove(0)
    busy.add(1, "a")
    busy.offer(1, 10, 0.0)

    assert busy.schedule(0.0) == []


def test_a_removed_session_is_forgotten():
    """What a session waited for goes with it."""
    busy = scheduler(a0=10, a1=1)
    busy.remove(0)

    assert busy.waiting_rows == 1
    assert [grant.session for grant in busy.schedule(0.0)] == [1]


def test_decoding_sessions_come_to_share_their_steps():
    """Clients that started at different times end up in one step, not in turns."""
    sizes = batch_sizes(decoders=4)

    assert sum(sizes[-20:]) / 20 > 3.5


def test_nobody_waits_when_told_not_to():
    """With a gather_factor of 0 a step starts as soon as there is a row."""
    sizes = batch_sizes(decoders=4, gather_factor=0.0)

    assert sum(sizes[-20:]) / 20 < 3


def batch_sizes(decoders, away=0.001, decode=0.006, **options):
    """Rows of each step when decoding clients start one after the other."""
    made = Scheduler(SchedulerSection(**options))
    for number in range(decoders):
        made.add(number, "a")
    comes = {number: number * decode / 3 for number in range(decoders)}
    now = 0.0
    sizes: list[int] = []
    while len(sizes) < 100:
        for number in [number for number, time in comes.items() if time <= now]:
            made.offer(number, 1, comes.pop(number))
        grants = made.schedule(now)
        if not grants:
            ready = made.next_ready(now)
            now = min([*comes.values(), *([ready] if ready is not None else [])])
            continue
        now += decode
        made.cost.record(len(grants), 0, decode)
        sizes.append(len(grants))
        for grant in grants:
            made.answered(grant.session, now)
            comes[grant.session] = now + away
    return sizes
