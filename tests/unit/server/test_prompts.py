"""Served soft prompts: the rows of the unsplit computation, for their tenants, at no surprise."""

from __future__ import annotations

import asyncio
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.trunk_client import BLOCKS, HIDDEN

from fedsea.errors import (
    Capacity,
    CheckpointError,
    ConfigError,
    FedseaError,
    FingerprintMismatch,
    PermissionDenied,
    PromptTooLong,
    QuotaExceeded,
)
from fedsea.model.adapters import write_adapter
from fedsea.model.attention import RaggedBatch
from fedsea.model.checkpoint import Checkpoint
from fedsea.model.kv_pool import KVPool, pages_for
from fedsea.model.lora import AdaptedRows, Adapter, LoraConfig
from fedsea.model.partition import Span
from fedsea.model.prompts import SoftPrompt, write_prompt
from fedsea.model.spans import Placement, load_trunk
from fedsea.server.prompts import SEQUENCE
from fedsea.server.service import TrunkService
from fedsea.wire.messages import Drop, Fork, Rollback, Want

PAGE = 8
ENTRANCE = 1
TENANT = "local"
# Part of a page, a whole one, and more than one.
COUNTS = (5, PAGE, 19)

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend():
    """The engine lives on a loop of asyncio."""
    return "asyncio"


@pytest.fixture(scope="module")
def checkpoint(checkpoint_folder):
    """The served model."""
    return Checkpoint.open(checkpoint_folder)


def made(count, seed=0, entrance=ENTRANCE, model=""):
    """A random prompt of visible size."""
    chance = torch.Generator().manual_seed(100 + seed)
    return SoftPrompt(torch.randn(count, HIDDEN, generator=chance), entrance, model)


@pytest.fixture
def save(tmp_path):
    """Write a prompt, and return its section of a configuration."""
    numbers = itertools.count()

    def written(prompt, *tenants):
        folder = tmp_path / f"prompt-{next(numbers)}"
        write_prompt(folder, prompt, "tiny")
        return {"folder": str(folder), "tenants": list(tenants or (TENANT,))}

    return written


@pytest.fixture(scope="module")
def unsplit(checkpoint):
    """The trunk's rows (n, hidden) for a whole text, with the prompt in front of it."""
    trunk = load_trunk(checkpoint, Span(ENTRANCE, BLOCKS), Placement())

    def run(rows, prompt=None, adapter=None, span=None):
        longer = rows if prompt is None else prompt.prepended(rows, [len(rows)])
        adapted = () if adapter is None else (AdaptedRows(0, len(longer), adapter),)
        if adapter is not None:
            trunk.accept(adapter)
        batch = RaggedBatch.whole([len(longer)], torch.device("cpu"), adapted)
        with torch.no_grad():
            return trunk.run(longer, batch, span)[-len(rows) :]

    return run


def close(found, expected):
    """Whether rows are equal up to fp32."""
    return torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", COUNTS)
async def test_rows_are_those_of_the_unsplit_computation(
    serving, connect, save, unsplit, rows, count
):
    """In a prompt of any length, chunk by chunk and row by row, with a part that lies in one run."""
    prompt, text = made(count), rows(30)
    async with serving(prompts={"a": save(prompt)}) as service:
        client = await connect(service, span=(ENTRANCE, BLOCKS), prompt="a")
        await client.begin(capacity=64)
        found = [await client.run(part) for part in text.split([17, 1, 1, 11])]
        pool = service.trunk.runner.pool
        assert pool.sequence(1, 0).is_one_run
        await client.close()

    assert close(torch.cat(found), unsplit(text, prompt))
    assert not close(torch.cat(found), unsplit(text))


