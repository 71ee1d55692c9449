"""Gradient of a convolution on few positions with respect to its input.

    dx[b, c, u, v] = Σ g[b, o, i, j] · w[o, c, p, q],   s·i + p − d = u,  s·j + q − d = v

s is the stride, d the padding. As ops/conv_few.py: a product of matrices that reads the weight
once, also in float32 beside bfloat16 maps. The reference is torch's gradient.

Cost: 2·k²·B·h·w·C·O flops (h, w of g); reads g and w, writes dx.
Source: arXiv:1410.0759 section 3 (lowering to a matrix product).
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.grad import conv2d_input

from vqfast import _check
from vqfast._dispatch import Op
from vqfast.ops import _conv_few as shared


def _reference(
    grad: Tensor, weight: Tensor, stride: int, padding: int, height: int, width: int
) -> Tensor:
    """grad [B, h, w, O], weight [O, k, k, C] -> dx [B, H, W, C]."""
    w = weight.movedim(-1, 1).to(grad.dtype)
    shape = (grad.shape[0], weight.shape[-1], height, width)
    steps = {"stride": stride, "padding": padding}
    dx = conv2d_input(shape, w, grad.movedim(-1, 1), **steps)
    return dx.movedim(1, -1).contiguous()


def _outputs(
    grad: Tensor, weight: Tensor, stride: int, padding: int, height: int, width: int
) -> Tensor:
    return grad.new_empty((grad.shape[0], height, width, weight.shape[-1]))


_OP = Op(
    "conv_few_input(Tensor grad, Tensor weight, int stride, int padding, int height, int width)"
    " -> Tensor",
    reference=_reference,
    outputs=_outputs,
)


def conv_few_input(
    grad: Tensor, weight: Tensor, size: tuple[int, int], *, stride: int = 1, padding: int = 0
) -> Tensor:
    """What the backward pass of F.conv2d(x, weight, None, stride, padding) gives x.

    Args:
        grad: [B, O, h, w] floating point, of its output; channels_last for no copy.
        weight: [O, C, k, k], of the dtype of grad, or float32 where that is bfloat16; device of
            grad; channels_last for no copy.
        size: (H, W) of x.
        stride: ≥ 1, of both axes.
        padding: ≥ 0, zeros around x.

    Returns:
        dx [B, C, H, W] like grad, channels_last. Not differentiable.

    Raises:
        TypeError: not floating-point tensors, or of other dtypes.
        ValueError: shapes or devices disagree, or a step is too small.

    Numerics: the maximum error stays within three times that of torch's gradient.
    Cost: reads B·h·w·O + k²·C·O values, writes B·H·W·C.
    Source: arXiv:1410.0759 section 3.
    """
    for name, t in (("grad", grad), ("weight", weight)):
        _check.floating(name, t)
        _check.same_device(name, t, "grad", grad)
        _check.ndim(name, t, 4)
    _check.same_or_wide("weight", weight, "grad", grad)
    shared.check_steps(stride, padding)
    k = weight.shape[2]
    _check.shape("weight", weight, [grad.shape[1], weight.shape[1], k, k], "to match grad")
    h, w = (shared.side(n, k, stride, padding) for n in size)
    _check.shape("grad", grad, [grad.shape[0], grad.shape[1], h, w], f"for an x of {list(size)}")
    rows = grad.detach().movedim(1, -1).contiguous()
    matrix = weight.detach().movedim(1, -1).contiguous()
    return _OP(rows, matrix, stride, padding, *size).movedim(-1, 1)


def sample_inputs(case: Any, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    """Inputs of the raw op for a case as in ops/conv_few.py."""
    x, weight, _, stride, padding = shared.sample_inputs(case, dtype, device)
    (H, W), k = x.shape[1:3], weight.shape[1]
    h, w = (shared.side(n, k, stride, padding) for n in (H, W))
    g = torch.Generator().manual_seed(1)
    grad = torch.randn(len(x), h, w, len(weight), generator=g).to(device, dtype)
    return grad, weight, stride, padding, H, W


COST = shared.COST
