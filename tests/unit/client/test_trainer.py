"""The trainer, on a model of three linears in one process whose trunk dies when a test says so."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedsea import artifacts
from fedsea.client.examples import Example
from fedsea.client.trainable import Moved
from fedsea.client.trainer import Callback, StepReport, Trainer
from fedsea.client.training_config import TrainerConfig
from fedsea.client.training_run import ADAPTER, CHECKPOINTS, Summary
from fedsea.errors import (
    BudgetExceeded,
    CheckpointError,
    ConfigError,
    ConnectionLost,
    DataError,
    NotFinite,
    StaleStep,
    Unreachable,
)
from fedsea.model.checkpoints import Steps, read_optimizer, write_optimizer
from fedsea.model.optimization import AdamWConfig, AdapterOptimizer, step_generator
from fedsea.wire.messages import Stepped

WIDTH, VOCABULARY = 8, 16


class Killed(BaseException):
    """The client's process is gone: nobody catches this."""


def weights(seed: int, rows: int = WIDTH) -> nn.Parameter:
    """Some numbers."""
    generator = torch.Generator().manual_seed(seed)
    return nn.Parameter(torch.randn(rows, WIDTH, generator=generator) / WIDTH**0.5)


@dataclass(slots=True)
class Server:
    """A trunk with its own optimizer and disk, and a list of what goes wrong at which call.

    Each entry of `faults` is the number of a call and what happens then: "cut" the connection before
    the call is carried out, "deaf" after it, "killed" with all that is in memory, "client" killed.
    """

    folder: Path
    faults: dict[int, str] = field(default_factory=dict)
    calls: int = 0
    opened: list[list[int]] = field(default_factory=list)
    weight: nn.Parameter = field(default_factory=lambda: weights(5))
    optimizer: AdapterOptimizer = field(init=False)
    last: Stepped | None = None
    overflows: set[int] = field(default_factory=set)
    scales: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.restart()

    @property
    def moved(self) -> Moved:
        """Counts calls, to have something to count."""
        return Moved(self.calls, 2 * self.calls)

    def restart(self) -> None:
        self.weight = weights(5)
        self.optimizer = AdapterOptimizer({"trunk": self.weight}, AdamWConfig())
        self.last = None

    def called(self, work: Callable[[], Any]) -> Any:
        self.calls += 1
        fault = self.faults.get(self.calls)
        if fault == "client":
            raise Killed
        if fault == "killed":
            self.restart()
        if fault in {"cut", "killed"}:
            raise ConnectionLost("it broke")
        found = work()
        if fault == "deaf":
            raise ConnectionLost("it broke")
        return found

    def open(self, steps: Sequence[int], within: float) -> int:
        assert within == TrainerConfig().reconnect_s
        self.opened.append(list(steps))
        saved = Steps(self.folder)
        common = set(steps) & {0, self.optimizer.steps, *saved.steps()}
        if not common:
            raise StaleStep("no step in common; start anew")
        found = max(common)
        if found != self.optimizer.steps:
            self.restart()
            if found:
                artifact = artifacts.read(saved.path(found) / "trunk", "trunk")
                with torch.no_grad():
                    self.weight.copy_(artifact.tensors["trunk"])
                read_optimizer(saved.path(found), self.optimizer)
        self.optimizer.clear()
        return found

    def reset(self) -> None:
        self.called(self.optimizer.clear)

    def step(self, number: int, learning_rate: float, clip: float | None, scale: float) -> Stepped:
        def apply() -> Stepped:
            if self.last is not None and number == self.last.number == self.optimizer.steps:
                return self.last
            assert number == self.optimizer.steps + 1
            self.scales.append(scale)
            if number in self.overflows:
                self.overflows.discard(number)
                self.optimizer.clear()
                return Stepped(number, float("inf"), False)
            norm = self.optimizer.apply(learning_rate, clip, scale)
            self.last = Stepped(number, norm, True)
            return self.last

        found: Stepped = self.called(apply)
        return found

    def save(self, number: int) -> None:
        def write(folder: Path) -> None:
            artifacts.write(folder / "trunk", "trunk", {}, {"trunk": self.weight})
            write_optimizer(folder, self.optimizer)

        assert number == self.optimizer.steps
        self.called(lambda: Steps(self.folder).save(number, write))


