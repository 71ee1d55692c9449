"""3x3 convolution of stride 2, padded below and at the right, without gradient: what halves the
maps of a VQGAN's encoder.

    y[b, o, i, j] = bias_o + Σ_{c, p, q} w[o, c, p, q] · x[b, c, 2i + p, 2j + q]

x is zero outside; no padded copy is made. The C++ kernel takes 25 products for 4 outputs in place
of 36: Winograd's F(2, 2) for the two outer taps of an axis. The reference is torch's convolution,
which also serves where the kernel refuses (few positions or channels, other dtypes, GPUs).

Cost: 18·B·h·w·C·O flops by definition (h, w of y), 1.44 times fewer; reads x and w, writes y.
Source: arXiv:1509.09308 section 4.1; CompVis/taming-transformers
taming/modules/diffusionmodules/model.py (Downsample).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vqfast import _check
from vqfast._dispatch import Op


def _reference(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x [B, H, W, C], weight [O, 3, 3, C], bias [O] -> y [B, H/2, W/2, O]."""
    w = weight.movedim(-1, 1)  # [O, C, 3, 3]
    padded = F.pad(x, (0, 0, 0, 1, 0, 1)).movedim(-1, 1)  # [B, C, H + 1, W + 1]
    return F.conv2d(padded, w, bias, stride=2).movedim(1, -1).contiguous()


def _outputs(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    B, H, W, _ = x.shape
    return x.new_empty((B, H // 2, W // 2, weight.shape[0]))


_OP = Op(
    "conv3x3_down(Tensor x, Tensor weight, Tensor bias) -> Tensor",
    reference=_reference,
    outputs=_outputs,
)


def conv3x3_down(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """F.conv2d(F.pad(x, (0, 1, 0, 1)), weight, bias, stride=2) for a 3x3 weight, without gradient.

    Args:
        x: [B, C, H, W] floating point, H, W ≥ 2; channels_last for no copy.
        weight: [O, C, 3, 3], dtype and device of x; channels_last for no copy.
        bias: [O].

    Returns:
        [B, O, H // 2, W // 2] like x, channels_last.

    Raises:
        TypeError: not floating-point tensors, or of different dtypes.
        ValueError: shapes or devices disagree, or H or W below 2.
        RuntimeError: a gradient is asked for.

    Numerics: the maximum error stays within twice that of torch's convolution, plus eps of the
        dtype. An image's result does not depend on the rest of the batch.
    Cost: reads B·H·W·C + 9·C·O values, writes B·H·W·O / 4.
    Source: arXiv:1509.09308 section 4.1.
    """
    for name, t in (("x", x), ("weight", weight), ("bias", bias)):
        _check.floating(name, t)
        _check.same_dtype(name, t, "x", x)
        _check.same_device(name, t, "x", x)
        if torch.is_grad_enabled() and t.requires_grad:
            raise RuntimeError(
                f"conv3x3_down has no gradient, but {name} requires one: use F.conv2d"
            )
    _check.ndim("x", x, 4)
    _check.ndim("weight", weight, 4)
    _check.shape("weight", weight, [len(weight), x.shape[1], 3, 3], "to match the channels of x")
    _check.shape("bias", bias, [len(weight)], "to match weight")
    if min(x.shape[2:]) < 2:
        raise ValueError(f"x must have sides of at least 2, got {list(x.shape)}")
    rows, w = x.movedim(1, -1).contiguous(), weight.movedim(1, -1).contiguous()
    return _OP(rows, w, bias.contiguous()).movedim(-1, 1)


def sample_inputs(case: Any, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    """Inputs of the raw op for a case with shape B, C, O, H, W."""
    g = torch.Generator().manual_seed(0)
    B, C, outs, H, W = (case.shape[k] for k in "BCOHW")
    x = torch.randn(B, H, W, C, generator=g)
    weight = torch.randn(outs, 3, 3, C, generator=g) / (9 * C) ** 0.5
    bias = torch.randn(outs, generator=g)
    return tuple(t.to(device, dtype) for t in (x, weight, bias))


def COST(case: Any) -> tuple[int, int]:
    """Bytes (float32, read or written once) and flops of the definition."""
    B, C, outs, H, W = (case.shape[k] for k in "BCOHW")
    positions = B * (H // 2) * (W // 2)  # of y
    return 4 * (B * H * W * C + positions * outs + 9 * C * outs), 18 * positions * C * outs
