"""How long the strategies of training take where every client has a machine of its own.

Two cores cannot show eight machines. The durations of one step's phases are measured; this module
plays the order in which they must happen: who waits for whom, and for a free worker of the server.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum


class Strategy(StrEnum):
    """Who trains when; the words of FedSEA-LLaMA's table 7."""

    SEQUENTIAL = "sequential"
    CLIENT_BATCH = "client-batch"
    SERVER_HIERARCHICAL = "server-hierarchical"


@dataclass(frozen=True, slots=True, kw_only=True)
class Phases:
    """Seconds of the parts of one step.

    Attributes:
        bottom_forward: at a client, until its rows are sent.
        top: at a client, forward and backward, until its gradients are sent.
        bottom_backward: at a client, with the step of its own optimizer.
        trunk_forward: at the server, by the number of clients in the joint batch.
        trunk_backward: likewise, with the step of the trunk's optimizer.
        travel: one message of rows between client and server.
        averaging: the mean of all sub-trunks.
    """

    bottom_forward: float
    top: float
    bottom_backward: float
    trunk_forward: Callable[[int], float]
    trunk_backward: Callable[[int], float]
    travel: float
    averaging: float = 0.0

    def client_chain(self, joint: int = 1) -> tuple[tuple[bool, float], ...]:
        """A step as pairs: whether the server computes, and for how long."""
        return (
            (False, self.bottom_forward + self.travel),
            (True, self.trunk_forward(joint)),
            (False, self.travel + self.top + self.travel),
            (True, self.trunk_backward(joint)),
            (False, self.travel + self.bottom_backward),
        )

    def alone(self) -> float:
        """Seconds of a step of one client with the server to itself."""
        return sum(seconds for _, seconds in self.client_chain())


def simulated(
    strategy: Strategy,
    phases: Phases,
    clients: int,
    steps: int,
    *,
    workers: int = 1,
    average_every: int = 10,
) -> float:
    """Seconds until every client has done `steps` steps.

    Args:
        strategy: who trains when.
        phases: durations.
        clients: how many, each with a machine of its own.
        steps: of each client.
        workers: sub-trunks that the server computes at the same time.
        average_every: steps between two means of the sub-trunks.
    """
    match strategy:
        case Strategy.SEQUENTIAL:
            return clients * steps * phases.alone()
        case Strategy.CLIENT_BATCH:
            return steps * sum(seconds for _, seconds in phases.client_chain(clients))
        case Strategy.SERVER_HIERARCHICAL:
            return _hierarchical(phases, clients, steps, workers, average_every)


def _hierarchical(phases: Phases, clients: int, steps: int, workers: int, every: int) -> float:
    """Rounds of `every` steps, each as long as its slowest client, with a mean after each."""
    seconds, left = 0.0, steps
    while left:
        count = min(every, left)
        seconds += _round(phases.client_chain() * count, clients, workers) + phases.averaging
        left -= count
    return seconds


def _round(chain: Sequence[tuple[bool, float]], clients: int, workers: int) -> float:
    """Seconds until all clients have done the chain; a free worker serves who came first."""
    ready = [0.0] * clients
    position = [0] * clients
    free = [0.0] * min(workers, clients)
    while (waiting := [c for c in range(clients) if position[c] < len(chain)]) != []:
        client = min(waiting, key=lambda c: (ready[c], c))
        is_server, seconds = chain[position[client]]
        begin = ready[client]
        if is_server:
            worker = min(range(len(free)), key=free.__getitem__)
            begin = max(begin, free[worker])
            free[worker] = begin + seconds
        ready[client] = begin + seconds
        position[client] += 1
    return max(ready)
