"""A convolution on few positions, without gradient: the coarse maps of a network in training.

    y[b, o, i, j] = bias_o + Σ_{c, p, q} w[o, c, p, q] · x[b, c, s·i + p − d, s·j + q − d]

x is zero outside; s the stride, d the padding. The C++ kernel is a product of matrices that reads
the weight once, as it lies in memory, and in the precision of training: a float32 weight meets
bfloat16 maps without a copy. The reference is torch's convolution, which also serves where the
kernel refuses (many positions, few channels, other dtypes, GPUs).

Cost: 2·k²·B·h·w·C·O flops (h, w of y); reads x and w, writes y.
Source: arXiv:1410.0759 section 3 (lowering to a matrix product).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from vqfast import _check
from vqfast._dispatch import Op
from vqfast.ops import _conv_few as shared


def _reference(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor:
    """x [B, H, W, C], weight [O, k, k, C], bias [O] -> y [B, h, w, O]."""
    w = weight.movedim(-1, 1).to(x.dtype)  # [O, C, k, k]
    b = None if bias is None else bias.to(x.dtype)
    y = F.conv2d(x.movedim(-1, 1), w, b, stride=stride, padding=padding)
    return y.movedim(1, -1).contiguous()


def _outputs(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor:
    k = weight.shape[1]
    h, w = (shared.side(n, k, stride, padding) for n in x.shape[1:3])
    return x.new_empty((x.shape[0], h, w, weight.shape[0]))


_OP = Op(
    "conv_few(Tensor x, Tensor weight, Tensor? bias, int stride, int padding) -> Tensor",
    reference=_reference,
    outputs=_outputs,
)


def conv_few(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, stride: int = 1, padding: int = 0
) -> Tensor:
    """F.conv2d(x, weight, bias, stride, padding) for a square weight, without gradient.

    Args:
        x: [B, C, H, W] floating point; channels_last for no copy.
        weight: [O, C, k, k], of the dtype of x, or float32 where x is bfloat16: it is then rounded
            on the way; device of x; channels_last for no copy.
        bias: [O], dtype of weight, or None.
        stride: ≥ 1, of both axes.
        padding: ≥ 0, zeros around x.

    Returns:
        [B, O, h, w] like x, channels_last; h = (H + 2·padding − k) // stride + 1.

    Raises:
        TypeError: not floating-point tensors, or of other dtypes.
        ValueError: shapes or devices disagree, the weight is larger than x, or a step is too small.
        RuntimeError: a gradient is asked for.

    Numerics: the maximum error stays within twice that of torch's convolution, plus eps of the
        dtype. An image's result does not depend on the rest of the batch.
    Cost: reads B·H·W·C + k²·C·O values, writes B·h·w·O.
    Source: arXiv:1410.0759 section 3.
    """
    inputs = [("x", x), ("weight", weight)]
    if bias is not None:
        inputs.append(("bias", bias))
    for name, t in inputs:
        _check.floating(name, t)
        _check.same_device(name, t, "x", x)
        if torch.is_grad_enabled() and t.requires_grad:
            raise RuntimeError(f"conv_few has no gradient, but {name} requires one: use F.conv2d")
    _check.same_or_wide("weight", weight, "x", x)
    _check.ndim("x", x, 4)
    _check.ndim("weight", weight, 4)
    k = weight.shape[2]
    _check.shape("weight", weight, [len(weight), x.shape[1], k, k], "to match the channels of x")
    if bias is not None:
        _check.same_dtype("bias", bias, "weight", weight)
        _check.shape("bias", bias, [len(weight)], "to match weight")
    shared.check_steps(stride, padding)
    if min(x.shape[2:]) + 2 * padding < k:
        raise ValueError(f"weight must not be larger than x [{k} taps], got {list(x.shape)}")
    rows, w = x.movedim(1, -1).contiguous(), weight.movedim(1, -1).contiguous()
    b = None if bias is None else bias.contiguous()
    return _OP(rows, w, b, stride, padding).movedim(-1, 1)


sample_inputs, COST = shared.sample_inputs, shared.COST
