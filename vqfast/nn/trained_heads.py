"""Query, key and value of a transformer in training on a CPU, as one product under autocast.

    [q k v] = x · [w_q; w_k; w_v]ᵀ + [b_q b_k b_v]

The cast to bfloat16 copies the weights anyway, so packing them costs nothing; x is cast once in
place of three times, and so is dx. The heads are views of the one result, and the gradients that
attention gives are copied once, into one packed buffer, as they would be for three products.
In float32 packing would cost a copy of the weights, and does not pay.
Source: the definition.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _PackedHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, n_head: int, *parameters: Tensor) -> tuple[Tensor, ...]:
        n = len(parameters) // 2
        kind, E = torch.get_autocast_dtype("cpu"), x.shape[-1]
        packed = x.new_empty((n * E, E), dtype=kind)
        bias = x.new_empty(n * E, dtype=kind)
        for i in range(n):
            packed[i * E : (i + 1) * E] = parameters[i]
            bias[i * E : (i + 1) * E] = parameters[n + i]
        rows = x.reshape(-1, E).to(kind)  # [M, E]
        ctx.save_for_backward(rows, packed)
        ctx.like, ctx.kinds = x.dtype, [p.dtype for p in parameters]
        y = F.linear(rows, packed, bias).view(*x.shape[:2], n, n_head, E // n_head)
        return tuple(part.transpose(1, 2) for part in y.unbind(2))  # [B, H, S, d] each

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, packed = ctx.saved_tensors
        B, H, S, d = grads[0].shape
        together = rows.new_empty(B, S, len(grads), H, d)
        for part, grad in zip(together.unbind(2), grads, strict=True):
            part.copy_(grad.transpose(1, 2))
        flat = together.view(B * S, -1)  # [M, n · E]
        dx = (flat @ packed).view(B, S, -1).to(ctx.like) if ctx.needs_input_grad[0] else None
        wanted, n, E = ctx.needs_input_grad[2:], len(grads), H * d
        dw: Sequence[Any] = [None] * n
        db: Sequence[Any] = [None] * n
        if any(wanted[:n]):
            dw = (flat.T @ rows).split(E)
        if any(wanted[n:]):
            db = flat.sum(0).split(E)
        found = zip((*dw, *db), ctx.kinds, wanted, strict=True)
        return dx, None, *(g.to(kind) if w else None for g, kind, w in found)


def trained_heads(x: Tensor, layers: Sequence[nn.Linear], n_head: int) -> tuple[Tensor, ...]:
    """Linear layers on the same x, each split into heads; under autocast on a CPU one product.

    Args:
        x: [B, S, E].
        layers: of equal width, E -> E, each with a bias.
        n_head: H, divides E.

    Returns:
        for each layer [B, H, S, d], views with d = E / H contiguous.

    Numerics: under autocast sums over E of dx are one, in float32, where torch adds three rounded
        ones.
    """
    B, S, E = x.shape
    if (
        x.device.type == "cpu"
        and torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and x.numel()
        and x.dtype != torch.float64
        # a wrapped or quantised layer has a forward of its own
        and all(type(m) is nn.Linear and m.bias is not None for m in layers)
    ):
        weights, biases = [m.weight for m in layers], [m.bias for m in layers]
        return _PackedHeads.apply(x, n_head, *weights, *biases)
    return tuple(m(x).view(B, S, n_head, E // n_head).transpose(1, 2) for m in layers)