async def test_sessions_with_different_prompts_and_none_run_together(
    serving, connect, save, unsplit, rows
):
    """Each gets its own rows, whatever else is in the step."""
    prompts = {"a": made(5, 1), "b": made(19, 2)}
    sections = {name: save(prompt, "*") for name, prompt in prompts.items()}
    async with serving(prompts=sections) as service:

        async def session(number):
            name, text = ("a", "b", "")[number % 3], rows(20, seed=number)
            client = await connect(
                service, f"tenant{number}", span=(ENTRANCE, BLOCKS), prompt=name, rows=64
            )
            await client.begin(capacity=64)
            found = [await client.run(part) for part in text.split([9, *[1] * 11])]
            await client.close()
            return close(torch.cat(found), unsplit(text, prompts.get(name)))

        assert await asyncio.gather(*map(session, range(9))) == [True] * 9


@pytest.mark.parametrize("count", COUNTS)
async def test_beams_forks_and_rollbacks(serving, connect, save, unsplit, rows, count):
    """Several sequences of one session share the prompt, and change behind it as they like."""
    prompt, text, other = made(count), rows(12), rows(6, seed=1)
    async with serving(prompts={"a": save(prompt)}) as service:
        client = await connect(service, span=(ENTRANCE, BLOCKS), prompt="a", rows=160)
        await client.begin(0, capacity=32)
        await client.begin(1, capacity=32)
        await client.push_many([(0, text, Want.ALL), (1, other, Want.ALL)])
        both = await client.pull()
        await client.send(Fork(0, 2, 10, 32))
        await client.send(Fork(0, 3, 0, 32))
        await client.send(Rollback(0, 3))
        parts = [(0, other), (1, text), (2, other), (3, text)]
        await client.push_many([(number, part, Want.ALL) for number, part in parts])
        found = await client.pull()
        await client.send(Drop(0))
        await client.send(Rollback(1, 0))
        again = await client.run(text, sequence=1)
        await client.close()

    first = [unsplit(text, prompt), unsplit(other, prompt)]
    assert close(both, torch.cat(first))
    chains = [(text[:3], other), (other, text), (text[:10], other), (text[:0], text)]
    expected = [unsplit(torch.cat(chain), prompt)[-len(chain[1]) :] for chain in chains]
    assert close(found, torch.cat(expected))
    assert close(again, first[0])


@pytest.mark.parametrize("pool", [2048, 160], ids=["kept", "too large to keep"])
async def test_later_sessions_get_copies_of_the_same_rows(
    serving, connect, save, unsplit, rows, pool
):
    """Keys and values are computed for the first one only, also behind a narrower span."""
    prompt, text = made(11), rows(9)
    async with serving(prompts={"a": save(prompt)}, kv={"rows": pool}) as service:
        runs = []
        runner = service.trunk.runner
        run = runner.run

        def counted(rows, *rest):
            runs.append(len(rows))
            return run(rows, *rest)

        runner.run = counted
        found = []
        for end in (BLOCKS - 1, BLOCKS):
            client = await connect(service, span=(ENTRANCE, end), prompt="a", rows=64)
            await client.begin(capacity=32)
            found.append(await client.run(text))
            await client.close()

    assert runs == ([11, 9, 9] if pool == 2048 else [11, 9, 11, 9])
    assert close(found[0], unsplit(text, prompt, span=Span(ENTRANCE, BLOCKS - 1)))
    assert close(found[1], unsplit(text, prompt))


async def test_prompt_and_adapter_together(
    serving, connect, save, unsplit, rows, checkpoint, tmp_path
):
    """The prompt's own rows are computed with the adapter of the session, not of another one."""
    prompt, text = made(7), rows(10)
    trunk = load_trunk(checkpoint, Span(ENTRANCE, BLOCKS), Placement())
    config = LoraConfig(rank=3, targets=("q_proj", "v_proj", "down_proj"))
    chance = torch.Generator().manual_seed(4)
    adapter = Adapter.fresh(config, trunk.span, trunk.linears(), chance).requires_grad_(False)
    for factors in adapter.factors.values():
        factors.b.copy_(0.3 * torch.randn(factors.b.shape, generator=chance))
    write_adapter(tmp_path / "lora", [adapter], "tiny")
    sections = {
        "prompts": {"a": save(prompt)},
        "adapters": {"l": {"folder": str(tmp_path / "lora"), "tenants": [TENANT]}},
    }
    async with serving(**sections) as service:
        for names in ({"prompt": "a"}, {"prompt": "a", "adapter": "l"}, {"adapter": "l"}) * 2:
            client = await connect(service, span=(ENTRANCE, BLOCKS), rows=64, **names)
            await client.begin(capacity=32)
            found = await client.run(text)
            await client.close()
            used = prompt if "prompt" in names else None
            assert close(found, unsplit(text, used, adapter if "adapter" in names else None))


