"""Adapters through the cut: equal to PEFT on the unsplit model, alone and mixed in one batch."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tests.tiny_models import save_tiny
from transformers import AutoModelForCausalLM

from fedsea.errors import CheckpointError, ConfigError
from fedsea.model.adapters import CONFIG, TENSORS, read_adapter, write_adapter
from fedsea.model.attention import RaggedBatch
from fedsea.model.checkpoint import Checkpoint
from fedsea.model.lora import AdaptedRows, Adapter, LoraConfig
from fedsea.model.partition import Partition, Span
from fedsea.model.runner import NewRows, SpanRunner
from fedsea.model.spans import Placement, load_bottom, load_top, load_trunk

ONE_EACH = Partition(1, 1)
CPU = torch.device("cpu")
IDS = torch.tensor([3, 9, 4, 17, 5, 11])
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama of four blocks."""
    return save_tiny("llama", tmp_path_factory.mktemp("models") / "llama", num_hidden_layers=4)


def whole_with_adapter(folder, seed: int, **options):
    """The unsplit model with a random PEFT adapter, B included."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = PeftConfig(
        **{"r": 4, "lora_alpha": 12, "target_modules": TARGETS, "task_type": "CAUSAL_LM"} | options
    )
    torch.manual_seed(seed)
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    return adapted.eval()


class Parts:
    """Bottom, trunk and top of a folder, each with its part of an adapter."""

    def __init__(self, folder, adapter_folder=None, partition=ONE_EACH) -> None:
        checkpoint = Checkpoint.open(folder)
        blocks = checkpoint.num_blocks
        self.bottom = load_bottom(checkpoint, partition.bottom_span(), Placement())
        self.trunk = load_trunk(checkpoint, partition.trunk_span(blocks), Placement())
        self.top = load_top(checkpoint, partition.top_span(blocks), Placement())
        self.spans = (self.bottom, self.trunk, self.top.span)
        self.adapters: list[Adapter] = []
        if adapter_folder is not None:
            self.use([read_adapter(adapter_folder, span.span) for span in self.spans])

    def use(self, adapters) -> None:
        self.adapters = list(adapters)
        for span, adapter in zip(self.spans, self.adapters, strict=True):
            span.accept(adapter)

    def batch(self, part: int, count: int) -> RaggedBatch:
        rows = (AdaptedRows(0, count, self.adapters[part]),) if self.adapters else ()
        return RaggedBatch.whole([count], CPU, rows)

    def logits(self, ids):
        count = len(ids)
        hidden = self.bottom.run(ids, self.batch(0, count))
        hidden = self.trunk.run(hidden, self.batch(1, count))
        return self.top.run(hidden, self.batch(2, count), torch.arange(count))


@pytest.mark.parametrize("partition", [Partition(1, 1), Partition(0, 0), Partition(2, 1)])
@pytest.mark.parametrize(
    "options",
    [{}, {"use_rslora": True}, {"layers_to_transform": [0, 2]}, {"target_modules": ["q_proj"]}],
    ids=["plain", "rslora", "some blocks", "one target"],
)
def test_split_with_an_adapter_equals_peft_on_the_whole(folder, tmp_path, options, partition):
    """Logits of the parts with their parts of a PEFT adapter are those of PEFT."""
    whole = whole_with_adapter(folder, 1, **options)
    whole.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = whole(IDS[None]).logits[0]
        found = Parts(folder, tmp_path, partition).logits(IDS)

    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_gradients_of_an_adapter_equal_peft(folder, tmp_path):
    """Every factor's gradient of a loss through all three parts is PEFT's."""
    whole = whole_with_adapter(folder, 2)
    whole.save_pretrained(tmp_path)
    whole(IDS[None], labels=IDS[None]).loss.backward()
    parts = Parts(folder, tmp_path)

    logits = parts.logits(IDS)
    torch.nn.functional.cross_entropy(logits[:-1], IDS[1:]).backward()

    grads = {n: p.grad for n, p in whole.named_parameters() if p.grad is not None}
    compared = 0
    for adapter in parts.adapters:
        for place, factors in adapter.factors.items():
            stem = f"base_model.model.model.layers.{place.block}.{place.path}"
            for factor, grad in (("A", factors.a.grad), ("B", factors.b.grad)):
                expected = grads[f"{stem}.lora_{factor}.default.weight"]
                torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-6)
                compared += 1
    assert compared == 4 * len(TARGETS) * 2


def test_parts_written_together_load_in_peft(folder, tmp_path):
    """Three parts saved as one adapter give PEFT the same logits on the unsplit model."""
    whole_with_adapter(folder, 3).save_pretrained(tmp_path / "given")
    parts = Parts(folder, tmp_path / "given")

    write_adapter(tmp_path / "written", parts.adapters, "tiny")

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(model, tmp_path / "written").eval()
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(IDS[None]).logits[0], parts.logits(IDS), rtol=1e-4, atol=1e-4
        )


def trunk_and_adapters(folder):
    """A trunk with three random adapters, two of one rank and one of another."""
    trunk = load_trunk(Checkpoint.open(folder), Span(1, 3), Placement())
    adapters = []
    for seed, rank in ((1, 4), (2, 4), (3, 2)):
        generator = torch.Generator().manual_seed(seed)
        adapter = Adapter.fresh(LoraConfig(rank=rank), trunk.span, trunk.linears(), generator)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.normal_(std=0.1, generator=generator)
        trunk.accept(adapter)
        adapters.append(adapter)
    return trunk, adapters


@pytest.mark.parametrize("counts", [(5, 3, 4, 2), (1, 1, 1, 1)])
@pytest.mark.parametrize("which", [(0, 1, None, 2), (0, 1, None, 0), (None, None, None, None)])
def test_mixed_batch_equals_each_alone(folder, counts, which):
    """Sequences with different adapters, or none, computed together are what each is alone."""
    trunk, adapters = trunk_and_adapters(folder)
    runner = SpanRunner(trunk, 256, Placement())
    hidden = trunk.blocks.config.hidden_size
    rows = torch.randn(sum(counts), hidden, generator=torch.Generator().manual_seed(7))
    chosen = [None if number is None else adapters[number] for number in which]

    def run(indices):
        account = runner.pool.open(16 * len(indices))
        new = []
        for index in indices:
            runner.pool.begin(account, index, counts[index])
            new.append(NewRows(account, index, counts[index], chosen[index]))
        entering = torch.cat([rows.split(counts)[index] for index in indices])
        found = runner.run(entering, runner.advance(new))
        runner.pool.close(account)
        return found

    together = run(range(len(counts))).split(counts)
    for index in range(len(counts)):
        torch.testing.assert_close(together[index], run([index]), rtol=1e-4, atol=1e-4)


def test_changed_factors_are_used_by_mixed_steps(folder):
    """Kept tables of factors are made again when an adapter has changed."""
    trunk, adapters = trunk_and_adapters(folder)
    runner = SpanRunner(trunk, 256, Placement())
    rows = torch.randn(2, trunk.blocks.config.hidden_size)

    def step():
        account = runner.pool.open(64)
        for number in (0, 1):
            runner.pool.begin(account, number, 4)
        new = [NewRows(account, number, 1, adapters[number]) for number in (0, 1)]
        found = runner.run(rows, runner.advance(new))
        runner.pool.close(account)
        return found

    before = step()
    with torch.no_grad():
        for parameter in adapters[0].parameters():
            parameter.mul_(2)
    adapters[0].changed()
    after = step()

    assert not torch.allclose(before[0], after[0])
    torch.testing.assert_close(before[1], after[1])


def test_fresh_adapter_changes_nothing(folder):
    """B is zero, so the first step of training begins at the base model."""
    parts, plain = Parts(folder), Parts(folder)
    generator = torch.Generator().manual_seed(0)
    config = LoraConfig()
    parts.use(Adapter.fresh(config, span.span, span.linears(), generator) for span in parts.spans)
    with torch.no_grad():
        torch.testing.assert_close(parts.logits(IDS), plain.logits(IDS))


def test_dropout_only_in_training(folder):
    """With dropout the same rows differ from step to step in training, and never otherwise."""
    trunk, _ = trunk_and_adapters(folder)
    generator = torch.Generator().manual_seed(5)
    adapter = Adapter.fresh(LoraConfig(dropout=0.5), trunk.span, trunk.linears(), generator)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(std=0.1, generator=generator)
    trunk.accept(adapter)
    rows = torch.randn(4, trunk.blocks.config.hidden_size)
    batch = RaggedBatch.whole([4], CPU, (AdaptedRows(0, 4, adapter),))

    def step():
        with torch.no_grad():
            return trunk.run(rows, batch)

    assert torch.equal(step(), step())
    trunk.adapters.generator = torch.Generator().manual_seed(1)
    assert not torch.equal(step(), step())


def test_dropout_masks_follow_from_the_generator(folder):
    """A forward computed again with a generator of the same seed is the same, bit for bit."""
    trunk, _ = trunk_and_adapters(folder)
    adapter = Adapter.fresh(
        LoraConfig(dropout=0.5), trunk.span, trunk.linears(), torch.Generator().manual_seed(5)
    )
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.fill_(0.05)
    trunk.accept(adapter)
    rows = torch.randn(4, trunk.blocks.config.hidden_size)
    batch = RaggedBatch.whole([4], CPU, (AdaptedRows(0, 4, adapter),))

    def step(seed):
        trunk.adapters.generator = torch.Generator().manual_seed(seed)
        return trunk.run(rows, batch)

    assert torch.equal(step(3), step(3))
    assert not torch.equal(step(3), step(4))


def test_frozen_a_takes_no_gradient(folder):
    """With `freeze_a` only B is trained."""
    trunk, _ = trunk_and_adapters(folder)
    adapter = Adapter.fresh(
        LoraConfig(freeze_a=True), trunk.span, trunk.linears(), torch.Generator().manual_seed(5)
    )
    trunk.accept(adapter)
    rows = torch.randn(4, trunk.blocks.config.hidden_size)
    trunk.run(rows, RaggedBatch.whole([4], CPU, (AdaptedRows(0, 4, adapter),))).sum().backward()

    assert all(factors.a.grad is None for factors in adapter.factors.values())
    assert all(factors.b.grad is not None for factors in adapter.factors.values())


def test_values_of_another_adapter_are_taken_over(folder):
    """`copy_from` copies values and counts as a change; other ranks are refused."""
    _, (first, second, other_rank) = trunk_and_adapters(folder)

    first.copy_from(second)

    assert first.version == 1
    for one, two in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, two)
    with pytest.raises(ConfigError, match="different ranks"):
        first.copy_from(other_rank)


@pytest.mark.parametrize(
    "change",
    [
        {"use_dora": True},
        {"bias": "all"},
        {"peft_type": "IA3"},
        {"rank_pattern": {"q_proj": 2}},
        {"init_lora_weights": "pissa"},
        {"modules_to_save": ["lm_head"]},
    ],
    ids=lambda change: next(iter(change)),
)
def test_adapters_of_other_kinds_are_refused(folder, tmp_path, change):
    """What would be computed wrongly is named instead."""
    whole_with_adapter(folder, 4).save_pretrained(tmp_path)
    described = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(described | change))

    with pytest.raises(
        ConfigError, match=next(iter(change)) if "peft_type" not in change else "LORA"
    ):
        read_adapter(tmp_path, Span(0, 4))


def test_missing_and_corrupt_files_are_named(folder, tmp_path):
    """Each file has its own message; a wrong rank, NaN and foreign tensors are found."""
    with pytest.raises(CheckpointError, match=CONFIG):
        read_adapter(tmp_path, Span(0, 4))
    whole_with_adapter(folder, 4).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    first = min(name for name in tensors if "lora_A" in name)
    for change, error in (
        ({first: tensors[first][:2].clone()}, "rank"),
        ({first: tensors[first] * torch.nan}, "NaN"),
    ):
        save_file(tensors | change, tmp_path / TENSORS)
        with pytest.raises(CheckpointError, match=error):
            read_adapter(tmp_path, Span(0, 4))
    save_file(tensors | {"base_model.model.lm_head.weight": torch.ones(2)}, tmp_path / TENSORS)
    with pytest.raises(ConfigError, match="outside of the linears"):
        read_adapter(tmp_path, Span(0, 4))
    (tmp_path / TENSORS).write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_adapter(tmp_path, Span(0, 4))
    (tmp_path / TENSORS).unlink()
    with pytest.raises(CheckpointError, match="is not there"):
        read_adapter(tmp_path, Span(0, 4))


def test_adapter_of_another_model_is_refused(folder, tmp_path):
    """Sizes are compared before anything is computed."""
    other = save_tiny("llama", tmp_path / "other", num_hidden_layers=4, hidden_size=32)
    whole_with_adapter(other, 5).save_pretrained(tmp_path / "adapter")
    trunk = load_trunk(Checkpoint.open(folder), Span(1, 3), Placement())

    with pytest.raises(ConfigError, match="does not fit"):
        trunk.accept(read_adapter(tmp_path / "adapter", trunk.span))


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 0},
        {"alpha": 0.0},
        {"alpha": float("nan")},
        {"dropout": 1.0},
        {"targets": ()},
        {"blocks": ()},
        {"blocks": (-1,)},
    ],
    ids=str,
)
def test_values_out_of_range_are_refused(options):
    """Every parameter says its range."""
    with pytest.raises(ConfigError, match="lora"):
        LoraConfig(**options)


def test_unknown_target_is_refused_with_those_that_are_known(folder):
    """The message lists the linears of the model."""
    trunk = load_trunk(Checkpoint.open(folder), Span(1, 3), Placement())
    with pytest.raises(ConfigError, match="down_proj"):
        Adapter.fresh(
            LoraConfig(targets=("query",)), trunk.span, trunk.linears(), torch.Generator()
        )


# PEFT makes the factors that no part has, which change nothing, and says so.
@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
def test_parts_that_name_their_own_targets_and_blocks_are_one(folder, tmp_path):
    """Parts of one rank and scale join; PEFT loads the whole with the logits of the parts."""
    checkpoint = Checkpoint.open(folder)
    spans = [
        load_bottom(checkpoint, Span(0, 1), Placement()),
        load_trunk(checkpoint, Span(1, 3), Placement()),
        load_top(checkpoint, Span(3, 4), Placement()).span,
    ]
    configs = (
        LoraConfig(rank=4, targets=("q_proj", "v_proj")),
        LoraConfig(rank=4, targets=("q_proj", "v_proj"), blocks=(2,)),
        LoraConfig(rank=4, targets=("v_proj",), freeze_a=True),
    )
    parts = Parts(folder)
    adapters = []
    for span, config in zip(spans, configs, strict=True):
        made = Adapter.fresh(config, span.span, span.linears(), torch.Generator().manual_seed(1))
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.normal_(std=0.1)
        adapters.append(made)
    parts.use(adapters)

    write_adapter(tmp_path, adapters, "tiny")

    read = read_adapter(tmp_path, Span(0, 4))
    assert read.config.targets == ("q_proj", "v_proj")
    assert read.config.blocks == (0, 2, 3)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(model, tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(IDS[None]).logits[0], parts.logits(IDS), rtol=1e-4, atol=1e-4
        )


def test_a_part_without_factors_is_written_and_read(folder, tmp_path):
    """Where nothing is trained, a part is an adapter of no linears, and joins with the others."""
    config = LoraConfig(rank=4, targets=("q_proj",))
    empty = Adapter(config, Span(0, 0), {})
    write_adapter(tmp_path / "empty", [empty, Adapter(config, Span(4, 4), {})], "tiny")
    read = read_adapter(tmp_path / "empty", Span(0, 4))
    assert not read.factors
    assert read.config == config
    trunk = load_trunk(Checkpoint.open(folder), Span(0, 4), Placement())
    other = LoraConfig(rank=8, targets=("v_proj",))
    full = Adapter.fresh(other, trunk.span, trunk.linears(), torch.Generator())
    write_adapter(tmp_path / "whole", [read, full], "tiny")
    assert read_adapter(tmp_path / "whole", Span(0, 4)).config == other


def test_parts_of_different_adapters_are_not_written_as_one(folder, tmp_path):
    """Ranks that differ, or the same block twice, are a mistake of the caller."""
    _, adapters = trunk_and_adapters(folder)
    with pytest.raises(ConfigError, match="not the parts"):
        write_adapter(tmp_path, [adapters[0], adapters[2]], "tiny")
    with pytest.raises(ConfigError, match="not the parts"):
        write_adapter(tmp_path, [adapters[0], adapters[1]], "tiny")
