"""Replace each vector by its nearest code, with straight-through gradient and the VQ loss.

    idx_n = argmin_k ‖z_n − c_k‖²,   z_q = c[idx],   m = mean((z_q − z)²)
    loss  = (b_z + b_c)·m        b_z = beta, b_c = 1; legacy: b_z = 1, b_c = beta
    ∂z_q/∂z := I,   ∂z_q/∂c := 0
    ∂loss/∂z_n = 2·b_z·(z_n − z_q,n)/(N·D)
    ∂loss/∂c_k = 2·b_c·Σ_{n: idx_n = k} (c_k − z_n)/(N·D)

Forward is one call (`nearest_quantize`). `quantize_backward` takes the rows in the
order of their codes (a counting sort) and gives both gradients in one pass: the sum over a code is
of differences, in one order, without a one-hot matrix or atomic additions. Nothing of size N·D is
kept for it but z itself. For "cosine" both sides are normalised first, outside the autograd
function.

Cost: that of `nearest`; forward 3·N·D values, backward 3·N·D + 2·K·D.
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
from vqfast._dispatch import Op

# functions of these names replace the modules as attributes of vqfast.ops
_nearest = importlib.import_module("vqfast.ops.nearest")
_nearest_quantize = importlib.import_module("vqfast.ops.nearest_quantize")
_straight_through = importlib.import_module("vqfast.ops.straight_through")
_code_order = importlib.import_module("vqfast.ops.code_order")


class Quantized(NamedTuple):
    """What `quantize` returns."""

    z_q: Tensor  # [..., D] like z: the codes, with the gradient of z
    indices: Tensor  # [...] int64
    loss: Tensor  # [] float32 (float64 for float64 z)


def _reference_backward(
    grad_z_q: Tensor | None,
    grad_loss: Tensor,
    z: Tensor,
    codebook: Tensor,
    order: Tensor,
    start: Tensor,
    to_z: float,
    to_codes: float,
) -> tuple[Tensor, Tensor]:
    """grad_z_q, z [N, D], codebook [K, D], order [N], start [K + 1] -> grad_z, grad_codes."""
    wide = _straight_through.wide_type(z, codebook)
    step = grad_loss.to(wide) * (2.0 / max(1, z.numel()))
    owner = _code_order.code_of_place(start, len(order))  # [N]
    indices = torch.empty_like(order).scatter(0, order, owner)
    difference = codebook.index_select(0, indices).to(wide) - z.to(wide)  # [N, D]
    grad_z = difference * (-to_z * step)
    if grad_z_q is not None:
        grad_z = grad_z_q.to(wide) + grad_z
    sums = torch.zeros(codebook.shape, dtype=torch.float64, device=z.device)
    _code_order.add_rows(sums, indices, difference.double())
    return grad_z.to(z.dtype), (sums.to(wide) * (to_codes * step)).to(codebook.dtype)


def _outputs_backward(
    grad_z_q: Tensor | None,
    grad_loss: Tensor,
    z: Tensor,
    codebook: Tensor,
    order: Tensor,
    start: Tensor,
    to_z: float,
    to_codes: float,
) -> tuple[Tensor, Tensor]:
    return z.new_empty(z.shape), codebook.new_empty(codebook.shape)


_BACKWARD = Op(
    "quantize_backward(Tensor? grad_z_q, Tensor grad_loss, Tensor z, Tensor codebook, Tensor order,"
    " Tensor start, float to_z, float to_codes) -> (Tensor, Tensor)",
    reference=_reference_backward,
    outputs=_outputs_backward,
)


class _Quantize(torch.autograd.Function):
    """x [N, D], codes [K, D] -> z_q [N, D], loss [], indices [N], counts [K]; in float32 or wider.

    z [N, D] and codebook [K, D] are what is searched, without gradient; None: x and codes."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, codes: Tensor, z: Tensor | None, codebook: Tensor | None, metric: str,
        to_z: float, to_codes: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        x, codes = x.contiguous(), codes.contiguous()
        z = x if z is None else z.contiguous()
        codebook = codes if codebook is None else codebook.contiguous()
        z_q, loss, indices, counts = _nearest_quantize.nearest_quantize(
            z, codebook, x, codes, metric, to_z + to_codes
        )
        ctx.mark_non_differentiable(indices, counts, *(() if ctx.needs_input_grad[0] else (z_q,)))
        # z_q holds the codes: a codebook without gradient may move (EMA) before backward comes
        ctx.codes_saved = not ctx.needs_input_grad[1] and x.dtype == codes.dtype
        ctx.save_for_backward(*((x, z_q) if ctx.codes_saved else (x, codes, indices)))
        ctx.set_materialize_grads(False)
        ctx.to_z, ctx.to_codes = to_z, to_codes
        return z_q, loss, indices, counts

    @staticmethod
    @once_differentiable  # a second derivative would be wrong in silence
    def backward(
        ctx: Any, grad_z_q: Tensor | None, grad_loss: Tensor | None, *no_grads: None
    ) -> tuple[Tensor | None, ...]:
        rest = (None,) * 5
        if grad_loss is None:  # straight through, and nothing else
            return grad_z_q, None, *rest
        if grad_z_q is not None:
            grad_z_q = grad_z_q.contiguous()
        if ctx.codes_saved:
            x, chosen = ctx.saved_tensors
        else:
            x, codes, indices = ctx.saved_tensors
        if ctx.needs_input_grad[1]:
            order, start = _code_order.code_order(indices, len(codes))
            inputs = (grad_z_q, grad_loss, x, codes, order, start, ctx.to_z, ctx.to_codes)
            return *_BACKWARD(*inputs), *rest
        if not ctx.codes_saved:
            chosen = codes.index_select(0, indices)
        grads = _straight_through.commitment_grad(grad_z_q, grad_loss, x, chosen, ctx.to_z)
        return grads, None, *rest


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
    return counted(z, codebook, beta=beta, legacy=legacy, metric=metric)[0]


def counted(
    z: Tensor, codebook: Tensor, *, beta: float, legacy: bool, metric: str
) -> tuple[Quantized, Tensor]:
    """`quantize`, and how many vectors each code has, [K] int64. Private: the quantizers of
    `vqfast.nn` are its users."""
    _nearest.check(z, codebook, metric)
    beta = _check.number("beta", beta, low=0.0)
    flat = z.reshape(-1, z.shape[-1])
    x, codes = flat, codebook
    searched: tuple[Tensor | None, Tensor | None] = (None, None)
    if metric == "cosine":
        x, codes = (F.normalize(_wide(t), dim=-1) for t in (flat, codebook))
        searched = flat.detach(), codebook.detach()  # by float64 norms of its own
    to_z, to_codes = (1.0, beta) if legacy else (beta, 1.0)
    z_q, loss, indices, counts = _Quantize.apply(x, codes, *searched, metric, to_z, to_codes)
    z_q = z_q.view(z.shape).to(z.dtype)
    return Quantized(z_q, indices.view(z.shape[:-1]), loss), counts


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def sample_backward_inputs(case: Any, dtype: torch.dtype, device: str) -> tuple:
    """Seeded inputs of the raw backward op; `case.shape`: N, K, D; rows lie near their codes."""
    z, codebook, indices, _ = _straight_through.sample_inputs(case, dtype, "cpu")
    order, start = _code_order._OP.reference(indices, len(codebook))
    g = torch.Generator().manual_seed(1)
    grad_z_q = (torch.randn(z.shape, generator=g) / max(1, z.numel())).to(dtype)
    tensors = (grad_z_q, torch.tensor(1.7), z, codebook, order, start)
    return *(t.to(device) for t in tensors), 0.25, 1.0