@pytest.mark.parametrize("count", COUNTS)
async def test_a_client_fills_its_reservation_as_without_a_prompt(
    serving, connect, save, rows, count
):
    """Whole pages for each sequence are enough; the prompt's are the server's affair."""
    async with serving(prompts={"a": save(made(count))}) as service:
        client = await connect(service, span=(ENTRANCE, BLOCKS), prompt="a", rows=3 * 16)
        for sequence in range(3):
            await client.begin(sequence, capacity=24)
            await client.run(rows(16), sequence)
        await client.push(rows(1), 0)
        with pytest.raises(QuotaExceeded, match="reserved"):
            await client.pull()


async def test_a_server_without_room_for_the_prompt_refuses_at_once(serving, connect, save):
    """What a client asks for fits, and the prompt beside it does not."""
    async with serving(prompts={"a": save(made(5))}, kv={"rows": 64}) as service:
        client = await connect(service, span=(ENTRANCE, BLOCKS), rows=64)
        await client.close()
        with pytest.raises(Capacity):
            await connect(service, span=(ENTRANCE, BLOCKS), rows=64, prompt="a")
        client = await connect(service, span=(ENTRANCE, BLOCKS), rows=56, prompt="a")
        await client.close()


async def test_a_prompt_counts_for_the_quota_of_its_tenant(serving, connect, save):
    """It holds pages like everything else."""
    quotas = {"kv_rows": 64}
    async with serving(prompts={"a": save(made(5))}, quotas=quotas) as service:
        with pytest.raises(QuotaExceeded):
            await connect(service, span=(ENTRANCE, BLOCKS), rows=64, prompt="a")


async def test_positions_of_the_prompt_count_for_the_longest_context(serving, connect, save, rows):
    """A sequence may have so many rows fewer."""
    async with serving(prompts={"a": save(made(5))}, kv={"max_context": 40}) as service:
        for capacity in (35, 36):
            client = await connect(service, span=(ENTRANCE, BLOCKS), rows=64, prompt="a")
            await client.begin(capacity=capacity)
            await client.push(rows(1))
            if capacity == 35:
                await client.pull()
                await client.close()
                continue
            with pytest.raises(PromptTooLong, match="holds 35"):
                await client.pull()


@pytest.mark.parametrize("name", ["a", "b"], ids=["another tenant's", "nobody's"])
async def test_a_prompt_of_others_cannot_be_named(serving, connect, save, name):
    """Whether a name exists for somebody else cannot be told from the refusal."""
    async with serving(prompts={"a": save(made(5), "globex")}) as service:
        with pytest.raises(PermissionDenied, match="no soft prompt of that name"):
            await connect(service, span=(ENTRANCE, BLOCKS), prompt=name)


async def test_a_prompt_of_another_cut_is_refused(serving, connect, save):
    """The error says which bottom it is for."""
    async with serving(prompts={"a": save(made(5))}) as service:
        with pytest.raises(ConfigError, match="use bottom=1"):
            await connect(service, span=(2, BLOCKS), prompt="a")


