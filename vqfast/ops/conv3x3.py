"""3x3 convolution of stride 1 and padding 1, without gradient: most of what a VQGAN computes.

    y[b, o, i, j] = bias_o + r[b, o, i, j]
                  + Σ_{c, p, q} w[o, c, p, q] · x'[b, c, i + p − 1, j + q − 1]

x' is x, or x with each pixel doubled to 2x2 (`scale` 2); r a residual, or nothing. The C++ kernel
is Winograd's F(2x2, 3x3), 16 products for 4 outputs in place of 36 and 9 on doubled pixels, or for
many positions F(4x4, 3x3), 36 for 16 outputs in place of 144, in bfloat16 by factors of int16; up
to 16 channels a direct sum. The reference is torch's convolution, which also serves where the
kernel refuses (few positions or outputs, 17 to 31 channels, other dtypes, GPUs).

Cost: 18·B·H·W·C·O flops by definition (H, W of y), 2.25 or 4 times fewer by Winograd; reads x and
w, writes y.
Source: arXiv:1509.09308 section 4.1.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vqfast import _check
from vqfast._dispatch import Op


def _reference(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, scale: int
) -> Tensor:
    """x [B, H, W, C], weight [O, 3, 3, C], bias [O], residual like y -> y [B, sH, sW, O]."""
    w = weight.movedim(-1, 1)  # [O, C, 3, 3]
    if scale == 2:
        x = x.repeat_interleave(2, 1).repeat_interleave(2, 2)
    y = F.conv2d(x.movedim(-1, 1), w, bias, padding=1).movedim(1, -1)
    return (y if residual is None else y + residual).contiguous()


def _outputs(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, scale: int
) -> Tensor:
    B, H, W, _ = x.shape
    return x.new_empty((B, scale * H, scale * W, weight.shape[0]))


_OP = Op(
    "conv3x3(Tensor x, Tensor weight, Tensor bias, Tensor? residual, int scale) -> Tensor",
    reference=_reference,
    outputs=_outputs,
)


def conv3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    *,
    scale: int = 1,
) -> Tensor:
    """F.conv2d(x, weight, bias, padding=1) for a 3x3 weight, without gradient.

    Args:
        x: [B, C, H, W] floating point; channels_last for no copy.
        weight: [O, C, 3, 3], dtype and device of x; channels_last for no copy.
        bias: [O].
        residual: [B, O, scale·H, scale·W] to add, or None; channels_last for no copy.
        scale: 2 convolves x with each pixel doubled to 2x2 (nearest); 1 x itself.

    Returns:
        [B, O, scale·H, scale·W] like x, channels_last.

    Raises:
        TypeError: not floating-point tensors, or of different dtypes.
        ValueError: shapes or devices disagree, or another scale.
        RuntimeError: a gradient is asked for.

    Numerics: the maximum error stays within twice that of torch's convolution, plus eps of the
        dtype. An image's result does not depend on the rest of the batch.
    Cost: reads B·H·W·C + 9·C·O values, writes B·scale²·H·W·O.
    Source: arXiv:1509.09308 section 4.1.
    """
    inputs = (("x", x), ("weight", weight), ("bias", bias), ("residual", residual))
    for name, t in inputs:
        if t is None and name == "residual":
            continue
        _check.floating(name, t)
        _check.same_dtype(name, t, "x", x)
        _check.same_device(name, t, "x", x)
        if torch.is_grad_enabled() and t.requires_grad:
            raise RuntimeError(f"conv3x3 has no gradient, but {name} requires one: use F.conv2d")
    if scale not in (1, 2):
        raise ValueError(f"scale must be 1 or 2, got {scale!r}")
    _check.ndim("x", x, 4)
    _check.ndim("weight", weight, 4)
    _check.shape("weight", weight, [len(weight), x.shape[1], 3, 3], "to match the channels of x")
    _check.shape("bias", bias, [len(weight)], "to match weight")
    if residual is not None:
        B, _, H, W = x.shape
        _check.shape("residual", residual, [B, len(weight), scale * H, scale * W], "as the result")
        residual = residual.movedim(1, -1).contiguous()
    rows, w = x.movedim(1, -1).contiguous(), weight.movedim(1, -1).contiguous()
    return _OP(rows, w, bias.contiguous(), residual, scale).movedim(-1, 1)


def sample_inputs(case: Any, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    """Inputs of the raw op for a case with shape B, C, O, H, W, perhaps scale and residual."""
    g = torch.Generator().manual_seed(0)
    B, C, outs, H, W = (case.shape[k] for k in "BCOHW")
    scale, adds = case.shape.get("scale", 1), case.shape.get("residual", 0)
    x = torch.randn(B, H, W, C, generator=g)
    weight = torch.randn(outs, 3, 3, C, generator=g) / (9 * C) ** 0.5
    bias = torch.randn(outs, generator=g)
    residual = torch.randn(B, scale * H, scale * W, outs, generator=g) if adds else None
    tensors = (x, weight, bias, residual)
    return *(t if t is None else t.to(device, dtype) for t in tensors), scale


def COST(case: Any) -> tuple[int, int]:
    """Bytes (float32, read or written once) and flops of the definition."""
    B, C, outs, H, W = (case.shape[k] for k in "BCOHW")
    positions = B * H * W * case.shape.get("scale", 1) ** 2  # of y
    macs = 9 * positions * C * outs
    writes = positions * outs * (1 + case.shape.get("residual", 0))
    return 4 * (B * H * W * C + writes + 9 * C * outs), 2 * macs
