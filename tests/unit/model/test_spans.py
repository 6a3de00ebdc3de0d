"""Loading a span: what is stored decides how little memory it takes, never what it computes."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.tiny_models import save_tiny

from fedsea.model.attention import RaggedBatch
from fedsea.model.checkpoint import Checkpoint
from fedsea.model.lora import AdaptedLinear, AdaptedRows, Adapter, LoraConfig
from fedsea.model.partition import Span
from fedsea.model.runner import NewRows, SpanRunner
from fedsea.model.spans import Placement, load_trunk

INT8 = Placement(quantization="int8")
ROWS = 9


def store(folder, source, dtype):
    """A copy of a checkpoint whose numbers are rounded to half precision and stored in `dtype`."""
    folder.mkdir()
    rounded = {
        name: t.half().to(dtype) for name, t in load_file(source / "model.safetensors").items()
    }
    save_file(rounded, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    return Checkpoint.open(folder)


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3_moe"])
def test_int8_from_half_precision_needs_no_wider_copy(family, tmp_path):
    """int8 weights made from stored 16-bit numbers equal those made from the same in fp32."""
    source = save_tiny(family, tmp_path / "source")
    outputs = []
    for dtype in (torch.float16, torch.float32):
        checkpoint = store(tmp_path / str(dtype), source, dtype)
        trunk = load_trunk(checkpoint, Span(1, 4), INT8)
        assert {parameter.dtype for parameter in trunk.parameters()} == {torch.float32}
        runner = SpanRunner(trunk, 16, INT8)
        account = runner.pool.open(16)
        runner.pool.begin(account, 0, 16)
        rows = torch.randn(ROWS, checkpoint.hidden_size, generator=torch.manual_seed(0))
        outputs.append(runner.run(rows, runner.advance([NewRows(account, 0, ROWS)])))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3_moe", "deepseek_v3"])
def test_a_replica_shares_weights_and_nothing_that_runs(family, tmp_path):
    """It computes the same without a cache, knows no adapters, and leaves the original's step."""
    checkpoint = Checkpoint.open(save_tiny(family, tmp_path / "model"))
    trunk = load_trunk(checkpoint, Span(1, 4), Placement())
    runner = SpanRunner(trunk, 16, Placement())
    account = runner.pool.open(16)
    runner.pool.begin(account, 0, 16)
    rows = torch.randn(ROWS, checkpoint.hidden_size, generator=torch.manual_seed(0))
    expected = runner.run(rows, runner.advance([NewRows(account, 0, ROWS)]))
    adapter = Adapter.fresh(
        LoraConfig(targets=("q_a_proj" if family == "deepseek_v3" else "q_proj",)),
        trunk.span, trunk.linears(), torch.Generator().manual_seed(1),
    )  # fmt: skip
    trunk.accept(adapter)

    replica = trunk.replica()
    before = trunk.context.batch
    leaf = rows.clone().requires_grad_()
    found = replica.run(leaf, RaggedBatch.whole([ROWS], torch.device("cpu")))

    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert torch.autograd.grad(found.sum(), leaf)[0].isfinite().all()
    assert trunk.context.batch is before
    assert not any(isinstance(module, AdaptedLinear) for module in replica.modules())
    assert {p.data_ptr() for p in replica.parameters()} <= {
        p.data_ptr() for p in trunk.parameters()
    }
    replica.accept(adapter)
    own = RaggedBatch.whole([ROWS], torch.device("cpu"), (AdaptedRows(0, ROWS, adapter),))
    replica.run(rows, own)
    assert trunk.adapters.rows == ()


def test_a_replica_runs_a_part_of_its_blocks(tmp_path):
    """A narrower span of the replica is that of the original."""
    checkpoint = Checkpoint.open(save_tiny("llama", tmp_path / "model"))
    trunk = load_trunk(checkpoint, Span(0, 4), Placement())
    rows = torch.randn(ROWS, checkpoint.hidden_size, generator=torch.manual_seed(0))
    batch = RaggedBatch.whole([4, 5], torch.device("cpu"))
    narrow = load_trunk(checkpoint, Span(1, 3), Placement())
    torch.testing.assert_close(
        trunk.replica().run(rows, batch, Span(1, 3)),
        narrow.run(rows, RaggedBatch.whole([4, 5], torch.device("cpu"))),
    )