async def test_a_prompt_that_cannot_be_computed_ends_its_session_only(
    serving, connect, save, rows, unsplit
):
    """Its pages are free again, and the engine goes on."""
    prompt = made(5)
    async with serving(prompts={"a": save(prompt)}) as service:
        runner = service.trunk.runner
        run = runner.run

        def fail(*_):
            raise RuntimeError("out of memory")

        runner.run = fail
        with pytest.raises(FedseaError, match="failed to compute"):
            await connect(service, span=(ENTRANCE, BLOCKS), prompt="a")
        runner.run = run
        assert runner.pool.num_accounts == 0
        client = await connect(service, span=(ENTRANCE, BLOCKS), prompt="a")
        await client.begin()
        assert close(await client.run(rows(4)), unsplit(rows(4), prompt))
        await client.close()


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        (made(5, entrance=BLOCKS), ConfigError, "serve a span that holds it"),
        (made(5, entrance=0), ConfigError, "enters block 0"),
        (made(5, model="ab" * 32), FingerprintMismatch, "checkpoint"),
        (made(64), ConfigError, "raise kv.max_context"),
        (SoftPrompt(torch.ones(5, HIDDEN + 1), ENTRANCE), ConfigError, "rows of 33 numbers"),
    ],
)
def test_prompts_that_do_not_fit_are_refused_at_the_start(
    make_config, save, prompt, error, message
):
    """Before anybody can ask for them."""
    config = make_config(
        prompts={"a": save(prompt)}, server={"span": "1:4"}, kv={"max_context": 64}
    )
    with pytest.raises(error, match=message):
        TrunkService.load(config)


def test_missing_files_and_bad_sections_are_named(make_config, save, tmp_path):
    """The folder, the section, the key."""
    with pytest.raises(CheckpointError, match="adapter_config"):
        TrunkService.load(make_config(prompts={"a": {"folder": str(tmp_path), "tenants": ["x"]}}))
    with pytest.raises(ConfigError, match="used by nobody"):
        make_config(prompts={"a": {"folder": "f", "tenants": []}})
    with pytest.raises(ConfigError, match=r"prompts\.a\.tenants is missing"):
        make_config(prompts={"a": {"folder": "f"}})
    with pytest.raises(ConfigError, match=r"folders is no key of section \[prompts\.a\]"):
        make_config(prompts={"a": {**save(made(5)), "folders": "f"}})


@settings(max_examples=60)
@given(
    count=st.integers(1, 3 * PAGE),
    rows=st.integers(1, 12 * PAGE),
    steps=st.lists(
        st.tuples(
            st.sampled_from(["begin", "fork", "grow", "roll", "drop"]), *[st.integers(0, 40)] * 2
        ),
        max_size=25,
    ),
)
def test_what_fits_without_a_prompt_fits_with_it(count, rows, steps):
    """Of two accounts that are treated alike, the one behind a prompt is never refused alone."""
    first = pages_for(count, PAGE) * PAGE
    pool = KVPool(64, PAGE)
    plain, behind = pool.open(rows), pool.open(rows + first)
    pool.begin(behind, SEQUENCE, first + rows)
    pool.extend(behind, SEQUENCE, first)
    lengths: dict[int, int] = {}
    for number, (kind, which, amount) in enumerate(steps):
        chosen = sorted(lengths)[which % len(lengths)] if lengths else None
        if kind == "begin":
            pool.begin(plain, number, amount)
            pool.seal(behind, SEQUENCE)
            pool.fork(behind, SEQUENCE, number, first, amount + first)
            lengths[number] = 0
        elif chosen is None:
            continue
        elif kind == "fork":
            length = min(amount, lengths[chosen])
            pool.fork(plain, chosen, number, length, 40)
            pool.fork(behind, chosen, number, length + first, 40 + first)
            lengths[number] = length
        elif kind == "grow":
            try:
                pool.extend(plain, chosen, amount)
            except QuotaExceeded:
                with pytest.raises(QuotaExceeded):
                    pool.extend(behind, chosen, amount)
                continue
            pool.extend(behind, chosen, amount)
            lengths[chosen] += amount
        elif kind == "roll":
            lengths[chosen] = min(amount, lengths[chosen])
            pool.rollback(plain, chosen, lengths[chosen])
            pool.rollback(behind, chosen, lengths[chosen] + first)
        else:
            pool.drop(plain, chosen)
            pool.drop(behind, chosen)
            del lengths[chosen]
        pool.check_integrity()
