"""Attention of one new token per sequence over its key-value cache.

out[b, h] = Σ_t softmax_t(<q[b, h], k[b, h, t]> / sqrt(d)) · v[b, h, t],   t < length

Only the first `length` slots are read: the others may hold anything, NaN too. The order of every
sum depends on `length` and d alone, so a sequence gets the same bits in any batch.

Cost: reads 2·B·H·length·d values; 4·B·H·length·d flops. Bound by memory.
Source: arXiv:1706.03762 eq. 1.
"""

import torch
from torch import Tensor

from vqfast import _check
from vqfast._dispatch import Op


def tree_sum(x: Tensor, dim: int) -> Tensor:
    """Sum over `dim` by repeated halving: one tree of additions, whatever the other dims hold."""
    while (n := x.shape[dim]) > 1:
        half = n // 2
        total = x.narrow(dim, 0, half) + x.narrow(dim, half, half)
        x = torch.cat([total, x.narrow(dim, n - 1, 1)], dim) if n % 2 else total
    return x.squeeze(dim)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One query per head over n slots: q [H, d], k and v [H, n, d] -> [H, d]. n = 0 gives zeros."""
    if k.shape[1] == 0:
        return torch.zeros_like(q)
    scores = tree_sum(q[:, None] * k, 2) / q.shape[1] ** 0.5  # [H, n]
    p = torch.exp(scores - scores.amax(1, keepdim=True))  # [H, n]
    return tree_sum(p[:, :, None] * v, 1) / tree_sum(p, 1)[:, None]


def _reference(q: Tensor, k_cache: Tensor, v_cache: Tensor, length: int) -> Tensor:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = torch.empty_like(q)
    for b in range(q.shape[0]):  # a row at a time: no call sees the batch size
        k, v = k_cache[b, :, :length].to(wide), v_cache[b, :, :length].to(wide)
        out[b] = attend(q[b].to(wide), k, v)
    return out


def _outputs(q: Tensor, k_cache: Tensor, v_cache: Tensor, length: int) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


_OP = Op(
    "decode_attention(Tensor q, Tensor k_cache, Tensor v_cache, int length) -> Tensor",
    reference=_reference,
    outputs=_outputs,
)


def decode_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, length: int) -> Tensor:
    """Attend with one query per sequence to the first `length` slots of a cache.

    Args:
        q: [B, H, d] float32, float16 or bfloat16.
        k_cache, v_cache: [B, H, S, d] of one floating dtype, which may differ from q's.
        length: 0..S, how many slots are written; 0 gives zeros.

    Returns:
        [B, H, d] like q. Not differentiable.

    Raises:
        TypeError: not floating point, or the caches differ in dtype. ValueError: shapes disagree,
            devices differ, or length is outside 0..S.

    Numerics: products and sums in float32 (float64 for float64 q); the same bits for a row in any
        batch and on any number of threads.
    """
    _check.floating("q", q)
    _check.floating("k_cache", k_cache)
    _check.is_tensor("v_cache", v_cache)
    _check.same_dtype("v_cache", v_cache, "k_cache", k_cache)
    _check.ndim("q", q, 3)
    _check.ndim("k_cache", k_cache, 4)
    B, H, d = q.shape
    S = k_cache.shape[2]
    _check.shape("k_cache", k_cache, (B, H, S, d), "to match q")
    _check.shape("v_cache", v_cache, k_cache.shape, "to match k_cache")
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        _check.same_device(name, cache, "q", q)
    length = _check.integer("length", length, low=0, high=S)
    with torch.no_grad():
        return _OP(q.contiguous(), k_cache.contiguous(), v_cache.contiguous(), length)


def sample_inputs(case, dtype: torch.dtype, device: torch.device | str) -> tuple:
    """Inputs of the op for one case; slots from n on hold NaN."""
    B, H, S, d, length = (case[letter] for letter in "BHSdn")
    g = torch.Generator().manual_seed(B * 1009 + S * 31 + d)
    q = torch.randn(B, H, d, generator=g)
    k, v = torch.randn(2, B, H, S, d, generator=g)
    k[:, :, length:] = v[:, :, length:] = float("nan")
    return tuple(t.to(device, dtype) for t in (q, k, v)) + (length,)


def COST(case) -> tuple[int, int]:
    """Bytes (float32 cache) and flops."""
    values = case["B"] * case["H"] * case["n"] * case["d"]
    return 8 * values, 4 * values
