"""Replace each vector by its nearest code, with straight-through gradient and the VQ loss.

    idx_n = argmin_k ‖z_n − c_k‖²,   z_q = c[idx],   m = mean((z_q − z)²)
    loss  = (b_z + b_c)·m        b_z = beta, b_c = 1; legacy: b_z = 1, b_c = beta
    ∂z_q/∂z := I,   ∂z_q/∂c := 0
    ∂loss/∂z_n = 2·b_z·(z_n − z_q,n)/(N·D)
    ∂loss/∂c_k = 2·b_c·Σ_{n: idx_n = k} (z_q,n − z_n)/(N·D)

The codebook gradient is `code_stats` of the differences: deterministic, without a one-hot matrix.
For "cosine" both sides are normalised first, outside the autograd function.

Cost: that of `nearest`, and four passes over N·D values.
Source: arXiv:1711.00937 eq. 1-3; CompVis/taming-transformers taming/modules/vqvae/quantize.py
(VectorQuantizer2), FoundationVision/LlamaGen tokenizer (cosine).
"""

import importlib
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from vqfast import _check

# functions of these names replace the modules as attributes of vqfast.ops
_nearest = importlib.import_module("vqfast.ops.nearest")
_code_stats = importlib.import_module("vqfast.ops.code_stats")


class Quantized(NamedTuple):
    """What `quantize` returns."""

    z_q: Tensor  # [..., D] like z: the codes, with the gradient of z
    indices: Tensor  # [...] int64
    loss: Tensor  # [] float32 (float64 for float64 z)


class _Quantize(torch.autograd.Function):
    """z [N, D], codebook [K, D], indices [N] -> z_q [N, D], loss []; in float32 or wider."""

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, codebook: Tensor, indices: Tensor, to_z: float, to_codes: float
    ) -> tuple[Tensor, Tensor]:
        wide = torch.float64 if torch.float64 in (z.dtype, codebook.dtype) else torch.float32
        codes = codebook.index_select(0, indices)  # [N, D]
        difference = codes.to(wide) - z.to(wide)
        mean = difference.square().sum() / max(1, difference.numel())
        z_q = codes.to(z.dtype)
        if not ctx.needs_input_grad[0]:
            ctx.mark_non_differentiable(z_q)
        ctx.save_for_backward(difference, indices)
        ctx.K, ctx.to_z, ctx.to_codes = len(codebook), to_z, to_codes
        ctx.dtypes = z.dtype, codebook.dtype
        return z_q, mean * (to_z + to_codes)

    @staticmethod
    @once_differentiable  # a second derivative would be wrong in silence
    def backward(ctx: Any, grad_z_q: Tensor, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        difference, indices = ctx.saved_tensors
        step = grad_loss * (2.0 / max(1, difference.numel()))
        grad_z = grad_codes = None
        if ctx.needs_input_grad[0]:
            wide = grad_z_q.to(difference.dtype) - difference * (step * ctx.to_z)
            grad_z = wide.to(ctx.dtypes[0])
        if ctx.needs_input_grad[1]:
            _, sums = _code_stats.collect(indices, difference, ctx.K)
            grad_codes = (sums * (step * ctx.to_codes)).to(ctx.dtypes[1])
        return grad_z, grad_codes, None, None, None


def quantize(
    z: Tensor,
    codebook: Tensor,
    *,
    beta: float = 0.25,
    legacy: bool = False,
    metric: str = "l2",
) -> Quantized:
    """Replace each vector by its nearest code; gradients pass straight through.

    idx_n = argmin_k ‖z_n − c_k‖²,   z_q = c[idx],   ∂z_q/∂z := I

    Args:
        z: [..., D] float32, float16 or bfloat16 (float64 on the reference); last dim contiguous for
            no copy.
        codebook: [K, D] on the device of z, 1 ≤ K < 2³¹.
        beta: weight of the commitment term, ≥ 0.
        legacy: True puts beta on the codebook term, as released taming checkpoints were trained.
        metric: "l2", "cosine" (both sides normalised for distance, loss and lookup) or "dot".

    Returns:
        Quantized(z_q [..., D] like z, indices [...] int64, loss [] float32, or float64 for float64
        inputs). z_q holds the codes themselves, not z + (code − z). The loss of no vectors is 0.

    Raises:
        TypeError: z or codebook is not a floating-point tensor, beta is not a number.
        ValueError: shapes disagree, K = 0, beta < 0 or NaN, unknown metric, or devices differ.

    Numerics: indices are exact (float64 rule of `nearest`); loss and gradients are computed in
        float32 or wider and rounded once; a row that is not finite makes the loss not finite. Under
        autocast the search still sees the values that it is given.
    Cost: reads N·D + K·D values, 2·N·K·D flops, writes N·D; never holds N×K.
    Source: arXiv:1711.00937 eq. 1-3; CompVis/taming-transformers taming/modules/vqvae/quantize.py.
    """
    _nearest.check(z, codebook, metric)
    beta = _check.number("beta", beta, low=0.0)
    flat = z.reshape(-1, z.shape[-1])
    indices, _ = _nearest.search(flat, codebook, metric)
    codes = codebook
    if metric == "cosine":
        flat, codes = (F.normalize(_wide(x), dim=-1) for x in (flat, codebook))
    to_z, to_codes = (1.0, beta) if legacy else (beta, 1.0)
    z_q, loss = _Quantize.apply(flat, codes, indices, to_z, to_codes)
    return Quantized(z_q.view(z.shape).to(z.dtype), indices.view(z.shape[:-1]), loss)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
