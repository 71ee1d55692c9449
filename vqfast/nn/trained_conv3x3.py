"""A 3x3 convolution with gradients, on many positions all three products by Winograd.

2.25 or 4 times fewer multiplications:

    y = conv(x, w) + b,   dx = conv(g, w'),   w'[c, o, p, q] = w[o, c, 2 − p, 2 − q],

dw and db as in ops/conv3x3_weight.py. Small images of a batch stand below each other, a row of
zeros between them, and are one large image. Few positions: see nn/trained_conv.py.
Source: arXiv:1509.09308 section 4.1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vqfast.nn.trained_conv import (
    FEW_POSITIONS,
    as_autocast,
    pulled_back,
    right_dtypes,
    trained_conv,
)
from vqfast.ops.conv3x3 import conv3x3
from vqfast.ops.conv3x3_weight import conv3x3_weight

# of an image: on fewer the transforms of the weights cost more than they save (2026-11-30)
_LEAST_POSITIONS, _LEAST_CHANNELS = 1024, 32


def _conv(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
    """ops.conv3x3 of x [B, C, H, W], or of its images as one if each has too few positions."""
    B, C, H, W = x.shape
    if H * W >= _LEAST_POSITIONS:
        return conv3x3(x, weight, bias, residual)
    stacked = x.new_zeros((B, H + 1, W, C))
    stacked[:, :H] = x.movedim(1, -1)
    y = conv3x3(stacked.view(1, -1, W, C).movedim(-1, 1), weight, bias)
    y = y.movedim(1, -1).view(B, H + 1, W, -1)[:, :H].contiguous().movedim(-1, 1)
    return y if residual is None else y.add_(residual)


def _turned(weight: Tensor) -> Tensor:
    """w' of weight [O, C, 3, 3], channels_last: faster than flip and transpose."""
    outs, C = weight.shape[:2]
    taps = weight.movedim(1, -1).reshape(outs, 9 * C).t().contiguous().view(9, C, outs)
    return torch.stack(taps.unbind()[::-1], 1).view(C, 3, 3, outs).movedim(-1, 1)


class _Winograd(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None
    ) -> Tensor:
        rounded = weight.to(x.dtype)
        ctx.save_for_backward(x, rounded)
        ctx.dtype = weight.dtype
        # detached: callers add to the result in place, which autograd forbids on a view
        return _conv(x, rounded, bias.to(x.dtype), residual).detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        gradients = pulled_back(
            ctx,
            lambda: _conv(grad, _turned(weight), grad.new_zeros(x.shape[1])),
            lambda: conv3x3_weight(x, grad, dtype=ctx.dtype),
        )
        return *gradients, grad if ctx.needs_input_grad[3] else None


def trained_conv3x3(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None
) -> Tensor:
    """F.conv2d(x, weight, bias, padding=1) + residual, on a CPU differentiable once and faster.

    Float32 and bfloat16 batches of more than 512 positions and 32 channels on both sides take
    `ops.conv3x3`, in the precision of autocast if that is on; all others `trained_conv`.

    Args:
        x: [B, C, H, W]; channels_last for no copy.
        weight: [O, C, 3, 3]; channels_last for no copy.
        bias: [O].
        residual: [B, O, H, W] or None.

    Returns:
        [B, O, H, W] like x (under autocast of its dtype).

    Numerics: the maximum error stays within twice that of torch's convolution, that of gradients
        within three times.
    """
    if x.dim() == 4 and x.shape[0] * x.shape[2] * x.shape[3] > FEW_POSITIONS:
        (given,) = as_autocast(x)
        right = right_dtypes(x, weight)
        if right and x.device.type == "cpu" and min(weight.shape[:2]) >= _LEAST_CHANNELS:
            same = residual is not None and residual.dtype == given.dtype
            with torch.autocast("cpu", enabled=False):
                y = _Winograd.apply(given, weight, bias, residual if same else None)
            return y if same or residual is None else y.add_(residual)
    y = trained_conv(x, weight, bias, padding=1)
    # in place: no backward pass needs the output of a convolution
    return y if residual is None else y.add_(residual)
