"""A split model under `transformers.Trainer`: the course of PEFT's under the same Trainer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from tests.tiny_models import VOCABULARY, save_tiny
from tests.training_trunk import TinyTrainingTrunk
from torch import Tensor
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from fedsea.client.training import SplitForTraining
from fedsea.client.trunk_callback import TrunkCallback
from fedsea.errors import ConfigError, NotFinite, StaleStep
from fedsea.model.lora import TARGETS, LoraConfig
from fedsea.model.partition import Partition
from fedsea.transport.memory import MemoryChannel

pytestmark = pytest.mark.filterwarnings("ignore")
CUT = Partition(1, 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama of four blocks."""
    return save_tiny("llama", tmp_path_factory.mktemp("models") / "llama", num_hidden_layers=4)


def examples(count: int) -> list[dict[str, list[int]]]:
    """Random examples of different lengths."""
    generator = torch.Generator().manual_seed(1)
    lengths = [4 + number % 7 for number in range(count)]
    made = [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]
    return [{"input_ids": ids, "labels": ids} for ids in made]


def padded(batch: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
    """A batch padded on the right."""
    longest = max(len(one["input_ids"]) for one in batch)
    fill = {"input_ids": 0, "labels": -100}
    found = {
        name: torch.tensor([one[name] + [empty] * (longest - len(one[name])) for one in batch])
        for name, empty in fill.items()
    }
    return found | {"attention_mask": (found["labels"] != -100).long()}


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    """Twelve steps of two batches of two examples, without dropout, on the CPU."""
    return TrainingArguments(
        output_dir=str(folder),
        **{
            "max_steps": 12,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "learning_rate": 5e-3,
            "lr_scheduler_type": "linear",
            "warmup_steps": 2,
            "max_grad_norm": 0.0,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
            "remove_unused_columns": False,
            "weight_decay": 0.01,
            **options,
        },
    )


class Run:
    """A split model, its server in this process, and a Trainer."""

    def __init__(self, folder: Path, server: TinyTrainingTrunk, **options: Any) -> None:
        self.server = server
        self.model = SplitForTraining.connect(
            folder,
            {"memory": lambda: MemoryChannel(server)},
            name="run",
            lora=LoraConfig(rank=4),
            seed=3,
            **options,
        )

    def trainer(self, where: Path, **options: Any) -> Trainer:
        """A Trainer of the model; checkpoints go to `where`."""
        return Trainer(
            self.model,
            arguments(where, **options),
            data_collator=padded,
            train_dataset=examples(20),
            eval_dataset=examples(6),
            callbacks=[TrunkCallback(self.model)],
        )


def losses(trainer: Trainer) -> list[float]:
    """The logged losses of all steps."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_course_is_that_of_peft_under_the_same_trainer(folder: Path, tmp_path: Path) -> None:
    """Accumulation, warm-up and schedule: twelve losses and the evaluation are PEFT's."""
    run = Run(folder, TinyTrainingTrunk(folder, CUT))
    config = PeftConfig(r=4, lora_alpha=16, target_modules=list(TARGETS), task_type="CAUSAL_LM")
    whole = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)
    state = dict(whole.named_parameters())
    assert run.server.adapter is not None
    with torch.no_grad():
        for adapter in (*run.model.adapters(), run.server.adapter):
            for place, pair in adapter.factors.items():
                stem = f"base_model.model.model.layers.{place.block}.{place.path}"
                state[f"{stem}.lora_A.default.weight"].copy_(pair.a)
    reference = Trainer(
        whole,
        arguments(tmp_path / "peft"),
        data_collator=padded,
        train_dataset=examples(20),
        eval_dataset=examples(6),
    )
    split = run.trainer(tmp_path / "split")

    reference.train()
    split.train()

    assert run.model.steps == 12
    assert losses(split) == pytest.approx(losses(reference), rel=1e-3)
    found, expected = split.evaluate(), reference.evaluate()
    assert found["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-3)
    run.model.close()


def test_resumed_course_is_that_of_one_without_a_break(folder: Path, tmp_path: Path) -> None:
    """Saved at step 6, the whole of it goes on in another client, bit for bit."""
    calm = Run(folder, TinyTrainingTrunk(folder, CUT))
    through = calm.trainer(tmp_path / "calm")
    through.train()
    calm.model.close()
    server = TinyTrainingTrunk(folder, CUT)
    first = Run(folder, server)
    begun = first.trainer(tmp_path / "broken", save_strategy="steps", save_steps=6, max_steps=12)
    begun.train()
    first.model.close()
    assert sorted(server.saved) == [6, 12]

    second = Run(folder, server, resume_steps=(6,))
    resumed = second.trainer(tmp_path / "broken")
    resumed.train(resume_from_checkpoint=str(tmp_path / "broken" / "checkpoint-6"))
    second.model.close()

    assert losses(resumed) == losses(through)


def test_a_checkpoint_that_the_server_lacks_is_refused(folder: Path, tmp_path: Path) -> None:
    """The Trainer's part alone is not enough to go on from."""
    run = Run(folder, TinyTrainingTrunk(folder, CUT))
    run.trainer(tmp_path, save_strategy="steps", save_steps=6).train()
    run.model.close()
    other = Run(folder, TinyTrainingTrunk(folder, CUT))
    with pytest.raises(StaleStep):
        other.trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    other.model.close()


def test_gradients_that_are_not_finite_stop_with_the_step(folder: Path, tmp_path: Path) -> None:
    """The trunk's NaN ends the training by the step's number."""
    run = Run(folder, TinyTrainingTrunk(folder, CUT))
    assert run.server.adapter is not None
    for parameter in run.server.adapter.parameters():
        parameter.register_hook(lambda gradient: gradient * torch.nan)
    with pytest.raises(NotFinite, match="step 1"):
        run.trainer(tmp_path).train()
    run.model.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fp16": True}, "fp16 scales"),
        (
            {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"},
            "without the trunk",
        ),
    ],
    ids=["fp16", "best"],
)
def test_what_the_trunk_cannot_follow_is_refused(
    folder: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    """Before the first step, in words."""
    run = Run(folder, TinyTrainingTrunk(folder, CUT))
    with pytest.raises(ConfigError, match=message):
        run.trainer(tmp_path, **options).train()
    run.model.close()
