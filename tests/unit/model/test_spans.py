"""Loading a span: what is stored decides how little memory it takes, never what it computes."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.tiny_models import save_tiny

from fedsea.model.checkpoint import Checkpoint
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
