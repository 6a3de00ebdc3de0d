"""Linear layers for inference: the fastest kernel of this machine, and int8 weights.

torch sends fp32 products on CPUs to its BLAS, which is slow for few rows on some machines. oneDNN
multiplies by the same unpacked weight. Which one wins depends on the machine, so it is measured
once per process and shape class. Both give the same numbers up to rounding.

int8: weights are symmetric per output channel; activations are quantized per row at run time, so a
row's result never depends on the other rows (other tenants' rows) of the batch.
"""

from __future__ import annotations

import functools
import statistics
import time

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

_PROBE_SIZE = 1024
# Together larger than a last-level cache, as the weights of a model are.
_PROBE_WEIGHTS = 24
_PROBE_REPEATS = 3


def onednn_linear(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``rows @ weight.T + bias`` by oneDNN; fp32 or bf16 on the CPU, inference only."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return product


class OneDNNLinear(nn.Linear):
    """A linear layer that multiplies by oneDNN when no gradient is asked for."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's own argument name
        """(..., in) to (..., out)."""
        if torch.is_grad_enabled():
            return linear(input, self.weight, self.bias)
        return onednn_linear(input, self.weight, self.bias)


class Int8Linear(nn.Module):
    """A linear layer with int8 weights and per-row int8 activations.

    Activations are mapped to 0..255 around 128 with scale absmax / 127 for each row; the product
    is exact in int32, so the only errors are the two roundings.
    """

    def __init__(self, source: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = source.in_features, source.out_features
        weight = source.weight.detach().float()
        scales = weight.abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny) / 127.0
        codes = torch.round(weight / scales[:, None]).clamp_(-127, 127).to(torch.int8)
        self.packed = torch.ops.onednn.qlinear_prepack(codes.contiguous(), None)
        self.register_buffer("scales", scales, persistent=False)
        self.register_buffer("zeros", torch.zeros_like(scales, dtype=torch.int32), persistent=False)
        self.bias = None if source.bias is None else nn.Parameter(source.bias.detach().float())

    def forward(self, rows: Tensor) -> Tensor:
        """(..., in) to (..., out), in the dtype of the input."""
        flat = rows.reshape(-1, self.in_features).float()
        row_scales = flat.abs().amax(dim=1, keepdim=True).clamp_min_(1e-30) / 127.0
        codes = torch.round(flat / row_scales).add_(128.0).to(torch.uint8)
        product: Tensor = torch.ops.onednn.qlinear_pointwise(
            codes, 1.0, 128, self.packed, self.scales, self.zeros,
            None, 1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip
        product.mul_(row_scales)
        if self.bias is not None:
            product += self.bias
        return product.reshape(*rows.shape[:-1], self.out_features).to(rows.dtype)


@functools.cache
def onednn_is_faster() -> bool:
    """Whether oneDNN beats the BLAS for one fp32 row on this machine; takes a few milliseconds."""
    if not torch.backends.mkldnn.is_available() or not hasattr(
        torch.ops.mkldnn, "_linear_pointwise"
    ):
        return False
    weights = [torch.ones(_PROBE_SIZE, _PROBE_SIZE) for _ in range(_PROBE_WEIGHTS)]
    row = torch.ones(1, _PROBE_SIZE)
    blas, onednn = [], []
    with torch.inference_mode():
        for _ in range(_PROBE_REPEATS):
            for weight in weights:
                began = time.perf_counter()
                linear(row, weight)
                middle = time.perf_counter()
                onednn_linear(row, weight, None)
                blas.append(middle - began)
                onednn.append(time.perf_counter() - middle)
    return statistics.median(onednn) < statistics.median(blas)


def use_fast_linears(module: nn.Module) -> None:
    """Let every fp32 CPU linear of the module use oneDNN where that is faster."""
    if not onednn_is_faster():
        return
    for child in module.modules():
        if type(child) is nn.Linear and child.weight.dtype == torch.float32:
            child.__class__ = OneDNNLinear


def quantize_int8(module: nn.Module) -> None:
    """Replace every linear of the module by an `Int8Linear`."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, Int8Linear(child))
        else:
            quantize_int8(child)
