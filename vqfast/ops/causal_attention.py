"""Causal self-attention.

out_i = Σ_{j≤i} softmax_j(scale · ⟨q_i, k_j⟩) v_j     lse_i = log Σ_{j≤i} exp(scale · ⟨q_i, k_j⟩)

      key j →       Row i sees keys 0..i. What stands in a slot of the future is never used: it
    1 . . .         may be NaN or infinite, and the result is equal, bit for bit, to the one with
  i 1 1 . .         zeros there.
  ↓ 1 1 1 .
    1 1 1 1

Cost: 2·B·H·T·(T+1)·d flops forward and 2.5 times that backward; reads q, k, v once per block of
rows and holds blocks of T x T only.
Source: arXiv:1706.03762 section 3.2.1; online softmax and backward: arXiv:2205.14135, 2307.08691.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from vqfast._dispatch import Op
from vqfast.ops._attention import outputs, outputs_backward, sample_inputs, validate, wide
from vqfast.ops._attention_choice import takes_torch, torch_attention

_CHUNK = 1 << 22  # scores that the reference holds at a time


def _finite(t: Tensor) -> Tensor:
    """Zeros where t is not finite, so that a weight of zero gives a term of zero."""
    return torch.where(t.isfinite(), t, 0)


def _row_chunks(q: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """(rows, keys that they see, [rows, keys] True in the future of a row)."""
    B, H, T, _ = q.shape
    step = max(1, _CHUNK // max(1, B * H * T))
    for begin in range(0, T, step):
        end = min(T, begin + step)
        at = torch.arange(end, device=q.device)
        yield slice(begin, end), slice(0, end), at > at[begin:, None]


def _attend(q: Tensor, k: Tensor, future: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Weights [B, H, rows, keys], zero in the future, and lse [B, H, rows]."""
    scores = q @ k.transpose(-1, -2) * scale  # [B, H, rows, keys]
    scores = scores.masked_fill(future, -math.inf)
    top = scores.amax(-1, keepdim=True)
    top = torch.where(top == -math.inf, 0, top)  # nothing to attend to: every weight is zero
    weights = (scores - top).exp()
    total = weights.sum(-1, keepdim=True)
    # an empty sum counts as +inf, so that exp(score - lse) is zero
    lse = torch.where(total == 0, math.inf, top + total.log())
    return weights / torch.where(total == 0, 1, total), lse[..., 0]


def _reference(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    out, lse = outputs(q, k, v, scale)
    q, k, v = wide(q, k, v)  # [B, H, T, d]
    sees_bad = (~v.isfinite()).cumsum(2) > 0  # [B, H, T, d]: a row that sees a bad value shows it
    v = _finite(v)
    for rows, keys, future in _row_chunks(q):
        weights, lse[:, :, rows] = _attend(q[:, :, rows], k[:, :, keys], future, scale)
        mean = weights @ v[:, :, keys]  # [B, H, rows, d]
        out[:, :, rows] = mean.masked_fill(sees_bad[:, :, rows], math.nan).to(out.dtype)
    return out, lse


def _reference_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    # out and lse spare a kernel the normalisation; here it is done again, which is more accurate
    grads = outputs_backward(grad, q, k, v, out, lse, scale)
    grad, q, k, v = wide(grad, q, k, v)  # [B, H, T, d]
    q_clean, k_clean = _finite(q), _finite(k)
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for rows, keys, future in _row_chunks(q):
        weights, _ = _attend(q[:, :, rows], k[:, :, keys], future, scale)  # [B, H, rows, keys]
        up = grad[:, :, rows]  # [B, H, rows, d]
        d_weights = (up @ v[:, :, keys].transpose(-1, -2)).masked_fill(future, 0)
        delta = (weights * d_weights).sum(-1, keepdim=True)  # = <grad, out>, [B, H, rows, 1]
        d_scores = weights * (d_weights - delta) * scale
        dv[:, :, keys] += weights.transpose(-1, -2) @ up
        dk[:, :, keys] += d_scores.transpose(-1, -2) @ q_clean[:, :, rows]
        dq[:, :, rows] = d_scores @ k_clean[:, :, keys]
    for into, value in zip(grads, (dq, dk, dv), strict=True):
        into.copy_(value)
    return grads


_OP = Op(
    "causal_attention(Tensor q, Tensor k, Tensor v, float scale) -> (Tensor, Tensor)",
    reference=_reference,
    outputs=outputs,
)
_BACKWARD = Op(
    "causal_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,"
    " float scale) -> (Tensor, Tensor, Tensor)",
    reference=_reference_backward,
    outputs=outputs_backward,
)


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        out, lse = _OP(q, k, v, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.scale = scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        grads = _BACKWARD(grad, q, k, v, out, lse, ctx.scale)
        wanted = ctx.needs_input_grad
        return *(g if w else None for g, w in zip(grads, wanted[:3], strict=True)), None


def causal_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
    """Attention of each position to itself and the ones before it.

    out_i = Σ_{j≤i} softmax_j(scale · ⟨q_i, k_j⟩) v_j

    Args:
        q: [B, H, T, d] float32, float16 or bfloat16 (float64 on the reference). Any strides: views
            of a packed QKV tensor and expanded heads are read in place; a contiguous last dim is
            fastest.
        k: like q.
        v: like q.
        scale: factor of the scores, finite; None means 1/√d.

    Returns:
        [B, H, T, d], contiguous, dtype of q. Differentiable once in q, k and v.

    Raises:
        TypeError: q, k or v is not a floating-point tensor, or their dtypes differ; scale is not a
            number.
        ValueError: q is not 4-D, shapes or devices differ, d = 0, or scale is not finite.

    Numerics: float32 sums for every input dtype; weights are float32, or bfloat16 for bfloat16
        inputs on a CPU that multiplies them. The error against float64 is at most twice
        (gradients: three times) that of torch's scaled_dot_product_attention. Slots of the
        future may hold NaN. Equal results from run to run and for any number of threads. A row
        whose scores are all -inf gives zeros.
        On a GPU torch's scaled_dot_product_attention runs where it was measured to be faster
        (`_attention_choice`), and its rules hold: a value of the future that is not finite may
        show, strides may be those of q, and gradients may differ in their last bits from run to
        run unless torch.use_deterministic_algorithms asks otherwise. A forced backend runs ours.
    Cost: 2·B·H·T·(T+1)·d flops, 2.5 times that backward; extra memory grows with T, never with T².
    Source: arXiv:1706.03762 section 3.2.1.
    """
    factor = validate(q, k, v, scale)
    if takes_torch("causal_attention", q, k, v):
        return torch_attention(q, k, v, factor, True)
    return _CausalAttention.apply(q, k, v, factor)


def sample_backward_inputs(case: Any, dtype: torch.dtype, device: str) -> tuple:
    """Inputs of the raw backward op for the same case."""
    *qkv, scale = sample_inputs(case, dtype, device)
    out, lse = _OP(*qkv, scale)
    g = torch.Generator().manual_seed(1)
    return torch.randn(out.shape, generator=g).to(device, dtype), *qkv, out, lse, scale


def COST(case: Any) -> tuple[int, int]:
    """Bytes (float32, each tensor once) and flops of the forward pass."""
    B, H, T, d = (case.shape[n] for n in "BHTd")
    return 4 * (4 * B * H * T * d + B * H * T), 2 * B * H * T * (T + 1) * d
