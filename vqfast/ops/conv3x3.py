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

from torch import Tensor

from vqfast._dispatch import Op
from vqfast.ops import _conv3x3 as shared

_OP = Op(
    "conv3x3(Tensor x, Tensor weight, Tensor bias, Tensor? residual, int scale) -> Tensor",
    reference=shared.reference,
    outputs=shared.outputs,
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
    return _OP(*shared.rows("conv3x3", x, weight, bias, residual, scale)).movedim(-1, 1)


sample_inputs, COST = shared.sample_inputs, shared.COST
