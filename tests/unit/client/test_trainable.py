"""The trainer on a model that is really cut, with a small trunk in this process."""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_models import VOCABULARY, save_tiny
from tests.training_trunk import TinyTrainingTrunk
from torch import Tensor
from torch.nn.functional import cross_entropy

from fedsea.client.examples import Example
from fedsea.client.link import Patience
from fedsea.client.trainer import Callback, StepReport, Trainer
from fedsea.client.training import PARTS, SplitForTraining
from fedsea.client.training_config import TrainerConfig
from fedsea.client.training_protection import TrainingProtection
from fedsea.client.training_run import ADAPTER, CHECKPOINTS, Summary
from fedsea.errors import CheckpointError, ConfigError, DataError, NotFinite
from fedsea.model.adapters import read_adapter
from fedsea.model.checkpoints import Steps
from fedsea.model.lora import LoraConfig
from fedsea.model.partition import Partition
from fedsea.model.spans import Placement
from fedsea.transport.memory import MemoryChannel

LORA = LoraConfig(rank=3, alpha=6.0, dropout=0.1)
CONFIG = TrainerConfig(
    steps=7, batch_size=3, accumulate=2, learning_rate=0.01, save_every=3, evaluate_every=3, seed=4
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama of five blocks."""
    return save_tiny("llama", tmp_path_factory.mktemp("models") / "llama")


def some_examples(count: int, seed: int = 0) -> list[Example]:
    """Random tokens; the answer is the second half."""
    chance = random.Random(seed)
    found = []
    for _ in range(count):
        length = chance.randint(4, 10)
        found.append(Example.of([chance.randrange(VOCABULARY) for _ in range(length)], length // 2))
    return found


class Losses(Callback):
    """Of each step."""

    def __init__(self) -> None:
        self.found: list[float] = []
        self.reports: list[StepReport] = []

    def on_step(self, report: StepReport) -> None:
        self.found.append(report.loss)
        self.reports.append(report)


def connect(folder: Path, server: TinyTrainingTrunk, **options: Any) -> SplitForTraining:
    """The client's side."""
    given: dict[str, Any] = {"lora": LORA, "seed": CONFIG.seed, "partition": (1, 1), **options}
    channels = {"memory": lambda: MemoryChannel(server)}
    return SplitForTraining.connect(
        folder, channels, name="run", patience=Patience(open=5.0), **given
    )


def train(
    folder: Path, out: Path | None, config: TrainerConfig = CONFIG, **options: Any
) -> tuple[Summary, Losses, list[Tensor]]:
    """A whole run against a new server; how it ended, its losses, what was trained."""
    losses = Losses()
    server = TinyTrainingTrunk(folder, Partition(1, 1), Placement())
    with connect(folder, server, **options) as model:
        summary = Trainer(
            model, config, some_examples(12), some_examples(4, 1), [losses], folder=out
        ).run()
        trunk = [] if server.adapter is None else list(server.adapter.parameters())
        return summary, losses, [*model.parameters(), *trunk]


def test_a_whole_run(folder, tmp_path):
    """Steps are taken on both sides, saved on both, and the adapter is in PEFT's format."""
    summary, losses, _ = train(folder, tmp_path)
    assert summary.step == 7
    assert len(losses.found) == 7
    assert summary.evaluation_loss is not None
    assert Steps(tmp_path / CHECKPOINTS).steps() == [6, 7]
    bottom = read_adapter(tmp_path / ADAPTER, Partition(1, 1).bottom_span())
    assert {place.block for place in bottom.factors} == {0}


def test_nothing_after_the_last_answer_travels(folder, tmp_path):
    """Rows whose output no loss needs are not sent: four times what is left, and little more."""
    config = replace(CONFIG, evaluate_every=100, steps=1, accumulate=1)
    _, losses, _ = train(folder, tmp_path, config)
    (report,) = losses.reports
    expected = report.tokens * 48 * 4
    assert expected < report.bytes_up < 2 * expected + 2048


def test_two_runs_are_alike(folder, tmp_path):
    """The seed decides everything, dropout included; another one decides otherwise."""
    _, first, tensors = train(folder, tmp_path / "a")
    _, second, again = train(folder, tmp_path / "b")
    _, other, _ = train(folder, tmp_path / "c", replace(CONFIG, seed=5), seed=5)
    assert first.found == second.found
    assert all(torch.equal(a, b) for a, b in zip(tensors, again, strict=True))
    assert other.found != first.found


def test_goes_on_in_another_process(folder, tmp_path):
    """A run that was asked to stop ends as one that was not."""
    _, whole, tensors = train(folder, tmp_path / "whole")
    server = TinyTrainingTrunk(folder, Partition(1, 1), Placement())
    out, losses = tmp_path / "parts", Losses()

    class Stop(Callback):
        def on_step(self, report: StepReport) -> None:
            if report.step in {2, 5}:
                trainer.stop()

    for _ in range(3):
        steps = Steps(out / CHECKPOINTS).steps() or [0]
        with connect(folder, server, resume_steps=steps) as model:
            trainer = Trainer(
                model, CONFIG, some_examples(12), some_examples(4, 1), [losses, Stop()], out
            )
            trainer.run()
            assert server.adapter is not None
            found = [*model.parameters(), *server.adapter.parameters()]
    assert losses.found == whole.found
    assert all(torch.equal(a, b) for a, b in zip(found, tensors, strict=True))


@pytest.mark.parametrize("parts", [("trunk",), ("bottom",), ("top",), ("bottom", "top")])
def test_any_part_alone(folder, tmp_path, parts):
    """Whatever is trained learns; what is not has no step."""
    config = replace(CONFIG, steps=6, learning_rate=0.05, batch_size=12, accumulate=1)
    _, losses, _ = train(folder, tmp_path, config, train=parts)
    assert losses.found[-1] < losses.found[0]


def test_loss_is_the_mean_over_answers(folder):
    """The loss of the first step is what the whole batch gives in one piece."""
    server = TinyTrainingTrunk(folder, Partition(1, 1), Placement())
    examples, losses = some_examples(12), Losses()
    config = replace(CONFIG, steps=1, batch_size=2, accumulate=6)
    plain = replace(LORA, dropout=0.0)
    with connect(folder, server, lora=plain) as model:
        Trainer(model, config, examples, callbacks=[losses]).run()
    with connect(
        folder, TinyTrainingTrunk(folder, Partition(1, 1), Placement()), lora=plain
    ) as model:
        logits = model.eval().logits([torch.tensor(example.ids) for example in examples])
    rows: list[int] = []
    targets: list[int] = []
    at = 0
    for example in examples:
        rows += [at + row for row in example.predicting]
        targets += example.targets
        at += len(example.ids)
    expected = cross_entropy(logits[rows], torch.tensor(targets))
    assert losses.found == pytest.approx([expected.item()], rel=1e-5)


def test_an_answer_outside_the_vocabulary(folder):
    """A token that is learned last is never an input: it is refused as one, without naming it."""
    server = TinyTrainingTrunk(folder, Partition(1, 1), Placement())
    with connect(folder, server) as model:
        trainer = Trainer(model, CONFIG, [Example.of([1, 2, VOCABULARY], 1)])
        with pytest.raises(DataError, match="outside the vocabulary") as caught:
            trainer.run()
    assert caught.value.__cause__ is None


def test_server_cannot_save(folder, tmp_path):
    """What the server could not save is an error that says so."""
    server = TinyTrainingTrunk(folder, Partition(1, 1), Placement())
    server.problem = "no space left on the disk"
    with (
        connect(folder, server) as model,
        pytest.raises(CheckpointError, match="no space left"),
    ):
        Trainer(model, CONFIG, some_examples(12), folder=tmp_path).run()


def test_not_finite(folder, tmp_path):
    """Factors that are NaN end the run before anything is applied."""
    server = TinyTrainingTrunk(folder, Partition(1, 1), Placement())
    with connect(folder, server) as model:
        with torch.no_grad():
            next(model.parameters()).fill_(float("nan"))
        with pytest.raises(NotFinite, match=r"a row of step 1 .* batch 1 of 2: examples"):
            Trainer(model, CONFIG, some_examples(12), folder=tmp_path).run()
    assert server.optimizer is not None
    assert server.optimizer.steps == 0


def test_another_adapter_is_refused(folder, tmp_path):
    """A run goes on with the adapter that it began with."""
    train(folder, tmp_path)
    server = TinyTrainingTrunk(folder, Partition(1, 1), Placement())

    def trainer(rank: int, examples: Sequence[Example]) -> None:
        with connect(folder, server, lora=replace(LORA, rank=rank)) as model:
            Trainer(model, CONFIG, examples, some_examples(4, 1), folder=tmp_path)

    with pytest.raises(ConfigError, match=r"model\.lora\.rank 3, and this one has 2"):
        trainer(2, some_examples(12))


def test_a_protected_run_does_not_go_on_without_protection(folder, tmp_path):
    """A run's mechanisms are part of it: the same folder without them, or with others, is refused."""
    protection = TrainingProtection(
        rows="gaussian:clip_norm=1,mu=1",
        gradients="gaussian:clip_norm=1,mu=1,by=frobenius",
        record="data",
        ledger=tmp_path / "ledger",
    )
    weaker = replace(protection, rows="gaussian:clip_norm=1,mu=2")

    def run(chosen: TrainingProtection | None, config: TrainerConfig) -> None:
        server = TinyTrainingTrunk(folder, Partition(1, 1), Placement())
        with ExitStack() as stack:
            guard = None
            if chosen is not None:
                policy = chosen.applied(48, PARTS)
                stack.callback(policy.close)
                guard = policy.guard()
            model = stack.enter_context(connect(folder, server, guard=guard))
            Trainer(model, config, some_examples(4), folder=tmp_path / "run").run()

    run(protection, replace(CONFIG, steps=1))
    for other in (None, weaker):
        with pytest.raises(ConfigError, match="privacy"):
            run(other, replace(CONFIG, steps=1))


def test_optimizers_that_differ(folder):
    """Both sides take steps with the same constants, or none at all."""
    config = replace(CONFIG, weight_decay=0.3)
    server = TinyTrainingTrunk(folder, Partition(1, 1), Placement())
    with (
        connect(folder, server) as model,
        pytest.raises(ConfigError, match=r"connect with optimizer=config\.optimizer"),
    ):
        Trainer(model, config, some_examples(12))
    with connect(folder, server, optimizer=config.optimizer) as model:
        assert Trainer(model, config, some_examples(12)).run().step == CONFIG.steps


@pytest.mark.parametrize(
    ("dtype", "torch_dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_half_precision(folder, dtype, torch_dtype):
    """Blocks in half precision learn; in fp16 the losses are scaled, and no step is lost to it."""
    server = TinyTrainingTrunk(folder, Partition(1, 1), Placement(dtype=torch_dtype))
    config = replace(CONFIG, steps=8, batch_size=12, accumulate=1, learning_rate=0.05)
    losses = Losses()
    with connect(folder, server, dtype=dtype, lora=replace(LORA, dropout=0.0)) as model:
        summary = Trainer(model, config, some_examples(12), callbacks=[losses]).run()
        assert (model.loss_scale > 1) == (dtype == "fp16")
    assert summary.step == 8
    assert losses.found[-1] < losses.found[0]
    assert server.optimizer is not None
    assert server.optimizer.steps == 8
