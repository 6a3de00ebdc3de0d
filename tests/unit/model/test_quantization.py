"""Weight formats: who makes them, what they refuse, and that a split stays close to the whole."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from tests.tiny_models import save_tiny
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from fedsea.errors import ConfigError, UnsupportedModel
from fedsea.model import quantization
from fedsea.model.attention import RaggedBatch
from fedsea.model.checkpoint import Checkpoint
from fedsea.model.partition import Partition, Span
from fedsea.model.quantization import FORMATS, library_config
from fedsea.model.spans import Placement, load_bottom, load_top, load_trunk
from fedsea.server.config import QUANTIZATIONS

CPU = torch.device("cpu")
needs_bitsandbytes = pytest.mark.skipif(
    find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama on disk, wide enough for the blocks of 64 that nf4 scales together."""
    path = tmp_path_factory.mktemp("models") / "llama"
    return save_tiny("llama", path, hidden_size=64, intermediate_size=128)


def logits_through_parts(folder, ids: Tensor, trunk_format: str) -> Tensor:
    """Logits of a split whose trunk has a weight format."""
    checkpoint, partition = Checkpoint.open(folder), Partition(1, 1)
    plain, trunk_placement = Placement(), Placement(quantization=trunk_format)
    blocks = checkpoint.num_blocks
    bottom = load_bottom(checkpoint, partition.bottom_span(), plain)
    trunk = load_trunk(checkpoint, partition.trunk_span(blocks), trunk_placement)
    top = load_top(checkpoint, partition.top_span(blocks), plain)
    batch = RaggedBatch.whole([len(ids)], CPU)
    with torch.no_grad():
        hidden = trunk.run(bottom.run(ids, batch), batch)
        return top.run(hidden, batch, torch.arange(len(ids)))


def save_quantized(folder, target, *, head_too: bool):
    """The model as transformers stores it in nf4."""
    asked = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=[] if head_too else None,
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=asked, device_map={"": "cpu"}
    )
    model.save_pretrained(target)
    return model


@needs_bitsandbytes
def test_nf4_trunk_is_close_to_the_whole_model(folder):
    """Logits differ by the error of four bits, and by more than rounding: the format was used."""
    ids = torch.tensor([3, 9, 4, 17, 5])
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        expected = whole(ids[None]).logits[0]

    found = logits_through_parts(folder, ids, "nf4")

    error = (found - expected).norm() / expected.norm()
    assert 1e-4 < error < 0.3


@needs_bitsandbytes
def test_nf4_rows_do_not_depend_on_their_neighbours(folder):
    """A sequence's rows are the same alone and beside those of another tenant."""
    checkpoint = Checkpoint.open(folder)
    span = Partition(1, 1).trunk_span(checkpoint.num_blocks)
    trunk = load_trunk(checkpoint, span, Placement(quantization="nf4"))
    rows = torch.randn(5, checkpoint.hidden_size)
    other = 100 * torch.randn(7, checkpoint.hidden_size)
    with torch.no_grad():
        alone = trunk.run(rows, RaggedBatch.whole([5], CPU))
        beside = trunk.run(torch.cat([rows, other]), RaggedBatch.whole([5, 7], CPU))

    torch.testing.assert_close(beside[:5], alone, rtol=1e-4, atol=1e-4)


@needs_bitsandbytes
def test_int8_of_a_gpu_is_asked_for_without_outliers():
    """Outlier columns would let one tenant's row change another's result."""
    config = library_config("int8", torch.device("cuda"), torch.float16)

    assert config is not None
    assert config.load_in_8bit
    assert config.llm_int8_threshold == 0.0


@pytest.mark.parametrize(("quantization_name", "device"), [("none", "cuda"), ("int8", "cpu")])
def test_own_formats_ask_transformers_for_nothing(quantization_name, device):
    """Unquantized weights and our own int8 load as they are."""
    assert library_config(quantization_name, torch.device(device), torch.float32) is None


def test_unknown_format_is_refused_with_those_that_are_known():
    """The message lists the formats."""
    with pytest.raises(ConfigError, match="none, int8, nf4"):
        library_config("int3", CPU, torch.float32)


def test_device_without_the_library_is_refused():
    """Apple's GPU has no bitsandbytes."""
    with pytest.raises(ConfigError, match="use none on mps"):
        library_config("nf4", torch.device("mps"), torch.float32)


def test_missing_library_is_named(monkeypatch):
    """The message says what to install."""
    monkeypatch.setattr(quantization, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="extra `quantization`"):
        library_config("nf4", CPU, torch.float32)


def test_server_configuration_knows_the_same_formats():
    """The keys of a configuration file and the loader agree."""
    assert QUANTIZATIONS == FORMATS


@needs_bitsandbytes
def test_checkpoint_stored_quantized_loads_as_stored(folder, tmp_path):
    """Blocks of a checkpoint that was saved in nf4 give what the whole of it gives."""
    stored = save_quantized(folder, tmp_path, head_too=False)
    ids = torch.tensor([3, 9, 4, 17, 5])
    with torch.no_grad():
        expected = stored(ids[None]).logits[0]

    found = logits_through_parts(tmp_path, ids, "none")

    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@needs_bitsandbytes
def test_head_stored_quantized_is_refused(folder, tmp_path):
    """A head of packed numbers is named instead of computed with."""
    save_quantized(folder, tmp_path, head_too=True)

    with pytest.raises(UnsupportedModel, match="lm_head"):
        load_top(Checkpoint.open(tmp_path), Span(1, 2), Placement())
