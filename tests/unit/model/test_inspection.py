"""Sizes told in advance are the sizes that loading shows."""

import json
import sys
from types import SimpleNamespace

import psutil
import pytest
import torch
from safetensors.torch import load_file
from tests.tiny_models import FAMILIES, save_tiny

from fedsea.errors import (
    CheckpointError,
    OutOfMemory,
    PartitionError,
    RequestError,
    UnsupportedModel,
)
from fedsea.model import inspection
from fedsea.model.bundles import split_checkpoint
from fedsea.model.checkpoint import Checkpoint
from fedsea.model.inspection import (
    Memory,
    available_memory,
    block_kv_shape,
    check_memory,
    inspect_model,
)
from fedsea.model.partition import Partition, Span
from fedsea.model.spans import Placement, load_trunk

CONTEXT = 64


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny untied checkpoint in fp32."""
    return save_tiny("llama", tmp_path_factory.mktemp("saved"))


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    """The same with the head tied to the embedding."""
    return save_tiny("llama", tmp_path_factory.mktemp("tied"), tie_word_embeddings=True)


def inspect(folder, bottom=1, top=2, dtype=torch.float32, context=CONTEXT):
    """Inspection of a folder."""
    return inspect_model(Checkpoint.open(folder), Partition(bottom, top), dtype, context)


def test_sides_add_up_to_the_model(saved):
    """Parameters and bytes of both sides together are those of the checkpoint."""
    whole = load_file(saved / "model.safetensors").values()
    inspection = inspect(saved)
    sides = inspection.client, inspection.server
    assert sum(side.parameters for side in sides) == sum(tensor.numel() for tensor in whole)
    assert sum(side.disk for side in sides) == sum(tensor.nbytes for tensor in whole)
    assert [side.num_blocks for side in sides] == [3, 2]


def test_names_and_settings(saved):
    """The inspection says what was inspected, and for which use."""
    inspection = inspect(saved, dtype=torch.bfloat16)
    checkpoint = Checkpoint.open(saved)
    assert inspection.name == checkpoint.name
    assert inspection.family == "llama"
    assert inspection.fingerprint == checkpoint.fingerprint()
    assert inspection.stored_dtypes == ("F32",)
    assert (inspection.num_blocks, inspection.hidden_size) == (5, 48)
    assert inspection.client.spans == (Span(0, 1), Span(3, 5))
    assert inspection.server.spans == (Span(1, 3),)
    assert inspection.row_bytes == 96


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trunk_memory_is_what_loading_takes(saved, dtype):
    """Weights and KV rows of the server are exact."""
    memory = inspect(saved, dtype=dtype).server.memory
    placement = Placement(dtype=dtype)
    trunk = load_trunk(Checkpoint.open(saved), Span(1, 3), placement)
    plain = load_file(saved / "model.safetensors")
    blocks = [
        plain[name] for name in plain if name.startswith(("model.layers.1.", "model.layers.2."))
    ]
    assert memory.weights == sum(tensor.numel() for tensor in blocks) * dtype.itemsize
    cache = trunk.new_cache(CONTEXT, placement)
    assert memory.kv == sum(store.nbytes for store in (*cache.keys, *cache.values))


def test_dtype_scales_weights_and_cache(saved):
    """Half the bytes per number are half the weights and half the KV rows."""
    full, half = (
        inspect(saved, dtype=dtype).server.memory for dtype in (torch.float32, torch.bfloat16)
    )
    assert full.weights == 2 * half.weights
    assert full.kv == 2 * half.kv


def test_context_scales_the_cache_alone(saved):
    """KV rows grow with the context, weights of the server do not."""
    short, long = (inspect(saved, context=context).server.memory for context in (10, 1000))
    assert long.kv == 100 * short.kv
    assert long.weights == short.weights
    assert long.activations > short.activations


def test_wider_sides_move_blocks_to_the_client(saved):
    """A larger bottom and top cost the client what they save the server."""
    narrow, wide = inspect(saved, 0, 0), inspect(saved, 2, 2)
    moved = wide.client.parameters - narrow.client.parameters
    assert moved == narrow.server.parameters - wide.server.parameters > 0


def test_embedding_stays_in_the_file(tmp_path):
    """Unconverted embedding rows take memory only when a token asks for them."""
    save_tiny("llama", tmp_path, vocab_size=20_000)
    embedding = 20_000 * 48 * 4
    as_stored = inspect(tmp_path, 0, 0, context=10).client.memory
    assert embedding < as_stored.weights < 2 * embedding
    converted = inspect(tmp_path, 0, 0, dtype=torch.bfloat16, context=10).client.memory
    assert 2 * converted.weights > 2 * embedding


def test_tied_head_counts_in_memory_not_on_disk(saved, tied):
    """A tied model is smaller on disk, and its client holds the head all the same."""
    separate, shared = inspect(saved).client, inspect(tied).client
    assert separate.disk - shared.disk == 96 * 48 * 4
    assert separate.memory.weights == shared.memory.weights


def test_peak_is_the_larger_of_loading_and_running():
    """Packing weights and computing rows do not happen at the same time."""
    assert Memory(runtime=1, weights=10, loading=5, kv=2, activations=2).peak == 16
    assert Memory(runtime=1, weights=10, loading=5, kv=9, activations=2).peak == 22


@pytest.mark.parametrize(
    "family", ["deepseek_v3", "gemma2", "gpt_oss", "phi3", "qwen3_moe", "stablelm"]
)
def test_kv_rows_of_other_families(family, tmp_path):
    """KV row sizes without loading equal those of the loaded blocks."""
    assert family in FAMILIES
    checkpoint = Checkpoint.open(save_tiny(family, tmp_path))
    loaded = load_trunk(checkpoint, Span(0, checkpoint.num_blocks), Placement())
    assert loaded.kv_shapes() == [block_kv_shape(checkpoint)] * checkpoint.num_blocks


class TestRefusals:
    """What cannot be inspected is said."""

    def test_no_trunk(self, saved):
        """A partition without trunk."""
        with pytest.raises(PartitionError, match="leave no trunk"):
            inspect(saved, 3, 2)

    @pytest.mark.parametrize("context", [0, -5])
    def test_no_context(self, saved, context):
        """A context of no rows."""
        with pytest.raises(RequestError, match="holds nothing"):
            inspect(saved, context=context)

    def test_bundle_lacks_the_other_side(self, saved, tmp_path):
        """A bundle cannot tell what the other side costs."""
        split_checkpoint(Checkpoint.open(saved), Partition(1, 1), tmp_path / "out")
        with pytest.raises(CheckpointError, match="is the client bundle"):
            inspect(tmp_path / "out" / "client")

    def test_family(self, saved, tmp_path):
        """A family that cannot be cut."""
        config = json.loads((saved / "config.json").read_text()) | {"model_type": "gpt_neox"}
        (tmp_path / "config.json").write_text(json.dumps(config))
        (tmp_path / "model.safetensors").symlink_to(saved / "model.safetensors")
        with pytest.raises(UnsupportedModel, match="cannot be cut"):
            inspect(tmp_path)


class TestMemoryCheck:
    """Too little memory is an error before it is a crash."""

    def test_names_need_and_supply(self, monkeypatch):
        """The message has what is needed, what there is, and what helps."""
        free = SimpleNamespace(available=3_000_000_000)
        monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
        check_memory(3_000_000_000, "the trunk")
        with pytest.raises(OutOfMemory, match=r"the trunk needs 13\.50 GB of memory and 3\.00 GB"):
            check_memory(13_500_000_000, "the trunk")

    def test_gpu_memory(self, monkeypatch):
        """On a GPU its own free memory counts."""
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (5, 10))
        assert available_memory(torch.device("cuda")) == 5
        with pytest.raises(OutOfMemory):
            check_memory(6, "the trunk", torch.device("cuda"))

    def test_limit_of_a_container(self, monkeypatch, tmp_path):
        """The tightest control group above this process bounds what is available."""
        inner = tmp_path / "sys/fs/cgroup/pod/box"
        inner.mkdir(parents=True)
        (tmp_path / "proc/self").mkdir(parents=True)
        (tmp_path / "proc/self/cgroup").write_text("1:cpu:/old\n0::/pod/box\n")
        for group, limit in ((inner, "max"), (inner.parent, "5000")):
            (group / "memory.max").write_text(limit + "\n")
            (group / "memory.current").write_text("4000\n")
            (group / "memory.stat").write_text("anon 3000\ninactive_file 700\n")

        assert min(inspection._left_in_groups(tmp_path)) == 1700

    def test_machine_without_groups(self, tmp_path):
        """Where there are no control groups nothing is taken away."""
        assert min(inspection._left_in_groups(tmp_path)) == sys.maxsize

    def test_this_machine(self):
        """What is available here is a positive number of bytes."""
        assert available_memory(torch.device("cpu")) > 0
