"""A convolution with gradients; on few positions by products of matrices.

With the weight as it lies in memory, [O, k·k·C], and the k x k neighbours of each position beside
each other, X [P, k·k·C]:

    y = X·Wᵀ + b,   dX = g·W,   dW = gᵀ·X,   db = Σ g

dX is added up into dx. A convolution of torch's reorders the weight for every one of the three,
which takes longer than to multiply where the weight is large and the positions are few.
Source: arXiv:1410.0759 section 3 (lowering to a matrix product).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# of the batch: on more of them the copies of x cost more than reordering the weight. At 1,024
# torch's is 6 to 10 % faster, at 256 this one by up to 28 % (bf16, one Zen 4 core, 2026-11-30)
FEW_POSITIONS = 256


def _columns(x: Tensor, side: int, stride: int, padding: int) -> Tensor:
    """x [B, C, H, W] -> the neighbours of each position, [B·H'·W', k·k·C]; a view for k = 1."""
    padded = F.pad(x.movedim(1, -1), (0, 0, *[padding] * 4)) if padding else x.movedim(1, -1)
    windows = padded.unfold(1, side, stride).unfold(2, side, stride)  # [B, H', W', C, k, k]
    return windows.movedim(3, -1).reshape(-1, side * side * x.shape[1])


def _matrix(weight: Tensor) -> Tensor:
    """weight [O, C, k, k] -> [O, k·k·C], a view in channels_last."""
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
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.steps = stride, padding
        B, _, H, W = x.shape
        h, w = ((n + 2 * padding - weight.shape[2]) // stride + 1 for n in (H, W))
        y = _times(_columns(x, weight.shape[2], stride, padding), _matrix(weight))  # [B·h·w, O]
        if bias is not None:
            y += bias
        return y.view(B, h, w, -1).movedim(-1, 1).detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        (outs, C, side, _), (stride, padding) = weight.shape, ctx.steps
        rows = grad.movedim(1, -1).reshape(-1, outs)  # [B·h·w, O]
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            dx = _folded(_times(rows, _matrix(weight).T), x.shape, grad.shape, side, *ctx.steps)
        if ctx.needs_input_grad[1]:
            dw = _times(rows.T, _columns(x, side, stride, padding).T)
            dw = dw.view(outs, side, side, C).movedim(-1, 1)
        if ctx.needs_input_grad[2]:
            db = rows.sum(0)
        return dx, dw, db, None, None


def _folded(
    parts: Tensor, x: torch.Size, grad: torch.Size, side: int, stride: int, padding: int
) -> Tensor:
    """parts [B·h·w, k·k·C], one for each pair of positions of y and x -> their sums like x."""
    (B, C, H, W), (h, w) = x, grad[2:]
    if side == stride == 1 and not padding:
        return parts.view(B, H, W, C).movedim(-1, 1)
    parts = parts.view(B, h, w, side, side, C)
    padded = parts.new_zeros((B, H + 2 * padding, W + 2 * padding, C))
    for p in range(side):
        for q in range(side):
            padded[:, p : p + stride * h : stride, q : q + stride * w : stride] += parts[
                :, :, :, p, q
            ]
    return padded[:, padding : padding + H, padding : padding + W].movedim(-1, 1)


def as_autocast(x: Tensor, *others: Any) -> tuple[Any, ...]:
    """x, weight and bias (or None) in the precision of autocast, if that is on for a CPU and they
    are on one; in their own otherwise, and in float64.
    """
    if x.device.type != "cpu" or x.dtype == torch.float64 or not torch.is_autocast_enabled("cpu"):
        return x, *others
    kind = torch.get_autocast_dtype("cpu")
    return tuple(t if t is None else t.to(kind) for t in (x, *others))


def _by_matrices(x: Tensor, weight: Tensor, stride: int, padding: int) -> bool:
    fits = x.dim() == weight.dim() == 4 and x.shape[1:2] == weight.shape[1:2]
    right = x.dtype == weight.dtype and x.dtype in (torch.float32, torch.bfloat16)
    if not (fits and right and x.device.type == "cpu" and weight.shape[2] == weight.shape[3]):
        return False
    h, w = ((n + 2 * padding - weight.shape[2]) // stride + 1 for n in x.shape[2:])
    return min(h, w) > 0 and 0 < x.shape[0] * h * w <= FEW_POSITIONS


def trained_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, stride: int = 1, padding: int = 0
) -> Tensor:
    """F.conv2d(x, weight, bias, stride, padding), on a CPU differentiable once and faster.

    Batches of at most 256 positions of y take products of matrices, in the precision of autocast if
    that is on; all others, float64, float16 and GPUs F.conv2d itself.

    Args:
        x: [B, C, H, W]; channels_last for no copy.
        weight: [O, C, k, k]; channels_last for no copy.
        bias: [O] or None.

    Returns:
        [B, O, H', W'] like x (under autocast of its dtype).

    Numerics: the maximum error stays within twice that of torch's convolution, that of gradients
        within three times.
    """
    x, weight, bias = as_autocast(x, weight, bias)
    if not _by_matrices(x, weight, stride, padding):
        return F.conv2d(x, weight, bias, stride, padding)
    with torch.autocast("cpu", enabled=False):
        return _Matrices.apply(x, weight, bias, stride, padding)


class Conv2d(nn.Conv2d):
    """nn.Conv2d that is `trained_conv` where gradients are recorded. Zeros around x; no groups."""

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return super().forward(x)
        (stride, _), (padding, _) = self.stride, self.padding
        return trained_conv(x, self.weight, self.bias, stride=stride, padding=padding)
