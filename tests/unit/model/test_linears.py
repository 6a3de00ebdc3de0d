"""Linears with a packed weight: equal with and without gradients, and equal to the plain layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedsea.model.linears import PackedLinear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 48), (1, 7, 48), (3, 48)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_packed_linear_has_the_plain_ones_gradient(dtype, shape, bias):
    """Product and gradient of the rows, for one row, for several, and without a batch."""
    chance = torch.Generator().manual_seed(0)
    plain = nn.Linear(48, 80, bias=bias, dtype=dtype).requires_grad_(False)
    try:
        packed = PackedLinear(plain)
        packed(torch.zeros(1, 48, dtype=dtype))
    except RuntimeError:
        pytest.skip(f"this processor does not pack {dtype}")
    rows = torch.randn(shape, generator=chance).to(dtype)
    gradient = torch.randn(*shape[:-1], 80, generator=chance).to(dtype)
    results = []
    for layer in (plain, packed):
        leaf = rows.clone().requires_grad_()
        found = layer(leaf)
        found.backward(gradient)
        results.append((found.detach(), leaf.grad))
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance)
    with torch.no_grad():
        assert torch.equal(packed(rows), results[1][0])


def test_a_packed_linear_keeps_nothing_for_the_backward():
    """What is saved between forward and backward does not grow with the weight."""
    packed = PackedLinear(nn.Linear(64, 64).requires_grad_(False))
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda tensor: tensor):
        packed(torch.ones(2, 64, requires_grad=True))
    assert not saved


def test_what_a_packed_linear_gives_may_be_changed_in_place():
    """As models do that clip their projections; the gradient is that of the plain layer."""
    plain = nn.Linear(48, 80).requires_grad_(False)
    gradients = []
    for layer in (plain, PackedLinear(plain)):
        leaf = torch.linspace(-3, 3, 5 * 48).view(1, 5, 48).requires_grad_()
        layer(leaf).clamp_(min=-0.5, max=0.5).sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)
