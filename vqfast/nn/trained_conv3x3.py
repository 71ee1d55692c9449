"""A 3x3 convolution with gradients, by one of three ways.

Many positions: all three products by Winograd, 2.25 times fewer multiplications,

    y = conv(x, w) + b,   dx = conv(g, w'),   w'[c, o, p, q] = w[o, c, 2 − p, 2 − q],

dw and db as in ops/conv3x3_weight.py. Few positions: products of matrices with the weight as it
lies in memory, [O, 9·C]; a convolution of torch's reorders it for every one of the three, which
takes longer than to multiply. Between them, torch's.
Source: arXiv:1509.09308 section 4.1.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vqfast.ops import conv3x3, conv3x3_weight

# Winograd: on fewer positions of an image the transforms of the weights cost more than they save
_LEAST_POSITIONS, _LEAST_CHANNELS = 1024, 32
# matrices: on more positions of the batch the copies of x cost more than reordering the weight
_FEW_POSITIONS = 256


class _Winograd(torch.autograd.Function):
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


def _columns(x: Tensor) -> Tensor:
    """x [B, C, H, W] -> the nine neighbours of each position, [B·H·W, 9·C]."""
    padded = F.pad(x.movedim(1, -1), (0, 0, 1, 1, 1, 1))  # [B, H + 2, W + 2, C]
    windows = padded.unfold(1, 3, 1).unfold(2, 3, 1)  # [B, H, W, C, 3, 3]
    return windows.movedim(3, -1).reshape(-1, 9 * x.shape[1])


def _matrix(weight: Tensor) -> Tensor:
    """weight [O, C, 3, 3] -> [O, 9·C], a view in channels_last."""
    return weight.movedim(1, -1).reshape(len(weight), -1)


def _times(a: Tensor, b: Tensor) -> Tensor:
    """a [M, K] · b [N, K]ᵀ. torch multiplies float32 by MKL, which reaches 100 GFLOP/s on one core
    of an AMD Zen 5 where oneDNN, if torch has it, reaches 190 (2026-11-25).
    """
    if a.dtype == torch.float32 and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return a @ b.T


class _Matrices(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        B, _, H, W = x.shape
        y = _times(_columns(x), _matrix(weight)).add_(bias)  # [B·H·W, O]
        return y.view(B, H, W, -1).movedim(-1, 1).detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        B, C, H, W = x.shape
        rows = grad.movedim(1, -1).reshape(-1, grad.shape[1])  # [B·H·W, O]
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            parts = _times(rows, _matrix(weight).T).view(B, H, W, 3, 3, C)
            padded = parts.new_zeros((B, H + 2, W + 2, C))
            for p in range(3):
                for q in range(3):
                    padded[:, p : p + H, q : q + W] += parts[:, :, :, p, q]
            dx = padded[:, 1:-1, 1:-1].movedim(-1, 1)
        if ctx.needs_input_grad[1]:
            dw = _times(rows.T, _columns(x).T).view(-1, 3, 3, C).movedim(-1, 1)
        if ctx.needs_input_grad[2]:
            db = rows.sum(0)
        return dx, dw, db


def trained_conv3x3(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """F.conv2d(x, weight, bias, padding=1), on a CPU differentiable once and faster.

    Float32 images of at least 1024 positions and 32 channels on both sides take `ops.conv3x3`,
    batches of at most 256 positions products of matrices, in the precision of autocast if that is
    on; all others, float64 and GPUs F.conv2d itself.

    Args:
        x: [B, C, H, W]; channels_last for no copy.
        weight: [O, C, 3, 3]; channels_last for no copy.
        bias: [O].

    Returns:
        [B, O, H, W] like x (under autocast of its dtype).

    Numerics: the maximum error stays within twice that of torch's convolution, that of gradients
        within three times.
    """
    if x.device.type != "cpu" or x.dtype == torch.float64:
        return F.conv2d(x, weight, bias, padding=1)
    if torch.is_autocast_enabled("cpu"):
        kind = torch.get_autocast_dtype("cpu")
        x, weight, bias = x.to(kind), weight.to(kind), bias.to(kind)
    if 0 < x.shape[0] * x.shape[2] * x.shape[3] <= _FEW_POSITIONS and weight.dtype == x.dtype:
        with torch.autocast("cpu", enabled=False):
            return _Matrices.apply(x, weight, bias)
    many = x.shape[2] * x.shape[3] >= _LEAST_POSITIONS and min(weight.shape[:2]) >= _LEAST_CHANNELS
    if many and x.dtype == weight.dtype and x.dtype in (torch.float32, torch.bfloat16):
        return _Winograd.apply(x, weight, bias)
    return F.conv2d(x, weight, bias, padding=1)
