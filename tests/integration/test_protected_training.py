"""Training under mechanisms, with the client's own trainer and a whole server in this process."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tests.conftest import memory_config
from tests.unit.client.conftest import BRIEF, Wire

from fedsea.client.examples import Example
from fedsea.client.trainer import Callback, StepReport, Trainer
from fedsea.client.training import SplitForTraining
from fedsea.client.training_config import TrainerConfig
from fedsea.client.training_protection import TrainingPolicy, TrainingProtection
from fedsea.client.training_run import CHECKPOINTS
from fedsea.errors import BudgetExceeded
from fedsea.model.checkpoints import Steps
from fedsea.model.lora import LoraConfig
from fedsea.privacy.accounts import Budget
from fedsea.server.service import TrunkService
from fedsea.transport.base import Channel, ClientStream
from fedsea.transport.recording import Direction
from fedsea.wire.messages import Backward, Forward

HIDDEN = 48
PARTS = ("bottom", "trunk", "top")
NOISY = "gaussian:clip_norm=4,mu=2,by=frobenius"
SILENT = "gaussian:clip_norm=1e3,mu=1e12"
CONFIG = TrainerConfig(steps=5, batch_size=2, learning_rate=1e-2, save_every=2, seed=3)


def examples() -> list[Example]:
    """Random tokens of different lengths."""
    drawn = torch.Generator().manual_seed(0)
    lengths = (5, 9, 7, 4)
    return [Example.of(torch.randint(3, 90, (n,), generator=drawn).tolist()) for n in lengths]


def policy_of(
    folder: Path, budget: Budget | None = None, **mechanisms: str | None
) -> TrainingPolicy:
    """Mechanisms in both directions, unless other ones are given."""
    chosen = {"rows": NOISY, "gradients": NOISY, **mechanisms}
    protection = TrainingProtection(
        **chosen,  # type: ignore[arg-type]  # mechanisms only
        record="set",
        ledger=folder / "x.ledger",
        budget=budget,
    )
    return protection.applied(HIDDEN, PARTS)


class Running(Channel):
    """A wire to a server that runs as long as the channel is open, on the client's loop."""

    def __init__(self, wire: Wire, service: TrunkService) -> None:
        self._channel = wire.channel(service)
        self._service = service
        self._runs = False

    async def describe(self) -> bytes:
        """Start the server when it is asked for the first time."""
        if not self._runs:
            self._runs = True
            await self._service.__aenter__()
        return await self._channel.describe()

    async def open_stream(self) -> ClientStream:
        """A session."""
        return await self._channel.open_stream()

    async def close(self) -> None:
        """End both."""
        await self._channel.close()
        if self._runs:
            await self._service.__aexit__(None, None, None)


@contextmanager
def training(
    model: Path, folder: Path, wire: Wire, policy: TrainingPolicy | None = None
) -> Iterator[SplitForTraining]:
    """A connected model and its server, which trains where `folder` says."""
    section = {"folder": str(folder / "server"), "threads": 1}
    service = TrunkService.load(memory_config(model, training=section))
    split = SplitForTraining.connect(
        model,
        {"memory": lambda: Running(wire, service)},
        name="run",
        lora=LoraConfig(rank=2, dropout=0.1),
        patience=BRIEF,
        guard=None if policy is None else policy.guard(),
    )
    try:
        yield split
    finally:
        split.close()


