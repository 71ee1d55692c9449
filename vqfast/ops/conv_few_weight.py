"""Gradients of a convolution on few positions with respect to its weight and bias.

    dw[o, c, p, q] = Σ_{b, i, j} g[b, o, i, j] · x[b, c, s·i + p − d, s·j + q − d],   db_o = Σ g_o

s is the stride, d the padding. As ops/conv_few.py: a product of matrices that writes the gradient
once, also in float32 from bfloat16 maps. The reference is torch's gradient.

Cost: 2·k²·B·h·w·C·O flops (h, w of g); reads x and g, writes dw.
Source: arXiv:1410.0759 section 3 (lowering to a matrix product).
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.grad import conv2d_weight

from vqfast import _check
from vqfast._dispatch import Op
from vqfast.ops import _conv_few as shared


def _reference(
    x: Tensor, grad: Tensor, stride: int, padding: int, side: int, wide: bool
) -> tuple[Tensor, Tensor]:
    """x [B, H, W, C], grad [B, h, w, O] -> dw [O, k, k, C], db [O]."""
    shape = (grad.shape[-1], x.shape[-1], side, side)
    steps = {"stride": stride, "padding": padding}
    dw = conv2d_weight(x.movedim(-1, 1), shape, grad.movedim(-1, 1), **steps)
    dw, db = dw.movedim(1, -1).contiguous(), grad.sum((0, 1, 2))
    return (dw.float(), db.float()) if wide else (dw, db)


def _outputs(
    x: Tensor, grad: Tensor, stride: int, padding: int, side: int, wide: bool
) -> tuple[Tensor, Tensor]:
    outs, dtype = grad.shape[-1], torch.float32 if wide else x.dtype
    shape = (outs, side, side, x.shape[-1])
    return x.new_empty(shape, dtype=dtype), x.new_empty((outs,), dtype=dtype)


_OP = Op(
    "conv_few_weight(Tensor x, Tensor grad, int stride, int padding, int side, bool wide)"
    " -> (Tensor, Tensor)",
    reference=_reference,
    outputs=_outputs,
)


def conv_few_weight(
    x: Tensor,
    grad: Tensor,
    k: int,
    *,
    stride: int = 1,
    padding: int = 0,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """What the backward pass of F.conv2d(x, weight, bias, stride, padding) gives weight and bias.

    Args:
        x: [B, C, H, W] floating point, the convolution's input; channels_last for no copy.
        grad: [B, O, h, w], of its output, dtype and device of x; channels_last for no copy.
        k: taps of the weight along each axis.
        stride: ≥ 1, of both axes.
        padding: ≥ 0, zeros around x.
        dtype: of the results: that of x (None), or torch.float32 where x is bfloat16.

    Returns:
        (dw [O, C, k, k], channels_last; db [O]) on the device of x. Not differentiable.

    Raises:
        TypeError: not floating-point tensors, or of different dtypes, or another dtype.
        ValueError: shapes or devices disagree, or a step is too small.

    Numerics: the maximum error stays within three times that of torch's gradient. Equal results
        for any number of threads.
    Cost: reads B·H·W·C + B·h·w·O values, writes k²·C·O.
    Source: arXiv:1410.0759 section 3.
    """
    for name, t in (("x", x), ("grad", grad)):
        _check.floating(name, t)
        _check.same_dtype(name, t, "x", x)
        _check.same_device(name, t, "x", x)
        _check.ndim(name, t, 4)
    wide = _check.wide_result(dtype, x)
    shared.check_steps(stride, padding)
    h, w = (shared.side(n, k, stride, padding) for n in x.shape[2:])
    _check.shape("grad", grad, [len(x), grad.shape[1], h, w], "to match x")
    rows, grads = (t.detach().movedim(1, -1).contiguous() for t in (x, grad))
    dw, db = _OP(rows, grads, stride, padding, k, wide)
    return dw.movedim(-1, 1), db


def sample_inputs(case: Any, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    """Inputs of the raw op for a case as in ops/conv_few.py."""
    x, weight, _, stride, padding = shared.sample_inputs(case, dtype, device)
    h, w = (shared.side(n, weight.shape[1], stride, padding) for n in x.shape[1:3])
    g = torch.Generator().manual_seed(1)
    grad = torch.randn(len(x), h, w, len(weight), generator=g).to(device, dtype)
    wide = weight.dtype != dtype
    return x, grad, stride, padding, weight.shape[1], wide


COST = shared.COST
