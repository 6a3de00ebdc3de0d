"""Linear layers for inference: the fastest kernel of this machine, and int8 weights.

torch sends small products on CPUs to its BLAS or to oneDNN with plain weights; both are far from
the memory bandwidth for a few rows. oneDNN with weights packed once reaches it on most machines,
so which of the two wins is measured once per process and dtype. Both give the same numbers up to
rounding.

int8: weights are symmetric per output channel; activations are quantized per row at run time, so a
row's result never depends on the other rows (other tenants' rows) of the batch.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from fedsea.errors import ConfigError

PACKABLE = (torch.float32, torch.bfloat16)

# Rows that the packed layout is made for; it serves one row and a whole prompt about as well.
_PACKED_FOR_ROWS = 64
_PROBE_SIZE = 1024
# Together larger than a second-level cache, as the weights of a model are.
_PROBE_WEIGHTS = 8
_PROBE_REPEATS = 7

Release = Callable[[Tensor], None]


def _keep(weight: Tensor) -> None:
    """Leave a weight that was replaced to the garbage collector."""


class PackedLinear(nn.Module):
    """A linear layer whose weight lies in oneDNN's packed layout.

    Unpacking is exact, so gradients with respect to the input are those of the plain layer. Only the
    backward unpacks, and keeps nothing of it.
    """

    weight: Tensor

    @torch.no_grad()
    def __init__(self, source: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = source.in_features, source.out_features
        self.bias = source.bias
        self.register_buffer("weight", _pack(source.weight.detach()), persistent=False)
        self.number = _register(self)

    def forward(self, rows: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        if torch.compiler.is_compiling():
            product: Tensor = torch.ops.fedsea.packed_product(rows, self.number, self.out_features)
            return product
        if rows.requires_grad and torch.is_grad_enabled():
            # Flat, since the kernel gives more dimensions as a view, and autograd forbids changing a
            # view in place (models that clip their projections do) where a function of ours made it.
            flat = rows.reshape(-1, self.in_features)
            differentiable: Tensor = _PackedProduct.apply(flat, self)  # type: ignore[no-untyped-call]
            return differentiable.reshape(*rows.shape[:-1], self.out_features)
        return _packed_product(rows, self.weight, self.bias)


class _PackedProduct(torch.autograd.Function):
    """The product of a `PackedLinear` with (n, in) rows, the same with and without a gradient."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, layer: PackedLinear) -> Tensor:
        ctx.layer = layer
        return _packed_product(rows, layer.weight, layer.bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        # oneDNN reads the weight of the transposed layer where it lies.
        return _packed_product(gradient, ctx.layer.weight.to_dense().t(), None), None


class Int8Linear(nn.Module):
    """A linear layer with int8 weights and per-row int8 activations.

    Activations are mapped to 1..255 around 128 with scale absmax / 127 for each row; the product
    is exact in int32, so the only errors are the two roundings.
    """

    scales: Tensor
    zeros: Tensor

    @torch.no_grad()
    def __init__(self, source: nn.Linear) -> None:
        super().__init__()
        if source.weight.device.type != "cpu":
            raise ConfigError(
                "int8 weights are for the CPU; on a GPU use bf16, or a checkpoint quantized for it"
            )
        self.in_features, self.out_features = source.in_features, source.out_features
        weight = source.weight.detach().float()
        scales = weight.abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny) / 127.0
        codes = torch.round(weight / scales[:, None]).clamp_(-127, 127).to(torch.int8)
        self.packed = torch.ops.onednn.qlinear_prepack(codes.contiguous(), None)
        self.register_buffer("scales", scales, persistent=False)
        self.register_buffer("zeros", torch.zeros_like(scales, dtype=torch.int32), persistent=False)
        self.bias = None if source.bias is None else nn.Parameter(source.bias.detach().float())
        self.number = _register(self)

    def forward(self, rows: Tensor) -> Tensor:
        """(..., in) to (..., out), in the dtype of the input.

        Raises:
            ConfigError: a gradient was asked for.
        """
        if rows.requires_grad:
            raise ConfigError("int8 weights give no gradients; load the span without quantization")
        flat = rows.reshape(-1, self.in_features).float()
        row_scales = flat.abs().amax(dim=1, keepdim=True).clamp_min_(1e-30) / 127.0
        codes = torch.round(flat / row_scales).add_(128.0).to(torch.uint8)
        product = self.product_of_codes(codes) * row_scales
        if self.bias is not None:
            product = product + self.bias
        return product.reshape(*rows.shape[:-1], self.out_features).to(rows.dtype)

    def product_of_codes(self, codes: Tensor) -> Tensor:
        """(n, in) codes around 128 to (n, out), scaled by the weights' scales only."""
        product: Tensor
        if torch.compiler.is_compiling():
            product = torch.ops.fedsea.int8_product(codes, self.number, self.out_features)
        else:
            product = torch.ops.onednn.qlinear_pointwise(
                codes, 1.0, 128, self.packed, self.scales, self.zeros,
                None, 1.0, 0, torch.float32, "none", [], "",
            )  # fmt: skip
        return product