class Model:
    """Embedding, three linears and means over what came before; dropout before each linear."""

    dtype = torch.float32
    optimizer = None
    dropout = 0.3

    def __init__(self, server: Server) -> None:
        self.trunk = server
        self.embedding = weights(1, VOCABULARY).detach()
        self.bottom, self.top = weights(2), weights(3, VOCABULARY)
        self.step, self.index = 0, 0
        self.poison: set[int] = set()
        self.spent: set[int] = set()
        self.spent_evaluation = False
        self.last_words: Callable[[], None] = lambda: None

    def description(self) -> Mapping[str, Any]:
        return {"width": WIDTH}

    def trained(self) -> Mapping[str, nn.Parameter]:
        return {"bottom": self.bottom, "top": self.top}

    def begin_step(self, step: int, scale: float = 1.0) -> None:
        del scale
        self.step, self.index = step, 0

    def logits(self, batch: Sequence[Example]) -> Tensor:
        if self.spent_evaluation if not torch.is_grad_enabled() else self.step in self.spent:
            self.last_words()
            raise BudgetExceeded("nothing more may leave")
        return self.trunk.called(lambda: self._logits(batch))  # type: ignore[no-any-return]

    def _logits(self, batch: Sequence[Example]) -> Tensor:
        generator = None
        if torch.is_grad_enabled():
            generator = step_generator(0, self.step, self.index)
            self.index += 1
        found = []
        for example in batch:
            rows = self.embedding[list(example.inputs)]
            rows = torch.tanh(self._dropped(rows, generator) @ self.bottom.T)
            rows = torch.tanh(self._dropped(rows, generator) @ self.trunk.weight.T)
            counts = torch.arange(1, len(rows) + 1)[:, None]
            rows = rows.cumsum(0) / counts
            found.append((self._dropped(rows, generator) @ self.top.T)[list(example.predicting)])
        logits = torch.cat(found)
        return logits * float("nan") if self.step in self.poison else logits

    def _dropped(self, rows: Tensor, generator: torch.Generator | None) -> Tensor:
        if generator is None:
            return rows
        keep = torch.rand(rows.shape, generator=generator) >= self.dropout
        return rows * keep / (1 - self.dropout)

    def changed(self) -> None:
        pass

    def save(self, folder: Path) -> None:
        artifacts.write(folder / "client", "client", {}, dict(self.trained()))

    def load(self, folder: Path) -> None:
        with torch.no_grad():
            for name, tensor in artifacts.read(folder / "client", "client").tensors.items():
                self.trained()[name].copy_(tensor)


class Log(Callback):
    """The last that was heard of every step."""

    def __init__(self) -> None:
        self.losses: dict[int, float] = {}
        self.norms: dict[int, float] = {}
        self.evaluations: dict[int, float] = {}
        self.reports: list[StepReport] = []
        self.rollbacks: list[int] = []
        self.messages: list[str] = []
        self.starts: list[int] = []

    def on_start(self, step: int, steps: int) -> None:
        self.starts.append(step)

    def on_step(self, report: StepReport) -> None:
        self.losses[report.step] = report.loss
        self.norms[report.step] = report.grad_norm
        self.reports.append(report)

    def on_evaluation(self, step: int, loss: float) -> None:
        self.evaluations[step] = loss

    def on_rollback(self, step: int) -> None:
        self.rollbacks.append(step)

    def on_message(self, text: str) -> None:
        self.messages.append(text)


