"""A 3x3 convolution with gradients, all three of its products by `ops.conv3x3` and its twin.

    y = conv(x, w) + b,   dx = conv(g, w'),   w'[c, o, p, q] = w[o, c, 2 − p, 2 − q],   dw, db: see
    ops/conv3x3_weight.py

so that training gets Winograd's 2.25 times fewer multiplications forward and backward.
Source: arXiv:1509.09308 section 4.1.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vqfast.ops import conv3x3, conv3x3_weight

# on fewer positions the transforms of the weights cost more than they save
_LEAST_POSITIONS, _LEAST_CHANNELS = 1024, 32


class _Conv3x3(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        # detached: callers add to the result in place, which autograd forbids on a view
        return conv3x3(x, weight, bias).detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            turned = weight.flip(2, 3).transpose(0, 1)
            dx = conv3x3(grad, turned, grad.new_zeros(x.shape[1]))
        if any(ctx.needs_input_grad[1:]):
            dw, db = conv3x3_weight(x, grad)
        return dx, dw, db


def trained_conv3x3(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """F.conv2d(x, weight, bias, padding=1), differentiable once where `ops.conv3x3` computes it.

    That is in float32 on a CPU, outside of autocast, for images of at least 1024 positions and 32
    channels on both sides. Elsewhere it is F.conv2d itself.

    Args:
        x: [B, C, H, W]; channels_last for no copy.
        weight: [O, C, 3, 3]; channels_last for no copy.
        bias: [O].

    Returns:
        [B, O, H, W] like x, channels_last where `ops.conv3x3` serves.

    Numerics: the maximum error stays within twice that of torch's convolution, that of gradients
        within three times.
    """
    ours = (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and x.shape[2] * x.shape[3] >= _LEAST_POSITIONS
        and min(weight.shape[:2]) >= _LEAST_CHANNELS
    )
    if ours:
        return _Conv3x3.apply(x, weight, bias)
    return F.conv2d(x, weight, bias, padding=1)
