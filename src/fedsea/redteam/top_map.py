"""The top as a linear map around the rows that entered it, for attacks on gradients.

With activations h and logits f(h), the gradient that a client returns for a mean of cross-entropies
over N scored rows is

    g = J^T (p - y) / N,    J = df/dh,  p = softmax(f(h)),  y one-hot labels

which is linear in the labels: everything but y is known to who has the top (threats 1.6).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedsea.model.attention import RaggedBatch
from fedsea.model.linears import PackedLinear
from fedsea.model.lora import AdaptedRows, Adapter
from fedsea.model.spans import Top


class TopMap:
    """The Jacobian J of the top's logits [n, vocabulary] in its input rows [n, hidden].

    Both products are exact: J^T w is one backward pass, and J r is the derivative of J^T w in w.

    Args:
        top: the attacker's copy; its packed linears become plain ones, which can be differentiated
            twice.
        rows: [n, hidden], one sequence as it entered the client's top.
        adapter: what the client's top adds, where that leaked.
    """

    def __init__(self, top: Top, rows: Tensor, adapter: Adapter | None = None) -> None:
        _unpack(top)
        self._input = rows.detach().float().clone().requires_grad_()
        count = len(rows)
        used = () if adapter is None else (AdaptedRows(0, count, adapter),)
        batch = RaggedBatch.whole([count], rows.device, adapters=used)
        # The fused kernels have no second derivative.
        with sdpa_kernel(SDPBackend.MATH):
            self._logits = top.run(self._input, batch, torch.arange(count))
        self._weights = torch.zeros_like(self._logits, requires_grad=True)
        (self._pulled,) = torch.autograd.grad(
            self._logits, self._input, self._weights, create_graph=True
        )
        self.expected = torch.log_softmax(self._logits.detach(), dim=-1)

    @property
    def probabilities(self) -> Tensor:
        """p [n, vocabulary]: what the client's model expected after each row."""
        return self.expected.exp()

    def pulled(self, weights: Tensor) -> Tensor:
        """J^T w: [n, vocabulary] to [n, hidden]."""
        (found,) = torch.autograd.grad(self._logits, self._input, weights, retain_graph=True)
        return found

    def pushed(self, rows: Tensor) -> Tensor:
        """J r: [n, hidden] to [n, vocabulary]."""
        (found,) = torch.autograd.grad(self._pulled, self._weights, rows, retain_graph=True)
        return found


def _unpack(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, PackedLinear):
            plain = nn.Linear(child.in_features, child.out_features, child.bias is not None)
            plain.weight = nn.Parameter(child.weight.to_dense(), requires_grad=False)
            plain.bias = child.bias
            setattr(module, name, plain)
        else:
            _unpack(child)


def entry_norms(top: Top) -> Tensor:
    """|W_v * gamma|^2 [vocabulary]: how long each label's pull on the final norm's input is.

    For a top that a `TopMap` was made of.

    gamma is what the norm makes of a row of ones, whatever form its family stores it in.
    """
    head: Any = top.causal.lm_head
    weight: Tensor = head.weight
    norm: Any = top.span.blocks.norm
    with torch.no_grad():
        gamma: Tensor = norm(torch.ones(1, weight.shape[1]))[0]
    return (weight.detach().float() * gamma.float()).square().sum(dim=1)