class Losses(Callback):
    """Hears the loss of every step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_step(self, report: StepReport) -> None:
        """Remember it."""
        self.seen.append(report.loss)


def run(split: SplitForTraining, folder: Path | None = None) -> list[float]:
    """Losses of a whole training."""
    heard = Losses()
    Trainer(split, CONFIG, examples(), callbacks=[heard], folder=folder).run()
    return heard.seen


def bytes_of(wire: Wire) -> list[bytes]:
    """What went up, in order."""
    return [
        bytes(event.rows) for _, _, event in wire.events if isinstance(event, Forward | Backward)
    ]


def test_a_mechanism_without_noise_changes_nothing(tiny_model: Path, tmp_path: Path) -> None:
    """With hardly any noise and a wide clip, losses are those of a training without a mechanism."""
    with training(tiny_model, tmp_path / "plain", Wire()) as split:
        expected = run(split)
    policy = policy_of(tmp_path, rows=SILENT, gradients=SILENT)
    with training(tiny_model, tmp_path / "silent", Wire(), policy) as split:
        assert run(split) == pytest.approx(expected, rel=1e-3)


def test_what_travels_is_what_was_released_and_charged(tiny_model: Path, tmp_path: Path) -> None:
    """Rows and gradients on the wire are noisy and clipped; the account holds both directions."""
    wire, policy = Wire(), policy_of(tmp_path)
    with training(tiny_model, tmp_path, wire, policy) as split:
        run(split)
    used = [2] * CONFIG.steps  # type: ignore[operator]  # so many examples in each step
    assert len(bytes_of(wire)) == 2 * len(used)
    spread = [
        policy.gradients.format.decode(event.rows, len(event.rows) // (4 * HIDDEN)).std()
        for _, _, event in wire.events
        if isinstance(event, Backward)
    ]
    # Gradients are far smaller than the noise, so what travels has the noise's spread.
    assert all(float(each) == pytest.approx(4.0, rel=0.15) for each in spread)
    assert policy.statement().spending().mu() == pytest.approx(math.sqrt(2 * sum(used) * 2.0**2))


@pytest.mark.parametrize("kind", [Forward, Backward])
def test_a_step_done_anew_sends_the_same_bytes(
    tiny_model: Path, tmp_path: Path, kind: type[Forward | Backward]
) -> None:
    """A connection that breaks in mid-step: what is sent again is sent byte for byte, charged once."""
    wire, policy = Wire(), policy_of(tmp_path)
    calm = Wire()
    with training(tiny_model, tmp_path / "calm", calm) as split:
        run(split)
    at = [type(event) for _, way, event in calm.events if way is Direction.DOWN]
    assert at
    uplink = [event for _, way, event in calm.events if way is Direction.UP]
    second = [number for number, event in enumerate(uplink, 1) if isinstance(event, kind)][1]
    wire.cut_at = (Direction.UP, second)
    with training(tiny_model, tmp_path / "cut", wire, policy) as split:
        run(split)
    sent = bytes_of(wire)
    again = [data for data in set(sent) if sent.count(data) == 2]
    assert wire.connections == 2
    assert len(again) == (1 if kind is Forward else 2)
    assert policy.statement().releases == 2 * 2 * CONFIG.steps  # type: ignore[operator]


def test_a_spent_budget_stops_before_the_step(tiny_model: Path, tmp_path: Path) -> None:
    """The step is named, nothing of it was sent, the steps before are saved, and more goes on."""
    wire = Wire()
    policy = policy_of(tmp_path, Budget(mu=math.sqrt(3.5 * 2 * 2 * 2.0**2)))
    with (
        training(tiny_model, tmp_path, wire, policy) as split,
        pytest.raises(BudgetExceeded, match="training stops at step 4"),
    ):
        run(split, tmp_path / "run")
    assert len(bytes_of(wire)) == 2 * 3
    assert policy.statement().releases == 2 * 2 * 3
    assert Steps(tmp_path / "run" / CHECKPOINTS).steps()[-1] == 3
    policy.ledger.set_budget("default", policy.rows.account.unit, "set", None)  # type: ignore[union-attr]  # it has one
    policy.close()

    policy = policy_of(tmp_path)
    with training(tiny_model, tmp_path, wire, policy) as split:
        assert len(run(split, tmp_path / "run")) == 2
    assert policy.statement().releases == 2 * 2 * CONFIG.steps  # type: ignore[operator]