def some_examples(count: int, seed: int = 0) -> list[Example]:
    """Random tokens; the answer is the second half."""
    chance = random.Random(seed)
    found = []
    for _ in range(count):
        length = chance.randint(4, 12)
        ids = [chance.randrange(VOCABULARY) for _ in range(length)]
        found.append(Example.of(ids, length // 2))
    return found


TRAIN, EVALUATION = some_examples(24), some_examples(7, seed=1)
CONFIG = TrainerConfig(
    epochs=3,
    batch_size=3,
    accumulate=2,
    learning_rate=0.02,
    warmup_steps=2,
    save_every=3,
    evaluate_every=4,
    seed=11,
)


@dataclass(slots=True)
class Place:
    """The two folders of a run, and what was heard of it over all processes."""

    folder: Path
    server: Server
    log: Log = field(default_factory=Log)
    models: list[Model] = field(default_factory=list)

    @classmethod
    def at(cls, folder: Path) -> Place:
        return cls(folder / "client", Server(folder / "server"))

    def trainer(self, config: TrainerConfig = CONFIG, **options: Any) -> Trainer:
        """A new process of the client."""
        self.models.append(Model(self.server))
        given: dict[str, Any] = {"train": TRAIN, "evaluation": EVALUATION, **options}
        return Trainer(
            self.models[-1],
            config,
            callbacks=[self.log],
            folder=given.pop("folder", self.folder),
            **given,
        )

    def parameters(self) -> list[Tensor]:
        """What is trained, of both sides."""
        model = self.models[-1]
        return [tensor.detach().clone() for tensor in (model.bottom, model.top, self.server.weight)]


def same(one: Place, other: Place) -> None:
    """Both runs ended bit for bit alike."""
    assert one.log.losses == other.log.losses
    assert one.log.norms == other.log.norms
    assert one.log.evaluations == other.log.evaluations
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A run to which nothing happens."""
    place = Place.at(tmp_path_factory.mktemp("undisturbed"))
    place.trainer().run()
    return place


class TestSteps:
    def test_learns(self, undisturbed):
        """The loss falls, and every step is reported once."""
        losses = undisturbed.log.losses
        assert list(losses) == list(range(1, 13))
        assert sum(list(losses.values())[-4:]) < sum(list(losses.values())[:4])

    def test_equals_one_optimizer_for_all(self, tmp_path):
        """Two sides with an optimizer each take the steps that one AdamW over everything takes."""
        place = Place.at(tmp_path)
        config = TrainerConfig(
            steps=6, batch_size=4, learning_rate=0.05, max_grad_norm=0, schedule="constant"
        )
        trainer = place.trainer(config)
        model = Model(Server(tmp_path / "other"))
        everything = [model.bottom, model.top, model.trunk.weight]
        optimizer = torch.optim.AdamW(everything, lr=0.05, weight_decay=config.weight_decay)
        steps = trainer._batches.epoch(0)
        losses = []
        for number, work in enumerate(steps, start=1):
            model.begin_step(number)
            (batch,) = work.batches
            targets = torch.tensor([target for example in batch for target in example.targets])
            loss = nn.functional.cross_entropy(model.logits(batch), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        trainer.run()
        assert list(place.log.losses.values()) == pytest.approx(losses, rel=1e-5)

    def test_accumulation_equals_one_big_batch(self, tmp_path, monkeypatch):
        """Batches of a step weigh by their answer tokens: their number changes nothing."""
        monkeypatch.setattr(Model, "dropout", 0.0)
        found = []
        for name, size, accumulate in (("big", 24, 1), ("small", 1, 24), ("odd", 5, 5)):
            place = Place.at(tmp_path / name)
            config = TrainerConfig(
                steps=5, batch_size=size, accumulate=accumulate, learning_rate=0.05
            )
            place.trainer(config).run()
            found.append(place)
        for other in found[1:]:
            assert list(other.log.losses.values()) == pytest.approx(
                list(found[0].log.losses.values()), rel=1e-5
            )
            for a, b in zip(other.parameters(), found[0].parameters(), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)

    def test_reports(self, undisturbed):
        """Reports count tokens, bytes and what is left."""
        reports = undisturbed.log.reports
        assert reports[-1].tokens == 3 * sum(example.rows for example in TRAIN)
        assert [report.epoch for report in reports] == [0] * 4 + [1] * 4 + [2] * 4
        assert reports[-1].eta_s == 0
        assert reports[0].learning_rate == 0
        assert all(report.bytes_down == 2 * report.bytes_up for report in reports)
        assert all(report.tokens_per_second > 0 for report in reports)

    def test_summary(self, tmp_path):
        """What is told at the end is what was reported, and is kept."""
        place = Place.at(tmp_path)
        summary = place.trainer().run()
        assert summary.step == summary.steps == 12
        assert summary.loss == place.log.losses[12]
        assert summary.evaluation_loss == place.log.evaluations[12]
        assert summary.stopped is None
        assert Summary(**json.loads((place.folder / "summary.json").read_text())) == summary
        assert (place.folder / ADAPTER / "client").exists()

    def test_without_a_folder(self, tmp_path):
        """Nothing is written, and the losses are the same."""
        place, kept = Place.at(tmp_path / "a"), Place.at(tmp_path / "b")
        place.trainer(folder=None).run()
        kept.trainer().run()
        assert not place.folder.exists()
        assert place.log.losses == kept.log.losses

    def test_evaluates_at_the_end(self, undisturbed):
        """There is an evaluation every so many steps and one at the end."""
        assert sorted(undisturbed.log.evaluations) == [4, 8, 12]


class TestBreaks:
    @pytest.mark.parametrize("fault", ["cut", "deaf"])
    @pytest.mark.parametrize("call", range(1, 25, 3))
    def test_cut_connection_at_any_call(self, tmp_path, undisturbed, call, fault):
        """A connection that breaks before or behind any call changes nothing, and takes nothing back."""
        place = Place.at(tmp_path)
        place.server.faults = {call: fault}
        place.trainer().run()
        same(place, undisturbed)
        assert place.log.rollbacks == []

    @pytest.mark.parametrize("call", range(1, 30, 5))
    def test_killed_server_at_any_call(self, tmp_path, undisturbed, call):
        """A server that lost its memory brings both sides to the newest step that both saved."""
        place = Place.at(tmp_path)
        place.server.faults = {call: "killed"}
        place.trainer().run()
        same(place, undisturbed)

    @pytest.mark.parametrize("call", range(1, 30, 5))
    def test_killed_client_at_any_call(self, tmp_path, undisturbed, call):
        """A client that starts anew goes on from its newest checkpoint."""
        place = Place.at(tmp_path)
        place.server.faults = {call: "client"}
        with pytest.raises(Killed):
            place.trainer().run()
        place.trainer().run()
        same(place, undisturbed)

    @settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        st.dictionaries(
            st.integers(1, 90), st.sampled_from(["cut", "deaf", "killed", "client"]), max_size=7
        )
    )
    def test_anything_at_any_time(self, tmp_path_factory, undisturbed, faults):
        """Whatever happens to either side, however often: the same losses, the same parameters."""
        place = Place.at(tmp_path_factory.mktemp("run"))
        place.server.faults = faults
        while True:
            try:
                place.trainer().run()
                break
            except Killed:
                pass
        same(place, undisturbed)

    def test_a_lost_answer_is_one_step(self, tmp_path):
        """When the server took a step and its answer was lost, this side follows."""
        place = Place.at(tmp_path)
        # Calls of a step: two forwards, then the step itself.
        place.server.faults = {3: "deaf"}
        place.trainer().run()
        assert place.server.opened == [[0], [0, 1]]
        assert place.server.optimizer.steps == 12

    def test_gives_up_when_every_session_breaks(self, tmp_path):
        """A server that breaks every session at the same place does not keep the client for ever."""
        place = Place.at(tmp_path)
        place.server.faults = dict.fromkeys(range(1, 1000), "cut")
        with pytest.raises(ConnectionLost):
            place.trainer().run()

    def test_no_server_in_time(self, tmp_path, monkeypatch):
        """What opening raises ends the run; it has waited already."""
        place = Place.at(tmp_path)

        def nobody(self: Server, steps: Sequence[int], within: float) -> int:
            raise Unreachable("nobody answers")

        monkeypatch.setattr(Server, "open", nobody)
        with pytest.raises(Unreachable):
            place.trainer().run()

    def test_server_that_lost_its_disk(self, tmp_path):
        """A server without any common step is an error, not a silent new start."""
        place = Place.at(tmp_path)
        place.server.faults = {40: "client"}
        with pytest.raises(Killed):
            place.trainer().run()
        place.server = Server(tmp_path / "elsewhere")
        with pytest.raises(StaleStep):
            place.trainer().run()

    def test_rollback_is_told(self, tmp_path):
        """Whoever keeps a log hears from which step on it is void."""
        place = Place.at(tmp_path)
        place.server.faults = {20: "killed"}
        place.trainer().run()
        assert place.log.rollbacks == [3]
        assert any("going back" in message for message in place.log.messages)


class TestEarlyStopping:
    CONFIG = TrainerConfig(
        epochs=40, batch_size=6, learning_rate=0.5, schedule="constant", patience=2
    )

    def test_stops_at_the_best(self, tmp_path):
        """Training ends after two evaluations in vain, and both sides are at the best step."""
        place = Place.at(tmp_path)
        summary = place.trainer(self.CONFIG).run()
        best = min(place.log.evaluations, key=lambda step: place.log.evaluations[step])
        assert summary.stopped == "patience"
        assert summary.step == best < max(place.log.losses)
        assert max(place.log.evaluations) == best + 2 * 4
        assert summary.evaluation_loss == place.log.evaluations[best]
        assert place.server.optimizer.steps == best
        model = place.models[-1]
        with torch.no_grad():
            total = sum(
                float(
                    nn.functional.cross_entropy(
                        model.logits([example]), torch.tensor(example.targets), reduction="sum"
                    )
                )
                for example in EVALUATION
            )
        tokens = sum(example.answer_tokens for example in EVALUATION)
        assert total / tokens == pytest.approx(summary.evaluation_loss, rel=1e-5)

    def test_a_request_to_stop_leaves_both_sides_at_the_best(self, tmp_path):
        """The adapter that is written is of the step that the server has saved; a run goes on."""
        place = Place.at(tmp_path)
        trainer = place.trainer(self.CONFIG)
        place.log.on_step = lambda report: trainer.stop() if report.step == 6 else None  # type: ignore[method-assign]
        summary = trainer.run()
        assert (summary.stopped, summary.step) == ("request", 4)
        assert place.server.optimizer.steps == 4 == Steps(place.server.folder).steps()[-1]
        kept = Steps(place.folder / CHECKPOINTS).path(4) / "client"
        written = artifacts.read(place.folder / ADAPTER / "client", "client")
        for name, tensor in artifacts.read(kept, "client").tensors.items():
            assert torch.equal(written.tensors[name], tensor)

    def test_min_improvement(self, tmp_path):
        """A loss that is lower by less does not count as better."""
        place = Place.at(tmp_path)
        config = TrainerConfig(
            epochs=40, batch_size=6, learning_rate=1e-5, patience=2, min_improvement=0.5
        )
        assert place.trainer(config).run().step == 4

    def test_killed_client(self, tmp_path):
        """A run with patience goes on from the best step and ends alike."""
        whole, place = Place.at(tmp_path / "a"), Place.at(tmp_path / "b")
        whole.trainer(self.CONFIG).run()
        place.server.faults = {20: "client"}
        with pytest.raises(Killed):
            place.trainer(self.CONFIG).run()
        place.trainer(self.CONFIG).run()
        same(place, whole)

    def test_needs_something_to_evaluate(self, tmp_path):
        """Patience without an evaluation, or without a folder, is refused."""
        place = Place.at(tmp_path)
        with pytest.raises(ConfigError, match="patience"):
            place.trainer(self.CONFIG, evaluation=None)
        with pytest.raises(ConfigError, match="patience"):
            place.trainer(self.CONFIG, folder=None)


class TestBudget:
    def test_the_steps_before_a_spent_budget_are_saved(self, tmp_path, undisturbed):
        """The error passes, both sides keep the steps that are done, and more budget goes on."""
        place = Place.at(tmp_path)
        trainer = place.trainer()
        place.models[-1].spent = {5}
        with pytest.raises(BudgetExceeded):
            trainer.run()
        assert Steps(place.folder / CHECKPOINTS).steps()[-1] == 4
        assert Steps(place.server.folder).steps()[-1] == 4
        assert (place.folder / ADAPTER / "client").exists()

        place.trainer().run()
        same(place, undisturbed)
        assert place.log.starts == [0, 4]

    def test_an_evaluation_that_is_too_dear_loses_no_step(self, tmp_path):
        """The steps before an evaluation that may not be made are saved."""
        place = Place.at(tmp_path)
        trainer = place.trainer()
        place.models[-1].spent_evaluation = True
        with pytest.raises(BudgetExceeded):
            trainer.run()
        assert Steps(place.folder / CHECKPOINTS).steps()[-1] == 4

    def test_a_server_that_is_gone_then_is_named(self, tmp_path):
        """Where the last steps cannot be saved, the budget is the error and a line names the rest."""
        place = Place.at(tmp_path)
        trainer = place.trainer()
        place.models[-1].spent = {5}
        place.models[-1].last_words = lambda: place.server.faults.update(
            {place.server.calls + 1: "cut"}
        )
        with pytest.raises(BudgetExceeded):
            trainer.run()
        assert place.log.messages == ["it broke; what stays is the checkpoint of step 3"]

    def test_nothing_is_kept_without_a_folder(self, tmp_path):
        """Without a folder there is nothing to save, and the error is the same."""
        place = Place.at(tmp_path)
        trainer = place.trainer(folder=None)
        place.models[-1].spent = {2}
        with pytest.raises(BudgetExceeded):
            trainer.run()


class TestNotFinite:
    def test_loss(self, tmp_path):
        """A NaN loss names step, batch and examples; nothing was applied on either side."""
        place = Place.at(tmp_path)
        trainer = place.trainer()
        place.models[-1].poison = {5}
        with pytest.raises(
            NotFinite, match=r"the loss of step 5 .*epoch 2, batch 1 of 2: examples"
        ):
            trainer.run()
        assert place.server.optimizer.steps == 4
        assert max(place.log.losses) == 4
        assert place.server.weight.grad is None

    def test_gradient_at_the_server(self, tmp_path):
        """Without loss scaling, a gradient that the server refuses ends the run."""
        place = Place.at(tmp_path)
        place.server.overflows = {5}
        with pytest.raises(NotFinite, match="a gradient of step 5"):
            place.trainer().run()
        assert place.server.optimizer.steps == 4

    def test_goes_on_after_it(self, tmp_path, undisturbed):
        """The same command goes on behind the last checkpoint."""
        place = Place.at(tmp_path)
        trainer = place.trainer()
        place.models[-1].poison = {5}
        with pytest.raises(NotFinite):
            trainer.run()
        place.trainer().run()
        same(place, undisturbed)


class TestLossScaling:
    CONFIG = TrainerConfig(steps=6, batch_size=6, learning_rate=0.02, loss_scaling="dynamic")

    def test_scale_cancels_out(self, tmp_path):
        """A power of two changes no bit of the steps."""
        scaled, plain = Place.at(tmp_path / "a"), Place.at(tmp_path / "b")
        scaled.trainer(self.CONFIG).run()
        plain.trainer(
            TrainerConfig(steps=6, batch_size=6, learning_rate=0.02, loss_scaling="off")
        ).run()
        same(scaled, plain)

    def test_overflow_at_the_server(self, tmp_path):
        """A step whose gradients overflow there is taken anew with half the scale, on both sides."""
        place, plain = Place.at(tmp_path / "a"), Place.at(tmp_path / "b")
        place.server.overflows = {3}
        place.trainer(self.CONFIG).run()
        plain.trainer(self.CONFIG).run()
        same(place, plain)
        first = 2.0**16
        assert place.server.scales == [
            first,
            first,
            first,
            first / 2,
            first / 2,
            first / 2,
            first / 2,
        ]

    def test_overflow_here(self, tmp_path, monkeypatch):
        """A gradient that overflows here is never applied there."""
        place, plain = Place.at(tmp_path / "a"), Place.at(tmp_path / "b")
        trainer = place.trainer(self.CONFIG)
        monkeypatch.setattr("fedsea.client.trainer._FIRST_SCALE", 2.0**16)
        original = AdapterOptimizer.gradient_norm
        seen: list[int] = []

        def overflowing(self: AdapterOptimizer) -> float:
            if self is trainer._optimizer and not seen:
                seen.append(1)
                raise NotFinite("too large")
            return original(self)

        monkeypatch.setattr(AdapterOptimizer, "gradient_norm", overflowing)
        trainer.run()
        monkeypatch.undo()
        plain.trainer(self.CONFIG).run()
        same(place, plain)
        assert place.server.scales[0] == 2.0**15

    def test_grows_again(self, tmp_path, monkeypatch):
        """After many steps without overflow the scale doubles."""
        monkeypatch.setattr("fedsea.client.trainer._SCALE_GROWS_AFTER", 2)
        place = Place.at(tmp_path)
        place.trainer(self.CONFIG).run()
        assert place.server.scales == [2.0**16] * 2 + [2.0**17] * 2 + [2.0**18] * 2

    def test_never_below_one(self, tmp_path, monkeypatch):
        """Gradients that are not finite without any scaling end the run."""
        place = Place.at(tmp_path)

        def never(self: Server, number: int, *_: Any) -> Stepped:
            return Stepped(number, float("inf"), False)

        monkeypatch.setattr(Server, "step", never)
        with pytest.raises(NotFinite):
            place.trainer(self.CONFIG).run()

    def test_auto_is_for_fp16(self, tmp_path, monkeypatch):
        """Blocks in fp16 get scaled losses without being asked for."""
        place = Place.at(tmp_path)
        monkeypatch.setattr(Model, "dtype", torch.float16)
        place.trainer(TrainerConfig(steps=1)).run()
        assert place.server.scales == [2.0**16]


class TestFolder:
    def test_keeps_the_last_checkpoints(self, undisturbed):
        """Both sides keep the same last steps."""
        assert Steps(undisturbed.folder / CHECKPOINTS).steps() == [9, 12]
        assert Steps(undisturbed.server.folder).steps() == [9, 12]

    def test_another_run_is_refused(self, tmp_path):
        """A folder of a run with other settings or data is refused before anything connects."""
        place = Place.at(tmp_path)
        place.trainer().run()
        with pytest.raises(ConfigError, match=r"training\.learning_rate 0\.02.*0\.5"):
            place.trainer(replace(CONFIG, learning_rate=0.5))

    def test_settings_that_change_nothing_may_change(self, tmp_path, undisturbed):
        """How often and how much is saved may be another when a run goes on."""
        place = Place.at(tmp_path)
        place.server.faults = {20: "client"}
        with pytest.raises(Killed):
            place.trainer().run()
        place.trainer(replace(CONFIG, save_every=2, keep=5)).run()
        same(place, undisturbed)

    def test_ended_run(self, tmp_path):
        """A run that has ended is not done again."""
        place = Place.at(tmp_path)
        first = place.trainer().run()
        calls = place.server.calls
        assert place.trainer().run() == first
        assert place.server.calls == calls

    def test_stop(self, tmp_path, undisturbed):
        """A run that is asked to stop saves, and goes on later as if it had not been."""
        place = Place.at(tmp_path)
        trainer = place.trainer()

        class Stop(Callback):
            def on_step(self, report: StepReport) -> None:
                if report.step == 5:
                    trainer.stop()

        trainer._callbacks += (Stop(),)
        summary = trainer.run()
        assert (summary.step, summary.stopped) == (5, "request")
        assert Steps(place.folder / CHECKPOINTS).steps() == [3, 5]
        place.trainer().run()
        assert place.log.starts == [0, 5]
        same(place, undisturbed)

    def test_full_disk(self, tmp_path, undisturbed, monkeypatch):
        """A checkpoint that does not fit is an error with advice; later the run goes on."""
        place = Place.at(tmp_path)
        trainer = place.trainer()
        original = artifacts.replace_file

        def full(path: Path, content: bytes) -> None:
            if "step" not in path.parent.name and ".tmp" in str(path) and place.server.last:
                cause = OSError(28, "No space left on device")
                raise ConfigError(f"{path} cannot be written") from cause
            original(path, content)

        monkeypatch.setattr(artifacts, "replace_file", full)
        with pytest.raises(CheckpointError, match="No space left"):
            trainer.run()
        monkeypatch.undo()
        place.trainer().run()
        same(place, undisturbed)

    def test_no_ids_in_files(self, undisturbed):
        """What is kept beside tensors says nothing of the examples but a digest."""
        for path in undisturbed.folder.rglob("*.json"):
            assert str(list(TRAIN[0].ids))[1:-1] not in path.read_text()

    def test_refuses_no_examples(self, tmp_path):
        """There is nothing to learn from nothing."""
        with pytest.raises(DataError):
            Place.at(tmp_path).trainer(train=[])
