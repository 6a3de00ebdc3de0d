"""Bottom and top of this process: who shares a turn, who waits, and how errors are handed out."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import pytest
import torch

from fedsea.client.local import MAX_TURN_ROWS, BottomJob, LocalParts, TopJob, Turns
from fedsea.client.sampling import Sampler, SamplingParams
from fedsea.errors import Capacity, QuotaExceeded
from fedsea.model.checkpoint import Checkpoint
from fedsea.model.partition import Partition
from fedsea.model.spans import Placement


@dataclass
class Job:
    """A job of so many rows."""

    count: int


class Recorded:
    """Turns whose batches are recorded; results are the counts."""

    def __init__(self, error=None):
        self.batches: list[list[int]] = []
        self.error = error
        self.turns = Turns(self.run)

    def run(self, jobs):
        self.batches.append([job.count for job in jobs])
        if self.error is not None:
            raise self.error
        return [job.count for job in jobs]

    def submit(self, *counts, wait=0.0):
        return [self.turns.submit(Job(count), wait) for count in counts]


def test_jobs_of_one_turn_run_together():
    """Everything submitted before the loop turns is one batch."""

    async def work():
        recorded = Recorded()
        results = await asyncio.gather(*recorded.submit(1, 2, 3))
        return results, recorded.batches

    assert asyncio.run(work()) == ([1, 2, 3], [[1, 2, 3]])


def test_small_jobs_go_first():
    """Decoding does not wait behind a prompt; results find their callers."""

    async def work():
        recorded = Recorded()
        results = await asyncio.gather(*recorded.submit(MAX_TURN_ROWS, 1, 1))
        return results, recorded.batches

    results, batches = asyncio.run(work())
    assert results == [MAX_TURN_ROWS, 1, 1]
    assert batches == [[1, 1], [MAX_TURN_ROWS]]


def test_a_job_over_the_limit_runs_alone():
    """No job is too large to ever run."""

    async def work():
        recorded = Recorded()
        await asyncio.gather(*recorded.submit(5 * MAX_TURN_ROWS, 2 * MAX_TURN_ROWS))
        return recorded.batches

    assert asyncio.run(work()) == [[2 * MAX_TURN_ROWS], [5 * MAX_TURN_ROWS]]


def test_cancelled_jobs_are_not_run():
    """Rows that nobody waits for are not computed."""

    async def work():
        recorded = Recorded()
        first, second = recorded.submit(1, 2)
        first.cancel()
        await second
        return recorded.batches

    assert asyncio.run(work()) == [[2]]


def test_a_job_that_must_not_wait_takes_the_waiting_along():
    """Who waits for others is taken along by the first who does not."""

    async def work():
        recorded = Recorded()
        patient = recorded.submit(1, wait=30.0)
        await asyncio.sleep(0)
        assert not recorded.batches
        hurried = recorded.submit(2)
        await asyncio.gather(*patient, *hurried)
        return recorded.batches

    assert asyncio.run(work()) == [[1, 2]]


def test_a_wait_ends_by_itself():
    """When nobody comes, the turn is taken all the same."""

    async def work():
        recorded = Recorded()
        return await asyncio.wait_for(recorded.submit(1, wait=0.01)[0], 5)

    assert asyncio.run(work()) == 1


@pytest.mark.parametrize("error", [QuotaExceeded("too many"), RuntimeError("out of memory")])
def test_an_error_reaches_all_of_the_turn(error):
    """Nobody is left waiting when a batch fails, and the next turn works."""

    async def work():
        recorded = Recorded(error)
        results = await asyncio.gather(*recorded.submit(1, 2), return_exceptions=True)
        recorded.error = None
        return results, await recorded.submit(3)[0]

    results, after = asyncio.run(work())
    assert results == [error, error]
    assert after == 3


@pytest.fixture(scope="module")
def checkpoint(tiny_model):
    """The tiny checkpoint."""
    return Checkpoint.open(tiny_model)


@pytest.fixture
def parts(checkpoint):
    """Bottom 2 and top 1 with room for 128 rows."""
    return LocalParts.load(checkpoint, Partition(2, 1), Placement(), 128)


def test_a_refused_account_leaves_nothing(checkpoint):
    """When the second pool is full the first is not held."""
    parts = LocalParts.load(checkpoint, Partition(2, 1), Placement(), 128)
    bottom, top = parts.pools
    taken = top.open(100)
    with pytest.raises(Capacity):
        parts.open(64)
    assert bottom.num_accounts == 0
    top.close(taken)
    parts.close(parts.open(128))
    assert (bottom.num_accounts, top.num_accounts) == (0, 0)


def test_a_ragged_batch_equals_single_runs(parts):
    """Sequences of different lengths and ages share a turn at bottom and top."""
    generator = torch.Generator().manual_seed(0)
    lengths = [7, 1, 12]
    ids = [torch.randint(3, 90, (length,), generator=generator) for length in lengths]

    async def through(sequences):
        accounts = parts.open(128)
        for sequence in sequences:
            for pool, account in zip(parts.pools, accounts, strict=True):
                pool.begin(account, sequence, 20)
        rows = await asyncio.gather(
            *(parts.run_bottom(BottomJob(accounts[0], s, ids[s])) for s in sequences)
        )
        results = await asyncio.gather(
            *(
                parts.run_top(TopJob(accounts[1], s, lengths[s], made, 1, greedy()))
                for s, made in zip(sequences, rows, strict=True)
            )
        )
        parts.close(accounts)
        return rows, results

    def greedy():
        return Sampler(SamplingParams(), [], [])

    together_rows, together = asyncio.run(through([0, 1, 2]))
    for sequence in range(3):
        rows, alone = asyncio.run(through([sequence]))
        torch.testing.assert_close(together_rows[sequence], rows[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(together[sequence].logits, alone[0].logits, atol=1e-4, rtol=1e-4)
        assert together[sequence].token == alone[0].token


def test_rows_without_logits(parts):
    """A chunk in the middle of a prompt asks for no logits and gets none."""

    async def work():
        accounts = parts.open(32)
        for pool, account in zip(parts.pools, accounts, strict=True):
            pool.begin(account, 0, 32)
        rows = await parts.run_bottom(BottomJob(accounts[0], 0, torch.tensor([5, 6, 7])))
        result = await parts.run_top(TopJob(accounts[1], 0, 3, rows, 0))
        held = parts.pools[1].sequence(accounts[1], 0).length
        parts.close(accounts)
        return result, held

    result, held = asyncio.run(work())
    assert result.logits.shape[0] == 0
    assert result.token is None
    assert held == 3
