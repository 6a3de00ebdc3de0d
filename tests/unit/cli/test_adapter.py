"""`fedsea adapter`: parts for each side, and whole again."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from fedsea.model.adapters import CONFIG, TENSORS, write_adapter
from fedsea.model.checkpoint import Checkpoint
from fedsea.model.lora import Adapter, LoraConfig
from fedsea.model.partition import Span
from fedsea.model.spans import Placement, load_trunk


@pytest.fixture(scope="module")
def adapter(tiny_model, tmp_path_factory):
    """An adapter of all five blocks of the tiny model."""
    folder = tmp_path_factory.mktemp("adapter")
    blocks = load_trunk(Checkpoint.open(tiny_model), Span(0, 5), Placement())
    generator = torch.Generator().manual_seed(1)
    whole = Adapter.fresh(LoraConfig(rank=2), blocks.span, blocks.linears(), generator)
    write_adapter(folder, [whole], "tiny")
    return folder


def test_parts_are_disjoint_and_merge_to_the_whole(fedsea, adapter, tiny_model, tmp_path):
    """The trunk's part holds its blocks only; both parts together are the adapter again."""
    for part in ("trunk", "client"):
        found = fedsea("adapter", "export", adapter, tmp_path / part, "--model", tiny_model,
                       "--part", part, "--bottom", 1, "--top", 2)  # fmt: skip
        assert found.exit_code == 0, found.stderr
    trunk = load_file(tmp_path / "trunk" / TENSORS)
    assert {name.split(".layers.")[1][0] for name in trunk} == {"1", "2"}

    merged = fedsea("adapter", "merge", tmp_path / "whole", tmp_path / "trunk", tmp_path / "client")

    assert merged.exit_code == 0, merged.stderr
    expected = load_file(adapter / TENSORS)
    whole = load_file(tmp_path / "whole" / TENSORS)
    assert whole.keys() == expected.keys()
    assert all(torch.equal(whole[name], expected[name]) for name in expected)


def test_the_same_part_twice_is_refused(fedsea, adapter, tmp_path):
    """One line says that the parts overlap."""
    found = fedsea("adapter", "merge", tmp_path / "whole", adapter, adapter)

    assert found.exit_code == 2
    assert "not the parts of one adapter" in found.stderr


def test_a_folder_without_adapter_is_named(fedsea, tiny_model, tmp_path):
    """The missing file is in the message."""
    found = fedsea("adapter", "export", tmp_path, tmp_path / "out", "--model", tiny_model)

    assert found.exit_code == 3
    assert CONFIG in found.stderr
