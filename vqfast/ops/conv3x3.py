"""3x3 convolution of stride 1 and padding 1, without gradient: most of what a VQGAN computes.

    y[b, o, i, j] = bias_o + Σ_{c, p, q} w[o, c, p, q] · x[b, c, i + p − 1, j + q − 1]

The C++ kernel is Winograd's F(2x2, 3x3): 16 products for 4 outputs in place of 36. The reference is
torch's convolution, which also serves where the kernel refuses (few positions or channels, other
dtypes, GPUs).

Cost: 18·B·H·W·C·O flops by definition, 2.25 times fewer by Winograd; reads x and w, writes y.
Source: arXiv:1509.09308 section 4.1.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vqfast import _check
from vqfast._dispatch import Op


def _reference(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x [B, H, W, C], weight [O, 3, 3, C], bias [O] -> [B, H, W, O]."""
    w = weight.movedim(-1, 1)  # [O, C, 3, 3]
    return F.conv2d(x.movedim(-1, 1), w, bias, padding=1).movedim(1, -1).contiguous()


def _outputs(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:3], weight.shape[0]))


_OP = Op(
    "conv3x3(Tensor x, Tensor weight, Tensor bias) -> Tensor",
    reference=_reference,
    outputs=_outputs,
)


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """F.conv2d(x, weight, bias, padding=1) for a 3x3 weight, without gradient.

    Args:
        x: [B, C, H, W] floating point; channels_last for no copy.
        weight: [O, C, 3, 3], dtype and device of x; channels_last for no copy.
        bias: [O].

    Returns:
        [B, O, H, W] like x, channels_last.

    Raises:
        TypeError: not floating-point tensors, or of different dtypes.
        ValueError: shapes or devices disagree.
        RuntimeError: a gradient is asked for.

    Numerics: the maximum error stays within twice that of torch's convolution. An image's result
        does not depend on the rest of the batch.
    Cost: reads B·H·W·C + 9·C·O values, writes B·H·W·O.
    Source: arXiv:1509.09308 section 4.1.
    """
    for name, t in (("x", x), ("weight", weight), ("bias", bias)):
        _check.floating(name, t)
        _check.same_dtype(name, t, "x", x)
        _check.same_device(name, t, "x", x)
        if torch.is_grad_enabled() and t.requires_grad:
            raise RuntimeError(f"conv3x3 has no gradient, but {name} requires one: use F.conv2d")
    _check.ndim("x", x, 4)
    _check.ndim("weight", weight, 4)
    _check.shape("weight", weight, [len(weight), x.shape[1], 3, 3], "to match the channels of x")
    _check.shape("bias", bias, [len(weight)], "to match weight")
    rows, w = x.movedim(1, -1).contiguous(), weight.movedim(1, -1).contiguous()
    return _OP(rows, w, bias.contiguous()).movedim(-1, 1)


def sample_inputs(case: Any, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs of the raw op for a case with shape B, C, O, H, W."""
    g = torch.Generator().manual_seed(0)
    B, C, outs, H, W = (case.shape[k] for k in "BCOHW")
    x = torch.randn(B, H, W, C, generator=g)
    weight = torch.randn(outs, 3, 3, C, generator=g) / (9 * C) ** 0.5
    return tuple(t.to(device, dtype) for t in (x, weight, torch.randn(outs, generator=g)))


def COST(case: Any) -> tuple[int, int]:
    """Bytes (float32, read or written once) and flops of the definition."""
    B, C, outs, H, W = (case.shape[k] for k in "BCOHW")
    macs = 9 * B * H * W * C * outs
    return 4 * (B * H * W * (C + outs) + 9 * C * outs), 2 * macs
