"""A convolution with gradients; on few positions by products of matrices, ops/conv_few*.py.

There a convolution of torch's reorders the weight for each of y, dx and dw, which takes longer than
to multiply where the weight is large and the positions are few. Under autocast the weight is read
as it is, in float32, and so is its gradient written: no copy in bfloat16. Where it can, dw is that
of ops/conv3x3_weight.py, which reads no weight and has 4 or 2.25 times fewer products.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

from vqfast.ops.conv3x3_weight import conv3x3_weight
from vqfast.ops.conv_few import conv_few
from vqfast.ops.conv_few_input import conv_few_input
from vqfast.ops.conv_few_weight import conv_few_weight

# of the batch and of channels: on more positions reordering the weight is cheap
FEW_POSITIONS, LEAST_CHANNELS = 512, 16
# of dw by Winograd: on fewer positions the transform of its sums takes longer than it saves
_WINOGRAD_POSITIONS, _WINOGRAD_CHANNELS = 16, 32


def _by_winograd(x: Tensor, weight: Tensor, stride: int, padding: int) -> bool:
    """dw is for ops.conv3x3_weight."""
    if (weight.shape[2], stride, padding) != (3, 1, 1) or x.shape[1] < _WINOGRAD_CHANNELS:
        return False
    return x.shape[0] * x.shape[2] * x.shape[3] >= _WINOGRAD_POSITIONS


def pulled_back(
    ctx: Any,
    of_x: Callable[[], Tensor],
    of_weight: Callable[[], tuple[Tensor, Tensor]],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx, and dw and db, which come together, of an autograd function whose first inputs are x,
    weight and bias; None for what is not asked for.
    """
    asked = ctx.needs_input_grad
    dx = of_x() if asked[0] else None
    dw, db = of_weight() if asked[1] or asked[2] else (None, None)
    return dx, dw, db if asked[2] else None


class _Few(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.steps = {"stride": stride, "padding": padding}
        # detached: callers add to the result in place, which autograd forbids on a view
        return conv_few(x, weight, bias, **ctx.steps).detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        size, k = (x.shape[2], x.shape[3]), weight.shape[2]

        def of_weight() -> tuple[Tensor, Tensor]:
            if _by_winograd(x, weight, **ctx.steps):
                return conv3x3_weight(x, grad, dtype=weight.dtype)
            return conv_few_weight(x, grad, k, dtype=weight.dtype, **ctx.steps)

        def of_x() -> Tensor:
            return conv_few_input(grad, weight, size, **ctx.steps)

        return *pulled_back(ctx, of_x, of_weight), None, None


class _Many(torch.autograd.Function):
    """A 3x3 convolution by torch of which only dw is for an op, as of few outputs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        b = None if bias is None else bias.to(x.dtype)
        return F.conv2d(x, weight.to(x.dtype), b, padding=1).detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        return pulled_back(
            ctx,
            lambda: conv2d_input(x.shape, weight.to(x.dtype), grad, padding=1),
            lambda: conv3x3_weight(x, grad, dtype=weight.dtype),
        )


def as_autocast(x: Tensor, *others: Any) -> tuple[Any, ...]:
    """x, weight and bias (or None) in the precision of autocast, if that is on for a CPU and they
    are on one; in their own otherwise, and in float64.
    """
    if x.device.type != "cpu" or x.dtype == torch.float64 or not torch.is_autocast_enabled("cpu"):
        return x, *others
    kind = torch.get_autocast_dtype("cpu")
    return tuple(t if t is None else t.to(kind) for t in (x, *others))


def right_dtypes(x: Tensor, weight: Tensor) -> bool:
    """The ops take x as autocast makes it beside this weight: of its dtype, or float32 beside
    bfloat16 where autocast is on, as without it torch refuses that.
    """
    (given,) = as_autocast(x)
    wide = torch.is_autocast_enabled("cpu") and weight.dtype == torch.float32
    return given.dtype in (torch.float32, torch.bfloat16) and (wide or given.dtype == weight.dtype)


def _fits(x: Tensor, weight: Tensor) -> bool:
    """x and weight, or what autocast makes of x, are for the ops."""
    fits = x.dim() == weight.dim() == 4 and x.shape[1:2] == weight.shape[1:2]
    square = fits and x.device.type == "cpu" and weight.shape[2] == weight.shape[3]
    return square and right_dtypes(x, weight)


def _few(x: Tensor, weight: Tensor, stride: int, padding: int) -> bool:
    if min(weight.shape[:2]) < LEAST_CHANNELS:
        return False
    h, w = ((n + 2 * padding - weight.shape[2]) // stride + 1 for n in x.shape[2:])
    return min(h, w) > 0 and 0 < x.shape[0] * h * w <= FEW_POSITIONS


def trained_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, stride: int = 1, padding: int = 0
) -> Tensor:
    """F.conv2d(x, weight, bias, stride, padding), on a CPU differentiable once and faster.

    Batches of at most 512 positions of y and 16 channels or more take the ops, in the precision of
    autocast if that is on; others of 3x3 and 32 channels or more those for dw; all others, float64,
    float16 and GPUs F.conv2d itself.

    Args:
        x: [B, C, H, W]; channels_last for no copy.
        weight: [O, C, k, k]; channels_last for no copy.
        bias: [O] or None.

    Returns:
        [B, O, H', W'] like x (under autocast of its dtype).

    Numerics: the maximum error stays within twice that of torch's convolution, that of gradients
        within three times.
    """
    if _fits(x, weight):
        (given,) = as_autocast(x)
        with torch.autocast("cpu", enabled=False):
            if _few(given, weight, stride, padding):
                return _Few.apply(given, weight, bias, stride, padding)
            if _by_winograd(given, weight, stride, padding):
                return _Many.apply(given, weight, bias)
    x, weight, bias = as_autocast(x, weight, bias)
    return F.conv2d(x, weight, bias, stride, padding)


class Conv2d(nn.Conv2d):
    """nn.Conv2d that is `trained_conv` where gradients are recorded. Zeros around x; no groups."""

    weight: nn.Parameter
    padding: tuple[int, ...]

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return super().forward(x)
        (stride, _), (padding, _) = self.stride, self.padding
        return trained_conv(x, self.weight, self.bias, stride=stride, padding=padding)