def use_fast_linears(module: nn.Module, release: Release = _keep) -> nn.Module:
    """Replace the CPU linears of the module, or the module, by packed ones where that is faster.

    `release` is given each weight that was packed and is not needed any more.
    """
    return _replace_linears(module, _packed_if_faster, release)


def quantize_int8(module: nn.Module, release: Release = _keep) -> nn.Module:
    """Replace every linear of the module, or the module, by an `Int8Linear`.

    `release` is given each weight that was quantized and is not needed any more.

    Raises:
        ConfigError: the weights are not on the CPU.
    """
    return _replace_linears(module, Int8Linear, release)


@functools.cache
def packing_is_faster(dtype: torch.dtype) -> bool:
    """Whether packed weights win for one row on this machine; takes a few milliseconds."""
    if not packing_works(dtype):
        return False
    plain = [torch.ones(_PROBE_SIZE, _PROBE_SIZE, dtype=dtype) for _ in range(_PROBE_WEIGHTS)]
    packed = [_pack(weight) for weight in plain]
    row = torch.ones(1, _PROBE_SIZE, dtype=dtype)
    with torch.inference_mode():
        seconds = _fastest(
            lambda: [linear(row, weight) for weight in plain],
            lambda: [_packed_product(row, weight, None) for weight in packed],
        )
    return seconds[1] < seconds[0]


def _fastest(*works: Callable[[], object]) -> list[float]:
    """Least seconds of each work over interleaved repeats: other load only ever adds time."""
    best = [float("inf")] * len(works)
    for _ in range(_PROBE_REPEATS):
        for index, work in enumerate(works):
            began = time.perf_counter()
            work()
            best[index] = min(best[index], time.perf_counter() - began)
    return best


@functools.cache
def packing_works(dtype: torch.dtype) -> bool:
    """Whether this build of torch has packed weights of this dtype for this processor."""
    if dtype not in PACKABLE:
        return False
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops, "mkldnn"):
        return False
    try:
        weight = torch.eye(16, dtype=dtype)
        return torch.equal(_packed_product(weight, _pack(weight), None), weight)
    except (RuntimeError, AttributeError):
        # A torch build or a processor without this kernel for this dtype.
        return False


def _pack(weight: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _PACKED_FOR_ROWS)
    return packed


def _packed_product(rows: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(rows, packed, bias, "none", [], "")
    return product


def _packed_if_faster(source: nn.Linear) -> nn.Module:
    if source.weight.device.type != "cpu" or not packing_is_faster(source.weight.dtype):
        return source
    return PackedLinear(source)


def _replace_linears(
    module: nn.Module, make: Callable[[nn.Linear], nn.Module], release: Release
) -> nn.Module:
    # Routers and other subclasses of nn.Linear keep their own forward.
    if type(module) is nn.Linear:
        made = make(module)
        if made is not module:
            release(module.weight)
        return made
    for name, child in module.named_children():
        replacement = _replace_linears(child, make, release)
        if replacement is not child:
            setattr(module, name, replacement)
    return module


# Compiled code cannot hold packed weights, so it names the layer by a number.
_numbers = itertools.count()
_layers: WeakValueDictionary[int, nn.Module] = WeakValueDictionary()


def _register(layer: nn.Module) -> int:
    number = next(_numbers)
    _layers[number] = layer
    return number


def _packed_compiled(rows: Tensor, layer: int, out_features: int) -> Tensor:  # noqa: ARG001
    found: Any = _layers[layer]
    return _packed_product(rows, found.weight, found.bias)


def _int8_compiled(codes: Tensor, layer: int, out_features: int) -> Tensor:  # noqa: ARG001
    found: Any = _layers[layer]
    product: Tensor = found.product_of_codes(codes)
    return product


def _packed_shape(rows: Tensor, layer: int, out_features: int) -> Tensor:  # noqa: ARG001
    return rows.new_empty(*rows.shape[:-1], out_features)


def _int8_shape(codes: Tensor, layer: int, out_features: int) -> Tensor:  # noqa: ARG001
    return codes.new_empty(codes.shape[0], out_features, dtype=torch.float32)


_library = torch.library.Library("fedsea", "FRAGMENT")
_library.define("packed_product(Tensor rows, int layer, int out_features) -> Tensor")
_library.define("int8_product(Tensor codes, int layer, int out_features) -> Tensor")
_library.impl("packed_product", _packed_compiled, "CPU")
_library.impl("packed_product", _packed_shape, "Meta")
_library.impl("int8_product", _int8_compiled, "CPU")
_library.impl("int8_product", _int8_shape, "Meta")
