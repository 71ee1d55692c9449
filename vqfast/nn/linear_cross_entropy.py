"""Head and cross-entropy in one, block of rows by block, so that the logits never exist as a whole.

    logits = x · wᵀ,   loss = mean_n (log Σ_v exp(logits_nv) − logits_nt)
    d = (softmax(logits) − one-hot(t)) / N,   dx = d · w,   dw = dᵀ · x

The gradients are made in the forward pass, while a block of logits is there, and only scaled in the
backward pass.
Source: linkedin/Liger-Kernel (fused linear cross-entropy); the definition.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vqfast.ops.cross_entropy import cross_entropy

_BLOCK = 1 << 23  # logits that a block holds, twice with their gradients
_FORMATS = (torch.float32, torch.bfloat16)  # in float16 gradients need the scale of the loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, kind: torch.dtype, wanted: bool
    ) -> Tensor:
        rows, w, N = x.to(kind), weight.to(kind), len(x)
        losses = x.new_empty(N, dtype=torch.float32)
        share = losses.new_full((1,), 1 / N)
        dx = torch.empty_like(x)
        dw: Any = None
        step = max(1, _BLOCK // len(w))
        for n in range(0, N, step):
            at = slice(n, n + step)
            logits = rows[at] @ w.T  # [step, V]
            losses[at], *sums = torch.ops.vqfast.cross_entropy(logits, targets[at])
            if not wanted:
                continue
            d = torch.ops.vqfast.cross_entropy_backward(
                share.expand(len(logits)), logits, targets[at], *sums
            )
            del logits
            dx[at] = d @ w
            part = d.T @ rows[at]
            dw = part.float() if dw is None else dw.add_(part)
        if wanted:
            ctx.save_for_backward(dx, dw.to(weight.dtype))
        return losses.mean()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        found = [
            None if not needed else g if grad == 1 else g * grad
            for g, needed in zip(ctx.saved_tensors, ctx.needs_input_grad[:2], strict=True)
        ]
        return *found, None, None, None


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """cross_entropy(F.linear(x, weight), targets); on a CPU without ever holding all logits.

    Args:
        x: [..., E] float32 or bfloat16 for the blocks; other formats hold all logits.
        weight: [V, E].
        targets: [...] integers in 0..V-1.

    Returns:
        [], float32; the mean. Differentiable once in x and weight, in the precision of autocast if
        that is on.

    Raises:
        TypeError, ValueError: as `cross_entropy` about the targets, where all logits are held; in
            blocks a target out of range gives NaN.

    Numerics: the loss is that of `cross_entropy`; dw is added up over blocks in float32.
    Cost: 6·N·V·E flops, all in the forward pass; holds blocks of 2²³ logits, twice.
    """
    autocast = torch.is_autocast_enabled("cpu")
    kind = torch.get_autocast_dtype("cpu") if autocast else x.dtype
    V = len(weight)
    if (
        x.device.type != "cpu"
        or torch.compiler.is_compiling()
        or kind not in _FORMATS
        or (not autocast and weight.dtype != kind)
        or targets.numel() * V <= _BLOCK
    ):
        return cross_entropy(F.linear(x, weight), targets)
    flat, t = x.reshape(-1, x.shape[-1]), targets.reshape(-1).to(torch.int64).contiguous()
    return _LinearCrossEntropy.apply(flat, weight, t, kind, torch.is_grad_enabled())
