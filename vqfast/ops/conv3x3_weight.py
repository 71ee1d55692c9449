"""Gradients of a 3x3 convolution of stride 1 and padding 1 with respect to its weight and bias.

    dw[o, c, p, q] = Σ_{b, i, j} g[b, o, i, j] · x[b, c, i + p − 1, j + q − 1],   db_o = Σ g_o

The C++ kernel is the transpose of Winograd's F(4x4, 3x3) in the weights: 36 products for 16
positions in place of 144, or on few positions of F(2x2, 3x3): 16 for 4 in place of 36. The
reference is torch's gradient, which also serves where the kernel refuses (few positions or
channels, other dtypes, GPUs).

Cost: 18·B·H·W·C·O flops by definition, 4 or 2.25 times fewer by Winograd; reads x and g, writes dw.
Source: arXiv:1509.09308 section 4.1.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.grad import conv2d_weight

from vqfast import _check
from vqfast._dispatch import Op


def _reference(x: Tensor, grad: Tensor, wide: bool) -> tuple[Tensor, Tensor]:
    """x [B, H, W, C], grad [B, H, W, O] -> dw [O, 3, 3, C], db [O]."""
    g, shape = grad.movedim(-1, 1), (grad.shape[-1], x.shape[-1], 3, 3)
    dw = conv2d_weight(x.movedim(-1, 1), shape, g, padding=1)
    dw, db = dw.movedim(1, -1).contiguous(), grad.sum((0, 1, 2))
    return (dw.float(), db.float()) if wide else (dw, db)


def _outputs(x: Tensor, grad: Tensor, wide: bool) -> tuple[Tensor, Tensor]:
    outs, dtype = grad.shape[-1], torch.float32 if wide else x.dtype
    shape = (outs, 3, 3, x.shape[-1])
    return x.new_empty(shape, dtype=dtype), x.new_empty((outs,), dtype=dtype)


_OP = Op(
    "conv3x3_weight(Tensor x, Tensor grad, bool wide) -> (Tensor, Tensor)",
    reference=_reference,
    outputs=_outputs,
)


def conv3x3_weight(
    x: Tensor, grad: Tensor, *, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """What the backward pass of F.conv2d(x, weight, bias, padding=1) gives weight and bias.

    Args:
        x: [B, C, H, W] floating point, the convolution's input; channels_last for no copy.
        grad: [B, O, H, W], of its output, dtype and device of x; channels_last for no copy.
        dtype: of the results: that of x (None), or torch.float32 where x is bfloat16.

    Returns:
        (dw [O, C, 3, 3], channels_last; db [O]) on the device of x. Not differentiable.

    Raises:
        TypeError: not floating-point tensors, of different dtypes, or another dtype.
        ValueError: shapes or devices disagree.

    Numerics: the maximum error stays within three times that of torch's gradient. Equal results
        for any number of threads.
    Cost: reads B·H·W·(C + O) values, writes 9·C·O.
    Source: arXiv:1509.09308 section 4.1.
    """
    for name, t in (("x", x), ("grad", grad)):
        _check.floating(name, t)
        _check.same_dtype(name, t, "x", x)
        _check.same_device(name, t, "x", x)
        _check.ndim(name, t, 4)
    _check.shape("grad", grad, [x.shape[0], grad.shape[1], *x.shape[2:]], "to match x")
    rows, grads = (t.detach().movedim(1, -1).contiguous() for t in (x, grad))
    dw, db = _OP(rows, grads, _check.wide_result(dtype, x))
    return dw.movedim(-1, 1), db


def sample_inputs(case: Any, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, bool]:
    """Inputs of the raw op for a case with shape B, C, O, H, W, perhaps wide (1: results in
    float32 where x is bfloat16).
    """
    g = torch.Generator().manual_seed(0)
    B, C, outs, H, W = (case.shape[k] for k in "BCOHW")
    x, grad = (torch.randn(B, H, W, n, generator=g).to(device, dtype) for n in (C, outs))
    return x, grad, bool(case.shape.get("wide")) and dtype == torch.bfloat16


def COST(case: Any) -> tuple[int, int]:
    """Bytes (float32, read or written once) and flops of the definition."""
    B, C, outs, H, W = (case.shape[k] for k in "BCOHW")
    macs = 9 * B * H * W * C * outs
    return 4 * (B * H * W * (C + outs) + 9 * C * outs), 2 * macs
