"""The schedule's simulated time."""

from __future__ import annotations

import pytest
from benchmarks.schedule import Phases, Strategy, simulated
from hypothesis import given
from hypothesis import strategies as st

_SECONDS = st.floats(0.01, 10)


def _phases(client: float, trunk: float) -> Phases:
    return Phases(
        bottom_forward=client,
        top=client,
        bottom_backward=client,
        trunk_forward=lambda joint: trunk * joint,
        trunk_backward=lambda joint: 2 * trunk * joint,
        travel=0.0,
    )


@given(_SECONDS, _SECONDS, st.integers(1, 5), st.integers(1, 12))
def test_sub_trunks_for_all_take_the_time_of_one_client(
    client: float, trunk: float, clients: int, steps: int
) -> None:
    """With a worker for every client nobody waits."""
    phases = _phases(client, trunk)
    found = simulated(
        Strategy.SERVER_HIERARCHICAL, phases, clients, steps, workers=clients, average_every=4
    )
    assert found == pytest.approx(steps * phases.alone())


@given(_SECONDS, _SECONDS, st.integers(1, 5), st.integers(1, 6))
def test_one_worker_is_never_slower_than_sequential_and_never_faster_than_its_work(
    client: float, trunk: float, clients: int, steps: int
) -> None:
    """The trunk's own work is a lower bound, taking turns an upper one."""
    phases = _phases(client, trunk)
    found = simulated(Strategy.SERVER_HIERARCHICAL, phases, clients, steps, workers=1)
    assert found <= simulated(Strategy.SEQUENTIAL, phases, clients, steps) * (1 + 1e-9)
    assert found >= clients * steps * 3 * trunk * (1 - 1e-9)


def test_a_joint_batch_saves_what_clients_do_at_the_same_time() -> None:
    """Joint: 3 client phases and 3 trunk units for each of two; sequential: all of it twice."""
    phases = _phases(client=1.0, trunk=1.0)
    assert simulated(Strategy.CLIENT_BATCH, phases, 2, 1) == pytest.approx(3 + 6)
    assert simulated(Strategy.SEQUENTIAL, phases, 2, 1) == pytest.approx(12)


def test_every_mean_is_paid() -> None:
    """Five steps with a mean after every second one: three means."""
    phases = Phases(
        bottom_forward=1.0, top=0.0, bottom_backward=0.0, trunk_forward=lambda _: 0.0,
        trunk_backward=lambda _: 0.0, travel=0.0, averaging=0.5,
    )  # fmt: skip
    found = simulated(Strategy.SERVER_HIERARCHICAL, phases, 2, 5, workers=2, average_every=2)
    assert found == pytest.approx(5 + 3 * 0.5)
